"""Writes down which RTP packets cross loopback, and when: rtp.py --seconds N --port P ... [--sample N] FILE

Listens with an AF_PACKET socket (root or CAP_NET_RAW). A line of FILE is a packet from or to one of the ports:
  time  source  destination  SSRC  sequence number  timestamp  payload type  bytes
with the kernel's time of sending in nanoseconds, addresses as address:port, and bytes with the IP and UDP headers. SRTP leaves the
header in clear, so the same packet is found again behind a relay. What is no RTP (RTCP, STUN, DTLS) is left out. Datagrams that
the kernel carries as one (UDP segmentation offload) are written down one by one.

On standard error it says "ready" once it listens; on standard output, when the time is over or on SIGINT or SIGTERM, one JSON
object: seconds, packets, dropped (packets which the kernel could not hand over in time).
"""

from __future__ import annotations

import argparse
import json
import signal
import socket
import struct
import sys
import time
from typing import Iterator, TextIO

from wire import ETH_P_ALL, PACKET_OUTGOING, PACKET_STATISTICS, PACKET_VNET_HDR, SOL_PACKET, VNET_HDR, only_ports

SO_TIMESTAMPNS = 35
UDP = 17
RTP = struct.Struct("!BBHII")
TIMESPEC = struct.Struct("=qq")


def datagrams(frame: memoryview, gso_size: int) -> Iterator[tuple[str, str, int, memoryview]]:
    """Source, destination, bytes of IP and UDP headers, and payload of each UDP datagram of an Ethernet frame."""
    kind = frame[12] << 8 | frame[13]
    ip = frame[14:]
    if kind == 0x0800 and len(ip) >= 20:
        header, protocol = (ip[0] & 15) * 4, ip[9]
        source, destination = socket.inet_ntoa(ip[12:16]), socket.inet_ntoa(ip[16:20])
    elif kind == 0x86DD and len(ip) >= 40:
        header, protocol = 40, ip[6]
        source, destination = socket.inet_ntop(socket.AF_INET6, ip[8:24]), socket.inet_ntop(socket.AF_INET6, ip[24:40])
    else:
        return
    udp = ip[header:]
    if protocol != UDP or len(udp) <= 8:
        return
    sport, dport = udp[0] << 8 | udp[1], udp[2] << 8 | udp[3]
    payload = udp[8:]
    step = gso_size or len(payload)
    for start in range(0, len(payload), step):
        yield f"{source}:{sport}", f"{destination}:{dport}", header + 8, payload[start : start + step]


def write(out: TextIO, nanoseconds: int, frame: memoryview, gso_size: int) -> int:
    """Writes the RTP packets of a frame down; returns how many there were."""
    count = 0
    for source, destination, headers, payload in datagrams(frame, gso_size):
        if len(payload) < RTP.size:
            continue
        first, second, sequence, timestamp, ssrc = RTP.unpack_from(payload)
        # RFC 7983: 128 to 191 is RTP and RTCP; RFC 5761: RTCP's types are 192 to 223.
        if not 128 <= first <= 191 or 192 <= second <= 223:
            continue
        out.write(f"{nanoseconds} {source} {destination} {ssrc} {sequence} {timestamp} {second & 127} {headers + len(payload)}\n")
        count += 1
    return count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--interface", default="lo")
    p.add_argument("--seconds", type=float, default=10)
    p.add_argument("--port", type=int, action="append", required=True, help="packets from or to it; may be repeated")
    p.add_argument("--sample", type=int, default=1, help="of what comes from these ports only streams whose SSRC is divisible by this power of two")
    p.add_argument("file")
    a = p.parse_args()
    try:
        # Without a protocol it gets nothing before it is bound.
        s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        s.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
        s.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        only_ports(s, a.port, a.sample)
        s.bind((a.interface, ETH_P_ALL))
    except PermissionError:
        sys.exit("rtp.py needs root or CAP_NET_RAW: packets are seen with an AF_PACKET socket")
    except OSError as e:
        sys.exit(f"rtp.py: interface {a.interface}: {e}")
    stopped = False

    def stop(*_) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    buffer = bytearray(VNET_HDR.size + 14 + 65_536)
    view = memoryview(buffer)
    packets = 0
    s.settimeout(0.1)
    start = time.monotonic()
    with open(a.file, "w") as out:
        print("ready", file=sys.stderr, flush=True)
        while not stopped and time.monotonic() - start < a.seconds:
            try:
                length, ancillary, _, address = s.recvmsg_into([buffer], socket.CMSG_SPACE(TIMESPEC.size))
            except TimeoutError:
                continue
            # Loopback shows each packet twice: as it leaves and as it arrives.
            if a.interface == "lo" and address[2] != PACKET_OUTGOING:
                continue
            whole, nanoseconds = TIMESPEC.unpack(ancillary[0][2])
            _, gso_type, _, gso_size, _, _ = VNET_HDR.unpack_from(buffer)
            if length > VNET_HDR.size + 34:
                packets += write(out, whole * 10**9 + nanoseconds, view[VNET_HDR.size : length], gso_size if gso_type else 0)
    _, dropped = struct.unpack("=II", s.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
    print(json.dumps({"seconds": round(time.monotonic() - start, 3), "packets": packets, "dropped": dropped}))


if __name__ == "__main__":
    main()
