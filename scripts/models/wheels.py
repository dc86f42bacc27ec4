"""Files out of the downloaded wheels; each one is checked against the sha256 that it is known by."""

from __future__ import annotations

import fnmatch
import zipfile
from pathlib import Path

from .bundle import Broken, sha256

AGAIN = "Remove the folder and run `make models` again."


def wheel(folder: Path, package: str) -> Path:
    """The wheel of a package, for instance `sora_sdk-2023.3.0`."""
    found = sorted(folder.glob(f"{package}-*.whl"))
    if len(found) != 1:
        raise Broken(f"{folder} holds {len(found)} wheels of {package} where one is needed. {AGAIN}")
    return found[0]


def read(path: Path, names: dict[str, str | None]) -> list[bytes]:
    """The members of a wheel that match the patterns, in their order; the value is the sha256 that the content must have."""
    contents = []
    try:
        with zipfile.ZipFile(path) as archive:
            for pattern, digest in names.items():
                found = fnmatch.filter(archive.namelist(), pattern)
                if len(found) != 1:
                    raise Broken(f"{path} holds {len(found)} files {pattern} where one is needed: is it another version?")
                contents.append(archive.read(found[0]))
                if digest and sha256(contents[-1]) != digest:
                    raise Broken(f"{found[0]} in {path} has sha256 {sha256(contents[-1])}, not {digest}: it is not the file this was written for.")
    except (zipfile.BadZipFile, OSError) as error:
        raise Broken(f"{path} cannot be read: {error}. {AGAIN}") from error
    return contents
