"""Makes the speech files of the tests and the demo out of Debian's asterisk-core-sounds packages: speech.py FOLDER

Two talkers, wideband (16 kHz G.722 studio recordings), written as 48 kHz mono 16-bit WAV at -26 dBFS active level:
  talker-a.wav, talker-b.wav      about 90 s each of nearly continuous speech (a: woman, English; b: man, Italian)
  dialogue-a.wav, dialogue-b.wav  the two sides of one conversation: turns of about 6 s, silence while the other speaks
Sources and licences: docs/third-party.md. Which prompts are taken, and in which order, is fixed, so every run makes the
same files.
"""

import subprocess
import sys
import tempfile
import wave
from pathlib import Path

import numpy as np

RATE = 48_000
SECONDS = 90
LEVEL = 10 ** (-26 / 20)

TALKERS = {
    # Debian package, folder in it
    "a": ("asterisk-core-sounds-en-g722", "en_US_f_Allison"),
    "b": ("asterisk-core-sounds-it-g722", "it_IT_m_Carlo"),
}

NOT_SPEECH = ("beep", "tone", "silence", "monkeys", "scream", "weasels")
"""Parts of the names of prompts that hold signals, silence or animals."""


def run(*command, cwd=None):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr.strip()}")


def unpack(package, work):
    """Downloads and unpacks a Debian package without installing it; no root needed."""
    try:
        run("apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", package, cwd=work)
    except FileNotFoundError:
        sys.exit(f"apt-get is missing: the speech comes from Debian's package {package}")
    (file,) = work.glob(f"{package}_*.deb")
    run("dpkg-deb", "-x", str(file), str(work / package))
    return work / package / "usr/share/asterisk/sounds"


def decode(path):
    """Samples of a raw G.722 file at 48 kHz, float, -1 to 1."""
    done = subprocess.run(
        ["ffmpeg", "-v", "error", "-f", "g722", "-i", str(path), "-ar", str(RATE), "-ac", "1", "-f", "s16le", "-"],
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"ffmpeg could not decode {path}: {done.stderr.decode()}")
    return np.frombuffer(done.stdout, np.int16).astype(np.float64) / 32768


def trim(x):
    """Cuts silence off both ends, leaving 50 ms."""
    blocks = len(x) // 480
    level = np.sqrt((x[: blocks * 480].reshape(blocks, 480) ** 2).mean(axis=1))
    loud = np.flatnonzero(level > 0.01)
    if len(loud) == 0:
        return x[:0]
    return x[max(0, loud[0] - 5) * 480 : (loud[-1] + 6) * 480]


def active_level(x):
    """RMS over the blocks within 35 dB of the loudest ones: speech, without its pauses."""
    blocks = x[: len(x) // 960 * 960].reshape(-1, 960)
    power = (blocks**2).mean(axis=1)
    return np.sqrt(power[power > np.percentile(power, 95) * 10**-3.5].mean())


def prompts(folder):
    """Sentences of a talker in a fixed order, each at -26 dBFS."""
    files = [f for f in sorted(folder.rglob("*.g722")) if f.stat().st_size > 24_000]
    files = [f for f in files if not any(word in str(f.relative_to(folder)) for word in NOT_SPEECH)]
    # A fixed shuffle: neighbours in the alphabet are variants of one sentence.
    order = np.random.default_rng(7).permutation(len(files))
    total, out = 0, []
    for i in order:
        x = trim(decode(files[i]))
        if len(x) < RATE:
            continue
        out.append(x * (LEVEL / active_level(x)))
        total += len(x)
        if total > 1.3 * SECONDS * RATE:
            return out
    sys.exit(f"{folder}: only {total / RATE:.0f} s of speech; the package has changed, adapt scripts/speech.py")


def pause(seconds):
    return np.zeros(int(seconds * RATE))


def save(path, x):
    with wave.open(str(path), "wb") as w:
        w.setnchannels(1)
        w.setsampwidth(2)
        w.setframerate(RATE)
        w.writeframes((np.clip(x, -1, 1) * 32767).astype(np.int16).tobytes())
    print(f"{path}: {len(x) / RATE:.1f} s")


def continuous(parts):
    """Prompts with 0.3 s between them, exactly SECONDS long."""
    return np.concatenate([y for x in parts for y in (x, pause(0.3))])[: SECONDS * RATE]


def dialogue(parts):
    """Both sides of a conversation, equally long: one talks while the other is silent; turns overlap by 0.2 s."""
    sides = {name: np.zeros(SECONDS * RATE) for name in parts}
    queues = {name: list(p) for name, p in parts.items()}
    position, turn = RATE // 2, 0
    while position < (SECONDS - 8) * RATE:
        name = "ab"[turn % 2]
        start = position
        while position - start < 4 * RATE and queues[name]:
            x = queues[name].pop(0)[: SECONDS * RATE - position]
            sides[name][position : position + len(x)] += x
            position += len(x) + RATE // 4
        if position == start:
            break
        position -= int(0.45 * RATE)
        turn += 1
    return sides


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    parts = {}
    with tempfile.TemporaryDirectory() as work:
        for name, (package, folder) in TALKERS.items():
            parts[name] = prompts(unpack(package, Path(work)) / folder)
    for name, p in parts.items():
        save(out / f"talker-{name}.wav", continuous(p))
    for name, x in dialogue(parts).items():
        save(out / f"dialogue-{name}.wav", x)


if __name__ == "__main__":
    main()
