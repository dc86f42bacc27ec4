"""Counts what really crosses an interface: wire.py [--interface lo] [--seconds N] [--port P ...]

Listens with an AF_PACKET socket (root or CAP_NET_RAW) and prints one JSON object when the time is over, or on SIGINT or SIGTERM:
  seconds, dropped      length of the count; packets which the kernel could not hand over in time (has to be 0)
  flows                 protocol, src and dst (address:port), packets, bytes, kbps; one entry a direction
  ports                 for each --port: packets, bytes and kbps of UDP and TCP "to" it and "from" it

Bytes are those of IP packets, headers of IP and UDP or TCP included and the link's left out. Packets that the kernel carries
over loopback as one (UDP and TCP segmentation offload) count as the segments which a real link would carry, each with its own
headers. On standard error it says "ready" once it counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import socket
import struct
import sys
import time

ETH_P_ALL = 3
SO_ATTACH_FILTER = 26
SOL_PACKET = 263
PACKET_STATISTICS = 6
PACKET_VNET_HDR = 15
PACKET_OUTGOING = 4
VNET_HDR = struct.Struct("=BBHHHH")
"""virtio_net_hdr: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset."""


class Counter:
    """Packets and bytes by (protocol, source, destination)."""

    def __init__(self) -> None:
        self.flows: dict[tuple, list[int]] = {}

    def add(self, frame: memoryview, length: int, gso_size: int) -> None:
        """One Ethernet frame: its first bytes, its whole length, and the size of its segments' payload (0: one segment)."""
        kind = frame[12] << 8 | frame[13]
        ip = frame[14:]
        if kind == 0x0800 and len(ip) >= 20:
            header, protocol = (ip[0] & 15) * 4, ip[9]
            family, source, destination = socket.AF_INET, ip[12:16], ip[16:20]
        elif kind == 0x86DD and len(ip) >= 40:
            header, protocol = 40, ip[6]
            family, source, destination = socket.AF_INET6, ip[8:24], ip[24:40]
        else:
            return
        if protocol not in (6, 17) or len(ip) < header + 14:
            return
        transport = ip[header:]
        headers = header + (8 if protocol == 17 else (transport[12] >> 4) * 4)
        total = length - 14
        segments = 1
        if gso_size and total > headers:
            segments = -(-(total - headers) // gso_size)
        key = (
            protocol,
            family,
            bytes(source),
            transport[0] << 8 | transport[1],
            bytes(destination),
            transport[2] << 8 | transport[3],
        )
        count = self.flows.setdefault(key, [0, 0])
        count[0] += segments
        count[1] += total + (segments - 1) * headers

    def report(self, seconds: float, ports: list[int]) -> dict:
        """`flows` and `ports` of the module's documentation."""

        def entry(packets: int, size: int) -> dict:
            return {"packets": packets, "bytes": size, "kbps": round(size * 8 / 1000 / seconds, 2)}

        flows = []
        totals = {port: {"to": [0, 0], "from": [0, 0]} for port in ports}
        for (protocol, family, source, sport, destination, dport), (packets, size) in sorted(self.flows.items()):
            if ports and sport not in totals and dport not in totals:
                continue
            flows.append(
                {
                    "protocol": "udp" if protocol == 17 else "tcp",
                    "src": f"{socket.inet_ntop(family, source)}:{sport}",
                    "dst": f"{socket.inet_ntop(family, destination)}:{dport}",
                    **entry(packets, size),
                }
            )
            for port, direction in ((dport, "to"), (sport, "from")):
                if port in totals:
                    totals[port][direction][0] += packets
                    totals[port][direction][1] += size
        return {
            "flows": flows,
            "ports": {str(port): {way: entry(*count) for way, count in both.items()} for port, both in totals.items()},
        }


def only_ports(s: socket.socket, ports: list[int], sample: int = 1) -> None:
    """Lets the kernel hand over nothing but packets from or to these ports, so that other traffic cannot crowd them out. Of what comes
    from one of them and goes elsewhere, only RTP streams whose SSRC is divisible by `sample`, a power of two up to 65,536, and frames
    of over 240 bytes, which may be datagrams of several streams in one (UDP segmentation offload)."""
    load_half, load_half_indexed, load_header_length, load_length = 0x28, 0x48, 0xB1, 0x80
    mask, equal, greater, ret = 0x54, 0x15, 0x25, 0x06
    accept, drop = (ret, 0, 0, 0xFFFF), (ret, 0, 0, 0)

    def test(load: int, offset: int) -> list[tuple]:
        # The destination, the source and, behind the 8 bytes of UDP's header, the lower half of the SSRC.
        out: list[tuple] = [(load, 0, 0, offset + 2)]
        for port in ports:
            out += [(equal, 0, 1, port), accept]
        long = [(load_length, 0, 0, 0), (greater, 0, 1, 240), accept]
        sampled = [*long, (load, 0, 0, offset + 8 + 10), (mask, 0, 0, sample - 1), (equal, 0, 1, 0), accept, drop] if sample > 1 else [accept]
        out.append((load, 0, 0, offset))
        for port in ports:
            out += [(equal, 0, len(sampled), port), *sampled]
        return [*out, drop]

    v4 = [(load_header_length, 0, 0, 14), *test(load_half_indexed, 14)]
    v6 = [(load_half, 0, 0, 12), (equal, 1, 0, 0x86DD), drop, *test(load_half, 14 + 40)]
    code = [(load_half, 0, 0, 12), (equal, 0, len(v4), 0x0800), *v4, *v6]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
    s.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HL", len(code), ctypes.addressof(buffer)))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--interface", default="lo")
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--port", type=int, action="append", default=[], help="count only packets from or to it; may be repeated")
    a = p.parse_args()
    try:
        # Without a protocol it gets nothing before it is bound.
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        s.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        if a.port:
            only_ports(s, a.port)
        s.bind((a.interface, ETH_P_ALL))
    except PermissionError:
        sys.exit("wire.py needs root or CAP_NET_RAW: packets are counted with an AF_PACKET socket")
    except OSError as e:
        sys.exit(f"wire.py: interface {a.interface}: {e}")
    stopped = False

    def stop(*_) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    counter = Counter()
    buffer = bytearray(256)
    view = memoryview(buffer)
    s.settimeout(0.1)
    start = time.monotonic()
    print("ready", file=sys.stderr, flush=True)
    while not stopped and time.monotonic() - start < a.seconds:
        try:
            # MSG_TRUNC: the whole length, though only the headers are copied.
            length, address = s.recvfrom_into(buffer, 0, socket.MSG_TRUNC)
        except TimeoutError:
            continue
        # Loopback shows each packet twice: as it leaves and as it arrives.
        if a.interface == "lo" and address[2] != PACKET_OUTGOING:
            continue
        _, gso_type, _, gso_size, _, _ = VNET_HDR.unpack_from(buffer)
        have = min(length, len(buffer))
        if have > VNET_HDR.size + 34:
            counter.add(view[VNET_HDR.size : have], length - VNET_HDR.size, gso_size if gso_type else 0)
    seconds = time.monotonic() - start
    _, dropped = struct.unpack("=II", s.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({"seconds": round(seconds, 3), "interface": a.interface, "dropped": dropped, **counter.report(seconds, a.port)}))


if __name__ == "__main__":
    main()
