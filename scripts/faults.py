#!/usr/bin/env python3
"""Can the tests be fooled? Runs those of tests/livekit while each loses the media of a participant: faults.py [--seed N] [--call N] [FILTER ...]

Every test that carries media has to fail then. AURALINK_TEST_FAULT is the switch (tests/livekit/sabotage.rs): participant and moment
are drawn by chance, from the seed and the test's name; the kernel drops the packets, whatever client it is. --call 1 strikes the second
call of a test that makes several. FILTERs are those of `cargo test`; all tests take half an hour. As root.

Prints what failed, as it must; what passed though a call died in it, which is a defect; what the fault never came to, and what carries no
media, with reasons. Exit 0: no defect. Logs are where they always are, under CARGO_TARGET_DIR/tmp/livekit; faults.log has what tests said.
"""
from __future__ import annotations

import argparse
import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent

NO_MEDIA = {
    "faults::no_upstream_is_502": "HTTP and WebSocket requests that are refused",
    "faults::refusals_are_livekits_own": "HTTP and WebSocket requests, and what LiveKit answers",
    "identity::livekit_and_the_sidecar_read_the_same_request": "joins over bare WebSockets, and whom they are taken for",
    "reload::sighup_reloads_and_refuses_by_name": "a configuration that is read again; nobody joins",
    "whip::a_whip_session_without_media_ends": "its subject is that no media comes",
}
"""Tests in which nobody takes part with a real client, and why."""


LOG = "faults.log"
"""What all of them said, and why they failed, beside their logs."""


def outcomes(filters: list[str], fault: str, threads: int) -> dict[str, str]:
    """Runs the tests; `ok`, `FAILED` or `ignored` by name."""
    command = ["cargo", "test", "--workspace", "--locked", "--test", "livekit", "--", "--test-threads", str(threads), *filters]
    found = {}
    folder().mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "AURALINK_TEST_FAULT": fault}
    with (
        open(folder() / LOG, "w") as log,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, errors="replace") as run,
    ):
        for line in run.stdout:
            log.write(line)
            if told := re.match(r"test ([a-z0-9_:]+)(?: - .*)? \.\.\. (ok|FAILED|ignored)", line):
                found[told[1]] = told[2]
                print(line, end="", flush=True)
            elif line.startswith("error"):
                print(line, end="", flush=True)
    if not found:
        sys.exit("faults.py: no test ran")
    return found


def folder() -> pathlib.Path:
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    return target / "tmp" / "livekit"


def listed(title: str, lines: list[str]) -> None:
    print(f"\n{title}: {len(lines)}")
    for line in lines:
        print(f"  {line}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--call", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("filters", nargs="*")
    a = p.parse_args()
    failed, fooled, missed, silent = [], [], [], []
    for name, outcome in sorted(outcomes(a.filters, f"kill-media:{a.seed}:{a.call}", a.threads).items()):
        logs = folder() / name.split("::")[-1]
        if outcome == "ignored":
            continue
        if not (logs / "participants.txt").exists():
            if name in NO_MEDIA:
                silent.append(f"{name}: {NO_MEDIA[name]}")
            else:
                missed.append(f"{name}: nobody took part, and NO_MEDIA in scripts/faults.py doesn't say why")
        elif name in NO_MEDIA:
            missed.append(f"{name}: NO_MEDIA in scripts/faults.py names it, but somebody took part")
        elif not (logs / "fault.txt").exists():
            missed.append(f"{name}: {outcome}, before the fault came" + (f" to call {a.call}" if a.call else ""))
        else:
            what = f"{name}: {(logs / 'fault.txt').read_text()}"
            (failed if outcome == "FAILED" else fooled).append(what)
    listed("failed, as they must", failed)
    listed("carry no media", silent)
    listed("never struck", missed)
    listed("passed though a call died in them", fooled)
    sys.exit(1 if fooled or (missed and not a.call) else 0)


if __name__ == "__main__":
    main()
