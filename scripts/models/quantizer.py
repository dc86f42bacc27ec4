"""Takes the codebooks of a residual vector quantizer out of its TFLite graph.

The graph itself is not converted: a stage is argmin over the distances to 16 vectors, which a few lines of Rust do in less time than a
runtime needs to be called.
"""

from __future__ import annotations

import re

import numpy as np

from .tflite_graph import Subgraph, Unsupported

NAME = re.compile(r"transpose(?:_(\d+))?")


def codebooks(decode: Subgraph, stages: int, entries: int, dimension: int) -> np.ndarray:
    """The codebooks, f32 [stages, entries, dimension], out of the graph that decodes. They are called transpose, transpose_1, ..."""
    found: dict[int, np.ndarray] = {}
    for tensor in range(decode.graph.TensorsLength()):
        match = NAME.fullmatch(decode.name(tensor))
        if match and decode.shape(tensor) == [entries, dimension] and decode.constant(tensor) is not None:
            found[int(match[1] or 0)] = decode.values(tensor)
    if sorted(found) != list(range(stages)):
        raise Unsupported(f"the quantizer has codebooks {sorted(found)}; {stages} of {entries} x {dimension} are needed")
    return np.stack([found[stage] for stage in range(stages)])
