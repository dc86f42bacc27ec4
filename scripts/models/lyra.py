"""The bundle `lyra2`: the speech codec Lyra v2 (SoundStream), 16 kHz mono, frames of 20 ms, 46 quantizer stages of 4 bits."""

from __future__ import annotations

from pathlib import Path

from . import wheels
from .bundle import Graph, Tensor, write_bundle
from .convert import STATE_IN, STATE_OUT, Converted, convert
from .quantizer import codebooks
from .tflite_graph import load

NAME = "lyra2"
VERSION = "1.3.2"
WHEEL = "sora_sdk-2023.3.0"
COPYRIGHT = "Copyright 2022 Google LLC"
LICENCE = "Apache-2.0"
ORIGIN = "Lyra 1.3.2, model files out of the PyPI wheel sora-sdk 2023.3.0"
MODIFICATIONS = "converted from TFLite to ONNX by the AuraLink project"

# The files of Lyra's own release 1.3.2; the wheel carries them unchanged.
ORIGINALS = {
    "soundstream_encoder.tflite": "237da0b16226fb0a68d49551c81bebf614e42142af72764448359f68581e88f1",
    "lyragan.tflite": "50e7839cda4f30599a3a34cfaddcd9c98449b049eee884e1a74295780448ad06",
    "quantizer.tflite": "841ee05989687d32d1f616a8ad1419fc7eda37599d3c05c7cf5a0d60ccf8ac5c",
}
APACHE = "0d542e0c8804e39aa7f37eb00da5a762149dc682d7829451287e11b938e94594"

SAMPLE_RATE = 16_000
FRAME = 320
FEATURES = 64
STAGES, ENTRIES = 46, 16
# Frames of a run: 120 ms, the most that a packet carries. The graphs themselves have no limit.
STEPS = 6

NOTICE = f"""Lyra, a speech codec: https://github.com/google/lyra
{COPYRIGHT}
Licensed under the Apache License, Version 2.0; see the file LICENSE.

The files {{changed}} are MODIFIED. They were made by the AuraLink project from the model files of
Lyra {VERSION}, as the PyPI wheel sora-sdk 2023.3.0 carries them:

{{originals}}

What was changed: the graphs were converted from TFLite to ONNX; int8 weights and int32 biases were multiplied out to 32-bit floating point
and the steps between int8 and floating point left out; the state that the graphs keep between frames became an input and an output; the
batch became variable; {{quantizer}}.
"""


def notice(changed: str, quantizer: str) -> str:
    """What goes along with changed files: which they are, and what became of the quantizer."""
    digests = "\n".join(f"  {name}  sha256 {digest}" for name, digest in ORIGINALS.items())
    return NOTICE.format(originals=digests, changed=changed, quantizer=quantizer)


def originals(folder: Path) -> dict[str, bytes]:
    """Lyra's own TFLite files by name, out of the wheels in `folder`."""
    contents = wheels.read(wheels.wheel(folder, WHEEL), {f"*/model_coeffs/{name}": digest for name, digest in ORIGINALS.items()})
    return dict(zip(ORIGINALS, contents, strict=True))


def build(folder: Path, downloads: Path) -> None:
    """Writes the bundle as `folder`."""
    files = originals(downloads)
    about = {"copyright": COPYRIGHT, "licence": LICENCE, "modifications": MODIFICATIONS, "origin": ORIGIN}
    encoder = convert(load(files["soundstream_encoder.tflite"]), "lyra2_encoder", "audio", "features", about)
    decoder = convert(load(files["lyragan.tflite"]), "lyra2_decoder", "features", "audio", about)
    (licence,) = wheels.read(wheels.wheel(downloads, WHEEL), {"*.dist-info/LICENSE": APACHE})
    contents = {
        "encoder.onnx": encoder.model.SerializeToString(deterministic=True),
        "decoder.onnx": decoder.model.SerializeToString(deterministic=True),
        "codebooks.f32": codebooks(load(files["quantizer.tflite"])[0], STAGES, ENTRIES, FEATURES).astype("<f4").tobytes(),
        "LICENSE": licence,
        "NOTICE": notice(
            "encoder.onnx, decoder.onnx and codebooks.f32",
            "the quantizer's codebooks were taken out of its graph as plain numbers (f32, little-endian, [stage][entry][dimension])",
        ).encode(),
    }
    audio, features = Tensor("audio", ["batch", FRAME]), Tensor("features", ["batch", FEATURES])
    write_bundle(
        folder,
        {
            "kind": "codec",
            "name": NAME,
            "version": VERSION,
            "licence": LICENCE,
            "copyright": COPYRIGHT,
            "origin": ORIGIN,
            "modifications": MODIFICATIONS,
            "sample_rate": SAMPLE_RATE,
            "frame": FRAME,
        },
        {
            "encoder": _graph("encoder.onnx", audio, features, encoder),
            "decoder": _graph("decoder.onnx", features, audio, decoder),
            "quantizer": [
                "file: codebooks.f32",
                "kind: residual",
                f"stages: {STAGES}",
                f"entries: {ENTRIES}",
                f"dimension: {FEATURES}",
            ],
        },
        contents,
    )


def _graph(file: str, source: Tensor, sink: Tensor, converted: Converted) -> list[str]:
    return Graph(file, source, sink, STATE_IN, STATE_OUT, ["batch", converted.state_size], steps=STEPS).lines()
