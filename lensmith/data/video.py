"""Videos: what a container holds, and its frames as pictures. Nothing here touches the network.

FFmpeg (through PyAV) gets open files and bytes only, never a name, and only the container formats of `CONTAINERS`: a
playlist (`ffconcat`, HLS, DASH) that calls itself .mp4 would make it open whatever files the playlist names.

The frames of a video are its packets in order; what a header says of their number is not believed. Of a video that is
probed, the first picture is decoded: nothing else tells its rotation and whether there is a decoder for it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from lensmith.core.encoded import VideoInfo
from lensmith.core.errors import ConfigError, Drop
from lensmith.data.media import ImageLimits, VideoLimits, open_media

CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
RATE_GAP = 0.05
"""A header whose pictures a second are this far off the times of the pictures is not believed."""
_TURN = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}

Source = bytes | Path
"""The file, or the path of one that `resolve_media` has found."""


def require_pyav() -> Any:
    """The module `av`. Raises ConfigError EXTRA where it is not installed."""
    try:
        import av
    except ImportError:
        remedy = 'pip install "lensmith[video]"'
        raise ConfigError("EXTRA", "the data has videos, and PyAV is not installed", remedy=remedy) from None
    return av


def probe_video(source: Source, limits: VideoLimits, pictures: ImageLimits) -> VideoInfo:
    """Size (upright), number of pictures and pictures a second; a picture is held to `pictures`.

    Raises Drop VIDEO_EMPTY, VIDEO_BYTES, VIDEO_FORMAT, VIDEO_DECODE, VIDEO_LONG, IMG_PIXELS, IMG_TINY, IMG_ASPECT, and
    what `open_media` raises; ConfigError EXTRA.
    """
    with _opened(source, limits) as (container, stream):
        counted = _Counted()
        for packet in container.demux(stream):
            counted.add(packet)
        if not counted.packets:
            raise Drop("VIDEO_EMPTY", "no frames")
        # an MP4 lists its packets one by one (less those that an edit list passes over); other headers hold a number
        promised = len(stream.index_entries) if container.format.name.startswith("mov") else 0
        if counted.corrupt or promised > counted.packets + 1:
            raise Drop("VIDEO_DECODE", "the file is damaged or cut short")
        if counted.first is None:
            raise Drop("VIDEO_DECODE", "no frame decodes")
        width, height = counted.first.width, counted.first.height
        if _turn(counted.first) in (90, 270):
            width, height = height, width
        fps = counted.rate(float(stream.average_rate or 0), float(stream.time_base or 0))
    _check_picture(width, height, pictures)
    if counted.shown / fps > limits.max_seconds:
        raise Drop("VIDEO_LONG", f"{counted.shown / fps:.1f} seconds > data.video.max_seconds {limits.max_seconds:g}")
    return VideoInfo(width, height, counted.shown, fps)


def read_frames(source: Source, indices: Sequence[int], limits: VideoLimits) -> Iterator[tuple[int, Image.Image]]:
    """The frames `indices` in RGB and upright, each once, in ascending order, with their numbers.

    Containers often hold one packet more than decoders give pictures: for the very last frame the one before it may
    stand. Raises Drop VIDEO_DECODE for any other that is missing, and as `probe_video` does.
    """
    wanted = sorted(set(indices))
    size: tuple[int, int] | None = None
    at, frame, done = -1, None, 0
    with _opened(source, limits) as (container, stream):
        for at, frame in enumerate(container.decode(stream)):
            if at != wanted[done]:
                continue
            picture = _upright(frame)
            size = size or picture.size
            if picture.size != size:
                raise Drop("VIDEO_DECODE", "the frames have several sizes")
            yield at, picture
            done += 1
            if done == len(wanted):
                return
        if frame is None or wanted[-1] > at + 1:
            raise Drop("VIDEO_DECODE", f"{at + 1} frames decode; number {wanted[-1] + 1} is wanted")
        yield wanted[-1], _upright(frame)


@dataclass
class _Counted:
    """The packets of a stream, and its first picture."""

    packets: int = 0
    shown: int = 0
    corrupt: bool = False
    first: Any = None
    earliest: int | None = None
    latest: int | None = None

    def add(self, packet: Any) -> None:
        if self.first is None:
            self.first = next(iter(packet.decode()), None)
        if not packet.size:  # the one that ends a stream
            return
        self.packets += 1
        self.corrupt |= packet.is_corrupt
        if packet.is_discard:  # before the start of the edit list
            return
        self.shown += 1
        if packet.pts is not None:
            self.earliest = packet.pts if self.earliest is None else min(self.earliest, packet.pts)
            self.latest = packet.pts if self.latest is None else max(self.latest, packet.pts)

    def rate(self, header: float, time_base: float) -> float:
        """Pictures a second: as the header says, unless the times of the pictures say otherwise."""
        seconds = (self.latest - self.earliest) * time_base if self.latest and self.earliest is not None else 0.0
        if seconds <= 0:
            return header or float(self.shown)
        measured = (self.shown - 1) / seconds
        return header if abs(header - measured) <= RATE_GAP * measured else measured


@contextmanager
def _opened(source: Source, limits: VideoLimits) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream."""
    av = require_pyav()
    with ExitStack() as stack:
        file: BinaryIO = io.BytesIO(source) if isinstance(source, bytes) else stack.enter_context(open_media(source))
        _check_bytes(file, limits)
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "none"}
        try:
            container = stack.enter_context(av.open(file, container_options=options, metadata_errors="replace"))
        except (av.FFmpegError, ValueError):
            raise Drop("VIDEO_FORMAT", "not a video file") from None
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise Drop("VIDEO_FORMAT", "no video stream")
        if streams[0].codec_context is None:
            raise Drop("VIDEO_DECODE", "no decoder for this kind of video")
        # more threads would show other pictures of a damaged stream, and workers decode side by side anyway
        streams[0].codec_context.thread_count = 1
        try:
            yield container, streams[0]
        except av.FFmpegError:
            raise Drop("VIDEO_DECODE", "the file is damaged or cut short") from None


def _check_bytes(file: BinaryIO, limits: VideoLimits) -> None:
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    if num_bytes == 0:
        raise Drop("VIDEO_EMPTY", "0 bytes")
    if num_bytes > limits.max_bytes:
        raise Drop("VIDEO_BYTES", f"{num_bytes} bytes > data.video.max_bytes {limits.max_bytes}")


def _check_picture(width: int, height: int, limits: ImageLimits) -> None:
    size = f"frames of {width} x {height} pixels"
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise Drop("IMG_PIXELS", f"{size}; max_pixels {limits.max_pixels}, max_side {limits.max_side}")
    if min(width, height) < limits.min_side:
        raise Drop("IMG_TINY", f"{size}; min_side {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Drop("IMG_ASPECT", f"{size}; max_aspect {limits.max_aspect:g}")


def _turn(frame: Any) -> int:
    """Degrees counterclockwise by which a frame is turned to stand upright."""
    return frame.rotation % 360


def _upright(frame: Any) -> Image.Image:
    picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
    turn = _TURN.get(_turn(frame))
    return picture if turn is None else picture.transpose(turn)
