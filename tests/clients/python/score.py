"""Speech quality of a recording against what was said: score.py REF.wav DEG.wav [--seconds N] [--skip S]

Both are WAV files at 48 kHz; the reference may be longer than the recording, and is taken as looped (the clients loop what
they play), so the recording may start anywhere in it. The recording is cut into stretches of about 8 s; each is aligned on its
own, so that a jitter buffer which stretches time costs no points. Stretches with hardly any speech are left out.

Prints one JSON object:
  visqol, visqol_min   mean and worst MOS-LQO of ViSQOL v3 in speech mode with its lattice model (1 to 5), 16 kHz
  pesq_wb, pesq_min    mean and worst MOS-LQO of PESQ, wideband (ITU-T P.862.2; 1.04 to 4.64), 16 kHz
  delay_ms             lag of the recording behind the reference (negative: it starts that far into the reference)
  delay_median_ms      the median of that lag over the stretches
  delay_change_ms      by how much the lag varies between stretches
  correlation          of the two signals' envelopes after alignment: 0.3 to 0.4 is other speech; packets lost in bursts leave 0.5 to 0.8
  segments             stretches scored
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
import wave

import numpy as np
from scipy.signal import correlate, resample_poly

RATE = 16_000
STRETCH = 8.0
SLACK = 0.4
"""Seconds by which a stretch may lie off the overall alignment."""


def load(path: str) -> np.ndarray:
    """First channel of a WAV file, resampled to 16 kHz, float."""
    with wave.open(path) as w:
        if w.getsampwidth() != 2:
            sys.exit(f"{path}: {8 * w.getsampwidth()} bit; needed: 16 bit")
        x = np.frombuffer(w.readframes(w.getnframes()), np.int16).reshape(-1, w.getnchannels())[:, 0]
        rate = w.getframerate()
    divisor = int(np.gcd(rate, RATE))
    return resample_poly(x.astype(np.float64) / 32768, RATE // divisor, rate // divisor)


def envelope(x: np.ndarray, step: int) -> np.ndarray:
    """Level in dB above -60 dBFS of blocks of `step` samples."""
    n = len(x) // step
    power = (x[: n * step].reshape(n, step) ** 2).mean(axis=1)
    return np.maximum(0, 10 * np.log10(power + 1e-12) + 60)


def best_lag(long: np.ndarray, short: np.ndarray) -> tuple[int, float]:
    """Where in `long` does `short` fit best, and the normalised correlation there."""
    short = short - short.mean()
    n = len(short)
    dot = correlate(long, short, mode="valid", method="fft")
    total = np.concatenate([[0], np.cumsum(long)])
    squares = np.concatenate([[0], np.cumsum(long**2)])
    mean = (total[n:] - total[:-n]) / n
    spread = np.sqrt(np.maximum(1e-9, (squares[n:] - squares[:-n]) - n * mean**2))
    score = dot / (spread * (np.sqrt((short**2).sum()) + 1e-9))
    k = int(score.argmax())
    return k, float(score[k])


def fine_lag(ref: np.ndarray, deg: np.ndarray) -> int:
    """Sample offset in `ref` at which `deg` fits best, by correlation of the waveforms."""
    dot = correlate(ref, deg, mode="valid", method="fft")
    energy = np.concatenate([[0], np.cumsum(ref**2)])
    energy = energy[len(deg) :] - energy[: -len(deg)]
    return int((np.abs(dot) / np.sqrt(energy + 1e-9)).argmax())


def stretches(ref: np.ndarray, deg: np.ndarray):
    """Pairs (reference, recording, lag in samples, envelope correlation) of aligned stretches with speech in them."""
    step = RATE // 100
    looped = ref
    while len(looped) < len(ref) + len(deg) + 2 * RATE:
        looped = np.concatenate([looped, ref])
    coarse, correlation = best_lag(envelope(looped, step), envelope(deg, step))
    coarse *= step
    size, slack = int(STRETCH * RATE), int(SLACK * RATE)
    for start in range(0, max(1, len(deg) - size // 2), size):
        d = deg[start : start + size]
        # The reference's neighbourhood; its start may lie before the beginning of the first loop.
        begin = coarse + start - slack
        r = np.take(looped, np.arange(begin, begin + len(d) + 2 * slack), mode="wrap")
        # Envelopes at 1 ms first, then the waveform near there.
        fine = RATE // 1000
        k, fit = best_lag(envelope(r, fine), envelope(d, fine))
        near = max(0, k * fine - 80)
        at = near + fine_lag(r[near : near + len(d) + 160], d) if near + len(d) + 160 <= len(r) else k * fine
        r = r[at : at + len(d)]
        active = float((envelope(r, step) > 15).mean())
        if active > 0.3 and len(r) == len(d):
            yield r, d, begin + at - start, fit
    if correlation < 0.2:
        print(f"warning: envelopes correlate by {correlation:.2f} only; is this a recording of that reference?", file=sys.stderr)


def score(ref: np.ndarray, deg: np.ndarray) -> dict:
    """The JSON object of the module's documentation."""
    from pesq import NoUtterancesError, pesq
    from visqol import VisqolApi

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        visqol = VisqolApi()
        visqol.create(mode="speech", use_lattice_model=True)
        moses, pesqs, lags, fits = [], [], [], []
        for r, d, lag, fit in stretches(ref, deg):
            try:
                pesqs.append(float(pesq(RATE, (r * 32767).astype(np.int16), (d * 32767).astype(np.int16), "wb")))
            except NoUtterancesError:
                continue
            moses.append(float(visqol.measure_from_arrays(r, d, RATE).moslqo))
            lags.append(lag)
            fits.append(fit)
    if not moses:
        sys.exit("no stretch with speech could be aligned: is the recording empty, or of something else?")
    lag = np.array(lags) / RATE * 1000
    return {
        "visqol": round(float(np.mean(moses)), 3),
        "visqol_min": round(min(moses), 3),
        "pesq_wb": round(float(np.mean(pesqs)), 3),
        "pesq_min": round(min(pesqs), 3),
        "delay_ms": round(-float(lag[0] % (len(ref) / RATE * 1000)), 1),
        "delay_median_ms": round(-float(np.median(lag) % (len(ref) / RATE * 1000)), 1),
        "delay_change_ms": round(float(lag.max() - lag.min()), 1),
        "correlation": round(float(np.mean(fits)), 3),
        "segments": len(moses),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("ref")
    p.add_argument("deg")
    p.add_argument("--seconds", type=float, help="score only this much of the recording")
    p.add_argument("--skip", type=float, default=1.0, help="seconds to leave out at its beginning, where the call still starts")
    a = p.parse_args()
    ref, deg = load(a.ref), load(a.deg)
    deg = deg[int(a.skip * RATE) :]
    if a.seconds:
        deg = deg[: int(a.seconds * RATE)]
    if len(deg) < 3 * RATE:
        sys.exit(f"{a.deg}: {len(deg) / RATE:.1f} s after --skip; at least 3 s are needed")
    print(json.dumps(score(ref, deg)))


if __name__ == "__main__":
    main()
