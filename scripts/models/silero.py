"""The bundle `silero-vad`: Silero's voice activity detector, 16 kHz, 32 ms a step. The model is taken as it is."""

from __future__ import annotations

from pathlib import Path

from . import wheels
from .bundle import Graph, Tensor, write_bundle

NAME = "silero-vad"
VERSION = "6.2.3"
WHEEL = f"silero_vad-{VERSION}"

# The package's file for 16 kHz only: the same answers as silero_vad.onnx, without its branch for 8 kHz, and with a batch dimension.
MODEL = {"silero_vad/data/silero_vad_16k_op15.onnx": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49"}
MIT = {"*.dist-info/licenses/LICENSE": "2e63e9a38b6e8fc0c7bc37ce174caca1862870856c6daf5697cfb785e925520b"}

SAMPLE_RATE = 16_000
FRAME = 512
CONTEXT = 64
STATE = 128


def build(folder: Path, downloads: Path) -> None:
    """Writes the bundle as `folder`."""
    model, licence = wheels.read(wheels.wheel(downloads, WHEEL), MODEL | MIT)
    graph = Graph(
        "vad.onnx",
        Tensor("input", ["batch", CONTEXT + FRAME]),
        Tensor("output", ["batch", 1]),
        "state",
        "stateN",
        [2, "batch", STATE],
        sample_rate_input="sr",
    )
    write_bundle(
        folder,
        {
            "kind": "vad",
            "name": NAME,
            "version": VERSION,
            "licence": "MIT",
            "copyright": "Copyright (c) 2020-present Silero Team",
            "origin": f"PyPI wheel silero-vad {VERSION}, file silero_vad_16k_op15.onnx",
            "modifications": "none",
            "sample_rate": SAMPLE_RATE,
            "frame": FRAME,
            "context": CONTEXT,
        },
        {"model": graph.lines()},
        {"vad.onnx": model, "LICENSE": licence},
    )
