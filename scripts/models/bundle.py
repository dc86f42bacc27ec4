"""Writes folders that are complete or not there: built beside their place, then renamed. docs/models.md describes the manifest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

FORMAT = 1
MANIFEST = "manifest.yaml"


class Broken(Exception):
    """Something that the bundles are made of is not what it should be. Says which file, and what to do."""


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph; "batch" in the shape is the number of streams."""

    name: str
    shape: list[int | str]
    dtype: str = "f32"

    def __str__(self) -> str:
        dtype = "" if self.dtype == "f32" else f", dtype: {self.dtype}"
        return f"{{name: {self.name}, shape: {_shape(self.shape)}{dtype}}}"


@dataclass(frozen=True)
class Graph:
    """An ONNX file: one step of it maps input and state to output and next state. States start as zeros."""

    file: str
    input: Tensor
    output: Tensor
    state_in: str
    state_out: str
    state_shape: list[int | str]
    sample_rate_input: str | None = None
    further_states: tuple[tuple[str, str, list[int | str]], ...] = ()
    """Input, output and shape of states beside the first."""
    steps: int = 1
    """Frames of a stream that it takes in one run at most."""

    def lines(self) -> list[str]:
        first = (self.state_in, self.state_out, self.state_shape)
        states = [f"{{input: {source}, output: {sink}, shape: {_shape(shape)}}}" for source, sink, shape in (first, *self.further_states)]
        lines = [
            f"file: {self.file}",
            f"input: {self.input}",
            f"output: {self.output}",
            *([f"state: {states[0]}"] if len(states) == 1 else ["state:", *(f"  - {state}" for state in states)]),
        ]
        if self.sample_rate_input:
            lines.append(f"sample_rate_input: {self.sample_rate_input}")
        if self.steps > 1:
            lines.append(f"steps: {self.steps}")
        return lines


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest(about: dict[str, str | int], parts: dict[str, list[str]], files: dict[str, bytes]) -> str:
    """The text of a manifest: `about` at the top, then each part's lines under its name, then the files."""
    lines = [f"format: {FORMAT}", *(f"{key}: {_scalar(value)}" for key, value in about.items())]
    for name, part in parts.items():
        lines += [f"{name}:", *(f"  {line}" for line in part)]
    lines.append("files:")
    lines += [f"  {name}: {{bytes: {len(data)}, sha256: {sha256(data)}}}" for name, data in sorted(files.items())]
    return "\n".join(lines) + "\n"


def write_bundle(folder: Path, about: dict[str, str | int], parts: dict[str, list[str]], files: dict[str, bytes]) -> None:
    """Writes the files and their manifest as `folder`."""
    write_folder(folder, files | {MANIFEST: manifest(about, parts, files).encode()})


def write_folder(folder: Path, files: dict[str, bytes], links: dict[str, str] | None = None) -> None:
    """Makes `folder` hold exactly these files and symbolic links.

    It is built beside its place. An older folder steps aside by a rename, so nobody ever sees one that is half written; who opens a file
    between the two renames finds none and has to try again. Files that are open keep their content.
    """
    links = links or {}
    if _holds(folder, files, links):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, data in files.items():
            with open(new / name, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, target in links.items():
            (new / name).symlink_to(target)
        new.chmod(0o755)
        old = None
        if folder.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            folder.rename(old / folder.name)
        new.rename(folder)
        if old:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _holds(folder: Path, files: dict[str, bytes], links: dict[str, str]) -> bool:
    """Whether the folder is already as it should be."""
    if not folder.is_dir() or {entry.name for entry in folder.iterdir()} != files.keys() | links.keys():
        return False
    if any(not (folder / name).is_symlink() or os.readlink(folder / name) != target for name, target in links.items()):
        return False
    return all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in files.items())


def _scalar(value: str | int) -> str:
    """YAML of a value. JSON's strings are YAML too, whatever they hold."""
    return json.dumps(value, ensure_ascii=False)


def _shape(shape: list[int | str]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
