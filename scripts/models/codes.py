"""Bundles of Lyra v2 in the form that most codecs are exported in: the quantizer is in the graph, integer codes come out and go in.

`lyra2-codes` computes what `lyra2` does. `lyra2-24k` is what a codec of another rate and frame looks like: 24 kHz, frames of 40 ms (two of
Lyra's in one step), a resampler with a state of its own in each graph. Neither is better than `lyra2`: they are how the engine's other half
is tested with real weights, and a pattern for further codecs (docs/models.md).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import lyra, wheels
from .bundle import Graph, Tensor, write_bundle
from .convert import IR_VERSION, OPSET, STATE_IN, STATE_OUT, Converted, convert
from .quantizer import codebooks
from .tflite_graph import load

NAMES = ("lyra2-codes", "lyra2-24k")
MODIFICATIONS = "converted from TFLite to ONNX by the AuraLink project, with the quantizer in the graphs"
MODIFICATIONS_24K = MODIFICATIONS + ", two frames a step, and resamplers between 24 and 16 kHz"

# Quantizer stages that L1 and L2 send of each of Lyra's frames.
L1, L2 = 16, 30

RESAMPLER_IN, RESAMPLER_OUT = "resampler_in", "resampler_out"
# The resamplers' filter runs at 48 kHz, which both rates divide. Half its length is what a resampler delays by: 2 ms.
FILTER = 193
CUTOFF, FILTER_RATE = 7_600, 48_000


class Graphs:
    """Nodes and constants of a graph in the making. Values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def node(self, kind: str, inputs: list[str], output: str | None = None, **attributes) -> str:
        output = output or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: np.ndarray) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(values), name))
        return name

    def integers(self, *values: int) -> str:
        return self.constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def part(self, value: str, first: int, last: int) -> str:
        """Columns of [batch, columns]."""
        return self.node("Slice", [value, self.integers(first), self.integers(last), self.integers(1)])

    def inline(self, converted: Converted, prefix: str, step: int, given: dict[str, str]) -> dict[str, str]:
        """The converted graph once more; `given` are the values of its inputs. Returns those of its outputs. Weights are shared."""
        graph = converted.model.graph
        names = dict(given)
        for weight in graph.initializer:
            names[weight.name] = f"{prefix}_{weight.name}"
            if names[weight.name] not in self.initializers:
                copy = onnx.TensorProto()
                copy.CopyFrom(weight)
                copy.name = names[weight.name]
                self.initializers[copy.name] = copy

        def renamed(name: str) -> str:
            return names.setdefault(name, f"{prefix}{step}_{name}") if name else name

        for node in graph.node:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name = renamed(node.name)
            del copy.input[:], copy.output[:]
            copy.input.extend(map(renamed, node.input))
            copy.output.extend(map(renamed, node.output))
            self.nodes.append(copy)
        return {output.name: names[output.name] for output in graph.output}

    def model(self, name: str, inputs: list[Tensor], outputs: list[Tensor], about: dict[str, str]) -> bytes:
        kinds = {"f32": TensorProto.FLOAT, "i64": TensorProto.INT64}

        def values(tensors: list[Tensor]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(tensor.name, kinds[tensor.dtype], tensor.shape) for tensor in tensors]

        graph = helper.make_graph(self.nodes, name, values(inputs), values(outputs), list(self.initializers.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="auralink")
        for key in sorted(about):
            model.metadata_props.add(key=key, value=about[key])
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def order(steps: int) -> list[tuple[int, int]]:
    """Which step's which stage each code of a frame is: first what L1 sends of all steps, then the rest."""
    return [(step, stage) for stages in (range(L1), range(L1, L2)) for step in range(steps) for stage in stages]


def taps(up: int, down: int) -> np.ndarray:
    """[up, 1, taps + 1]: for each of `up` outputs a step the filter over the inputs, of which a step takes `down`; newest last."""
    time = np.arange(FILTER) - (FILTER - 1) / 2
    window = np.kaiser(FILTER, 6.0)
    response = up * 2 * CUTOFF / FILTER_RATE * np.sinc(2 * CUTOFF / FILTER_RATE * time) * window
    length = history(up) + 1
    kernels = np.zeros((up, 1, length + 1), np.float32)
    for output in range(up):
        # At 48 kHz a step is up * down ticks; output `output` stands at tick output * down, input k at tick k * up.
        for source in range(-length + 1, 2):
            tick = output * down - source * up
            if 0 <= tick < FILTER:
                kernels[output, 0, source + length - 1] = response[tick]
    return kernels


def history(up: int) -> int:
    """Samples of before that a resampler keeps."""
    return -(-FILTER // up) - 1


def resample(graphs: Graphs, value: str, count: int, up: int, down: int, output: str | None = None) -> tuple[str, int]:
    """`count` samples a stream at `up` / `down` times the rate; the state goes in and out. Returns name and count."""
    kept = history(up)
    whole = graphs.node("Concat", [RESAMPLER_IN, value], axis=1)
    graphs.node("Slice", [whole, graphs.integers(count), graphs.integers(count + kept), graphs.integers(1)], RESAMPLER_OUT)
    shaped = graphs.node("Unsqueeze", [whole, graphs.integers(1)])
    filters = graphs.constant(f"filter_{up}_{down}", taps(up, down))
    filtered = graphs.node("Conv", [shaped, filters], strides=[down])
    turned = graphs.node("Transpose", [filtered], perm=[0, 2, 1])
    result = graphs.node("Reshape", [turned, graphs.integers(0, count // down * up)], output)
    return result, count // down * up


def encoder(converted: Converted, books: np.ndarray, steps: int, wide: bool, about: dict[str, str], name: str) -> tuple[bytes, Graph]:
    """From `steps` of Lyra's frames to codes [batch, steps * L2]."""
    graphs, frame = Graphs(), lyra.FRAME * steps * 3 // 2 if wide else lyra.FRAME * steps
    audio = resample(graphs, "audio", frame, 2, 3)[0] if wide else "audio"
    state, columns = STATE_IN, []
    for step in range(steps):
        part = graphs.part(audio, step * lyra.FRAME, (step + 1) * lyra.FRAME)
        made = graphs.inline(converted, "encoder", step, {"audio": part, STATE_IN: state})
        state, rest = made[STATE_OUT], made["features"]
        for stage in range(L2):
            book = graphs.constant(f"book_{stage}", books[stage])
            # [batch, 1, dimension] - [entries, dimension]
            apart = graphs.node("Sub", [graphs.node("Unsqueeze", [rest, graphs.integers(1)]), book])
            distance = graphs.node("ReduceSum", [graphs.node("Mul", [apart, apart]), graphs.integers(2)], keepdims=0)
            code = graphs.node("ArgMin", [distance], axis=1, keepdims=1)
            columns.append(code)
            if stage + 1 < L2:
                entry = graphs.node("Gather", [book, graphs.node("Squeeze", [code, graphs.integers(1)])])
                rest = graphs.node("Sub", [rest, entry])
    graphs.node("Concat", [columns[step * L2 + stage] for step, stage in order(steps)], "codes", axis=1)
    graphs.node("Identity", [state], STATE_OUT)
    source, sink = Tensor("audio", ["batch", frame]), Tensor("codes", ["batch", steps * L2], "i64")
    return finish(graphs, f"{name}_encoder", "encoder.onnx", source, sink, converted.state_size, history(2) if wide else 0, about)


def decoder(converted: Converted, books: np.ndarray, steps: int, wide: bool, about: dict[str, str], name: str) -> tuple[bytes, Graph]:
    """From codes to `steps` of Lyra's frames. A code of -1 is one that didn't come: it adds nothing."""
    graphs, frame = Graphs(), lyra.FRAME * steps * 3 // 2 if wide else lyra.FRAME * steps
    entries = graphs.constant("books", books[:L2].reshape(-1, lyra.FEATURES))
    starts = graphs.constant("starts", np.arange(L2, dtype=np.int64) * lyra.ENTRIES)
    zero = graphs.constant("zero", np.array(0, np.int64))
    places = {place: column for column, place in enumerate(order(steps))}
    state, parts = STATE_IN, []
    for step in range(steps):
        columns = graphs.integers(*(places[step, stage] for stage in range(L2)))
        codes = graphs.node("Gather", ["codes", columns], axis=1)
        came = graphs.node("Cast", [graphs.node("Not", [graphs.node("Less", [codes, zero])])], to=TensorProto.FLOAT)
        rows = graphs.node("Add", [graphs.node("Max", [codes, zero]), starts])
        vectors = graphs.node("Mul", [graphs.node("Gather", [entries, rows]), graphs.node("Unsqueeze", [came, graphs.integers(2)])])
        features = graphs.node("ReduceSum", [vectors, graphs.integers(1)], keepdims=0)
        made = graphs.inline(converted, "decoder", step, {"features": features, STATE_IN: state})
        state = made[STATE_OUT]
        parts.append(made["audio"])
    if wide:
        resample(graphs, graphs.node("Concat", parts, axis=1), lyra.FRAME * steps, 3, 2, "audio")
    else:
        graphs.node("Concat", parts, "audio", axis=1)
    graphs.node("Identity", [state], STATE_OUT)
    source, sink = Tensor("codes", ["batch", steps * L2], "i64"), Tensor("audio", ["batch", frame])
    return finish(graphs, f"{name}_decoder", "decoder.onnx", source, sink, converted.state_size, history(3) if wide else 0, about)


def finish(
    graphs: Graphs, name: str, file: str, source: Tensor, sink: Tensor, state: int, kept: int, about: dict[str, str]
) -> tuple[bytes, Graph]:
    shape, kept_shape = ["batch", state], ["batch", kept]
    further = ((RESAMPLER_IN, RESAMPLER_OUT, kept_shape),) if kept else ()
    inputs = [source, Tensor(STATE_IN, shape), *(Tensor(given, size) for given, _, size in further)]
    outputs = [sink, Tensor(STATE_OUT, shape), *(Tensor(made, size) for _, made, size in further)]
    model = graphs.model(name.replace("-", "_"), inputs, outputs, about)
    return model, Graph(file, source, sink, STATE_IN, STATE_OUT, shape, further_states=further)


def build(name: str, folder: Path, downloads: Path) -> None:
    """Writes the bundle `name` as `folder`."""
    wide = name == "lyra2-24k"
    steps = 2 if wide else 1
    modifications = MODIFICATIONS_24K if wide else MODIFICATIONS
    files = lyra.originals(downloads)
    about = {"copyright": lyra.COPYRIGHT, "licence": lyra.LICENCE, "modifications": modifications, "origin": lyra.ORIGIN}
    books = codebooks(load(files["quantizer.tflite"])[0], lyra.STAGES, lyra.ENTRIES, lyra.FEATURES).astype(np.float32)
    sound, features = load(files["soundstream_encoder.tflite"]), load(files["lyragan.tflite"])
    encodes, encoder_graph = encoder(convert(sound, "lyra2_encoder", "audio", "features", about), books, steps, wide, about, name)
    decodes, decoder_graph = decoder(convert(features, "lyra2_decoder", "features", "audio", about), books, steps, wide, about, name)
    (licence,) = wheels.read(wheels.wheel(downloads, lyra.WHEEL), {"*.dist-info/LICENSE": lyra.APACHE})
    notice = lyra.notice("encoder.onnx and decoder.onnx", "its codebooks are constants of the graphs that give and take its indices")
    if wide:
        notice += "A step takes two frames, and resamplers between 24 and 16 kHz were added.\n"
    write_bundle(
        folder,
        {
            "kind": "codec",
            "name": name,
            "version": lyra.VERSION,
            "licence": lyra.LICENCE,
            "copyright": lyra.COPYRIGHT,
            "origin": lyra.ORIGIN,
            "modifications": modifications,
            "sample_rate": 24_000 if wide else lyra.SAMPLE_RATE,
            "frame": encoder_graph.input.shape[1],
            # Each of the two resamplers: half its filter.
            **({"delay": (FILTER - 1) * 24_000 // FILTER_RATE} if wide else {}),
        },
        {
            "encoder": encoder_graph.lines(),
            "decoder": decoder_graph.lines(),
            "codes": [f"stages: {L2 * steps}", f"entries: {lyra.ENTRIES}"],
            "rungs": [f"L1: {L1 * steps}", f"L2: {L2 * steps}"],
        },
        {"encoder.onnx": encodes, "decoder.onnx": decodes, "LICENSE": licence, "NOTICE": notice.encode()},
    )
