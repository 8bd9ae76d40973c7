"""Videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL: which frames are shown, how large, and what stands in their place.

Vendor sources: transformers' `video_processing_qwen2_vl`, `video_processing_qwen3_vl` and `processing_qwen3_vl`, which
need torchvision and are therefore not called.

Deliberate differences, by name:
- `no_outer_marks`: Qwen3-VL's marks stand around each pair of frames only, as in transformers 4.57, with which the
  model was released, and in vLLM; transformers 5 leaves those of the chat template around the whole video as well;
- `no_frame_past_the_end`: Qwen2-VL's sampling asks for one frame too many, beyond the end, where its division rounds up
  (17 frames of which 14 are shown); here as many are shown as were reckoned;
- `one_frame`: a video of one frame is that frame twice; the vendor's processors fail;
- `resampling`: frames are resized by Pillow, as pictures are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lensmith.core.encoded import ImageBlock, VideoInfo
from lensmith.core.errors import Drop
from lensmith.core.sample import Video
from lensmith.data.encode import Piece, Placed, Template
from lensmith.data.media import VideoLimits
from lensmith.data.resize import FirstResize
from lensmith.family.base import PixelSettings, VideoSettings

MAX_ASPECT = 200  # the vendor's processors refuse more


def video_settings(name: str, own: Mapping[str, Any], unit: int, temporal: int, limits: VideoLimits) -> VideoSettings:
    """The model's own settings with those of the run file in front. `unit` is the side of a token in pixels.

    The vendor's `size` is of a frame before Qwen3-VL, of all frames together since; `cap_pixels_per_frame` adds the
    other of the two.
    """
    size, cap = own.get("size") or {}, bool(own.get("cap_pixels_per_frame"))
    low, high = size.get("shortest_edge"), size.get("longest_edge")
    if name == "qwen3_vl":
        low, high = low or 128 * 32 * 32, high or 768 * 32 * 32
        frame = (own.get("max_video_tokens") or 768) * unit**2
        found = VideoSettings(min_total=low, max_total=high, max_pixels=frame if cap else None)
    else:
        low, high = own.get("min_pixels") or low or 128 * 28 * 28, own.get("max_pixels") or high or 768 * 28 * 28
        total = int((own.get("max_video_tokens") or 128000) * unit**2 * 0.9) * temporal
        found = VideoSettings(min_pixels=low, max_pixels=high, max_total=total if cap else None)
    found = replace(
        found, fps=limits.fps or own.get("fps") or 2.0, floor=int(low * 1.05) if cap else 0,
        min_frames=limits.min_frames or own.get("min_frames") or 4,
        max_frames=limits.max_frames or own.get("max_frames") or 768,
    )  # fmt: skip
    if limits.rule == "llamafactory":
        first = FirstResize(limits.min_pixels or 16 * 16, limits.max_pixels or 256 * 256, "sides")
        return replace(found, first=first, fps=limits.fps or 2.0, max_frames=limits.max_frames or 128)
    if limits.max_pixels is not None:
        found = replace(found, max_pixels=limits.max_pixels, floor=0)
    if limits.total_pixels is not None:
        found = replace(found, max_total=limits.total_pixels, floor=0)
    if limits.min_pixels is not None:
        found = replace(found, min_pixels=limits.min_pixels, floor=limits.min_pixels, min_total=0)
    return found


def place_video(name: str, pixels: PixelSettings, shown: VideoSettings, video: Video, info: VideoInfo) -> list[Piece]:
    """Qwen3-VL: each pair of frames with its time in front; before: all frames as one block."""
    t = pixels.temporal
    fps = info.fps or shown.fps
    frames = sample_frames(name, info, shown, t, video.fps if not video.frames and video.fps else shown.fps)
    wide, high = frame_size(name, pixels, shown, info, max(len(frames), t))
    seconds = t / (len(frames) / info.num_frames * fps)
    frames += [frames[-1]] * (-len(frames) % t)
    grid = high // pixels.patch, wide // pixels.patch

    def placed(part: list[int]) -> list[Piece]:
        rows = len(part) // t
        tokens = rows * grid[0] * grid[1] // pixels.merge**2
        block = ImageBlock(video, wide, high, (rows, *grid), tokens, tuple(part), seconds)
        return [Template("<|vision_start|>"), Placed(block), Template("<|vision_end|>")]

    if name != "qwen3_vl":
        return placed(frames)
    pieces: list[Piece] = []
    for at in range(0, len(frames), t):
        part = frames[at : at + t]
        pieces += [Template(f"<{(part[0] / fps + part[-1] / fps) / 2:.1f} seconds>"), *placed(part)]
    return pieces


def sample_frames(name: str, info: VideoInfo, shown: VideoSettings, temporal: int, fps: float) -> list[int]:
    """Which frames are shown, `fps` of a second (the vendors' `sample_frames`). Frames whose rate is not known (0)
    have been chosen before: all of them, up to the limit."""
    total = info.num_frames
    wanted = total / info.fps * fps if info.fps else float(total)
    if shown.first is not None:
        count = min(max(1, int(wanted + 1e-6)), shown.max_frames, total) if info.fps else total
        return np.linspace(0, total - 1, count).astype(int).tolist()
    if name == "qwen3_vl":
        count = min(max(int(wanted), shown.min_frames), shown.max_frames, total)
        return np.linspace(0, total - 1, count).round().astype(int).tolist()
    if total <= temporal or (not info.fps and total <= shown.max_frames):
        return list(range(total))
    most = min(shown.max_frames, total) // temporal * temporal
    count = int(min(max(wanted, shown.min_frames, temporal), most)) // temporal * temporal
    return (np.arange(count) * total // count).tolist()


def frame_size(
    name: str, pixels: PixelSettings, shown: VideoSettings, info: VideoInfo, num_frames: int
) -> tuple[int, int]:
    """Width and height that the frames are resized to. Raises `Drop` IMG_ASPECT."""
    unit, (width, height) = pixels.patch * pixels.merge, (info.width, info.height)
    if shown.first is not None:
        width, height = shown.first(width, height)
    if name == "qwen3_vl":
        if min(width, height) < unit:
            scale = max(unit / height, unit / width)
            width, height = int(width * scale), int(height * scale)
        assert shown.max_total is not None
        most = shown.max_total
        if shown.max_pixels is not None:
            most = min(shown.max_pixels, most // num_frames) * num_frames
        most = max(most, shown.floor * num_frames)
        least = min(max(shown.min_total, shown.min_pixels * num_frames), most)
        rounded = round(num_frames / pixels.temporal) * pixels.temporal
        return smart_resize(width, height, unit, least, most, num_frames, rounded)
    assert shown.max_pixels is not None
    most = shown.max_pixels
    if shown.max_total is not None:
        most = max(min(most, shown.max_total // num_frames), shown.floor)
    return smart_resize(width, height, unit, min(shown.min_pixels, most), most)


def smart_resize(
    width: int, height: int, unit: int, min_pixels: int, max_pixels: int, frames: int = 1, rounded: int = 1
) -> tuple[int, int]:
    """The vendor's: both sides multiples of `unit`, the area of all frames within the limits, the aspect ratio kept as
    near as that allows. `rounded` is the number of frames that is held against the limits.

    Raises `Drop` IMG_ASPECT above 200 : 1.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Drop("IMG_ASPECT", f"{width}x{height} is longer than {MAX_ASPECT}:1")
    high, wide = round(height / unit) * unit, round(width / unit) * unit
    if rounded * high * wide > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        high = max(unit, math.floor(height / shrink / unit) * unit)
        wide = max(unit, math.floor(width / shrink / unit) * unit)
    elif rounded * high * wide < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        high, wide = math.ceil(height * grow / unit) * unit, math.ceil(width * grow / unit) * unit
    return wide, high
