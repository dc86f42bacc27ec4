"""The video figures of docs/benchmarks.md: a stock browser's camera as it is, and as lean rooms steer it; see --help.

Chromium publishes a film through AuraLink as its camera, with livekit-client's defaults, and the Python client records what it
decoded. Counted is everything on the wire between either of them and AuraLink, IP and UDP headers included, in the last seconds of
each call; scored are the last frames, each against the very frame that was sent (tests/clients/python/score_video.py).

Prints a table and leaves everything in video.json. Encoder, decoder and servers share the machine's cores: frames that one of them
drops are missing in the column frames/s, and a call in which too many are missing is no measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import lab
from lab import Failed

def steered(codec: str, bitrate: str) -> str:
    """The policy of a lean room."""
    return f"mode: lean\n    video: {{ codec: {codec}, max_bitrate: {bitrate} }}"


CALLS = {
    "default": "mode: off",
    "vp8-360k": steered("keep", "360k"),
    "vp9-360k": steered("vp9", "360k"),
    "av1-360k": steered("av1", "360k"),
    "av1-300k": steered("av1", "300k"),
    "av1-400k": steered("av1", "400k"),
    "av1-900k": steered("av1", "900k"),
}
"""Name and what its rooms are."""

LEAST_RATE = 0.85
"""Part of the film's frames that the subscriber has to have decoded for a call to be a measurement."""


def film(running: lab.Lab, a) -> tuple[Path, float]:
    """The film with numbers drawn in and only every Nth frame, for Chromium's fake camera; its frames/s."""
    path = a.out / f"film-{a.size}-{a.every}.y4m"
    source = Path(running.tool("AURALINK_VIDEO")) / f"film-{a.size}.y4m"
    command = [running.tool("AURALINK_PYTHON"), str(lab.CLIENTS / "python" / "picture.py"), str(source), str(path), str(a.every)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr.strip()}")
    print(done.stdout.strip())
    return path, float(done.stdout.split(" at ")[1].split("/")[0])


def call(running: lab.Lab, a, name: str, source: Path, fps: float) -> dict:
    """One call and its figures."""
    folder = a.out / name
    common = ["--url", running.sidecar, "--room", f"{name}-room", "--seconds", str(a.settle + a.seconds + 3)]
    camera = running.browser_client(f"{name}-camera", *common, "--identity", "camera", "--video", f"y4m:{source}", "--timeline")
    viewer = running.python_client(f"{name}-viewer", *common, "--identity", "viewer", "--record", str(folder), "--record-video")
    watching = folder / "viewer-from-camera.y4m"
    deadline = time.monotonic() + 60
    while not watching.exists():
        running.check()
        if time.monotonic() > deadline or camera.child.poll() is not None or viewer.child.poll() is not None:
            raise Failed(f"{name}: no picture arrived; see {camera.log} and {viewer.log}")
        time.sleep(0.1)
    # The browser's estimate of the bandwidth grows for so long.
    time.sleep(a.settle)
    before = lab.busy_cores()
    wire = running.wire(f"{name}-wire", a.seconds).report(a.seconds + 30)
    after = lab.busy_cores()
    sent, seen = camera.report(120), viewer.report(120)
    if wire["dropped"] > 0.02 * sum(flow["packets"] for flow in wire["flows"]):
        raise Failed(f"{name}: wire.py could not count {wire['dropped']} packets: the machine is too busy")
    ports = {f":{port}" for port in running.media_ports}

    def kbps(report: dict, here: str, there: str) -> float:
        own = {pair["local"] for pair in report["ice"]}
        ours = [f for f in wire["flows"] if f[here] in own and ":" + f[there].rsplit(":", 1)[1] in ports]
        return sum(flow["kbps"] for flow in ours)

    video = next(v for v in seen["video"] if v["from"] == "camera")
    score = [running.tool("AURALINK_PYTHON"), str(lab.CLIENTS / "python" / "score_video.py"), str(source), video["y4m"]]
    done = subprocess.run([*score, "--frames", str(int(a.seconds * fps))], capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{name}: {done.stderr.strip()}")
    if not a.keep:
        Path(video["y4m"]).unlink()
    # Frames decoded while the bytes were counted, from the publisher's side of the same seconds.
    layers = [f for f in sent["outbound"] if f["kind"] == "video" and f["bytes"]]
    return {
        "codec": video["codec"],
        "up_kbps": round(kbps(sent, "src", "dst"), 1),
        "down_kbps": round(kbps(seen, "dst", "src"), 1),
        "frames_per_second": round(video["frames"] / (a.settle + a.seconds + 3), 1),
        "busy_cores": round((after[1] - before[1]) / (after[0] - before[0]), 2),
        "layers": [{k: f[k] for k in ("codec", "rid", "width", "height", "scalability", "frames")} for f in layers],
        **json.loads(done.stdout),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--auralink", type=Path, required=True, help="the auralink binary")
    p.add_argument("--only", default="default,vp8-360k,vp9-360k,av1-360k,av1-300k", help=f"comma-separated calls out of {', '.join(CALLS)}")
    p.add_argument("--size", default="360p", choices=["360p", "720p"], help="which film")
    p.add_argument("--every", type=int, default=2, help="only every Nth frame of its 30 a second")
    p.add_argument("--settle", type=float, default=15, help="seconds before the count")
    p.add_argument("--seconds", type=float, default=12, help="length of the count")
    p.add_argument("--keep", action="store_true", help="keep the recordings")
    p.add_argument("--out", type=Path, default=lab.CACHE / "measure" / "video", help="folder for logs and video.json")
    a = p.parse_args()
    for name in a.only.split(","):
        if name not in CALLS:
            p.error(f"--only: {name} is not one of {', '.join(CALLS)}")
    a.out.mkdir(parents=True, exist_ok=True)
    load = os.getloadavg()[0]
    print(f"{lab.machine()}; load average before: {load:.2f}")
    result = {"machine": lab.machine(), "load_average_before": load, "arguments": sys.argv[1:], "calls": {}}
    with lab.Lab(a.out / "lab", a.auralink.resolve(), CALLS) as running:
        source, fps = film(running, a)
        for name in a.only.split(","):
            result["calls"][name] = found = call(running, a, name, source, fps)
            (a.out / "video.json").write_text(json.dumps(result, indent=1) + "\n")
            if name == next(iter(result["calls"])):
                print("\n| call | codec | up kbps | down kbps | VMAF | VMAF p5 | SSIM | frames/s | picture |\n|---|---|---|---|---|---|---|---|---|")
            few = "" if found["frames_per_second"] >= LEAST_RATE * fps else " (too few: no measurement)"
            print(
                f"| {name} | {found['codec']} | {found['up_kbps']:.0f} | {found['down_kbps']:.0f} | {found['vmaf']:.1f} | {found['vmaf_p5']:.1f} "
                f"| {found['ssim']:.4f} | {found['frames_per_second']}{few} | {found['width']}x{found['height']} |",
                flush=True,
            )
    print(f"\nEverything: {a.out / 'video.json'}")


if __name__ == "__main__":
    lab.main_guard(main)
