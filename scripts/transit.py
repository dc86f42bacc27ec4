"""What AuraLink adds to the way of a packet, from the times that tests/clients/python/rtp.py wrote down.

A **crossing** is the way through the sidecars in one direction: up, from the client's sending to the last sidecar's sending to LiveKit, or
down, from LiveKit's sending to the sending to the client. SSRC, sequence number and timestamp of a packet are the same before and behind it,
restored ones included. LiveKit renumbers a stream for each listener by a constant, so the two crossings of one packet are found by timestamp.
All times are the kernel's, in milliseconds; the network between the processes is loopback.
"""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

AT_ENDS = 0.5
"""Seconds at the end of a capture in which a packet may still be on its way."""
FORWARDED_WITHIN = 0.005
"""Seconds that LiveKit takes at most to forward a packet, in looking for the constant."""
OPUS_CLOCK = 48_000
GROUP = OPUS_CLOCK * 60 // 1000
"""Clock ticks that a packet of the hop covers at most: packets after its first one."""


@dataclass(frozen=True, slots=True)
class Packet:
    """An RTP packet as it left a process; `time` in seconds."""

    time: float
    source: str
    destination: str
    ssrc: int
    sequence: int
    timestamp: int

    def to(self, ports: list[int]) -> bool:
        return int(self.destination.rsplit(":", 1)[1]) in ports

    def of(self, ports: list[int]) -> bool:
        return int(self.source.rsplit(":", 1)[1]) in ports


def read(path: Path) -> list[Packet]:
    """The packets of a file of rtp.py's, in order of time."""
    found = []
    for line in path.read_text().splitlines():
        time, source, destination, ssrc, sequence, timestamp, _, _ = line.split()
        found.append(Packet(int(time) / 1e9, source, destination, int(ssrc), int(sequence), int(timestamp)))
    return sorted(found, key=lambda p: p.time)


@dataclass
class Passed:
    """A packet that crossed; times in ms."""

    before: Packet
    behind: Packet

    @property
    def took(self) -> float:
        return (self.behind.time - self.before.time) * 1000


@dataclass
class Crossing:
    """The packets that crossed in one direction, and how many never came out."""

    passed: list[Passed]
    lost: int


def crossing(before: list[Packet], behind: list[Packet]) -> Crossing:
    """Pairs what went in with what came out, by SSRC and sequence number; of repeated ones the first."""
    out: dict[tuple[int, int], Packet] = {}
    for p in behind:
        out.setdefault((p.ssrc, p.sequence), p)
    forwarded = {p.ssrc for p in behind}
    into: dict[tuple[int, int], Packet] = {}
    for p in before:
        if p.ssrc in forwarded:
            into.setdefault((p.ssrc, p.sequence), p)
    last = max((p.time for p in behind), default=0) - AT_ENDS
    passed = [Passed(p, out[key]) for key, p in into.items() if key in out and p.timestamp == out[key].timestamp]
    return Crossing(passed, sum(1 for key, p in into.items() if key not in out and p.time < last))


def only(across: Crossing, streams: set[int]) -> Crossing:
    """What crossed of these streams."""
    return Crossing([p for p in across.passed if p.before.ssrc in streams], across.lost)


def both_ways(up: Crossing, down: Crossing) -> list[float]:
    """What the two crossings took together, for each packet of each talker and listener."""
    talkers: dict[int, list[Passed]] = defaultdict(list)
    for p in up.passed:
        talkers[p.before.ssrc].append(p)
    listeners: dict[int, list[Passed]] = defaultdict(list)
    for p in down.passed:
        listeners[p.before.ssrc].append(p)
    total = []
    for said in talkers.values():
        said.sort(key=lambda p: p.behind.time)
        times = [p.behind.time for p in said]
        by_timestamp = {p.behind.timestamp: p for p in said}
        for heard in listeners.values():
            shifts: Counter[int] = Counter()
            for p in heard:
                i = bisect_right(times, p.before.time) - 1
                # A pair of restored packets leaves at once: either may be the one.
                for candidate in said[max(0, i - 1) : i + 1]:
                    if p.before.time - candidate.behind.time < FORWARDED_WITHIN:
                        shifts[(p.before.timestamp - candidate.behind.timestamp) % 2**32] += 1
            if not shifts:
                continue
            shift, votes = shifts.most_common(1)[0]
            # Another talker's stream: what coincides does so by chance.
            if votes < 0.5 * len(heard):
                continue
            for p in heard:
                origin = by_timestamp.get((p.before.timestamp - shift) % 2**32)
                if origin:
                    total.append(origin.took + p.took)
    return total


@dataclass
class Share:
    """Where the time of a packet went that crossed a hop in one with others; ms. They add up to what it took."""

    waiting: float
    encoding: float
    decoding: float


def shares(across: Crossing, hop: list[Packet]) -> list[Share]:
    """The shares of packets that share a packet of the hop, which has the timestamp of its first original."""
    sent: dict[int, list[Packet]] = defaultdict(list)
    for p in hop:
        sent[p.ssrc].append(p)
    groups: dict[tuple[int, int], list[Passed]] = defaultdict(list)
    carriers: dict[tuple[int, int], Packet] = {}
    for ssrc, packets in sent.items():
        for p in packets:
            carriers.setdefault((ssrc, p.timestamp), p)
    for p in across.passed:
        ssrc, timestamp = p.before.ssrc, p.before.timestamp
        for back in range(0, GROUP, OPUS_CLOCK // 100):
            key = (ssrc, (timestamp - back) % 2**32)
            if key in carriers:
                groups[key].append(p)
                break
    out = []
    for key, group in groups.items():
        carrier, complete = carriers[key], max(p.before.time for p in group)
        if len(group) < 2 or carrier.time < complete:
            continue
        out += [
            Share((complete - p.before.time) * 1000, (carrier.time - complete) * 1000, (p.behind.time - carrier.time) * 1000)
            for p in group
        ]
    return out


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the number of values."""
    if len(values) < 2:
        raise ValueError("no packet was seen on both sides")
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {"p50": round(cuts[49], 2), "p99": round(cuts[98], 2), "packets": len(values)}


def report(path: Path, clients: set[str], livekit_ports: list[int], hop_ports: list[int] | None = None) -> dict:
    """What a call's packets took: `up`, `down` and `both`, each p50 and p99 in ms, packets lost within, and the shares on a hop.

    `clients` are their addresses. `hop_ports` are the origin's, where there is an edge: `up` and `down` are then of the streams that crossed
    the hop alone.
    """
    packets = read(path)
    up = crossing([p for p in packets if p.source in clients], [p for p in packets if p.to(livekit_ports)])
    down = crossing([p for p in packets if p.of(livekit_ports)], [p for p in packets if p.destination in clients])
    out: dict = {"both": quantiles(both_ways(up, down)), "lost": up.lost + down.lost}
    to_hop = [p for p in packets if hop_ports and p.to(hop_ports) and p.source not in clients]
    from_hop = [p for p in packets if hop_ports and p.of(hop_ports) and p.destination not in clients]
    if hop_ports:
        up = only(up, {p.ssrc for p in to_hop})
        down = only(down, {p.ssrc for p in from_hop})
    out |= {"up": quantiles([p.took for p in up.passed]), "down": quantiles([p.took for p in down.passed])}
    if hop_ports:
        parts = shares(up, to_hop)
        out["shares"] = {
            "waiting": quantiles([s.waiting for s in parts]),
            # The one that is waited for comes last and waits for none.
            "waiting_first": quantiles([s.waiting for s in parts if s.waiting > 0]),
            "encoding": quantiles([s.encoding for s in parts]),
            "decoding": quantiles([s.decoding for s in parts]),
        }
    return out
