"""python -m models WHEELS CACHE: writes the bundles into CACHE/models and ONNX Runtime into CACHE/onnxruntime."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from . import codes, lyra, runtime, silero
from .bundle import Broken
from .tflite_graph import Unsupported


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    downloads, cache = map(Path, arguments)
    for build, folder in (
        (lyra.build, cache / "models" / lyra.NAME),
        *((partial(codes.build, name), cache / "models" / name) for name in codes.NAMES),
        (silero.build, cache / "models" / silero.NAME),
        (runtime.build, cache / "onnxruntime"),
    ):
        try:
            build(folder, downloads)
        except (Broken, Unsupported, OSError) as error:
            print(f"models: {folder} was not made: {error}", file=sys.stderr)
            return 1
        print(f"models: {folder}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
