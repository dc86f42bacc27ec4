"""The converted graphs against the TFLite originals, on real speech."""

from __future__ import annotations

import unittest

import numpy as np
import onnx
from onnx import helper

from . import lyra, original, quantizer, speech
from .convert import convert
from .original import snr
from .tflite_graph import Subgraph, Unsupported, load

ENCODER, DECODER, QUANTIZER = lyra.ORIGINALS
SECONDS = 6.0


def features(talker: str) -> np.ndarray:
    """What the original encoder says of a talker, [frames, 64]."""
    return original.run_original(ENCODER, speech.frames(speech.talker(talker, SECONDS), lyra.FRAME))


def residual(codebooks: np.ndarray, frames: np.ndarray, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """What the Rust quantizer does: indices [frames, stages], and the sum of the vectors that they name."""
    rest, indices = frames.copy(), []
    for book in codebooks[:stages]:
        indices.append(((rest[:, None] - book) ** 2).sum(-1).argmin(1))
        rest = rest - book[indices[-1]]
    return np.stack(indices, 1), sum(book[index] for book, index in zip(codebooks, indices, strict=False))


def codebooks() -> np.ndarray:
    path = original.place("AURALINK_MODELS") / lyra.NAME / "codebooks.f32"
    return np.fromfile(path, "<f4").reshape(lyra.STAGES, lyra.ENTRIES, lyra.FEATURES)


class Operators(unittest.TestCase):
    """Each operator by itself: it gets the very inputs that the original's had, so nothing adds up and the bounds are tight."""

    def check(self, name: str, frames: np.ndarray, source: str, sink: str) -> None:
        subgraphs = load(original.originals()[name])
        graph, converted = subgraphs[0], convert(subgraphs, "test", source, sink, {})
        runner = original.interpreter(name, original.REFERENCE, keep=True)
        for frame in frames:
            original.step(runner, frame)
        producer = {output: node for node in converted.model.graph.node for output in node.output}
        constants = {tensor.name: tensor for tensor in converted.model.graph.initializer}
        compared = 0
        for operator in graph.operators():
            outputs = [tensor for tensor in operator.outputs if tensor in converted.names]
            if operator.name in ("QUANTIZE", "DEQUANTIZE", "READ_VARIABLE") or not outputs:
                continue
            values = [converted.names[tensor] for tensor in outputs]
            given = {converted.names[tensor]: tensor for tensor in converted.names if converted.names[tensor] not in values}
            got = self.alone(values, given, producer, constants, lambda tensor: original.real(runner, graph, tensor))
            for tensor, value in zip(outputs, got, strict=True):
                with self.subTest(operator=str(operator), tensor=graph.name(tensor)):
                    self.compare(runner, graph, tensor, value, converted.through.get(tensor, tensor))
                    compared += 1
        self.assertGreater(compared, 90)

    @staticmethod
    def alone(values: list[str], given: dict[str, int], producer: dict, constants: dict, real) -> list[np.ndarray]:
        """A model of the nodes only that lead from what the original has too to these values."""
        nodes, feeds, used, open_ends = {}, {}, {}, list(values)
        while open_ends:
            name = open_ends.pop()
            if name in given:
                feeds[name] = real(given[name])
            elif name in constants:
                used[name] = constants[name]
            elif producer[name].name not in nodes:
                nodes[producer[name].name] = producer[name]
                open_ends += producer[name].input
        # In the order of the whole graph, which is one in which they can run.
        body = [node for node in {id(node): node for node in producer.values()}.values() if node.name in nodes]
        inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, value.shape) for name, value in feeds.items()]
        outputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in values]
        graph = helper.make_graph(body, "nodes", inputs, outputs, list(used.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
        return original.session(model.SerializeToString()).run(None, feeds)

    def compare(self, runner, graph: Subgraph, tensor: int, got: np.ndarray, through: int) -> None:
        wanted = original.real(runner, graph, tensor)
        self.assertEqual(wanted.size, got.size)
        got = got.reshape(wanted.shape)
        if runner.get_tensor(tensor).dtype == np.int8:
            # The original rounds to a step and saturates; its fixed-point arithmetic may land on the step beside the nearest.
            scale, zero = original.step_of(graph, tensor)
            got = got.clip((-128 - zero) * scale, (127 - zero) * scale)
            bound = 1.01 * scale
        else:
            bound = 1e-5 * max(1.0, float(np.abs(wanted).max()))
            if through != tensor and runner.get_tensor(through).dtype == np.int8:
                # The original has rounded on the way, and its bias too.
                bound += 1.1 * original.step_of(graph, through)[0]
        self.assertLessEqual(float(np.abs(wanted - got).max()), bound)

    def test_every_operator_of_the_encoder(self) -> None:
        self.check(ENCODER, speech.frames(speech.talker("a", 1.0), lyra.FRAME), "audio", "features")

    def test_every_operator_of_the_decoder(self) -> None:
        self.check(DECODER, features("a")[:50], "features", "audio")


class Streams(unittest.TestCase):
    """Whole seconds from the initial state on, each side with its own state. The original computes the middle of its graphs in int8 and two
    sets of its own kernels agree to 23-24 dB only, so this cannot be exact: it must be about as near as they are to each other."""

    def check(self, name: str, file: str, frames: np.ndarray, floor: float) -> None:
        wanted = original.run_original(name, frames)
        other = original.run_original(name, frames, original.REFERENCE)
        got = original.run_converted(original.bundled(file), frames[:, None])[:, 0]
        self.assertGreater(snr(wanted, got), floor)
        self.assertGreater(snr(wanted, got), snr(wanted, other) - 4.0)
        # Nothing drifts: the last second is as near as the whole.
        self.assertGreater(snr(wanted[-50:], got[-50:]), floor - 1.5)

    def test_encoder(self) -> None:
        for talker in "ab":
            with self.subTest(talker=talker):
                frames = speech.frames(speech.talker(talker, SECONDS), lyra.FRAME)
                self.check(ENCODER, "encoder.onnx", frames, 20.0)

    def test_decoder(self) -> None:
        books = codebooks()
        for talker in "ab":
            for stages in (16, 30):
                with self.subTest(talker=talker, stages=stages):
                    self.check(DECODER, "decoder.onnx", residual(books, features(talker), stages)[1].astype(np.float32), 20.0)

    def test_every_state_holds_what_the_variable_holds(self) -> None:
        for name, source, sink, frames in (
            (ENCODER, "audio", "features", speech.frames(speech.talker("a", 1.0), lyra.FRAME)),
            (DECODER, "features", "audio", features("a")[:50]),
        ):
            subgraphs = load(original.originals()[name])
            graph, converted = subgraphs[0], convert(subgraphs, "test", source, sink, {})
            runner = original.interpreter(name, original.REFERENCE, keep=True)
            session = original.session(converted.model.SerializeToString())
            state = np.zeros((1, converted.state_size), np.float32)
            for number, frame in enumerate(frames):
                # What the original reads in this frame is what the one before left.
                before = state
                original.step(runner, frame)
                _, state = session.run(None, {source: frame[None], "state_in": before})
            handles = {}
            reads = {}
            for operator in graph.operators():
                if operator.name == "VAR_HANDLE":
                    handles[operator.outputs[0]] = len(handles)
                elif operator.name == "READ_VARIABLE":
                    reads[handles[operator.inputs[0]]] = operator.outputs[0]
            self.assertEqual(len(reads), len(converted.states))
            for index, held in enumerate(converted.states):
                with self.subTest(graph=name, state=held.name, frame=number):
                    wanted = original.real(runner, graph, reads[index]).reshape(-1)
                    # The encoder computes in f32 up to its last stages, which are called quant_.
                    exact = name == ENCODER and not held.name.startswith("quant_")
                    got = before[0, held.offset : held.offset + held.size]
                    self.assertGreater(snr(wanted, got), 100.0 if exact else 12.0)

    def test_several_frames_at_once_are_the_frames_one_by_one(self) -> None:
        audio = np.stack([speech.frames(speech.talker(name, 2.4), lyra.FRAME) for name in "ab"], 1)
        encoder, decoder = original.bundled("encoder.onnx"), original.bundled("decoder.onnx")
        said = original.run_converted(encoder, audio)
        for frames in (2, 3, lyra.STEPS):
            for graph, source, wanted in ((encoder, audio, said), (decoder, said, original.run_converted(decoder, said))):
                with self.subTest(frames=frames, graph=graph.get_inputs()[0].name):
                    runs = source.reshape(-1, frames, 2, source.shape[-1]).swapaxes(1, 2).reshape(-1, 2, frames * source.shape[-1])
                    got = original.run_converted(graph, runs)
                    got = got.reshape(len(runs), 2, frames, -1).swapaxes(1, 2).reshape(wanted.shape)
                    # The decoder's sums come in another order, and what it makes of 10^-7 goes through it again in each frame.
                    np.testing.assert_allclose(got, wanted, atol=5e-3 * np.abs(wanted).max())
                    self.assertGreater(snr(wanted, got), 50.0)

    def test_a_batch_is_the_streams_by_themselves(self) -> None:
        audio = [speech.frames(speech.talker(name, 2.0, start), lyra.FRAME) for name, start in (("a", 0), ("b", 0), ("a", 30), ("b", 30))]
        encoder, decoder = original.bundled("encoder.onnx"), original.bundled("decoder.onnx")
        together = original.run_converted(encoder, np.stack(audio, 1))
        alone = np.stack([original.run_converted(encoder, stream[:, None])[:, 0] for stream in audio], 1)
        np.testing.assert_allclose(together, alone, atol=1e-3 * np.abs(alone).max())
        spoken = original.run_converted(decoder, alone)
        np.testing.assert_allclose(
            spoken, np.stack([original.run_converted(decoder, alone[:, i : i + 1])[:, 0] for i in range(4)], 1), atol=1e-3 * np.abs(spoken).max()
        )
        self.assertLess(snr(together[:, 0], together[:, 1]), 3.0)


class Quantizer(unittest.TestCase):
    """The codebooks, used as the Rust code uses them, against the original quantizer."""

    def test_indices_and_sums(self) -> None:
        runner = original.interpreter(QUANTIZER)
        encode, decode = runner.get_signature_runner("encode"), runner.get_signature_runner("decode")
        frames, books = features("b")[:100], codebooks()
        for stages in (16, 30, 46):
            indices, sums = residual(books, frames, stages)
            for frame, index, total in zip(frames, indices, sums, strict=True):
                theirs = encode(input_frames=frame.reshape(1, 1, -1), num_quantizers=np.int32(stages))["output_0"]
                np.testing.assert_array_equal(theirs.reshape(-1)[:stages], index)
                np.testing.assert_allclose(decode(encoding_indices=theirs)["output_0"].reshape(-1), total, atol=1e-4)

    def test_a_missing_stage_is_noticed(self) -> None:
        with self.assertRaisesRegex(Unsupported, "47 of 16 x 64"):
            quantizer.codebooks(load(original.originals()[QUANTIZER])[0], 47, 16, 64)


class Refusals(unittest.TestCase):
    def test_no_tflite(self) -> None:
        with self.assertRaisesRegex(Unsupported, "TFL3"):
            load(b"\x00" * 64)

    def test_an_operator_that_is_not_known(self) -> None:
        with self.assertRaisesRegex(Unsupported, "is not known|inputs and"):
            convert(load(original.originals()[QUANTIZER]), "test", "in", "out", {})
