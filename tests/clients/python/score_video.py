"""Picture quality of a recording against what was sent: score_video.py REFERENCE DEG.y4m [--frames N]

REFERENCE is what the sender was given: WxH (the Python client's moving pattern) or the path of a Y4M file. DEG.y4m and
DEG.y4m.numbers are what the Python client wrote with --record and --record-video. Every decoded frame carries its number
(picture.py), so each is compared with the very frame that was sent, however many were dropped or frozen. Frames smaller than the
reference (a lower simulcast layer) are scaled up first, as a viewer's window would.

Prints one JSON object:
  vmaf, vmaf_p5        mean and 5th percentile of VMAF (model vmaf_v0.6.1, 0 to 100)
  ssim, psnr_y         means
  frames, unreadable   frames scored; frames whose number could not be read (left out)
  shown                part of the sent frames, between the first and the last one seen, that were seen
  width, height        of the recording
The numbered strip along the top is cropped off before scoring.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import numpy as np

import picture


def ffmpeg_with_vmaf() -> str:
    """The ffmpeg of the imageio-ffmpeg wheel: Debian's is built without libvmaf."""
    import imageio_ffmpeg

    return imageio_ffmpeg.get_ffmpeg_exe()


def reference(name: str):
    """A source of numbered frames for WxH or a Y4M file."""
    if os.path.exists(name):
        return picture.Y4mSource(name)
    try:
        width, height = map(int, name.split("x"))
    except ValueError:
        sys.exit(f"{name}: neither a file nor WIDTHxHEIGHT")
    return picture.Pattern(width, height)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("reference")
    p.add_argument("recording")
    p.add_argument("--frames", type=int, default=150, help="score at most this many frames, taken from the recording's end")
    a = p.parse_args()
    source = reference(a.reference)
    try:
        with open(a.recording + ".numbers") as f:
            numbers = [int(line) for line in f]
        recording = open(a.recording, "rb")
    except OSError as e:
        sys.exit(f"{e}; record with the Python client: --record DIR --record-video")
    width, height, _, first = picture.read_header(recording, a.recording)
    size = width * height * 3 // 2
    readable = [i for i, n in enumerate(numbers) if n >= 0]
    if len(readable) < 10:
        sys.exit(f"{a.recording}: only {len(readable)} of {len(numbers)} frames carry a readable number")
    chosen = readable[-a.frames :]
    with tempfile.TemporaryDirectory() as work:
        paths = {name: os.path.join(work, name) for name in ("sent.yuv", "seen.yuv", "vmaf.json")}
        with open(paths["sent.yuv"], "wb") as sent, open(paths["seen.yuv"], "wb") as seen:
            for i in chosen:
                sent.write(source.i420(numbers[i]))
                recording.seek(first + i * (size + 6) + 6)
                seen.write(recording.read(size))
        # An even number of lines below the strip.
        top = -(-source.height // picture.STRIP // 2) * 2
        crop = f"crop={source.width}:{source.height - top}:0:{top}"
        graph = (
            f"[0:v]scale={source.width}:{source.height}:flags=bicubic,{crop}[seen];[1:v]{crop}[sent];"
            f"[seen][sent]libvmaf=log_fmt=json:log_path={paths['vmaf.json']}:n_threads=2:feature=name=psnr|name=float_ssim"
        )
        raw = ["-f", "rawvideo", "-pix_fmt", "yuv420p", "-r", "30"]
        command = [ffmpeg_with_vmaf(), "-nostdin", "-v", "error"]
        command += [*raw, "-s", f"{width}x{height}", "-i", paths["seen.yuv"]]
        command += [*raw, "-s", f"{source.width}x{source.height}", "-i", paths["sent.yuv"], "-lavfi", graph, "-f", "null", "-"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"ffmpeg: {done.stderr.strip()}")
        with open(paths["vmaf.json"]) as f:
            frames = [frame["metrics"] for frame in json.load(f)["frames"]]
    vmaf = np.array([m["vmaf"] for m in frames])
    seen_numbers = sorted({numbers[i] for i in readable})
    # A file that is looped numbers its frames anew in each round: the span then is the whole file.
    span = seen_numbers[-1] - seen_numbers[0] + 1
    print(
        json.dumps(
            {
                "vmaf": round(float(vmaf.mean()), 2),
                "vmaf_p5": round(float(np.percentile(vmaf, 5)), 2),
                "ssim": round(float(np.mean([m["float_ssim"] for m in frames])), 5),
                "psnr_y": round(float(np.mean([m["psnr_y"] for m in frames])), 2),
                "frames": len(frames),
                "unreadable": len(numbers) - len(readable),
                "shown": round(len(seen_numbers) / span, 3),
                "width": width,
                "height": height,
            }
        )
    )


if __name__ == "__main__":
    main()
