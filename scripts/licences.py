"""Checks the dependencies against deny.toml: licences, banned crates, sources, yanked versions. Needs nothing but cargo.

It reads `cargo metadata --locked` over all platforms. Advisories need RustSec's database, which comes from a git host: run
`cargo deny check advisories` where that can be reached. Exit code 1: something is not allowed; it is named with what to do.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INDEX = Path(os.environ.get("CARGO_HOME") or Path.home() / ".cargo") / "registry" / "index"


def allowed(expression: str, licences: set[str]) -> bool:
    """Whether an SPDX expression can be satisfied with these licences; "/" is Cargo's old OR."""
    tokens = re.findall(r"[()]|[^\s()/]+|/", expression)

    def take(word: str) -> bool:
        if tokens and tokens[0] == word:
            tokens.pop(0)
            return True
        return False

    def either() -> bool:
        value = every()
        while take("OR") or take("/"):
            value = every() or value
        return value

    def every() -> bool:
        value = one()
        while take("AND"):
            value = one() and value
        return value

    def one() -> bool:
        if take("("):
            value = either()
            if not take(")"):
                raise ValueError(expression)
            return value
        name = tokens.pop(0)
        if take("WITH"):
            name += " WITH " + tokens.pop(0)
        return name in licences

    try:
        value = either()
    except (IndexError, ValueError):
        return False
    return value and not tokens


def yanked(name: str, version: str) -> bool | None:
    """What cargo's cache of the registry's index says; None where it holds nothing about this version."""
    low = name.lower()
    folder = {1: "1", 2: "2", 3: f"3/{low[0]}"}.get(len(low), f"{low[:2]}/{low[2:4]}")
    for path in INDEX.glob(f"*/.cache/{folder}/{low}"):
        for entry in path.read_bytes().split(b"\0"):
            if entry.startswith(b"{") and (found := json.loads(entry))["vers"] == version:
                return found["yanked"]
    return None


def main() -> int:
    rules = tomllib.loads((ROOT / "deny.toml").read_text())
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(f"licences: {' '.join(command)} failed:\n{done.stderr.strip()}", file=sys.stderr)
        return 1
    common = set(rules["licenses"]["allow"])
    extra = {e["crate"]: set(e["allow"]) for e in rules["licenses"].get("exceptions", [])}
    banned = {b["crate"] for b in rules["bans"].get("deny", [])}
    problems, unknown, packages = [], 0, json.loads(done.stdout)["packages"]
    for package in packages:
        name, version, source = package["name"], package["version"], package["source"]
        what = f"{name} {version}"
        licence = package["license"]
        if not licence or not allowed(licence, common | extra.get(name, set())):
            problems.append(f"{what}: licence {licence or 'not stated'} is not allowed by deny.toml; use another crate, or add it there with the reason")
        if name in banned:
            problems.append(f"{what} is banned by deny.toml; `cargo tree -i {name}` says who needs it")
        if source is None:
            if not Path(package["manifest_path"]).resolve().is_relative_to(ROOT):
                problems.append(f"{what} comes from {package['manifest_path']}, outside this tree")
        elif not source.startswith(("registry+", "sparse+")):
            problems.append(f"{what} comes from {source}; only the registry is allowed")
        else:
            gone = yanked(name, version)
            unknown += gone is None
            if gone:
                problems.append(f"{what} was yanked; `cargo update -p {name}`")
    for problem in problems:
        print(f"licences: {problem}", file=sys.stderr)
    note = f", {unknown} of them without an entry in cargo's index cache (yanked or not is unknown)" if unknown else ""
    print(f"licences: {len(packages)} packages{note}, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
