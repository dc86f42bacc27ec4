"""Tests of transit.py on captures with known times: python scripts/test_transit.py"""

import random
import tempfile
import unittest
from pathlib import Path

import transit

CLIENT, LISTENER, EDGE, HOP, ORIGIN, SERVER, LIVEKIT = (f"127.0.0.1:{port}" for port in range(1001, 1008))
ORIGIN_PORT, LIVEKIT_PORT = 1005, 1007
TALKER, FORWARDED, OTHER = 11, 22, 33
SHIFT = 123_456
"""What LiveKit adds to timestamps in these captures."""


class Capture:
    """Lines as rtp.py writes them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, ms: float, source: str, destination: str, ssrc: int, sequence: int, timestamp: int) -> None:
        self.lines.append(f"{round(ms * 1e6)} {source} {destination} {ssrc} {sequence % 65536} {timestamp % 2**32} 111 90")

    def report(self, hop: bool) -> dict:
        random.Random(1).shuffle(self.lines)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "packets.txt"
            path.write_text("\n".join(self.lines) + "\n")
            return transit.report(path, {CLIENT, LISTENER}, [LIVEKIT_PORT], [ORIGIN_PORT] if hop else None)


def call(hop: bool, packets: int = 200) -> Capture:
    """A packet each 20 ms: 3 ms up and 2 ms down; over a hop in pairs, 4 ms to code, 5 ms to restore. Numbers and timestamps wrap."""
    capture = Capture()
    for n in range(packets):
        sent, sequence, timestamp = 20.0 * n, 65_500 + n, 2**32 - 48_000 + 960 * n
        arrived = sent + 3
        capture.add(sent, CLIENT, EDGE, TALKER, sequence, timestamp)
        if hop:
            carried = 20.0 * (n | 1) + 4
            if n % 2 == 1:
                capture.add(carried, HOP, ORIGIN, TALKER, 7 + n // 2, timestamp - 960)
            arrived = carried + 5
        capture.add(arrived, SERVER, LIVEKIT, TALKER, sequence, timestamp)
        capture.add(arrived + 0.5, LIVEKIT, SERVER, FORWARDED, sequence + 9, timestamp + SHIFT)
        if hop and n % 2 == 0:
            capture.add(arrived + 1, ORIGIN, HOP, FORWARDED, 9 + n // 2, timestamp + SHIFT)
        capture.add(arrived + 2.5, EDGE, LISTENER, FORWARDED, sequence + 9, timestamp + SHIFT)
        # Another stream towards the listener, whose talker is not to be seen here.
        capture.add(sent + 9, LIVEKIT, SERVER, OTHER, n, 960 * n)
        capture.add(sent + 9 + 2, EDGE, LISTENER, OTHER, n, 960 * n)
    return capture


class TransitTest(unittest.TestCase):
    def test_one_sidecar(self) -> None:
        found = call(hop=False).report(hop=False)
        self.assertEqual(found["up"], {"p50": 3, "p99": 3, "packets": 200})
        self.assertEqual(found["down"], {"p50": 2, "p99": 2, "packets": 400})
        # LiveKit's half a millisecond is not AuraLink's.
        self.assertEqual(found["both"], {"p50": 5, "p99": 5, "packets": 200})
        self.assertEqual(found["lost"], 0)

    def test_hop(self) -> None:
        found = call(hop=True).report(hop=True)
        self.assertEqual(found["up"]["p99"], 29)
        # The other stream did not cross the hop.
        self.assertEqual(found["down"], {"p50": 2, "p99": 2, "packets": 200})
        self.assertEqual(found["both"]["p99"], 31)
        shares = found["shares"]
        self.assertEqual(shares["waiting_first"], {"p50": 20, "p99": 20, "packets": 100})
        self.assertEqual((shares["encoding"]["p50"], shares["decoding"]["p50"]), (4, 5))
        self.assertEqual(shares["encoding"]["packets"], 200)

    def test_lost(self) -> None:
        capture = call(hop=False)
        gone = [line for line in capture.lines if f"{SERVER} {LIVEKIT} {TALKER}" in line][10:13]
        capture.lines = [line for line in capture.lines if line not in gone]
        found = capture.report(hop=False)
        self.assertEqual(found["lost"], 3)
        self.assertEqual(found["up"]["packets"], 197)

    def test_nothing_seen(self) -> None:
        with self.assertRaises(ValueError):
            Capture().report(hop=False)


if __name__ == "__main__":
    unittest.main()
