#!/usr/bin/env python3
"""Takes the media from the processes of a cgroup, silently and for good: no_media.py CGROUP [--tcp PORT ...]   as root

From the moment that it ends with 0, no datagram leaves or reaches a socket that was made in CGROUP (a folder of cgroup v2), and
nothing of TCP connections from or to the named ports: that is where ICE-TCP is, so that no path is left. The processes are told of
nothing: what they send is taken from them as if it had gone out. All else, signalling for one, goes on.

Two BPF programs are attached to the cgroup (BPF_PROG_TYPE_CGROUP_SKB). They stay until the folder is removed.
"""
import argparse, ctypes, os, platform, socket, struct, sys

SYS_BPF = {"x86_64": 321, "aarch64": 280}
PROG_LOAD, PROG_ATTACH = 5, 8
CGROUP_SKB, INGRESS, EGRESS = 8, 0, 1
LOAD_BYTES = 26
# What the programs return: of an egress program 2 drops without a word to the sender, which 0 would tell of as EPERM.
PASS, DROP = 1, {INGRESS: 0, EGRESS: 2}
libc = ctypes.CDLL(None, use_errno=True)


def bpf(command: int, attributes: bytes) -> int:
    call = SYS_BPF.get(platform.machine())
    if call is None:
        sys.exit(f"no_media.py knows no number of bpf(2) on {platform.machine()}")
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(call, command, buffer, len(attributes))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


class Program:
    """BPF instructions with jumps to labels."""

    def __init__(self) -> None:
        self.code: list[list] = []
        self.labels: dict[str, int] = {}

    def op(self, code: int, dst: int = 0, src: int = 0, offset: "int | str" = 0, value: int = 0) -> None:
        self.code.append([code, dst, src, offset, value])

    def label(self, name: str) -> None:
        self.labels[name] = len(self.code)

    def load(self, offset_register: int, length: int) -> None:
        """`length` bytes of the packet to the stack at r10 - 8, or on to the end."""
        self.op(0xBF, 1, 6)  # r1 = the packet
        self.op(0xBF, 2, offset_register)
        self.op(0xBF, 3, 10)
        self.op(0x07, 3, value=-8)  # r3 = the stack
        self.op(0xB7, 4, value=length)
        self.op(0x85, value=LOAD_BYTES)
        self.op(0x55, 0, offset="pass")  # if r0 != 0

    def bytes(self) -> bytes:
        out = b""
        for at, (code, dst, src, offset, value) in enumerate(self.code):
            if isinstance(offset, str):
                offset = self.labels[offset] - at - 1
            out += struct.pack("<BBhi", code, dst | src << 4, offset, value)
        return out


def program(drop: int, ports: list[int]) -> bytes:
    p = Program()
    p.op(0xBF, 6, 1)  # r6 = the packet, which begins with its IP header
    p.op(0xB7, 7, value=0)
    p.load(7, 1)
    p.op(0x71, 8, 10, -8)  # r8 = version and header length
    p.op(0xBF, 7, 8)
    p.op(0x77, 7, value=4)
    p.op(0x15, 7, offset="v4", value=4)
    p.op(0x55, 7, offset="pass", value=6)
    p.op(0xB7, 8, value=40)  # r8 = length of the header
    p.op(0xB7, 7, value=6)  # r7 = where the protocol is
    p.op(0x05, offset="protocol")
    p.label("v4")
    p.op(0x57, 8, value=15)
    p.op(0x67, 8, value=2)
    p.op(0xB7, 7, value=9)
    p.label("protocol")
    p.load(7, 1)
    p.op(0x71, 9, 10, -8)
    p.op(0x15, 9, offset="drop", value=socket.IPPROTO_UDP)
    p.op(0x55, 9, offset="pass", value=socket.IPPROTO_TCP)
    p.load(8, 4)
    for end in (-8, -6):
        p.op(0x69, 9, 10, end)
        for port in ports:
            p.op(0x15, 9, offset="drop", value=struct.unpack("=H", struct.pack("!H", port))[0])
    p.label("pass")
    p.op(0xB7, 0, value=PASS)
    p.op(0x95)
    p.label("drop")
    p.op(0xB7, 0, value=drop)
    p.op(0x95)
    return p.bytes()


def load(way: int, ports: list[int]) -> int:
    code = program(DROP[way], ports)
    instructions = ctypes.create_string_buffer(code, len(code))
    licence, log = ctypes.create_string_buffer(b"GPL"), ctypes.create_string_buffer(1 << 16)
    attributes = struct.pack("=IIQQIIQII", CGROUP_SKB, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(licence),
                             1, len(log), ctypes.addressof(log), 0, 0)
    # Name, interface and the way, which the kernel wants to know beforehand.
    attributes += struct.pack("=16sII", b"no_media", 0, way)
    try:
        return bpf(PROG_LOAD, attributes)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} {log.value.decode()}") from None


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("cgroup")
    p.add_argument("--tcp", type=int, nargs="*", default=[], metavar="PORT")
    a = p.parse_args()
    try:
        folder = os.open(a.cgroup, os.O_RDONLY | os.O_DIRECTORY)
        for way in (INGRESS, EGRESS):
            bpf(PROG_ATTACH, struct.pack("=IIII", folder, load(way, a.tcp), way, 0))
    except OSError as error:
        sys.exit(f"no_media.py: {error} (it needs root, cgroup v2, and a kernel with CONFIG_CGROUP_BPF)")


if __name__ == "__main__":
    main()
