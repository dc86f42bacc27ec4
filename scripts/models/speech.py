"""Speech for the tests: the files of `make setup` at the codec's rate."""

from __future__ import annotations

import os
import wave
from pathlib import Path

import numpy as np

RATE = 16_000


def talker(name: str, seconds: float, start: float = 0.0) -> np.ndarray:
    """Speech of talker "a" or "b" at 16 kHz as f32 of whole int16 steps, full scale 1."""
    folder = os.environ.get("AURALINK_SPEECH")
    if not folder:
        raise RuntimeError("AURALINK_SPEECH is not set: run `make setup`, then scripts/models/make.sh --test")
    with wave.open(str(Path(folder) / f"talker-{name}.wav")) as file:
        rate = file.getframerate()
        if (rate, file.getnchannels(), file.getsampwidth()) != (3 * RATE, 1, 2):
            raise RuntimeError(f"{folder}/talker-{name}.wav is not 48 kHz mono of 16 bits: run `make setup` again")
        file.setpos(int(start * rate))
        samples = np.frombuffer(file.readframes(int(seconds * rate)), "<i2").astype(np.float64)
    # A windowed sinc at a third of the rate: its stop band begins below 9 kHz, where these recordings end.
    reach = np.arange(-96, 97)
    low_pass = np.sinc(reach / 3) / 3 * np.hanning(len(reach))
    return (np.round(np.convolve(samples, low_pass, "same")[::3]).clip(-32768, 32767) / 32768).astype(np.float32)


def frames(samples: np.ndarray, size: int) -> np.ndarray:
    """Whole frames, [count, size]."""
    return samples[: len(samples) // size * size].reshape(-1, size)
