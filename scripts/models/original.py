"""The TFLite originals and the converted graphs, run frame by frame for the tests."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from . import lyra
from .tflite_graph import Subgraph

# Two sets of TFLite's own kernels: the optimised ones and the reference ones that define what the operators mean.
FAST, REFERENCE = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES, OpResolverType.BUILTIN_REF


def place(variable: str) -> Path:
    """The folder or file that make.sh names."""
    if variable not in os.environ:
        raise RuntimeError(f"{variable} is not set: start these tests with scripts/models/make.sh --test")
    return Path(os.environ[variable])


@cache
def originals() -> dict[str, bytes]:
    return lyra.originals(place("AURALINK_MODEL_WHEELS"))


def interpreter(name: str, kernels: OpResolverType = FAST, keep: bool = False) -> Interpreter:
    """`keep`: intermediate tensors can be read after each frame."""
    made = Interpreter(
        model_content=originals()[name],
        num_threads=1,
        experimental_op_resolver_type=kernels,
        experimental_preserve_all_tensors=keep,
    )
    made.allocate_tensors()
    return made


def step(runner: Interpreter, frame: np.ndarray) -> np.ndarray:
    """One frame through a graph with one input and one output; the interpreter keeps the state."""
    source, sink = runner.get_input_details()[0], runner.get_output_details()[0]
    runner.set_tensor(source["index"], frame.reshape(source["shape"]))
    runner.invoke()
    return runner.get_tensor(sink["index"]).reshape(-1)


def run_original(name: str, frames: np.ndarray, kernels: OpResolverType = FAST) -> np.ndarray:
    """[count, in] -> [count, out], from an initial state."""
    runner = interpreter(name, kernels)
    return np.stack([step(runner, frame) for frame in frames])


def real(runner: Interpreter, graph: Subgraph, tensor: int) -> np.ndarray:
    """A computed tensor as f32 [batch, channels, 1, time]; int8 is multiplied out."""
    value = runner.get_tensor(tensor)
    if value.dtype == np.int8:
        scale, zero = step_of(graph, tensor)
        value = (value.astype(np.float32) - zero) * scale
    return value.transpose(0, 3, 2, 1) if value.ndim == 4 else value.reshape(len(value), -1)


def step_of(graph: Subgraph, tensor: int) -> tuple[np.float32, np.float32]:
    """Scale and zero point of an int8 tensor."""
    quantization = graph.graph.Tensors(tensor).Quantization()
    return np.float32(quantization.ScaleAsNumpy()[0]), np.float32(quantization.ZeroPointAsNumpy()[0])


def session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bundled(name: str) -> onnxruntime.InferenceSession:
    """encoder.onnx or decoder.onnx of the bundle that was made."""
    return session((place("AURALINK_MODELS") / lyra.NAME / name).read_bytes())


def run_converted(graph: onnxruntime.InferenceSession, frames: np.ndarray) -> np.ndarray:
    """[count, batch, in] -> [count, batch, out], from an initial state."""
    source, held = graph.get_inputs()
    state = np.zeros((frames.shape[1], held.shape[1]), np.float32)
    outputs = []
    for frame in frames:
        output, state = graph.run(None, {source.name: frame, held.name: state})
        outputs.append(output)
    return np.stack(outputs)


def snr(wanted: np.ndarray, got: np.ndarray) -> float:
    """Signal to difference, dB."""
    wanted, got = wanted.astype(np.float64), got.astype(np.float64)
    return 10 * np.log10((wanted**2).sum() / max(((wanted - got) ** 2).sum(), 1e-30))
