"""Lyra with its quantizer in the graphs: the same codes and the same sound as `lyra2`, and resamplers that only delay."""

from __future__ import annotations

import unittest

import numpy as np
import yaml

from . import codes, lyra, original, speech
from .bundle import MANIFEST, Tensor


class Coder:
    """A bundle's graphs by its manifest, for one stream."""

    def __init__(self, name: str) -> None:
        folder = original.place("AURALINK_MODELS") / name
        self.said = yaml.safe_load((folder / MANIFEST).read_text())
        self.sessions = {part: original.session((folder / f"{part}.onnx").read_bytes()) for part in ("encoder", "decoder")}
        self.states: dict[str, np.ndarray] = {}
        for part in self.sessions:
            for state in self.listed(part):
                self.states[part + state["input"]] = np.zeros([1, *state["shape"][1:]], np.float32)

    def listed(self, part: str) -> list[dict]:
        state = self.said[part]["state"]
        return state if isinstance(state, list) else [state]

    def step(self, part: str, value: np.ndarray) -> np.ndarray:
        graph, states = self.said[part], self.listed(part)
        feeds = {graph["input"]["name"]: value[None], **{state["input"]: self.states[part + state["input"]] for state in states}}
        output, *after = self.sessions[part].run([graph["output"]["name"], *(state["output"] for state in states)], feeds)
        for state, value in zip(states, after, strict=True):
            self.states[part + state["input"]] = value
        return output[0]


class Codes(unittest.TestCase):
    def test_they_are_what_the_quantizer_gives(self) -> None:
        whole, split = Coder("lyra2-codes"), Coder(lyra.NAME)
        folder = original.place("AURALINK_MODELS") / lyra.NAME
        books = np.fromfile(folder / "codebooks.f32", "<f4").reshape(lyra.STAGES, lyra.ENTRIES, lyra.FEATURES)
        same = frames = 0
        for frame in speech.frames(speech.talker("a", 4.0), lyra.FRAME):
            rest, wanted = split.step("encoder", frame).copy(), []
            for book in books[: codes.L2]:
                wanted.append(int(((rest - book) ** 2).sum(1).argmin()))
                rest -= book[wanted[-1]]
            found = whole.step("encoder", frame)
            self.assertEqual((found.dtype, found.shape), (np.int64, (codes.L2,)))
            same += wanted == found.tolist()
            frames += 1
            features = sum(books[stage][code] for stage, code in enumerate(found))
            np.testing.assert_allclose(whole.step("decoder", found), split.step("decoder", features), atol=1e-3)
        self.assertGreaterEqual(same, frames * 0.995)

    def test_what_did_not_come_adds_nothing(self) -> None:
        whole, split = Coder("lyra2-codes"), Coder(lyra.NAME)
        nothing = np.full(codes.L2, -1, np.int64)
        np.testing.assert_allclose(whole.step("decoder", nothing), split.step("decoder", np.zeros(lyra.FEATURES, np.float32)), atol=1e-5)

    def test_a_frame_of_two_steps_begins_with_what_l1_sends_of_both(self) -> None:
        places = codes.order(2)
        self.assertEqual(len(set(places)), 2 * codes.L2)
        self.assertEqual(set(places[: 2 * codes.L1]), {(step, stage) for step in range(2) for stage in range(codes.L1)})
        self.assertEqual(codes.order(1), [(0, stage) for stage in range(codes.L2)])


class Resamplers(unittest.TestCase):
    """Both alone, one after the other, in steps with their states: what comes out is what went in, later by what the manifest says."""

    def resampler(self, count: int, up: int, down: int):
        graphs = codes.Graphs()
        graphs.node("Identity", ["audio"], "same")
        _, made = codes.resample(graphs, "same", count, up, down, "out")
        kept = ["batch", codes.history(up)]
        inputs = [Tensor("audio", ["batch", count]), Tensor(codes.RESAMPLER_IN, kept)]
        outputs = [Tensor("out", ["batch", made]), Tensor(codes.RESAMPLER_OUT, kept)]
        session = original.session(graphs.model("resampler", inputs, outputs, {}))
        state = np.zeros((1, codes.history(up)), np.float32)

        def step(samples: np.ndarray) -> np.ndarray:
            nonlocal state
            output, state = session.run(["out", codes.RESAMPLER_OUT], {"audio": samples[None], codes.RESAMPLER_IN: state})
            return output[0]

        return step

    def test_they_delay_and_do_nothing_else(self) -> None:
        rate, frame = 24_000, 960
        delay = Coder("lyra2-24k").said["delay"]
        time = np.arange(rate) / rate
        tones = sum(np.sin(2 * np.pi * hertz * time + hertz) for hertz in (110, 900, 3_300, 5_100, 6_700)).astype(np.float32) * 0.15
        narrow, wide = self.resampler(frame, 2, 3), self.resampler(frame * 2 // 3, 3, 2)
        back = np.concatenate([wide(narrow(part)) for part in tones.reshape(-1, frame)])
        error = back[delay + 500 :] - tones[500:-delay]
        self.assertGreater(10 * np.log10((tones**2).mean() / (error**2).mean()), 50)
        # What 16 kHz can't hold is gone, not folded.
        narrow = self.resampler(frame, 2, 3)
        high = np.sin(2 * np.pi * 10_000 * time).astype(np.float32)
        folded = np.concatenate([narrow(part) for part in high.reshape(-1, frame)])[500:]
        self.assertLess(10 * np.log10((folded**2).mean() / 0.5), -50)


if __name__ == "__main__":
    unittest.main()
