"""libonnxruntime.so with its licences, out of the wheel that carries it."""

from __future__ import annotations

from pathlib import Path

from . import wheels
from .bundle import write_folder

VERSION = "1.32.0"
WHEEL = f"onnxruntime-{VERSION}"
LIBRARY = f"libonnxruntime.so.{VERSION}"


def build(folder: Path, downloads: Path) -> None:
    """Writes the folder: the library under its full name, `libonnxruntime.so` as a link to it, and the licences."""
    # No sha256 here: the wheel differs between machines, and pip has checked it against wheels.txt.
    names = {f"onnxruntime/capi/{LIBRARY}": None, "onnxruntime/LICENSE": None, "onnxruntime/ThirdPartyNotices.txt": None}
    library, licence, notices = wheels.read(wheels.wheel(downloads, WHEEL), names)
    files = {LIBRARY: library, "LICENSE": licence, "ThirdPartyNotices.txt": notices}
    write_folder(folder, files, {"libonnxruntime.so": LIBRARY})
