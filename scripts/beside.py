"""Native media relayed by a sidecar whose codec threads work beside it: part `beside` of measure.py.

Go clients hold ordinary calls in a room that is off, through the origin; meanwhile none, or some pairs of talkers behind an edge, speak on
the neural rungs of the hop, which the same origin codes and restores. Each packet of the ordinary calls is followed through the origin.
"""

from __future__ import annotations

import time
from pathlib import Path

import lab
import transit
from lab import Failed

ORDINARY = ["--load", "6", "--speakers", "3", "--packet-bytes", "80"]
"""The calls that are followed: 150 packets a second up, 750 down."""
SPEAK = 250
"""Packets that each talker has spoken in before anything is followed: everybody has met, and models are warm."""


def talkers(running: lab.Lab, pairs: int, seconds: float) -> list[lab.Process]:
    """Starts pairs of Go clients behind the edge, each in a room of its own, who speak without a pause."""
    speech = Path(running.tool("AURALINK_SPEECH"))
    said = {"anna": speech / "talker-a.wav", "ben": speech / "talker-b.wav"}
    return [
        running.go_client(
            f"talker-{pair}-{who}",
            *("--url", running.edge_url, "--room", f"neural-{pair}", "--identity", who),
            *("--audio", f"wav:{wav}", "--no-dtx", "--seconds", str(seconds)),
        )
        for pair in range(pairs)
        for who, wav in said.items()
    ]


def coded(status: dict) -> int:
    """Originals that a sidecar has coded and restored."""
    originals = status["totals"]["hop"]["originals"]
    return originals["coded"] + originals["restored"]


def run(folder: Path, auralink: Path, pairs: int, seconds: float, scheduling: str) -> dict:
    """One call of `seconds` beside so many pairs: transit.py's report on the ordinary packets, and what the origin's engine did."""
    with lab.Lab(folder, auralink, {"off": "mode: off", "neural": "mode: neural"}, hop=True, scheduling=scheduling) as running:
        speaking = talkers(running, pairs, seconds + 60)
        deadline = time.monotonic() + 60
        while coded(lab.Lab.status(running.admin)) < SPEAK * pairs * 2:
            if time.monotonic() > deadline:
                raise Failed(f"the talkers do not speak over the hop; see {folder}")
            time.sleep(0.5)
        capture, packets = running.rtp("packets", seconds + 30, [*running.media_ports, running.livekit_udp])
        # Whoever is seen now belongs to the talkers.
        time.sleep(2)
        started = time.time()
        load = running.go_client("load", "--url", running.sidecar, "--room", "off-beside", "--seconds", str(seconds), *ORDINARY)
        before, at = running.side.cpu_seconds(), time.monotonic()
        ordinary = load.report(seconds + 60)
        cores = (running.side.cpu_seconds() - before) / (time.monotonic() - at)
        status = lab.Lab.status(running.admin)
        capture.stop()
        capture.report(1)
        for talker in speaking:
            talker.stop()
        running.check()
    seen = transit.read(packets)
    ports = running.media_ports
    ends = [(p.time, p.source) for p in seen if p.to(ports)] + [(p.time, p.destination) for p in seen if p.of(ports)]
    edge = {address for at, address in ends if at < started}
    report = transit.report(packets, {address for _, address in ends} - edge, [running.livekit_udp])
    native = status["totals"]["hop"]["native"]
    engine = {"pairs": pairs, "coded": coded(status), "late": native["missed"], "resting": native["resting"], "cores": cores}
    return report | engine | {"packets_lost": ordinary["packets_lost"]}


def beside(folder: Path, auralink: Path, pairs: list[int], seconds: float, rounds: int, scheduling: str) -> tuple[list[str], list[list[str]], list[dict]]:
    """Head, rows and everything of the table: each number of pairs, in turn, `rounds` times."""
    results = [run(folder / f"beside-{n}-{turn}", auralink, n, seconds, scheduling) for turn in range(rounds) for n in pairs]
    rows = []
    for r in sorted(results, key=lambda r: r["pairs"]):
        took = [f"{r[way][q]:.2f}" for way in ("up", "down", "both") for q in ("p50", "p99")]
        rows.append([f"{2 * r['pairs']} talkers", *took, str(r["packets_lost"]), str(r["coded"]), str(r["late"] + r["resting"]), f"{r['cores']:.2f}"])
    head = ["beside", "up p50 ms", "p99", "down p50", "p99", "both p50", "p99", "lost", "coded", "late or resting", "cores"]
    return head, rows, results
