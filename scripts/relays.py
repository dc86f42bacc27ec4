"""AuraLink beside other relays, for measure.py: LiveKit itself, and rtpengine in userspace with DTLS-SRTP towards both ends.

All relay the same number of packets a second for the same number of participants, on one media thread each. LiveKit and AuraLink carry a
room; rtpengine knows no rooms and carries calls of two, in which both send more. Clients are Pion in one process, and latency is from Go to Go:
the row without anything between them says what is their own.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import lab
from lab import Failed

HOW = "rtpengine is missing: apt-get install --no-install-recommends rtpengine-daemon (and stop the service that it starts)"
PORTS = 400
"""UDP ports for rtpengine's calls; each takes two, or four before RTCP is multiplexed."""


class Rtpengine(lab.Lab):
    """rtpengine alone, on loopback; `control` is the address of its ng port."""

    def _start(self) -> None:
        program = shutil.which("rtpengine")
        if not program:
            raise Failed(HOW)
        first = lab.free_ports(PORTS + 1)
        self.control = f"127.0.0.1:{first}"
        self.side = self.spawn(
            "rtpengine",
            [
                program, "--foreground", "--log-stderr", "--log-level=4", "--table=-1", "--interface=127.0.0.1", f"--listen-ng={self.control}",
                f"--port-min={first + 1}", f"--port-max={first + PORTS}", "--num-threads=1", f"--pidfile={self.folder}/rtpengine.pid",
            ],
        )
        self.servers = [self.side]
        time.sleep(1)
        self.check()


def calls(running: lab.Lab, relay: str, count: int, per_tick: int, seconds: float, measured: lab.Process | None) -> dict:
    """`count` calls of two through that relay; CPU time and memory of the process `measured`."""
    idle = measured.rss_bytes() if measured else 0
    args = ["--relay", relay, "--load", str(count), "--per-tick", str(per_tick), "--packet-bytes", "80", "--seconds", str(seconds)]
    client = running.go_client(f"calls-{relay.replace(':', '-')}", *args)
    samples = []
    deadline = time.monotonic() + seconds + 120
    while client.child.poll() is None:
        if time.monotonic() > deadline:
            raise Failed(f"the calls through {relay} did not end; see {client.log}")
        samples.append((time.monotonic(), measured.cpu_seconds() if measured else 0.0, measured.rss_bytes() if measured else 0))
        time.sleep(0.25)
    ended = time.monotonic()
    report = client.report(10)
    inside = [s for s in samples if ended - seconds <= s[0] <= ended - 2] or samples
    first, last = inside[0], inside[-1]
    report["cores"] = (last[1] - first[1]) / max(0.001, last[0] - first[0])
    report["grown_kib"] = (last[2] - idle) / 1024
    return report


def relays(a, lab_for, loads: dict[str, tuple[int, int]], run_load, note) -> tuple[list[str], list[list[str]], dict]:
    """The head and the rows of the table, and all runs. `run_load` is measure.py's, which measures LiveKit and AuraLink."""
    out: dict = {}
    rows = []
    for name, (participants, speakers) in loads.items():
        relayed = speakers * 50 + speakers * (participants - 1) * 50
        # Each call has two senders. As many calls as participants: a session of AuraLink has two peer connections, a call has two as well.
        per_tick = max(1, round(relayed / (participants * 2 * 50)))
        runs: dict[str, list[dict]] = {"none": [], "rtpengine": [], "LiveKit": [], "AuraLink": []}
        for turn in range(a.rounds):
            note(f"relays: {name}, about {relayed} packets a second, round {turn + 1} of {a.rounds} ...")
            with Rtpengine(a.out / f"relays-{name}-rtpengine-{turn}", a.auralink.resolve(), {}) as running:
                runs["none"].append(calls(running, "none", participants, per_tick, a.seconds, None))
                r = calls(running, running.control, participants, per_tick, a.seconds, running.side)
                packets = r["packets_received_per_second"]
                runs["rtpengine"].append(r | {"us": r["cores"] / packets * 1e6, "kib": r["grown_kib"] / (2 * participants), "relayed": packets})
            args = ["--load", str(participants), "--speakers", str(speakers), "--packet-bytes", "80"]
            for path, who, process in (("direct", "LiveKit", "livekit"), ("sidecar", "AuraLink", "auralink")):
                with lab_for(f"relays-{name}-{path}-{turn}") as running:
                    server = running.livekit if path == "direct" else running.side
                    idle = server.rss_bytes() / 1024
                    r = run_load(running, path, f"off-{name}-{turn}", a.seconds, args)
                received = r["packets_received_per_second"]
                packets = received + (speakers * 50 if path == "sidecar" else 0)
                # A participant has two peer connections; AuraLink ends each twice.
                legs = participants * (4 if path == "sidecar" else 2)
                grown = r["rss_mib"][process] * 1024 - idle
                runs[who].append(r | {"us": r["cores"][process] / packets * 1e6, "kib": grown / legs, "relayed": packets})
        out[name] = runs
        for who, found in runs.items():
            middle = {k: statistics.median(r[k] for r in found) for k in ("latency_ms_p50", "latency_ms_p99", "packets_lost")}
            cells = [f"{statistics.median(r[k] for r in found):.{d}f}" if k in found[0] else "" for k, d in (("relayed", 0), ("us", 1))]
            kib = f"{statistics.median(r['kib'] for r in found):.0f}" if "kib" in found[0] else ""
            between = {"none": "nothing", "AuraLink": "AuraLink and LiveKit"}.get(who, who)
            rows.append([f"{name}, {between}", *cells, f"{middle['latency_ms_p50']:.2f}", f"{middle['latency_ms_p99']:.2f}", kib, f"{middle['packets_lost']:.0f}"])
    head = ["between the clients", "relayed/s", "µs a packet", "p50 ms", "p99 ms", "KiB a peer connection", "lost"]
    return head, rows, out
