"""The bundles themselves: what the manifests say is so, and the folders are the same on every run."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import yaml

from . import __main__ as program
from . import codes, lyra, original, runtime, silero, speech, wheels
from .bundle import MANIFEST, sha256, write_folder

# What the two ends of a hop must have alike to understand each other. It changes only with the converter or with Lyra.
LYRA_FILES = {
    "codebooks.f32": "ac803fabb602b0243ab2b7869f718ae99b0d37958999df9a3d871eef923fbd32",
    "decoder.onnx": "eb2d67cf765225adfb5eb812567a775a9b1901d7cfe9d604e1eb0a9065c25bfd",
    "encoder.onnx": "3feb33dddcd09f02633e593aefb349fd2f6e00654dd7b14197800bdca26eeb6e",
}

KINDS = {"f32": np.float32, "i64": np.int64}


def content(folder: Path) -> dict[str, str]:
    """The sha256 of every file under a folder; of a link, where it leads."""
    held = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            held[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            held[str(path.relative_to(folder))] = sha256(path.read_bytes())
    return held


class Folder(unittest.TestCase):
    def setUp(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="auralink-models-"))
        self.addCleanup(shutil.rmtree, self.root)


class Builds(Folder):
    def test_two_builds_are_the_same_and_are_what_is_installed(self) -> None:
        downloads = original.place("AURALINK_MODEL_WHEELS")
        for name in ("one", "two"):
            with self.said_on_stderr(lyra.NAME, silero.NAME, "onnxruntime"):
                self.assertEqual(program.main([str(downloads), str(self.root / name)]), 0)
        self.assertEqual(content(self.root / "one"), content(self.root / "two"))
        for name in (lyra.NAME, *codes.NAMES, silero.NAME):
            self.assertEqual(content(self.root / "one" / "models" / name), content(original.place("AURALINK_MODELS") / name))
        for name, digest in LYRA_FILES.items():
            self.assertEqual(sha256((self.root / "one" / "models" / lyra.NAME / name).read_bytes()), digest, name)

    def test_the_library_is_the_one_that_the_wheel_was_built_with(self) -> None:
        library = original.place("AURALINK_ONNXRUNTIME")
        self.assertEqual(library.resolve().name, f"libonnxruntime.so.{onnxruntime.__version__}")
        self.assertEqual(onnxruntime.__version__, runtime.VERSION)
        for name in ("LICENSE", "ThirdPartyNotices.txt"):
            self.assertGreater((library.parent / name).stat().st_size, 1000)

    def test_a_broken_wheel_is_named_and_leaves_nothing(self) -> None:
        downloads = self.root / "wheels"
        shutil.copytree(original.place("AURALINK_MODEL_WHEELS"), downloads)
        (broken,) = downloads.glob("sora_sdk-*.whl")
        broken.write_bytes(broken.read_bytes()[:1_000_000])
        with self.said_on_stderr(str(broken), "make models"):
            self.assertEqual(program.main([str(downloads), str(self.root / "out")]), 1)
        broken.unlink()
        with self.said_on_stderr("sora_sdk", "make models"):
            self.assertEqual(program.main([str(downloads), str(self.root / "out")]), 1)
        self.assertFalse((self.root / "out" / "models").exists())

    @contextlib.contextmanager
    def said_on_stderr(self, *parts: str) -> Iterator[None]:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
        for part in parts:
            self.assertIn(part, said.getvalue())


class Replacing(Folder):
    def test_a_folder_holds_exactly_what_was_written(self) -> None:
        folder = self.root / "a"
        write_folder(folder, {"x": b"1", "y": b"2"}, {"link": "x"})
        inode = folder.stat().st_ino
        write_folder(folder, {"x": b"1", "y": b"2"}, {"link": "x"})
        self.assertEqual(folder.stat().st_ino, inode, "it was written again though nothing changed")
        for change in ({"x": b"1"}, {"x": b"3", "y": b"2"}, {"x": b"3", "y": b"2", "z": b""}):
            write_folder(folder, change)
            self.assertEqual(content(folder), {name: sha256(data) for name, data in change.items()})
        self.assertEqual([path.name for path in self.root.iterdir()], ["a"], "something was left beside it")

    def test_a_failure_keeps_the_old_folder(self) -> None:
        folder = self.root / "a"
        write_folder(folder, {"x": b"1"})
        with self.assertRaises(OSError):
            write_folder(folder, {"x": b"2", "no/such": b""})
        self.assertEqual(content(folder), {"x": sha256(b"1")})
        self.assertEqual([path.name for path in self.root.iterdir()], ["a"], "something was left beside it")


class Manifests(unittest.TestCase):
    """What a reader in another language relies on."""

    def manifest(self, name: str) -> tuple[Path, dict]:
        folder = original.place("AURALINK_MODELS") / name
        return folder, yaml.safe_load((folder / MANIFEST).read_text())

    def test_they_list_every_file(self) -> None:
        for name, kind in (*((name, "codec") for name in (lyra.NAME, *codes.NAMES)), (silero.NAME, "vad")):
            folder, said = self.manifest(name)
            self.assertEqual((said["format"], said["kind"], said["name"]), (1, kind, name))
            self.assertEqual(said["files"].keys() | {MANIFEST}, content(folder).keys())
            for file, digest in content(folder).items():
                if file != MANIFEST:
                    size = (folder / file).stat().st_size
                    self.assertEqual(said["files"][file], {"bytes": size, "sha256": digest}, file)
            for key in ("version", "licence", "copyright", "origin", "modifications"):
                self.assertTrue(isinstance(said[key], str) and said[key], key)

    def test_they_describe_the_graphs(self) -> None:
        for name, graphs in (*((name, ("encoder", "decoder")) for name in (lyra.NAME, *codes.NAMES)), (silero.NAME, ("model",))):
            folder, said = self.manifest(name)
            for graph in (said[key] for key in graphs):
                with self.subTest(bundle=name, graph=graph["file"]):
                    self.run_by_manifest(folder, said, graph)

    def run_by_manifest(self, folder: Path, said: dict, graph: dict) -> None:
        """Three streams at once through a graph of which only the manifest is known."""
        session = original.session((folder / graph["file"]).read_bytes())
        states = graph["state"] if isinstance(graph["state"], list) else [graph["state"]]

        def zeros(tensor: dict) -> np.ndarray:
            return np.zeros([3 if size == "batch" else size for size in tensor["shape"]], KINDS[tensor.get("dtype", "f32")])

        feeds = {graph["input"]["name"]: zeros(graph["input"]), **{state["input"]: zeros(state) for state in states}}
        if "sample_rate_input" in graph:
            feeds[graph["sample_rate_input"]] = np.array(said["sample_rate"], np.int64)
        self.assertEqual({value.name for value in session.get_inputs()}, feeds.keys())
        results = session.run([graph["output"]["name"], *(state["output"] for state in states)], feeds)
        for result, tensor in zip(results, (graph["output"], *states), strict=True):
            self.assertEqual((result.dtype, result.shape), (zeros(tensor).dtype, zeros(tensor).shape))
            self.assertTrue(np.isfinite(result).all())

    def test_sizes_fit_each_other(self) -> None:
        folder, said = self.manifest(lyra.NAME)
        frame, stages = said["frame"], said["quantizer"]
        self.assertEqual(said["encoder"]["input"]["shape"], ["batch", frame])
        self.assertEqual(said["decoder"]["output"]["shape"], ["batch", frame])
        self.assertEqual(said["encoder"]["output"], said["decoder"]["input"])
        self.assertEqual(said["encoder"]["output"]["shape"][1], stages["dimension"])
        size = stages["stages"] * stages["entries"] * stages["dimension"] * 4
        self.assertEqual((folder / stages["file"]).stat().st_size, size)
        for name in codes.NAMES:
            _, said = self.manifest(name)
            frame, stages = said["frame"], said["codes"]["stages"]
            self.assertEqual((said["encoder"]["input"]["shape"], said["decoder"]["output"]["shape"]), (["batch", frame], ["batch", frame]))
            self.assertEqual(said["encoder"]["output"], said["decoder"]["input"])
            self.assertEqual((said["encoder"]["output"]["shape"], said["rungs"]["L2"]), (["batch", stages], stages))
        _, said = self.manifest(silero.NAME)
        self.assertEqual(said["model"]["input"]["shape"][1], said["context"] + said["frame"])

    def test_changed_files_say_so(self) -> None:
        """Apache-2.0, section 4: the licence goes along, and changed files say that they were changed."""
        for name in (lyra.NAME, *codes.NAMES):
            folder, said = self.manifest(name)
            self.assertIn("Apache License", (folder / "LICENSE").read_text())
            notice = (folder / "NOTICE").read_text()
            for part in (lyra.COPYRIGHT, "MODIFIED", *lyra.ORIGINALS.values()):
                self.assertIn(part, notice)
            for file in ("encoder.onnx", "decoder.onnx"):
                self.assertIn(file, notice)
                meta = original.session((folder / file).read_bytes()).get_modelmeta().custom_metadata_map
                self.assertEqual((meta["copyright"], meta["licence"], meta["modifications"]), (lyra.COPYRIGHT, lyra.LICENCE, said["modifications"]))


class Detector(unittest.TestCase):
    """The voice activity detector with the input that the manifest describes: 64 samples of before, 512 new ones, the state."""

    def probabilities(self, *streams: np.ndarray, model: bytes | None = None) -> np.ndarray:
        session = original.session(model or (original.place("AURALINK_MODELS") / silero.NAME / "vad.onnx").read_bytes())
        steps = np.stack([speech.frames(stream, silero.FRAME) for stream in streams], 1)
        state, before = np.zeros((2, len(streams), silero.STATE), np.float32), np.zeros((len(streams), silero.CONTEXT), np.float32)
        outputs = []
        for step in steps:
            feeds = {"input": np.concatenate([before, step], 1), "state": state, "sr": np.array(silero.SAMPLE_RATE, np.int64)}
            output, state = session.run(["output", "stateN"], feeds)
            before = step[:, -silero.CONTEXT :]
            outputs.append(output[:, 0])
        return np.stack(outputs, 1)

    def test_it_knows_speech_in_a_batch_as_alone(self) -> None:
        talker, other = speech.talker("a", 8.0), speech.talker("b", 8.0)
        time = np.arange(len(talker)) / speech.RATE
        tone = (0.2 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
        noise = np.random.default_rng(1).normal(0, 0.05, len(talker)).astype(np.float32)
        together = self.probabilities(talker, other, tone, noise)
        speaking = (together > 0.3).mean(1)
        self.assertGreater(speaking[0], 0.8)
        self.assertGreater(speaking[1], 0.8)
        self.assertLess(speaking[2], 0.05)
        self.assertLess(speaking[3], 0.05)
        np.testing.assert_allclose(together[1:2], self.probabilities(other), atol=1e-4)

    def test_it_says_what_the_package_s_main_model_says(self) -> None:
        wheel = wheels.wheel(original.place("AURALINK_MODEL_WHEELS"), silero.WHEEL)
        (main,) = wheels.read(wheel, {"silero_vad/data/silero_vad.onnx": None})
        talker = speech.talker("b", 6.0)
        np.testing.assert_allclose(self.probabilities(talker), self.probabilities(talker, model=main), atol=1e-5)
