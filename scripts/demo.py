"""The demo: two stock clients talk through AuraLink to a stock LiveKit server, in rooms `off`, `lean` and `neural`; see --help.

In `off` and `lean` the clients dial the AuraLink beside LiveKit. In `neural` anna dials a second one, the edge, whose upstream is the first,
the origin: between the two speech goes by a neural codec. In `twice` both dial the edge. It prints a table of what went over the wire, how it sounded, what AuraLink
added in latency and what was lost, and leaves the recordings, the logs and demo.json in demo-out/. Exit code 1: a call failed, or a mode
saved less than it has to. Run it by `make demo`.
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
import transit
from lab import Failed

MODES = {
    "off": "mode: off",
    "lean": "mode: lean",
    "neural": "mode: neural",
    "twice": "mode: neural",
}
"""Columns of the table: room prefix and what its rule in AuraLink's YAML says. The first is what the others are compared with."""

AT_EDGE = {"neural": {"anna"}, "twice": {"anna", "bruno"}}
"""Who dials the edge, by column; their wire is that between edge and origin. The others dial the origin."""

BROWSER_BASELINE = 117.5
"""kbps on the wire that livekit-client 2.23 in Chromium sends by default while somebody speaks: Opus at 48 kbps, RED, IP and UDP
headers included, through stock LiveKit 1.13.5 (docs/benchmarks.md)."""

LEAST_SAVING = {"lean": 50, "neural": 75, "twice": 75}
"""Percent of the uplink that a column has to save for the demo to succeed."""

PEOPLE = {"anna": "dialogue-a.wav", "bruno": "dialogue-b.wav"}
LONGEST_PAUSE = 22.0
"""Seconds for which one of them may be silent: the other has the floor for 20 at most."""

SKIPPED = 1.0
"""Seconds at the beginning of a recording that score.py leaves out by default."""


class Sampler(threading.Thread):
    """Counts the wire a second at a time, so that seconds of speech can be told from those of silence."""

    def __init__(self, running: lab.Lab, ports: list[int]) -> None:
        super().__init__(daemon=True)
        wire = str(lab.CLIENTS / "python" / "wire.py")
        self.command = [running.tool("AURALINK_PYTHON"), wire, "--seconds", "1", *lab.port_options(ports)]
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
    """Returns when LiveKit gets speech from one peer and sends some to another."""
    deadline = time.monotonic() + 60
    for attempt in range(1000):
        running.check()
        for client in clients:
            if client.child.poll() is not None:
                client.report(1)
                raise Failed(f"{client.name} ended before the call started; see {client.log}")
        flows = running.wire(f"start-{attempt % 2}", 0.5, [running.livekit_udp]).report(10)["flows"]
        up = {f["src"] for f in flows if f["dst"].endswith(f":{running.livekit_udp}") and f["packets"] >= 8}
        down = {f["dst"] for f in flows if f["src"].endswith(f":{running.livekit_udp}") and f["packets"] >= 8}
        if any(d != u for u in up for d in down):
            return
        if time.monotonic() > deadline:
            raise Failed(f"no speech passed AuraLink within 60 s; see the logs in {running.folder}")
    raise Failed("no speech passed AuraLink")


def call(running: lab.Lab, mode: str, seconds: float, browser: bool, out: Path) -> dict:
    """One call of two people in a room of that mode: what was counted and reported per person, and what AuraLink took."""
    record = running.folder / f"{mode}-recordings"
    record.mkdir()
    start = running.browser_client if browser else running.python_client
    at_edge = AT_EDGE.get(mode, set())
    wire_ports = [*running.media_ports, *(running.edge_ports if at_edge else [])]
    clients = {}
    for who, speech in PEOPLE.items():
        path = Path(running.tool("AURALINK_SPEECH")) / speech
        clients[who] = start(
            f"{mode}-{who}", "--url", running.edge_url if who in at_edge else running.sidecar, "--room", f"{mode}-demo", "--identity", who,
            "--audio", f"wav:{path}", "--record", str(record), "--seconds", str(seconds + 5), "--wait-timeout", "45",
        )
    await_media(running, list(clients.values()))
    rtp, packets = running.rtp(f"{mode}-rtp", seconds, [*wire_ports, running.livekit_udp])
    sampler = Sampler(running, wire_ports)
    sampler.start()
    wire = running.wire(f"{mode}-wire", seconds, wire_ports).report(seconds + 20)
    samples = sampler.stop()
    dropped = wire["dropped"] + rtp.report(20)["dropped"]
    if dropped:
        raise Failed(f"{mode}: {dropped} packets could not be counted; the machine is too busy for the figures to be true")
    sidecars = {"edge": running.status(running.edge_admin), "origin": running.status(running.admin)} if at_edge else {}
    for name, status in sidecars.items():
        if not status["engine"]["complete"]:
            raise Failed(f"{mode}: the engine of the {name} lacks something: {'; '.join(status['engine']['problems'])}; run make models")
    reports = {who: client.report(seconds + 60) for who, client in clients.items()}
    people = {}
    for who, report in reports.items():
        other = next(p for p in PEOPLE if p != who)
        heard = next((a for a in report["audio"] if a["from"] == other and a.get("wav")), None)
        if heard is None or heard["seconds"] < seconds * 0.8:
            raise Failed(f"{mode}: {who} heard {heard['seconds'] if heard else 0} s of {other}, who spoke for {seconds} s")
        # A recording goes on where nothing comes any more.
        silent = min(report["ended_at"], reports[other]["ended_at"]) - (heard["last_at"] or 0)
        if silent > LONGEST_PAUSE:
            raise Failed(f"{mode}: {who} heard nothing of {other} in the last {silent:.1f} s")
        wav = out / f"{mode}-{who}-heard-{other}.wav"
        shutil.move(heard["wav"], wav)
        inbound = [f for f in report["inbound"] if f["kind"] == "audio"]
        client = mine = addresses(report)
        near = traffic(client, wire, running.edge_ports if who in at_edge else running.media_ports, f"{mode}: {who}")
        if who in at_edge:
            mine = hop_addresses(packets, client, running.media_ports)
        people[who] = {
            **(traffic(mine, wire, running.media_ports, f"{mode}: {who}, between edge and origin") if who in at_edge else near),
            "client_up_kbps": near["up_kbps"],
            "talking_up_kbps": talking(client, mine, samples),
            "heard": str(wav),
            "said": str(Path(running.tool("AURALINK_SPEECH")) / PEOPLE[other]),
            "said_at": reports[other].get("said_at"),
            "heard_at": heard.get("heard_at"),
            "packets": sum(f["packets"] for f in inbound),
            "lost": sum(f["lost"] or 0 for f in inbound),
        }
    everyone = {address for report in reports.values() for address in addresses(report)}
    took = transit.report(packets, everyone, [running.livekit_udp], running.media_ports if at_edge else None)
    return {"people": people, "took": took, "hop": {name: hop_of(status, mode) for name, status in sidecars.items()}}


def hop_of(status: dict, mode: str) -> dict:
    """What a sidecar's /status.json says of the hop, over this column's sessions: its rungs, packets coded, and natives by reason."""
    found = [
        pc[way]
        for session in status["sessions"]
        if session["room"] == f"{mode}-demo"
        for pc in session["pcs"]
        for way in ("hop_up", "hop_down")
        if pc.get(way)
    ]
    native: dict[str, int] = {}
    for hop in found:
        for reason, count in hop["native"].items():
            native[reason] = native.get(reason, 0) + count
    return {
        "rungs": sorted({hop["rung"] for hop in found if hop.get("rung")}),
        "coded": sum(hop["originals"]["coded"] for hop in found),
        "native": {reason: count for reason, count in native.items() if count},
        "engine": status["engine"],
    }


def addresses(report: dict) -> set[str]:
    """The client's own addresses of its selected pairs."""
    return {pair["local"] for pair in report["ice"]}


def hop_addresses(packets: Path, client: set[str], origin_ports: list[int]) -> set[str]:
    """The edge's addresses towards the origin that carry the streams of the client with these addresses: SSRCs stay on the hop."""
    seen = transit.read(packets)
    streams = {p.ssrc for p in seen if p.source in client or p.destination in client}
    hop = [p for p in seen if p.ssrc in streams]
    return {p.source for p in hop if p.to(origin_ports)} | {p.destination for p in hop if p.of(origin_ports)}


def traffic(mine: set[str], wire: dict, ports: list[int], what: str) -> dict:
    """What the wire carried between these addresses and AuraLink's ports, whatever it was."""
    seconds = wire["seconds"]
    out = {}
    for way, own, theirs in (("up", "src", "dst"), ("down", "dst", "src")):
        flows = [f for f in wire["flows"] if f[own] in mine and int(f[theirs].rsplit(":", 1)[1]) in ports]
        if not flows:
            raise Failed(f"{what}: nothing was counted {way} between AuraLink and {sorted(mine)}: the call did not go through it")
        out[f"{way}_kbps"] = sum(f["bytes"] for f in flows) * 8 / 1000 / seconds
        out[f"{way}_pps"] = sum(f["packets"] for f in flows) / seconds
    return out


def talking(client: set[str], mine: set[str], samples: list[dict]) -> float:
    """Median kbps up from the addresses `mine` in the seconds in which this person spoke throughout: those with nearly the most packets
    from the client."""

    def rate(sample: dict, sources: set[str], what: str) -> float:
        return sum(f[what] for f in sample["flows"] if f["src"] in sources) / sample["seconds"]

    full = max(rate(sample, client, "packets") for sample in samples)
    return statistics.median(rate(s, mine, "bytes") * 8 / 1000 for s in samples if rate(s, client, "packets") >= 0.9 * full)


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


def mouth_to_ear(person: dict) -> float | None:
    """ms from the talker's client taking the sound to the listener's client playing it; None where the clients have no clock in common."""
    if person["said_at"] is None or person["heard_at"] is None:
        return None
    with wave.open(person["said"]) as w:
        loop = w.getnframes() / w.getframerate()
    # The delay is that of the recording without its beginning, which lies that far into what was said.
    return 1000 * ((person["heard_at"] + SKIPPED - person["said_at"] + person["score"]["delay_median_ms"] / 1000) % loop)


def check_heard(mode: str, people: dict) -> None:
    for who, p in people.items():
        if p["score"]["correlation"] < 0.5:
            raise Failed(f"{mode}: what {who} heard is not what was said (correlation {p['score']['correlation']}); listen to {p['heard']}")


def saving(result: dict, first: dict, key: str) -> float:
    return 100 * (1 - result[key] / first[key])


def table(results: dict, browser: bool) -> str:
    """The table, one column a mode, figures of the first person unless said otherwise, and what they mean."""
    modes = list(results)
    who = next(iter(PEOPLE))
    mine = {mode: results[mode]["people"][who] for mode in modes}
    everyone = {mode: results[mode]["people"].values() for mode in modes}
    first = mine[modes[0]]
    rows: list[tuple[str, list[str]]] = []

    def row(name: str, cell) -> None:
        rows.append((name, [cell(mode) for mode in modes]))

    def save(key: str):
        return lambda mode: "" if mode == modes[0] else f"{saving(mine[mode], first, key):.1f} %"

    def both(value) -> object:
        return lambda mode: " / ".join(value(p) for p in everyone[mode])

    row("wire between", lambda mode: "edge, origin" if mode in AT_EDGE else "client, AuraLink")
    for way in ("up", "down"):
        row(f"wire {way}, kbps", lambda mode, k=f"{way}_kbps": f"{mine[mode][k]:.1f}")
        row("  packets/s", lambda mode, k=f"{way}_pps": f"{mine[mode][k]:.1f}")
        row(f"  saved against {modes[0]}", save(f"{way}_kbps"))
    row("wire up in seconds of speech, kbps", lambda mode: f"{mine[mode]['talking_up_kbps']:.1f}")
    row(f"  saved against {modes[0]}", save("talking_up_kbps"))
    row(f"  saved against {BROWSER_BASELINE} kbps (browser)", lambda mode: f"{100 * (1 - mine[mode]['talking_up_kbps'] / BROWSER_BASELINE):.1f} %")
    names = " / ".join(PEOPLE)
    row(f"ViSQOL of what was heard by {names}", both(lambda p: f"{p['score']['visqol']:.2f}"))
    row("PESQ-WB of the same", both(lambda p: f"{p['score']['pesq_wb']:.2f}"))
    for q in ("p50", "p99"):
        row(f"latency added, talker to listener, {q}, ms", lambda mode, q=q: f"{results[mode]['took']['both'][q]:.2f}")
    ears = {mode: [mouth_to_ear(p) for p in everyone[mode]] for mode in modes}
    if all(x is not None for xs in ears.values() for x in xs):
        row("mouth to ear, everything, ms", lambda mode: " / ".join(f"{x:.0f}" for x in ears[mode]))
    row("packets lost, both clients", lambda mode: f"{sum(p['lost'] for p in everyone[mode])} of {sum(p['packets'] for p in everyone[mode])}")
    row("packets lost in AuraLink", lambda mode: str(results[mode]["took"]["lost"]))
    left = max(len(name) for name, _ in rows)
    widths = [max(14, len(mode), *(len(cells[i]) for _, cells in rows)) for i, mode in enumerate(modes)]
    lines = [" " * left + "".join(f"  {mode:>{width}}" for mode, width in zip(modes, widths)), "-" * (left + sum(w + 2 for w in widths))]
    lines += [f"{name:<{left}}" + "".join(f"  {cell:>{w}}" for cell, w in zip(cells, widths)) for name, cells in rows]
    client = "Chromium (livekit-client)" if browser else "Python (livekit, libwebrtc)"
    text = f"""
Wire figures are {who}'s alone, whose client is {client}: every UDP packet (RTP, RTCP, STUN, DTLS), IP and UDP headers counted.
"Saved" compares with the same conversation in the room `{modes[0]}`, a pure relay: what the same clients send and get without AuraLink.
Both sides use DTX, and each is silent while the other talks; in "seconds of speech" the client never pauses. For comparison: a default
browser publisher sends {BROWSER_BASELINE} kbps while it speaks (48 kbps Opus + RED; measured, docs/benchmarks.md).
Latency is that of each packet of the conversation inside AuraLink, on its way to LiveKit and on its way from it added up, by the kernel's
clock. Packets of 40 ms instead of 20 (lean) add 20 ms at the talker on top of it, which nothing but "mouth to ear" shows."""
    hop = [neural_text(mode, results[mode], mine[mode]["client_up_kbps"]) for mode in modes if mode in AT_EDGE]
    return "\n".join(lines) + "\n" + "\n".join([text, *hop])


def neural_text(mode: str, result: dict, client_up: float) -> str:
    """What happened on the hop, and where the time went."""
    took, edge = result["took"], result["hop"]["edge"]
    part = took["shares"]
    people = AT_EDGE[mode]
    first = next(iter(PEOPLE))
    ways = "is coded once" if len(people) == 1 else "crosses the hop up and down again and is coded twice"
    native = edge["native"]
    why = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in native.items()) or "none"
    return f"""
{mode}: {' and '.join(sorted(people))} dial{'s' if len(people) == 1 else ''} the edge; speech {ways}. {first}'s client sends its usual {client_up:.1f} kbps to the edge.
Of {edge['coded'] + sum(native.values())} packets for the origin the edge coded {edge['coded']} (rung {', '.join(edge['rungs'])}); natively went: {why}.
Crossing the hop adds {took['up']['p50']:.1f} ms (p99 {took['up']['p99']:.1f}) up and {took['down']['p50']:.1f} (p99 {took['down']['p99']:.1f}) down. Of the way up, p50 (p99):
  waiting for the second half of the 40 ms    {part['waiting_first']['p50']:5.1f} ({part['waiting_first']['p99']:.1f}) ms for the first half, none for the second
  edge: decoding Opus, coding                 {part['encoding']['p50']:5.1f} ({part['encoding']['p99']:.1f}) ms
  origin: decoding, coding Opus, the hop      {part['decoding']['p50']:5.1f} ({part['decoding']['p99']:.1f}) ms"""


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
    with lab.Lab(out / "logs", a.auralink.resolve(), MODES, hop=True) as running:
        for mode in MODES:
            way = f", {' and '.join(sorted(AT_EDGE[mode]))} over the edge" if mode in AT_EDGE else ""
            print(f"demo: {' and '.join(PEOPLE)} talk for {a.seconds:.0f} s in room {mode}-demo{way} ...", file=sys.stderr)
            results[mode] = call(running, mode, a.seconds, a.browser, out)
        running.check()
        said_cut(running, a.seconds, out)
    print("demo: scoring what was heard ...", file=sys.stderr)
    for mode, result in results.items():
        score(running, result["people"])
        check_heard(mode, result["people"])
    (out / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n" + table(results, a.browser))
    who = next(iter(PEOPLE))
    print("\nTo listen to:")
    for mode in MODES:
        print(f"  {mode:<7} {results[mode]['people'][who]['heard']}")
    print(f"What was said, the other recordings, logs and demo.json: {out} ({time.monotonic() - begin:.0f} s)")
    modes = list(MODES)
    for mode in modes[1:]:
        for who in AT_EDGE.get(mode, PEOPLE):
            saved = saving(results[mode]["people"][who], results[modes[0]]["people"][who], "up_kbps")
            if saved < LEAST_SAVING[mode]:
                busy = ["missed", "resting", "crowded"]
                late = sum(results[mode]["hop"].get("edge", {}).get("native", {}).get(reason, 0) for reason in busy)
                why = f"; {late} packets crossed natively because the engine was late: the machine is too busy" if late else ""
                raise Failed(f"{mode} saved {saved:.1f} % of {who}'s uplink; at least {LEAST_SAVING[mode]} % were to be saved{why}")


if __name__ == "__main__":
    lab.main_guard(main)
