"""Video frames that carry their own number, so that a decoded frame can be compared with the very one that was sent.

As a command, `picture.py IN.y4m OUT.y4m [N]` copies every Nth frame of a file with the numbers drawn in, for senders that
play files as they are (Chromium's fake camera). Its frames are numbered anew, from 0.

A strip along the top edge holds 20 black or white squares: 16 bits of the frame number (most significant first) and 4 of a
checksum. It survives scaling to lower simulcast layers and coarse quantization.
"""

from __future__ import annotations

import sys

import numpy as np

BITS = 16
CHECK = 4
CELLS = BITS + CHECK
STRIP = 16
"""The strip is 1/16 of the picture's height."""


def checksum(number: int) -> int:
    """Four bits over the number's nibbles, never equal for an all-black strip."""
    return (((number >> 12) ^ (number >> 8) ^ (number >> 4) ^ number) & 0xF) ^ 0xA


def draw_number(luma: np.ndarray, number: int) -> None:
    """Draws `number` modulo 65536 into the strip of a luma plane, shape (height, width), uint8."""
    height, width = luma.shape
    number &= 0xFFFF
    word = (number << CHECK) | checksum(number)
    for cell in range(CELLS):
        left, right = cell * width // CELLS, (cell + 1) * width // CELLS
        luma[: height // STRIP, left:right] = 235 if (word >> (CELLS - 1 - cell)) & 1 else 16


def read_number(luma: np.ndarray) -> int | None:
    """The number in a decoded luma plane, or None where the strip can't be read."""
    height, width = luma.shape
    middle = height // STRIP // 2
    word = 0
    for cell in range(CELLS):
        centre = (2 * cell + 1) * width // (2 * CELLS)
        word = (word << 1) | int(luma[max(0, middle - 1) : middle + 2, centre - 1 : centre + 2].mean() > 125)
    number = word >> CHECK
    return number if word & 0xF == checksum(number) else None


class Pattern:
    """A colour gradient with moving detail, at 30 frames/s; every frame is a function of its number alone."""

    fps = 30

    def __init__(self, width: int, height: int) -> None:
        if width % 2 or height % 2:
            raise ValueError(f"--video {width}x{height}: I420 needs even sizes")
        self.width, self.height = width, height
        y, x = np.mgrid[0:height, 0:width]
        texture = np.random.default_rng(1).integers(-24, 24, (height // 8 + 1, width // 8 + 1))
        texture = np.kron(texture, np.ones((8, 8), int))[:height, :width]
        self.base = np.clip(60 + 120 * x / width + 30 * np.sin(y / 17) + texture, 16, 235).astype(np.uint8)
        cy, cx = np.mgrid[0 : height // 2, 0 : width // 2]
        self.u = (96 + 64 * cx / max(1, width // 2)).astype(np.uint8)
        self.v = (96 + 64 * cy / max(1, height // 2)).astype(np.uint8)

    def i420(self, number: int) -> bytes:
        """Frame `number` as I420."""
        # The picture pans slowly and a square runs over it: like a talking head, most of it moves little.
        luma = np.roll(self.base, number // 2, axis=1)
        side = self.height // 5
        left = int((np.sin(number / 20) * 0.4 + 0.5) * (self.width - side))
        top = self.height // 3 + int(np.cos(number / 13) * self.height / 8)
        luma[top : top + side, left : left + side] = 255 - luma[top : top + side, left : left + side]
        draw_number(luma, number)
        return luma.tobytes() + self.u.tobytes() + self.v.tobytes()


class Y4mSource:
    """Frames of an 8-bit 4:2:0 Y4M file, looped, each with its number drawn in."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as f:
            self.width, self.height, self.fps, self.first = read_header(f, path)
            f.seek(0, 2)
            self.frame_bytes = self.width * self.height * 3 // 2
            self.count = (f.tell() - self.first) // (self.frame_bytes + 6)
        if self.count == 0:
            raise ValueError(f"{path}: no frames")
        self.file = open(path, "rb")

    def i420(self, number: int, drawn: int | None = None) -> bytes:
        """Frame `number` modulo the length of the file, as I420; `drawn` is written into it in place of its own number."""
        self.file.seek(self.first + (number % self.count) * (self.frame_bytes + 6) + 6)
        data = bytearray(self.file.read(self.frame_bytes))
        luma = np.frombuffer(data, np.uint8, self.width * self.height).reshape(self.height, self.width)
        draw_number(luma, number if drawn is None else drawn)
        return bytes(data)


def read_header(f, path: str) -> tuple[int, int, float, int]:
    """Width, height, frames/s and the offset of the first frame of a Y4M file whose frame headers are plain."""
    line = f.readline(256)
    if not line.startswith(b"YUV4MPEG2 ") or not line.endswith(b"\n"):
        raise ValueError(f"{path}: not a Y4M file")
    width = height = 0
    fps = 30.0
    for word in line.split()[1:]:
        key, value = word[:1], word[1:].decode()
        if key == b"W":
            width = int(value)
        elif key == b"H":
            height = int(value)
        elif key == b"F":
            top, bottom = value.split(":")
            fps = int(top) / int(bottom)
        elif key == b"C" and not value.startswith("420"):
            raise ValueError(f"{path}: colour format {value}; needed: 420")
    return width, height, fps, f.tell()


class NumberedY4m:
    """Received frames as Y4M, and beside it PATH.numbers with one frame number a line (-1: unreadable).

    The first frame sets the size; frames of other sizes (lower simulcast layers) are left out, and so counted in
    `other_sizes`, unless a larger one comes: then the file starts again at the larger size.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.size = (0, 0)
        self.other_sizes = 0
        self.file = None
        self.numbers: list[int] = []

    def write(self, number: int | None, width: int, height: int, data: bytes) -> None:
        if width * height > self.size[0] * self.size[1]:
            if self.file:
                self.file.close()
            self.other_sizes += len(self.numbers)
            self.numbers = []
            self.size = (width, height)
            self.file = open(self.path, "wb")
            self.file.write(f"YUV4MPEG2 W{width} H{height} F30:1 Ip A1:1 C420jpeg\n".encode())
        elif (width, height) != self.size:
            self.other_sizes += 1
            return
        self.file.write(b"FRAME\n" + data)
        self.numbers.append(-1 if number is None else number)

    def close(self) -> str:
        """Finishes both files; returns the path of the Y4M file."""
        self.file.close()
        with open(self.path + ".numbers", "w") as f:
            f.writelines(f"{n}\n" for n in self.numbers)
        return self.path


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    every = int(sys.argv[3]) if len(sys.argv) == 4 else 1
    source = Y4mSource(sys.argv[1])
    fps, count = source.fps / every, len(range(0, source.count, every))
    with open(sys.argv[2], "wb") as out:
        out.write(f"YUV4MPEG2 W{source.width} H{source.height} F{round(fps * 1000)}:1000 Ip A1:1 C420jpeg\n".encode())
        for number in range(count):
            out.write(b"FRAME\n" + source.i420(number * every, number))
    print(f"{sys.argv[2]}: {source.width}x{source.height}, {count} frames at {fps:g}/s")


if __name__ == "__main__":
    main()
