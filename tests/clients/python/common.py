"""What every Python part of the test clients shares: command line, data pattern, audio analysis, WAV files.

The command line and the report are specified in ../README.md; the Node, browser and Go clients implement the same ones,
so that any two clients can be put into one room and each can check what the other sent.
"""

from __future__ import annotations

import argparse
import os
import struct
import sys
import wave
from dataclasses import dataclass, field

import numpy as np

RATE = 48_000
"""Sampling rate in Hz of all audio the clients send, receive and record."""

SCENARIOS = (
    "none",
    "resume",
    "full-reconnect",
    "disconnect-on-resume",
    "server-leave",
    "node-failure",
    "migration",
    "force-tcp",
    "speaker",
)

LEAST_HOLE_MS = 100
"""Shorter silences are not told of one by one."""

STALL_MS = 100
"""A client that its own clock finds later than this stood still: the machine was busy with something else."""

DATA_HEADER = struct.Struct(">BII")
"""kind (0 reliable, 1 lossy), message index, message length in bytes."""

LOSSY_BYTES = 200
"""Size of a lossy message: under any MTU, because lossy messages are not fragmented by every SDK."""


def parser(client: str) -> argparse.ArgumentParser:
    """The common command line of a test client."""
    p = argparse.ArgumentParser(prog=client, description="LiveKit test client; prints one JSON report as its last line")
    p.add_argument("--url", default="ws://127.0.0.1:7880", help="ws(s):// address of LiveKit or of the sidecar")
    p.add_argument("--token", help="JWT; or give --key, --secret, --room and --identity")
    p.add_argument("--key", default="devkey")
    p.add_argument("--secret", default="secret-of-at-least-32-chars-for-auralink-tests")
    p.add_argument("--room", default="test")
    p.add_argument("--identity", default=f"{client}-{os.getpid()}")
    p.add_argument("--own-metadata", action="store_true", help="a token by which it may change its own attributes")
    p.add_argument("--seconds", type=float, default=10, help="length of the call, counted from when all peers are there")
    p.add_argument("--audio", default="none", help="none | tone:HZ | wav:PATH (16 bit, 48 kHz; looped)")
    p.add_argument("--stereo", action="store_true", help="publish two channels; a tone is 1.5 times as high on the right")
    p.add_argument("--no-red", action="store_true", help="publish Opus without RED")
    p.add_argument("--no-dtx", action="store_true", help="publish Opus without DTX")
    p.add_argument("--mute", default="0:0", help="AT:SECONDS: mutes the audio AT seconds into the call for so long")
    p.add_argument("--video", default="none", help="none | WxH (moving pattern) | y4m:PATH (looped)")
    p.add_argument("--video-codec", default="vp8", choices=["vp8", "vp9", "av1", "h264"])
    p.add_argument("--simulcast", type=int, default=1, choices=[0, 1])
    p.add_argument("--data", default="0:0", help="COUNT:BYTES reliable messages, and COUNT lossy ones of 200 bytes")
    p.add_argument("--e2ee", help="shared key of end-to-end encryption (media and data)")
    p.add_argument("--pc", default="single", choices=["single", "dual"], help="peer connections to ask for")
    p.add_argument("--record", help="folder for WAV files of the audio received, one per peer")
    p.add_argument("--record-video", action="store_true", help="with --record: also Y4M files of the video received")
    p.add_argument("--scenario", default="none", choices=SCENARIOS)
    p.add_argument("--scenario-at", type=float, default=3, help="seconds into the call")
    p.add_argument("--wait-peers", type=int, default=1, help="participants to wait for before the call starts")
    p.add_argument("--wait-timeout", type=float, default=60, help="seconds to wait for them")
    p.add_argument("--connect-timeout", type=float, help="seconds for each try to join; the SDK's own default (5) is short for a bad link")
    return p


def check_args(a: argparse.Namespace) -> argparse.Namespace:
    """Turns compound options into values; exits with 2 and a message where one is malformed."""

    def fail(what: str) -> None:
        print(f"{what}; see tests/clients/README.md", file=sys.stderr)
        sys.exit(2)

    a.tone, a.wav = None, None
    if a.audio.startswith("tone:"):
        a.tone = float(a.audio[5:])
    elif a.audio.startswith("wav:"):
        a.wav = a.audio[4:]
        if not os.path.exists(a.wav):
            fail(f"--audio: no file {a.wav} (scripts/setup.sh makes the speech files)")
    elif a.audio != "none":
        fail("--audio takes none, tone:HZ or wav:PATH")
    try:
        at, length = a.mute.split(":")
        a.mute_at, a.mute_seconds = float(at), float(length)
    except ValueError:
        fail("--mute takes AT:SECONDS")
    a.video_size, a.y4m = None, None
    if a.video.startswith("y4m:"):
        a.y4m = a.video[4:]
        if not os.path.exists(a.y4m):
            fail(f"--video: no file {a.y4m}")
    elif a.video != "none":
        try:
            w, h = a.video.split("x")
            a.video_size = (int(w), int(h))
        except ValueError:
            fail("--video takes none, WIDTHxHEIGHT or y4m:PATH")
    try:
        count, size = a.data.split(":")
        a.data_count, a.data_bytes = int(count), int(size)
    except ValueError:
        fail("--data takes COUNT:BYTES")
    if a.data_count and a.data_bytes < DATA_HEADER.size:
        fail(f"--data: BYTES is at least {DATA_HEADER.size}, the size of the header")
    if a.record:
        os.makedirs(a.record, exist_ok=True)
    return a


def data_message(reliable: bool, index: int, size: int) -> bytes:
    """A message whose every byte the receiver can recompute from its 9-byte header."""
    kind = 0 if reliable else 1
    body = (np.arange(DATA_HEADER.size, size, dtype=np.int64) * 7 + index * 31 + kind) & 0xFF
    return DATA_HEADER.pack(kind, index, size) + body.astype(np.uint8).tobytes()


@dataclass
class DataLog:
    """Messages received from one peer: how many, how long, and how many were not what their header says."""

    reliable: int = 0
    lossy: int = 0
    bytes: int = 0
    bad: int = 0
    duplicates: int = 0
    seen: set = field(default_factory=set)

    def add(self, payload: bytes) -> None:
        self.bytes += len(payload)
        if len(payload) < DATA_HEADER.size:
            self.bad += 1
            return
        kind, index, size = DATA_HEADER.unpack_from(payload)
        if kind > 1 or size != len(payload) or payload != data_message(kind == 0, index, size):
            self.bad += 1
            return
        if (kind, index) in self.seen:
            self.duplicates += 1
            return
        self.seen.add((kind, index))
        if kind == 0:
            self.reliable += 1
        else:
            self.lossy += 1

    def report(self, peer: str) -> dict:
        return {
            "from": peer,
            "reliable": self.reliable,
            "lossy": self.lossy,
            "bytes": self.bytes,
            "bad": self.bad,
            "duplicates": self.duplicates,
        }


def load_wav(path: str, channels: int) -> np.ndarray:
    """Samples of a 16-bit 48 kHz WAV file, shape (n, channels), int16; mono is copied to both channels."""
    with wave.open(path) as w:
        if w.getframerate() != RATE or w.getsampwidth() != 2:
            raise ValueError(f"{path}: {w.getframerate()} Hz, {8 * w.getsampwidth()} bit; needed: {RATE} Hz, 16 bit")
        pcm = np.frombuffer(w.readframes(w.getnframes()), np.int16).reshape(-1, w.getnchannels())
    if pcm.shape[1] == channels:
        return pcm
    mono = pcm.astype(np.int32).mean(axis=1).astype(np.int16)[:, None]
    return np.repeat(mono, channels, axis=1)


def save_wav(path: str, pcm: np.ndarray) -> None:
    """Writes int16 samples of shape (n, channels) at 48 kHz."""
    with wave.open(path, "wb") as w:
        w.setnchannels(pcm.shape[1])
        w.setsampwidth(2)
        w.setframerate(RATE)
        w.writeframes(np.ascontiguousarray(pcm).tobytes())


def tone_block(hz: float, channels: int, start: int, n: int) -> np.ndarray:
    """`n` samples from sample `start` of a sine at amplitude 0.3; the right channel is 1.5 times as high."""
    t = (np.arange(start, start + n) / RATE)[:, None]
    f = np.array([hz, hz * 1.5][:channels])[None, :]
    return (0.3 * 32767 * np.sin(2 * np.pi * f * t)).astype(np.int16)


def analyse(pcm: np.ndarray) -> dict:
    """Tone, level and holes of int16 samples, shape (n, channels).

    `tone_hz` is the strongest frequency after the first sound, `tone_share` the part of the power within 3 % of it
    (over 0.9 for an undisturbed sine), `rms` is relative to full scale, `silent_ms` counts 10 ms blocks under
    -60 dBFS between the first and the last sound.
    """
    out = {"seconds": round(len(pcm) / RATE, 3), "tone_hz": None, "tone_share": 0.0, "rms": 0.0, "silent_ms": 0}
    x = pcm.astype(np.float64) / 32768.0
    blocks = len(x) // 480
    if blocks == 0:
        return out
    level = np.sqrt((x[: blocks * 480].reshape(blocks, 480, -1) ** 2).mean(axis=(1, 2)))
    loud = np.flatnonzero(level > 1e-3)
    if len(loud) == 0:
        return out
    first, last = loud[0], loud[-1] + 1
    out["silent_ms"] = int(10 * np.count_nonzero(level[first:last] <= 1e-3))
    out["onset_s"] = round(first / 100, 2)
    x = x[first * 480 : last * 480]
    out["rms"] = round(float(np.sqrt((x**2).mean())), 5)
    for channel in range(x.shape[1]):
        hz, share = strongest(x[:, channel])
        suffix = "" if channel == 0 else "_right"
        out["tone_hz" + suffix] = hz
        out["tone_share" + suffix] = share
    return out


def sounds(blocks: list[np.ndarray], times: list[float]) -> dict:
    """When sound was heard: `blocks` of int16 samples, shape (n, channels), and the time of the clock at which each had come.

    `heard_ms` counts 10 ms blocks over -60 dBFS, `first_at` and `last_at` are the times of the first and the last of them, and
    `holes` are the stretches without any between those two: [time at which it began, ms].
    """
    out = {"heard_ms": 0, "first_at": None, "last_at": None, "holes": []}
    ends, loud = [], []
    for pcm, came in zip(blocks, times):
        n = len(pcm) // 480
        if n == 0:
            continue
        x = pcm[: n * 480].astype(np.float64) / 32768.0
        loud.append(np.sqrt((x.reshape(n, 480, -1) ** 2).mean(axis=(1, 2))) > 1e-3)
        ends.append(came - (len(pcm) - 480 * np.arange(1, n + 1)) / RATE)
    if not loud:
        return out
    ends, loud = np.concatenate(ends), np.concatenate(loud)
    heard = ends[loud]
    if len(heard) == 0:
        return out
    out["heard_ms"] = 10 * len(heard)
    out["first_at"], out["last_at"] = round(float(heard[0]) - 0.01, 3), round(float(heard[-1]), 3)
    places = np.flatnonzero(loud)
    for before, after in zip(places[:-1], places[1:]):
        # By the clock, too: blocks that never came are as silent as silent ones.
        ms = max(10 * (after - before - 1), round(1000 * float(ends[after] - ends[before] - 0.01)))
        if ms >= LEAST_HOLE_MS:
            out["holes"].append([round(float(ends[before]), 3), int(ms)])
    return out


def strongest(x: np.ndarray) -> tuple[float | None, float]:
    """Strongest frequency of `x` in Hz from windowed one-second spectra, and its share of the power above 40 Hz."""
    n = min(len(x), RATE)
    if n < 4800:
        return None, 0.0
    window = np.hanning(n)
    power = np.zeros(n // 2 + 1)
    for start in range(0, len(x) - n + 1, n):
        power += np.abs(np.fft.rfft(x[start : start + n] * window)) ** 2
    freq = np.fft.rfftfreq(n, 1 / RATE)
    power[freq < 40] = 0
    total = power.sum()
    if total <= 0:
        return None, 0.0
    k = int(power.argmax())
    near = (freq > freq[k] * 0.97 - 3) & (freq < freq[k] * 1.03 + 3)
    centre = float((freq[near] * power[near]).sum() / power[near].sum())
    return round(centre, 1), round(float(power[near].sum() / total), 4)
