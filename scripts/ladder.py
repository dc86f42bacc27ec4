"""Quality of every rung of the ladder through AuraLink's own engine: ladder.py --tool LADDER [--losses] [--out FOLDER] [--clips N] [--rungs L1,L2] [--loss PERCENT]

23 clips of 8 s in five languages, a talker each (Debian's asterisk-core-sounds), as a client sends them (Opus 32 kbps, 20 ms), through
`src/engine/examples/ladder.rs`, and scored by tests/clients/python/score.py against what was said: at the usual level (-26 dBFS) and 20 dB below it
(-46 dBFS), where the listener's sound is raised by 20 dB before it is scored. Prints the table of docs/benchmarks.md and keeps everything in the folder.
With --losses instead: 8 clips over a hop that loses 10 and 20 % of its packets, evenly and in bursts of a mean of 60 ms (80 ms with packets of 40 ms), with copies
as AuraLink sends them while a hop loses packets. Run both by `make ladder`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from hashlib import sha256
from pathlib import Path

import numpy as np
import speech

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/clients/python"))
import score  # noqa: E402

SECONDS = 8
# Clips of each, 23 in all.
LANGUAGES = {"en": 5, "es": 5, "fr": 5, "it": 4, "ru": 4}
RUNGS = ["native", "L1", "L2", "L3", "L4", "L5", "L6"]
QUIET = -20
# codec-ladder.md, "Loss": the same with copies of the packet before the last two, 20 ms packets, no second codec in the way: nothing lost, evenly 10 and 20 %, in bursts.
LOSSY = {
    "L2": [(3.58, 2.95), (3.45, 2.66), (3.34, 2.19), (3.16, 2.28), (2.98, 1.94)],
    "L4": [(4.21, 3.93), (4.15, 3.60), (3.97, 2.86), (3.84, 2.88), (3.64, 2.52)],
}
LOSSES = ["none", "10 %", "20 %", "10 % in bursts", "20 % in bursts"]
# What a hop packet holds in ms, and how many packets behind its copy comes: AuraLink's, and codec-ladder.md's.
PACKETS = {40: 2, 20: 3}
# codec-ladder.md, "after Opus 32k tandem": ViSQOL, PESQ-wb; the last leg there is Opus 32k.
TANDEM = {"L1": (2.84, 2.40), "L2": (3.36, 2.93), "L3": (3.63, 3.29), "L4": (3.93, 3.76), "L5": (4.08, 3.99)}


def clips(folder: Path) -> list[Path]:
    """The clips, made once: sentences of a talker in speech.py's fixed order, 0.3 s between them, each at -26 dBFS."""
    names = [f"{language}-{number}" for language, count in LANGUAGES.items() for number in range(count)]
    files = [folder / f"{name}.wav" for name in names]
    if all(file.exists() for file in files):
        return files
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        for language, count in LANGUAGES.items():
            sounds = speech.unpack(f"asterisk-core-sounds-{language}-g722", Path(work))
            talkers = sorted(path for path in sounds.iterdir() if path.is_dir() and any(path.rglob("*.g722")))
            if not talkers:
                sys.exit(f"{sounds}: no recordings; the package has changed, adapt scripts/ladder.py")
            parts = speech.prompts(talkers[0])
            said = np.concatenate([y for x in parts for y in (x, speech.pause(0.3))])
            size = SECONDS * speech.RATE
            if len(said) < count * size:
                sys.exit(f"{talkers[0]}: {len(said) / speech.RATE:.0f} s of speech; {count * SECONDS} s are needed")
            for number in range(count):
                # By a rename, so that what an interrupted run has left is no clip.
                part = folder / f".{language}-{number}.wav"
                speech.save(part, said[number * size : (number + 1) * size])
                part.rename(folder / f"{language}-{number}.wav")
    return files


def points(task: tuple[str, str, float]) -> tuple[float, float]:
    """ViSQOL and PESQ-wb of a recording that is raised by so many dB first."""
    reference, recording, gain = task
    heard = np.clip(score.load(recording) * 10 ** (gain / 20), -1, 1)
    # Silence after it, so that the stretch can be found whole though it comes late.
    said = np.concatenate([score.load(reference), np.zeros(score.RATE)])
    found = score.score(said, heard[: SECONDS * score.RATE])
    return found["visqol"], found["pesq_wb"]


def measure(tool: Path, files: list[Path], rungs: list[str], out: Path, options: list[str], gain: int, pool: ProcessPoolExecutor) -> list[dict]:
    """A row for each clip and rung: what the tool says of it, and its points."""
    command = [str(tool), f"rungs={','.join(rungs)}", f"gain={gain}", *options, *map(str, files), str(out)]
    out.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{tool} failed, see above")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    tasks = [(str(files[0].parent / f"{row['clip']}.wav"), str(out / f"{row['clip']}-{row['rung']}.wav"), -gain) for row in rows]
    for row, (visqol, pesq) in zip(rows, pool.map(points, tasks), strict=True):
        row.update(visqol=visqol, pesq=pesq, level=gain)
    return rows


def mean(rows: list[dict], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))


def table(rows: list[dict], rungs: list[str]) -> str:
    lines = [
        "| rung | kbps | −26 dBFS | codec-ladder.md | difference | −46 dBFS | difference | on another rung, −26 / −46 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rung in rungs:
        usual, quiet = ([r for r in rows if r["rung"] == rung and r["level"] == level] for level in (0, QUIET))
        pair = f"{mean(usual, 'visqol'):.2f} / {mean(usual, 'pesq'):.2f}"
        said, change = "", ""
        if rung in TANDEM:
            said = "{:.2f} / {:.2f}".format(*TANDEM[rung])
            change = f"{mean(usual, 'visqol') - TANDEM[rung][0]:+.2f} / {mean(usual, 'pesq') - TANDEM[rung][1]:+.2f}"
        low, drop = "", ""
        if quiet:
            low = f"{mean(quiet, 'visqol'):.2f} / {mean(quiet, 'pesq'):.2f}"
            drop = f"{mean(quiet, 'visqol') - mean(usual, 'visqol'):+.2f} / {mean(quiet, 'pesq') - mean(usual, 'pesq'):+.2f}"
        elsewhere = " / ".join(f"{100 * np.mean([1 - r['used'].get(rung, 0) for r in part]):.1f} %" for part in (usual, quiet) if part)
        kbps = f"{mean(usual, 'kbps'):.1f}" if rung != "native" else ""
        lines.append(f"| {rung} | {kbps} | {pair} | {said} | {change} | {low} | {drop} | {elsewhere if rung != 'native' else ''} |")
    return "\n".join(lines)


def losses(a: argparse.Namespace, files: list[Path], pool: ProcessPoolExecutor) -> tuple[list[dict], str]:
    """Rows of LOSSY's rungs over every loss and packet length, and their table."""
    rows = []
    for ms, distance in PACKETS.items():
        for number, name in enumerate(LOSSES):
            percent, burst = (0, 10, 20, 10, 20)[number], 80 / 40 if ms == 40 else 60 / 20
            options = [f"packet={ms}", f"copies={distance}", f"loss={percent}", *([f"burst={burst}"] if number > 2 else [])]
            found = measure(a.tool, files, list(LOSSY), a.out / f"{ms}-{number}", [*a.option, *options], 0, pool)
            rows += [{**row, "packet": ms, "loss": name} for row in found]
    lines = [f"| rung, packets | {' | '.join(LOSSES)} |", f"|---|{'---|' * len(LOSSES)}"]
    for rung, said in LOSSY.items():
        for ms in PACKETS:
            cells = []
            for name in LOSSES:
                part = [r for r in rows if (r["rung"], r["packet"], r["loss"]) == (rung, ms, name)]
                shares = f" ({100 * mean(part, 'lost'):.0f}, {100 * mean(part, 'concealed'):.1f} %)" if name != "none" else ""
                cells.append(f"{mean(part, 'visqol'):.2f} / {mean(part, 'pesq'):.2f}{shares}")
            lines.append(f"| {rung}, {ms} ms | {' | '.join(cells)} |")
        lines.append(f"| codec-ladder.md, 20 ms | {' | '.join('{:.2f} / {:.2f}'.format(*pair) for pair in said)} |")
    return rows, "\n".join(lines)


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auralink"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tool", type=Path, required=True, help="the example `ladder`, built with --release")
    p.add_argument("--out", type=Path, default=cache / "ladder", help="where recordings and ladder.json go")
    p.add_argument("--clips", type=int, help="only so many, evenly over the languages")
    p.add_argument("--rungs", default=",".join(RUNGS))
    p.add_argument("--loss", type=float, default=0, help="percent of hop packets, evenly random, concealed; the usual level only")
    p.add_argument("--usual", action="store_true", help="the usual level only")
    p.add_argument("--losses", action="store_true", help="what loss costs, see above")
    p.add_argument("--option", action="append", default=[], help="NAME=VALUE for the tool, for instance local=32000")
    a = p.parse_args()
    if not a.tool.exists():
        sys.exit(f"{a.tool} is missing: cargo build --release -p auralink-engine --example ladder")
    key = sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in ("speech.py",)) + repr((SECONDS, LANGUAGES)).encode()).hexdigest()[:16]
    files = clips(cache / f"ladder-clips-{key}")
    clips_wanted = a.clips or (8 if a.losses else len(files))
    files = [files[k * len(files) // clips_wanted] for k in range(clips_wanted)]
    rungs, rows = a.rungs.split(","), []
    with ProcessPoolExecutor() as pool:
        if a.losses:
            rows, text = losses(a, files, pool)
            (a.out / "losses.json").write_text(json.dumps(rows, indent=1))
            print(f"{len(files)} clips of {SECONDS} s; ViSQOL / PESQ-wb (packets lost, of which neither they nor a copy came)\n{text}")
            return
        for gain in (0,) if a.loss or a.usual else (0, QUIET):
            rows += measure(a.tool, files, rungs, a.out / str(gain), [*a.option, f"loss={a.loss}"], gain, pool)
    (a.out / "ladder.json").write_text(json.dumps(rows, indent=1))
    print(f"{len(files)} clips of {SECONDS} s; ViSQOL / PESQ-wb" + (f"; {100 * mean(rows, 'lost'):.1f} % of hop packets lost" if a.loss else ""))
    print(table(rows, rungs))


if __name__ == "__main__":
    main()
