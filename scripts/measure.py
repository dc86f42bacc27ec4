"""Whole-process figures of docs/benchmarks.md: AuraLink against stock LiveKit alone, with stock clients; see --help.

  join     seconds until a client is connected, direct and through AuraLink, in turn
  load     one-way latency, loss and CPU time with few speakers (low) and in a 20 x 20 audio call (half of this machine)
  memory   resident memory of AuraLink and LiveKit against the number of sessions
  beside   what the codec threads of a hop cost the native media that the same sidecar relays
  scale    how many participants, one speaker per ten, get all their packets
  relays   beside LiveKit alone and rtpengine at three loads: CPU a packet, latency, memory (needs Debian's rtpengine-daemon)

Prints a table for each and leaves everything in measure.json. Clients, LiveKit and AuraLink share the machine's cores: run it when
nothing else does. Run it by `make measure`, parts of it by ONLY=join,load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from pathlib import Path

import beside
import lab
import relays
import transit
from lab import Failed

PATHS = ("direct", "sidecar")
LOADS = {"low": (4, 2), "tenth": (8, 8), "half": (20, 20), "most": (32, 32)}
"""Name: participants and speakers, all in one room. On two cores, clients and LiveKit included, about 3, 10, 50 and 90 % of what they can do."""

QUIET = 0.15
"""Cores that others may use while something is measured here."""

LOSS_LIMIT = 0.001
"""Part of the packets that may be missing for a number of participants to count as carried."""


SAMPLE = {"low": 1, "tenth": 2, "half": 16, "most": 32}
"""One in so many streams towards listeners is followed through AuraLink; all of the larger calls would keep the capture busier than AuraLink."""


def quantile(values: list[float], q: float) -> float:
    """Linear between the closest ranks."""
    values = sorted(values)
    at = q * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def show(title: str, head: list[str], rows: list[list[str]]) -> None:
    """One table on standard output."""
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, ["-" * w for w in widths], *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]
        print("| " + " | ".join(cells) + " |")
    sys.stdout.flush()


def note(text: str) -> None:
    print(f"measure: {text}", file=sys.stderr, flush=True)


# Join time


async def python_joins(addresses: dict[str, str], count: int) -> dict[str, list[float]]:
    """Milliseconds of `Room.connect` in this process, one room a join, the two paths in turn."""
    from livekit import api, rtc

    took: dict[str, list[float]] = {path: [] for path in addresses}
    for i in range(-1, count):
        for path, url in addresses.items():
            grants = api.VideoGrants(room_join=True, room=f"off-join-{path}-{i}")
            token = api.AccessToken(lab.KEY, lab.SECRET).with_identity("joiner").with_grants(grants).to_jwt()
            room = rtc.Room()
            start = time.monotonic()
            await asyncio.wait_for(room.connect(url, token, rtc.RoomOptions(single_peer_connection=True)), 20)
            elapsed = (time.monotonic() - start) * 1000
            await room.disconnect()
            await asyncio.sleep(0.1)
            # The first of each path loads code on both sides.
            if i >= 0:
                took[path].append(elapsed)
    return took


def go_joins(running: lab.Lab, addresses: dict[str, str], count: int) -> dict[str, list[float]]:
    """Milliseconds of a join of server-sdk-go (two peer connections), a process each, the two paths in turn."""
    took: dict[str, list[float]] = {path: [] for path in addresses}
    for i in range(-1, count):
        for path, url in addresses.items():
            args = ["--load", "1", "--speakers", "0", "--seconds", "0.1", "--room", f"off-gojoin-{path}-{i}"]
            report = running.go_client(f"join-{path}", "--url", url, *args).report(60)
            if i >= 0:
                took[path].append(report["connect_ms_p50"])
    return took


def join(a, lab_for) -> dict:
    with lab_for("join") as running:
        addresses = {"direct": running.direct, "sidecar": running.sidecar}
        note(f"join: {a.joins} Python and {a.joins} Go joins on each path ...")
        took = {"python": asyncio.run(python_joins(addresses, a.joins)), "go": go_joins(running, addresses, a.joins)}
    out, rows = {}, []
    for client, paths in took.items():
        stats = {path: {"p50": quantile(v, 0.5), "p95": quantile(v, 0.95), "joins": len(v)} for path, v in paths.items()}
        stats["paired_difference_p50"] = statistics.median(s - d for d, s in zip(paths["direct"], paths["sidecar"]))
        out[client] = {**stats, "values": paths}
        d, s = stats["direct"], stats["sidecar"]
        cells = [f"{x:.1f}" for x in (d["p50"], s["p50"], d["p95"], s["p95"])]
        rows.append([client, str(d["joins"]), *cells, f"{s['p50'] - d['p50']:+.1f}", f"{stats['paired_difference_p50']:+.1f}"])
    head = ["join, ms", "joins", "direct p50", "sidecar p50", "direct p95", "sidecar p95", "p50 difference", "median of differences"]
    show("Join time", head, rows)
    return out


# Latency, loss, CPU


def run_load(running: lab.Lab, path: str, room: str, seconds: float, args: list[str], patience: float = 120, may_fail: bool = False, follow: int | None = None) -> dict:
    """One `go --load`; adds what each process spent of CPU time while packets were counted, and their memory near the end. `follow`: and
    what each packet of one in so many streams took through AuraLink, whose CPU time is then not what it is without the capture."""
    url = running.direct if path == "direct" else running.sidecar
    ports = [*running.media_ports, running.livekit_udp]
    capture, packets = running.rtp(f"transit-{path}", seconds + patience, ports, follow) if follow else (None, None)
    client = running.go_client(f"load-{path}", "--url", url, "--room", room, "--seconds", str(seconds), *args)
    watched = {"livekit": running.livekit, "auralink": running.side, "client": client}
    if capture:
        watched["capture"] = capture
    samples = []
    deadline = time.monotonic() + seconds + patience
    while client.child.poll() is None:
        if time.monotonic() > deadline:
            client.stop()
            raise Failed(f"the load on {path} did not end; see {client.log}")
        try:
            at, busy = lab.busy_cores()
            samples.append(
                (at, {n: p.cpu_seconds() for n, p in watched.items()} | {"machine": busy}, {n: p.rss_bytes() for n, p in watched.items()})
            )
        except (FileNotFoundError, ProcessLookupError, IndexError):
            break
        time.sleep(0.25)
    ended = time.monotonic()
    try:
        report = client.report(10)
    except Failed:
        if not may_fail:
            raise
        lines = client.out.read_text().strip().splitlines()
        if not lines:
            raise
        report = json.loads(lines[-1])
    # Packets are counted until shortly before the end: two seconds are left to leave.
    inside = [s for s in samples if ended - seconds <= s[0] <= ended - 2] or samples
    first, last = inside[0], inside[-1]
    span = max(0.001, last[0] - first[0])
    report["cores"] = {n: (last[1][n] - first[1][n]) / span for n in first[1]}
    report["rss_mib"] = {n: v / 2**20 for n, v in last[2].items()}
    report["cores"]["others"] = report["cores"]["machine"] - sum(report["cores"][n] for n in watched)
    report["cpu_window_s"] = span
    if capture:
        capture.stop()
        capture.report(1)
        seen = transit.read(packets)
        # A participant has two addresses: that of its publisher's connection and that of its subscriber's.
        clients = {p.source for p in seen if p.to(running.media_ports)} | {p.destination for p in seen if p.of(running.media_ports)}
        report["transit"] = transit.report(packets, clients, [running.livekit_udp])
    report["drops"] = {name: lab.socket_drops(ports) for name, ports in (("livekit", [running.livekit_udp]), ("auralink", running.media_ports))}
    running.check()
    return report


def await_quiet(seconds: float) -> None:
    """Waits until the machine does nothing else, at most so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        (start, before), _ = lab.busy_cores(), time.sleep(2)
        end, after = lab.busy_cores()
        if (after - before) / (end - start) < QUIET:
            return


def quiet_run(a, run) -> dict:
    """The result of `run()` with the machine to itself; where that is not to be had, the least disturbed of a few."""
    best = None
    for attempt in range(a.attempts):
        await_quiet(a.patience)
        result = run()
        if best is None or result["cores"]["others"] < best["cores"]["others"]:
            best = result
        if best["cores"]["others"] < QUIET:
            break
        if attempt + 1 < a.attempts:
            note(f"others used {result['cores']['others']:.2f} cores meanwhile: once more")
    return best


def load(a, lab_for) -> dict:
    out: dict = {}
    rows, cpu_rows, transit_rows = [], [], []
    for name, (participants, speakers) in LOADS.items():
        # A server of its own for each run: the second would otherwise start with warm memory and sockets.
        runs: dict[str, list[dict]] = {path: [] for path in PATHS}
        for turn in range(a.rounds):
            for path in PATHS:
                note(f"load: {participants} x {speakers}, {path}, round {turn + 1} of {a.rounds} ...")
                args = ["--load", str(participants), "--speakers", str(speakers), "--packet-bytes", "80"]

                def once(name=name, path=path, turn=turn, args=args) -> dict:
                    with lab_for(f"load-{name}-{path}-{turn}") as running:
                        return run_load(running, path, f"off-{name}-{turn}", a.seconds, args)

                runs[path].append(quiet_run(a, once))

        def followed(name=name, args=args) -> dict:
            with lab_for(f"load-{name}-followed") as running:
                return run_load(running, "sidecar", f"off-{name}-followed", a.seconds, args, follow=SAMPLE[name])

        note(f"load: {participants} x {speakers}, sidecar, packets followed ...")
        transits = quiet_run(a, followed)["transit"]
        out[name] = {"participants": participants, "speakers": speakers, "runs": runs, "transit": transits}
        for way in ("up", "down", "both"):
            t = transits[way]
            transit_rows.append([f"{name} ({participants} x {speakers}), {way}", f"{t['p50']:.2f}", f"{t['p99']:.2f}", str(t["packets"])])
        middle = {path: {k: statistics.median(r[k] for r in rs) for k in ("latency_ms_p50", "latency_ms_p99")} for path, rs in runs.items()}
        cores = {path: {k: statistics.median(r["cores"][k] for r in rs) for k in rs[0]["cores"]} for path, rs in runs.items()}
        out[name]["latency"], out[name]["cores"] = middle, cores
        for path in PATHS:
            lost, expected = (sum(r[k] for r in runs[path]) for k in ("packets_lost", "packets_expected"))
            rate = statistics.median(r["packets_received_per_second"] for r in runs[path])
            late = max(r["sender_late_ms_max"] for r in runs[path])
            cells = [f"{middle[path][k]:.2f}" for k in ("latency_ms_p50", "latency_ms_p99")]
            rows.append([f"{name} ({participants} x {speakers}), {path}", f"{rate:.0f}", *cells, f"{lost} of {expected}", f"{late:.1f}"])
        added = [f"{middle['sidecar'][k] - middle['direct'][k]:+.2f}" for k in ("latency_ms_p50", "latency_ms_p99")]
        rows.append([f"{name}, added", "", *added, "", ""])
        for path in PATHS:
            c = cores[path]
            cells = [f"{c[who]:.2f}" for who in ("machine", "others", "client")] + [f"{c['livekit']:.3f}"]
            if path == "direct":
                cpu_rows.append([f"{name}, {path}", *cells, "", "", ""])
                continue
            packets = speakers * 50 + statistics.median(r["packets_received_per_second"] for r in runs[path])
            share, each = c["auralink"] / c["livekit"], c["auralink"] / packets * 1e6
            out[name] |= {"cpu_share_of_livekit": share, "us_per_packet": each, "relayed_per_second": packets}
            cpu_rows.append([f"{name}, {path}", *cells, f"{c['auralink']:.3f}", f"{100 * share:.0f} %", f"{each:.1f}"])
    show("One-way latency (Go to Go, payload timestamps)", ["load", "packets/s", "p50 ms", "p99 ms", "lost", "sender late, max ms"], rows)
    head = ["in AuraLink, each packet", "p50 ms", "p99 ms", "packets"]
    show("From being sent to AuraLink to being sent by it (the kernel's times), up, down, and both for the same packet", head, transit_rows)
    head = ["CPU, cores in use", "machine", "others", "clients", "LiveKit", "AuraLink", "AuraLink / LiveKit", "µs a packet"]
    show(f"CPU (of {os.cpu_count()} cores; 1.00 is one core)", head, cpu_rows)
    return out


# Memory


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    mx, my = (statistics.mean(p[i] for p in points) for i in (0, 1))
    return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)


def memory(a, lab_for) -> dict:
    rows, points = [], {"auralink": [], "livekit": []}
    for count in a.memory:
        note(f"memory: {count} sessions ...")
        with lab_for(f"memory-{count}") as running:
            if count:
                args = ["--load", str(count), "--speakers", "0", "--rooms", str(max(1, count // 10)), "--join-rate", str(a.join_rate)]
                rss = run_load(running, "sidecar", "off-memory", 6, args, patience=120 + count / a.join_rate)["rss_mib"]
            else:
                time.sleep(1)
                rss = {"auralink": running.side.rss_bytes() / 2**20, "livekit": running.livekit.rss_bytes() / 2**20}
        for who in points:
            points[who].append((count, rss[who]))
        rows.append([str(count), f"{rss['auralink']:.1f}", f"{rss['livekit']:.1f}"])
    each = {who: slope(p) * 1024 for who, p in points.items()}
    rows.append(["KiB a session (slope)", f"{each['auralink']:.0f}", f"{each['livekit']:.0f}"])
    show("Memory: RSS in MiB, Go sessions (two peer connections each, nobody speaks)", ["sessions", "AuraLink", "LiveKit"], rows)
    return {"points": points, "kib_per_session": each}


# Scale


def verdict(r: dict) -> str:
    """Empty when all was carried, else what was not."""
    problems = []
    if r["joined"] < r["participants"]:
        problems.append(f"{r['participants'] - r['joined']} did not join")
    if r["pairs_heard"] < r["pairs"]:
        problems.append(f"{r['pairs'] - r['pairs_heard']} of {r['pairs']} pairs silent")
    if r["reconnects"] or r["disconnects"]:
        problems.append(f"{r['reconnects']} reconnects, {r['disconnects']} disconnects")
    if r["packets_lost"] > LOSS_LIMIT * max(1, r["packets_expected"]):
        problems.append(f"{100 * r['packets_lost'] / r['packets_expected']:.2f} % lost")
    return "; ".join(problems)


def scale(a, lab_for) -> dict:
    out: dict = {path: [] for path in PATHS}
    going = dict.fromkeys(PATHS, True)
    rows = []
    for count in a.scale:
        for path in PATHS:
            if not going[path]:
                continue
            note(f"scale: {count} participants, {path} ...")
            rooms = str(max(1, count // 10))
            args = ["--load", str(count), "--speakers", rooms, "--rooms", rooms, "--join-rate", str(a.join_rate)]
            await_quiet(a.patience)
            with lab_for(f"scale-{count}-{path}") as running:
                r = run_load(running, path, "off-scale", a.seconds, args, patience=240 + count / a.join_rate, may_fail=True)
            bad = verdict(r)
            going[path] = not bad
            out[path].append(r | {"verdict": bad})
            c = r["cores"]
            cells = [f"{r['joined']}", f"{r['connect_ms_p50']:.0f}", f"{r['packets_received_per_second']}", f"{r['packets_lost']} of {r['packets_expected']}"]
            cells += [f"{r['latency_ms_p50']:.2f}", f"{r['latency_ms_p99']:.1f}", f"{c['machine']:.2f}", f"{c['others']:.2f}", f"{c['livekit']:.2f}"]
            rows.append([f"{count}, {path}", *cells, f"{c['auralink']:.2f}" if path == "sidecar" else "", f"{r['drops']['livekit']} + {r['drops']['auralink']}", bad or "all carried"])
    head = ["participants", "joined", "join p50 ms", "packets/s", "lost", "p50 ms", "p99 ms", "machine", "others", "LiveKit", "AuraLink", "drops", "verdict"]
    show("Participants, one speaker per ten, rooms of ten (cores in use; drops: full sockets of LiveKit + AuraLink)", head, rows)
    return out


def native_beside_neural(a, lab_for) -> dict:
    await_quiet(a.patience)
    note(f"beside: {a.rounds} rounds of {', '.join(str(n) for n in a.beside)} pairs of talkers ...")
    head, rows, results = beside.beside(a.out, a.auralink.resolve(), a.beside, a.seconds, a.rounds, a.scheduling)
    show("Native media in the origin, from being sent to it to being sent by it, while talkers use its codecs", head, rows)
    return {"runs": results}


def other_relays(a, lab_for) -> dict:
    await_quiet(a.patience)
    loads = {name: LOADS[name] for name in ("low", "tenth", "half")}
    head, rows, results = relays.relays(a, lab_for, loads, run_load, note)
    show("Relays side by side; µs a packet and memory are those of rtpengine, LiveKit, AuraLink alone", head, rows)
    return results


PARTS = {"join": join, "load": load, "memory": memory, "beside": native_beside_neural, "scale": scale, "relays": other_relays}


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--auralink", type=Path, required=True, help="the auralink binary (release build)")
    p.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    p.add_argument("--joins", type=int, default=30, help="joins by each client on each path")
    p.add_argument("--rounds", type=int, default=3, help="runs of each load on each path; medians are shown")
    p.add_argument("--seconds", type=float, default=20, help="length of each load")
    p.add_argument("--memory", type=numbers, default=[0, 50, 100, 200], help="numbers of sessions")
    p.add_argument("--beside", type=numbers, default=[0, 3], help="numbers of pairs of talkers on the hop, beside which native media is followed")
    p.add_argument("--scale", type=numbers, default=[100, 200, 300, 400, 600, 800, 1000], help="numbers of participants, multiples of ten")
    p.add_argument("--join-rate", type=float, default=20, help="joins a second of memory and scale")
    p.add_argument("--attempts", type=int, default=3, help="runs of a load at most, where others disturb it")
    p.add_argument("--patience", type=float, default=60, help="seconds to wait for a quiet machine before each run")
    p.add_argument("--workers", type=int, default=1, help="AuraLink's media workers")
    p.add_argument("--scheduling", default="normal", choices=["normal", "realtime"], help="media.scheduling of AuraLink")
    p.add_argument("--short", action="store_true", help="a quick run that shows whether everything works; its figures mean nothing")
    p.add_argument("--out", type=Path, default=lab.CACHE / "measure", help="folder for logs and measure.json")
    a = p.parse_args()
    if a.short:
        a.joins, a.rounds, a.seconds, a.memory, a.scale, a.beside = 3, 1, 5, [0, 10, 20], [20], [0, 1]
        a.attempts, a.patience = 1, 0
    parts = a.only.split(",")
    for part in parts:
        if part not in PARTS:
            p.error(f"--only: {part} is not one of {', '.join(PARTS)}")
    lab.raise_file_limit()

    def lab_for(name: str) -> lab.Lab:
        return lab.Lab(a.out / name, a.auralink.resolve(), {"off": "mode: off"}, a.workers, scheduling=a.scheduling)

    load_before = os.getloadavg()[0]
    if load_before > 0.5:
        note(f"the machine is busy (load average {load_before:.1f}): the figures will be worse than they are")
    print(f"{lab.machine()}; load average before: {load_before:.2f}; media workers: {a.workers}, scheduling: {a.scheduling}")
    result = {"machine": lab.machine(), "load_average_before": load_before, "arguments": sys.argv[1:]}
    for part in parts:
        result[part] = PARTS[part](a, lab_for)
        a.out.mkdir(parents=True, exist_ok=True)
        (a.out / "measure.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nEverything: {a.out / 'measure.json'}")


if __name__ == "__main__":
    lab.main_guard(main)
