"""The demo: two stock clients talk through AuraLink to a stock LiveKit server, once with the room `off`, once `lean`; see --help.

It prints a table of what went over the wire, how it sounded, what AuraLink added in latency and what was lost, and leaves the
recordings, the logs and demo.json in demo-out/. Exit code 1: a call failed, or lean saved less than half. Run it by `make demo`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
import wave
from pathlib import Path

import lab
from lab import Failed

MODES = {
    "off": "mode: off",
    "lean": "mode: lean",
}
"""Columns of the table: room prefix and what its rule in AuraLink's YAML says. The first is what the others are compared with."""

BROWSER_BASELINE = 117.5
"""kbps on the wire that livekit-client 2.23 in Chromium sends by default while somebody speaks: Opus at 48 kbps, RED, IP and UDP
headers included, through stock LiveKit 1.13.5 (docs/benchmarks.md)."""

LEAST_SAVING = 50
"""Percent of the uplink that each mode but the first has to save for the demo to succeed."""

PEOPLE = {"anna": "dialogue-a.wav", "bruno": "dialogue-b.wav"}
LATENCY_SECONDS = 10


class Sampler(threading.Thread):
    """Counts the wire a second at a time, so that seconds of speech can be told from those of silence."""

    def __init__(self, running: lab.Lab) -> None:
        super().__init__(daemon=True)
        ports = [x for port in running.media_ports for x in ("--port", str(port))]
        wire = str(lab.CLIENTS / "python" / "wire.py")
        self.command = [running.tool("AURALINK_PYTHON"), wire, "--seconds", "1", *ports]
        self.seconds: list[dict] = []
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            out = subprocess.run(self.command, capture_output=True, text=True)
            if out.returncode == 0:
                self.seconds.append(json.loads(out.stdout))

    def stop(self) -> list[dict]:
        self.done.set()
        self.join()
        return self.seconds


def await_media(running: lab.Lab, clients: list[lab.Process]) -> None:
    """Returns when speech flows up from one client and down to another."""
    deadline = time.monotonic() + 60
    for attempt in range(1000):
        running.check()
        for client in clients:
            if client.child.poll() is not None:
                client.report(1)
                raise Failed(f"{client.name} ended before the call started; see {client.log}")
        flows = running.wire(f"start-{attempt % 2}", 0.5).report(10)["flows"]
        ports = {f":{port}" for port in running.media_ports}
        up = {f["src"] for f in flows if any(f["dst"].endswith(p) for p in ports) and f["packets"] >= 8}
        down = {f["dst"] for f in flows if any(f["src"].endswith(p) for p in ports) and f["packets"] >= 8}
        if any(d != u for u in up for d in down):
            return
        if time.monotonic() > deadline:
            raise Failed(f"no speech passed AuraLink within 60 s; see the logs in {running.folder}")
    raise Failed("no speech passed AuraLink")


def call(running: lab.Lab, mode: str, seconds: float, browser: bool, out: Path) -> dict:
    """One call of two people in a room of that mode; returns per person what was counted and what the clients reported."""
    record = running.folder / f"{mode}-recordings"
    record.mkdir()
    start = running.browser_client if browser else running.python_client
    clients = {}
    for who, speech in PEOPLE.items():
        path = Path(running.tool("AURALINK_SPEECH")) / speech
        clients[who] = start(
            f"{mode}-{who}", "--url", running.sidecar, "--room", f"{mode}-demo", "--identity", who,
            "--audio", f"wav:{path}", "--record", str(record), "--seconds", str(seconds + 5), "--wait-timeout", "45",
        )
    await_media(running, list(clients.values()))
    sampler = Sampler(running)
    sampler.start()
    wire = running.wire(f"{mode}-wire", seconds).report(seconds + 20)
    samples = sampler.stop()
    if wire["dropped"]:
        raise Failed(f"{mode}: wire.py could not count {wire['dropped']} packets; the machine is too busy for the figures to be true")
    reports = {who: client.report(seconds + 60) for who, client in clients.items()}
    people = {}
    for who, report in reports.items():
        other = next(p for p in PEOPLE if p != who)
        heard = next((a for a in report["audio"] if a["from"] == other and a.get("wav")), None)
        if heard is None or heard["seconds"] < seconds * 0.8:
            raise Failed(f"{mode}: {who} heard {heard['seconds'] if heard else 0} s of {other}, who spoke for {seconds} s")
        wav = out / f"{mode}-{who}-heard-{other}.wav"
        shutil.move(heard["wav"], wav)
        inbound = [f for f in report["inbound"] if f["kind"] == "audio"]
        people[who] = {
            **traffic(report, wire, running.media_ports, f"{mode}: {who}"),
            "talking_up_kbps": talking(report, samples),
            "heard": str(wav),
            "said": str(Path(running.tool("AURALINK_SPEECH")) / PEOPLE[other]),
            "packets": sum(f["packets"] for f in inbound),
            "lost": sum(f["lost"] or 0 for f in inbound),
        }
    return people


def local_addresses(report: dict) -> set[str]:
    return {pair["local"] for pair in report["ice"]}


def traffic(report: dict, wire: dict, ports: list[int], what: str) -> dict:
    """What the wire carried between this client and AuraLink: everything with the addresses of its selected pairs."""
    mine = local_addresses(report)
    seconds = wire["seconds"]
    out = {}
    for way, own, theirs in (("up", "src", "dst"), ("down", "dst", "src")):
        flows = [f for f in wire["flows"] if f[own] in mine and int(f[theirs].rsplit(":", 1)[1]) in ports]
        if not flows:
            raise Failed(f"{what}: nothing was counted {way} between AuraLink and {sorted(mine)}: the call did not go through it")
        out[f"{way}_kbps"] = sum(f["bytes"] for f in flows) * 8 / 1000 / seconds
        out[f"{way}_pps"] = sum(f["packets"] for f in flows) / seconds
    return out


def talking(report: dict, samples: list[dict]) -> float:
    """Median kbps up of the seconds in which this person spoke throughout: those with nearly the most packets."""
    mine = local_addresses(report)
    points = []
    for sample in samples:
        flows = [f for f in sample["flows"] if f["src"] in mine]
        points.append((sum(f["packets"] for f in flows) / sample["seconds"], sum(f["bytes"] for f in flows) * 8 / 1000 / sample["seconds"]))
    full = max(p for p, _ in points)
    return statistics.median(kbps for pps, kbps in points if pps >= 0.9 * full)


def latency(running: lab.Lab, modes: list[str]) -> dict:
    """One-way latency of the same packets' kind direct and through AuraLink, all at the same time."""
    loads = {"direct": running.direct} | {mode: running.sidecar for mode in modes}
    args = ["--load", "4", "--speakers", "2", "--seconds", str(LATENCY_SECONDS)]
    started = {name: running.go_client(f"latency-{name}", "--url", url, "--room", f"{name}-latency", *args) for name, url in loads.items()}
    return {name: process.report(LATENCY_SECONDS + 60) for name, process in started.items()}


def score(running: lab.Lab, people: dict) -> None:
    """Adds ViSQOL and PESQ of what each person heard against what the other said."""
    command = [running.tool("AURALINK_PYTHON"), str(lab.CLIENTS / "python" / "score.py")]
    started = {
        who: subprocess.Popen([*command, p["said"], p["heard"]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for who, p in people.items()
    }
    for who, process in started.items():
        out, err = process.communicate(timeout=120)
        if process.returncode:
            raise Failed(f"score.py could not score {people[who]['heard']}: {err.strip()[-500:]}")
        people[who]["score"] = json.loads(out.strip().splitlines()[-1])


def check_heard(mode: str, people: dict) -> None:
    for who, p in people.items():
        if p["score"]["correlation"] < 0.5:
            raise Failed(f"{mode}: what {who} heard is not what was said (correlation {p['score']['correlation']}); listen to {p['heard']}")


def saving(result: dict, first: dict, key: str) -> float:
    return 100 * (1 - result[key] / first[key])


def table(results: dict, delays: dict, browser: bool) -> str:
    """The table, one column a mode, figures of the first person unless said otherwise."""
    modes = list(results)
    who = next(iter(PEOPLE))
    first = results[modes[0]][who]
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, cell) -> None:
        rows.append((name, [cell(mode) for mode in modes]))

    def save(key: str):
        return lambda mode: "" if mode == modes[0] else f"{saving(results[mode][who], first, key):.1f} %"

    def both(value: str) -> object:
        return lambda mode: " / ".join(f"{p['score'][value]:.2f}" for p in results[mode].values())

    for way, text in (("up", "client → AuraLink"), ("down", "AuraLink → client")):
        row(f"wire {way}, {text}, kbps", lambda mode, k=f"{way}_kbps": f"{results[mode][who][k]:.1f}")
        row("  packets/s", lambda mode, k=f"{way}_pps": f"{results[mode][who][k]:.1f}")
        row(f"  saved against {modes[0]}", save(f"{way}_kbps"))
    row("wire up in seconds of speech, kbps", lambda mode: f"{results[mode][who]['talking_up_kbps']:.1f}")
    row(f"  saved against {modes[0]}", save("talking_up_kbps"))
    row(
        f"  saved against {BROWSER_BASELINE} kbps (browser)",
        lambda mode: f"{100 * (1 - results[mode][who]['talking_up_kbps'] / BROWSER_BASELINE):.1f} %",
    )
    names = " / ".join(PEOPLE)
    row(f"ViSQOL of what was heard by {names}", both("visqol"))
    row("PESQ-WB of the same", both("pesq_wb"))
    for q in ("p50", "p99"):
        key = f"latency_ms_{q}"
        row(f"latency added by AuraLink, {q}, ms", lambda mode, k=key: f"{delays[mode][k] - delays['direct'][k]:+.2f}")
    row("packets lost, both clients", lambda mode: f"{sum(p['lost'] for p in results[mode].values())} of {sum(p['packets'] for p in results[mode].values())}")
    row("packets lost, latency run", lambda mode: f"{delays[mode]['packets_lost']} of {delays[mode]['packets_expected']}")
    left = max(len(name) for name, _ in rows)
    widths = [max(14, len(mode), *(len(cells[i]) for _, cells in rows)) for i, mode in enumerate(modes)]
    lines = [" " * left + "".join(f"  {mode:>{width}}" for mode, width in zip(modes, widths)), "-" * (left + sum(w + 2 for w in widths))]
    lines += [f"{name:<{left}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths)) for name, cells in rows]
    client = "Chromium (livekit-client)" if browser else "Python (livekit, libwebrtc)"
    direct = delays["direct"]
    return "\n".join(lines) + f"""

Wire figures are of {who}, between {who}'s {client} client and AuraLink alone: every UDP packet (RTP, RTCP, STUN, DTLS), IP and UDP
headers counted. "Saved" compares with the same conversation in the room `{modes[0]}`, a pure relay: what the same clients send and get
without AuraLink. Both sides use DTX, and each is silent while the other talks; in "seconds of speech" the client never pauses.
For comparison: a default browser publisher sends {BROWSER_BASELINE} kbps while it speaks (48 kbps Opus + RED; measured, docs/benchmarks.md).
Latency: Go clients stamp payloads with the time of sending; quantiles through AuraLink minus those of a call direct to LiveKit
({direct['latency_ms_p50']:.2f} and {direct['latency_ms_p99']:.2f} ms) that ran beside it. Packets of 40 ms instead of 20 (lean) add 20 ms at the talker on top of this."""


def said_cut(running: lab.Lab, seconds: float, out: Path) -> None:
    """Leaves the beginning of what was said beside what was heard."""
    for who, speech in PEOPLE.items():
        with wave.open(str(Path(running.tool("AURALINK_SPEECH")) / speech)) as r, wave.open(str(out / f"said-by-{who}.wav"), "wb") as w:
            w.setparams(r.getparams())
            w.writeframes(r.readframes(int(r.getframerate() * (seconds + 10))))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--auralink", type=Path, required=True, help="the auralink binary (release build)")
    p.add_argument("--seconds", type=float, default=20, help="how long the wire is counted in each call")
    p.add_argument("--browser", action="store_true", help="Chromium instead of Python clients")
    p.add_argument("--out", type=Path, default=lab.ROOT / "demo-out")
    a = p.parse_args()
    begin = time.monotonic()
    out = a.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    results: dict[str, dict] = {}
    with lab.Lab(out / "logs", a.auralink.resolve(), MODES) as running:
        for mode in MODES:
            print(f"demo: {' and '.join(PEOPLE)} talk for {a.seconds:.0f} s in room {mode}-demo ...", file=sys.stderr)
            results[mode] = call(running, mode, a.seconds, a.browser, out)
        print(f"demo: latency, direct and through AuraLink, {LATENCY_SECONDS} s ...", file=sys.stderr)
        delays = latency(running, list(MODES))
        running.check()
        said_cut(running, a.seconds, out)
    print("demo: scoring what was heard ...", file=sys.stderr)
    for mode, people in results.items():
        score(running, people)
        check_heard(mode, people)
    (out / "demo.json").write_text(json.dumps({"calls": results, "latency": delays}, indent=1) + "\n")
    print("\n" + table(results, delays, a.browser))
    print(f"\nRecordings, logs and demo.json: {out} ({time.monotonic() - begin:.0f} s)")
    modes = list(MODES)
    for mode in modes[1:]:
        for who, result in results[mode].items():
            saved = saving(result, results[modes[0]][who], "up_kbps")
            if saved < LEAST_SAVING:
                raise Failed(f"{mode} saved {saved:.1f} % of {who}'s uplink; at least {LEAST_SAVING} % were to be saved")


if __name__ == "__main__":
    lab.main_guard(main)
