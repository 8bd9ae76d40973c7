"""Where a picture may come from: limits, paths, `data:` URLs and the bytes of a file. Nothing here touches the network.

`media_open` looks into the bytes. A path goes `resolve_media` -> `read_bytes` or `media_open.probe_file`; a `data:` URL
goes `parse_data_url` -> `media_open`.

Two kinds of refusal: a path that reaches where the run file did not allow it, or that is no path at all, is a
`DataError` (the data set is wrong and is never trained around); a file that is missing or unusable is a `Drop` (one
sample less).
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

from pydantic import Field, model_validator

from lensmith.config.part import Part
from lensmith.core.errors import DataError, Drop

Format = Literal["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]
DEFAULT_FORMATS: tuple[Format, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF")

NAME_BYTES = 255  # NAME_MAX of Linux
PATH_BYTES = 4095  # PATH_MAX of Linux, without the closing NUL

_DRIVE = re.compile(r"[A-Za-z]:(?:[\\/]|$)")
# A colon is legal in a file name ("scene:1.png"): the names known to be schemes are refused whatever follows them
# ("http:127.1"), any other where a slash or nothing follows.
_URL = re.compile(
    r"\s*(?:(?:https?|ftps?|sftp|ssh|gopher|wss?|s3|gs|gcs|az|abfss?|hf|hdfs|oss|tos|blob|javascript|data):"
    r"|[a-z][a-z0-9+.-]+:(?:[/\\]|$))",
    re.IGNORECASE,
)
# Regular files there have size 0 and contents of the machine, not of a data set.
_PSEUDO_ROOTS = (Path("/proc"), Path("/sys"))


class ImageLimits(Part):
    """What a picture may be. Everything is checked from the file header, before a pixel is decoded."""

    max_bytes: int = Field(default=64 * 2**20, gt=0)
    """Largest encoded size of one picture, in bytes."""

    max_pixels: int = Field(default=50_000_000, gt=0)
    """Largest width times height, in pixels."""

    max_side: int = Field(default=16_384, gt=0)
    """Largest width and largest height, in pixels."""

    min_side: int = Field(default=1, gt=0)
    """Smallest width and smallest height, in pixels."""

    max_aspect: float = Field(default=200.0, ge=1.0)
    """Largest ratio of the longer to the shorter side (Qwen's processors refuse more than 200)."""

    max_images: int = Field(default=16, gt=0)
    """Largest number of pictures in one sample. A document with more (videos count too) is cut."""

    formats: tuple[Format, ...] = Field(default=DEFAULT_FORMATS, min_length=1)
    """Accepted formats, told by content, not by file name. TIFF can be added."""

    frames: Literal["drop", "first"] = "drop"
    """An animation or multi-page file: drop its sample, or train on its first frame (counted as `first_frame`)."""


class VideoLimits(Part):
    """How a video is shown, and what it may be. Its pictures are held to `data.image` too."""

    fps: float | None = Field(default=None, gt=0)
    """Frames shown of a second of video; an `fps` beside a video in the data goes first. Left out: the model's own
    setting, else 2."""

    min_frames: int | None = Field(default=None, ge=2)
    """Fewest frames shown of a video that has them. Left out: the model's own setting, else 4."""

    max_frames: int | None = Field(default=None, ge=2)
    """Most frames shown of a video. Left out: the model's own setting, else 768."""

    min_pixels: int | None = Field(default=None, ge=1)
    """Frames below this area are enlarged. Left out: the model's own setting."""

    max_pixels: int | None = Field(default=None, ge=1)
    """Frames above this area are reduced. Left out: the model's own setting."""

    total_pixels: int | None = Field(default=None, ge=1)
    """Most pixels of all shown frames of a video together: the more frames, the smaller they are, down to
    `min_pixels`. Left out: the model's own setting; Qwen2-VL and Qwen2.5-VL have none."""

    rule: Literal["model", "llamafactory"] = "model"
    """`llamafactory`: frames are chosen as LLaMA-Factory does, at most `max_frames` (left out: 128), and each is
    brought within `min_pixels` and `max_pixels` (left out: 256 and 65,536) before the model's own rule and limits."""

    max_seconds: float = Field(default=3600.0, gt=0)
    """Longest video."""

    max_bytes: int = Field(default=2**30, gt=0)
    """Largest file of a video, in bytes."""

    @model_validator(mode="after")
    def _lowest_first(self) -> VideoLimits:
        for low, high in (("min_frames", "max_frames"), ("min_pixels", "max_pixels"), ("min_pixels", "total_pixels")):
            fewest, most = getattr(self, low), getattr(self, high)
            if fewest is not None and most is not None and fewest > most:
                raise ValueError(f"{low} {fewest} is above {high} {most}")
        return self


def resolve_media(path: str, roots: Sequence[Path], origin: str, base: Path) -> Path:
    """The real path (no symbolic links left) of the file that `path` names in the row `origin`.

    Relative paths start at `base`. The file must lie inside `base` or one of `roots` after all links are followed. A
    name is looked up as written, then in the other Unicode normal form: archives made on macOS hold NFD names.

    Raises DataError PATH_SYNTAX, URL_NOT_ALLOWED, PATH_ABSOLUTE, PATH_ESCAPE; Drop IMG_MISSING, PATH_KIND, IMG_READ.
    """
    _check_syntax(path, origin)
    real = _locate(path, base)
    allowed = [Path(os.path.realpath(root)) for root in (base, *roots)]
    if not any(real.is_relative_to(root) for root in allowed):
        raise _outside(path, origin, base, roots)
    _check_kind(real)
    return real


@contextmanager
def open_media(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; `path` comes from `resolve_media`, so a link at its end was put there since.

    O_NONBLOCK keeps a FIFO from blocking the open; the kind is checked on the descriptor that is then read.

    Raises Drop PATH_KIND, IMG_MISSING, IMG_READ.
    """
    _check_kind(path)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        raise _unreadable(error) from None
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Drop("PATH_KIND", "not a regular file")
        yield file


def read_bytes(path: Path, limits: ImageLimits) -> bytes:
    """The whole file; its kind and size are checked before anything is read.

    Raises Drop IMG_BYTES, IMG_EMPTY and what `open_media` raises.
    """
    with open_media(path) as file:
        check_size(os.fstat(file.fileno()).st_size, limits)
        data = file.read(limits.max_bytes + 1)  # one more than allowed: the file may have grown since fstat
    check_size(len(data), limits)
    return data


def check_size(num_bytes: int, limits: ImageLimits) -> None:
    """Raises Drop IMG_EMPTY, IMG_BYTES."""
    if num_bytes == 0:
        raise Drop("IMG_EMPTY", "0 bytes")
    if num_bytes > limits.max_bytes:
        raise Drop("IMG_BYTES", f"{num_bytes} bytes > max_bytes {limits.max_bytes}")


def is_data_url(text: str) -> bool:
    return text[:5].lower() == "data:"


def parse_data_url(text: str, limits: ImageLimits) -> bytes:
    """The bytes of `data:image/...;base64,...` (RFC 2397; only base64, only image types; the content decides which).

    Raises Drop IMG_FORMAT (not an image type), IMG_BASE64 (not base64, or wrong base64), IMG_BYTES (before decoding).
    """
    header, comma, payload = text[5:].partition(",")
    media_type, *parameters = header.lower().split(";")
    if not comma or not parameters or parameters[-1].strip() != "base64":
        raise Drop("IMG_BASE64", "the data: URL has no ';base64,' part")
    if not media_type.strip().startswith("image/"):
        raise Drop("IMG_FORMAT", f"data: URL of type {_quoted(media_type)}")
    num_bytes = len(payload) * 3 // 4 - payload[-2:].count("=")
    if num_bytes > limits.max_bytes:
        raise Drop("IMG_BYTES", f"{num_bytes} bytes > max_bytes {limits.max_bytes}")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):  # ValueError: characters outside ASCII
        raise Drop("IMG_BASE64", "wrong base64 in a data: URL") from None


def _check_syntax(path: str, origin: str) -> None:
    def refuse(problem: str) -> DataError:
        remedy = "write a path relative to the data file"
        return DataError("PATH_SYNTAX", f"image path {_quoted(path)} {problem}", where=origin, remedy=remedy)

    if not path or "\0" in path:
        raise refuse("is empty or holds a NUL")
    if _DRIVE.match(path) or path.startswith("\\\\"):
        raise refuse("is a Windows path")
    if path.startswith("~"):
        raise refuse("starts with '~', which is not expanded")
    if path[:5].lower() == "file:":
        raise refuse("is a file: URL")
    if _URL.match(path):
        message = f"image {_quoted(path)} is a URL; nothing is fetched while training"
        remedy = "download the pictures first and give their paths"
        raise DataError("URL_NOT_ALLOWED", message, where=origin, remedy=remedy)
    try:
        names = os.fsencode(path).split(b"/")
    except UnicodeEncodeError:
        raise refuse("is not valid Unicode") from None
    if max(map(len, names)) > NAME_BYTES or sum(map(len, names)) + len(names) - 1 > PATH_BYTES:
        raise refuse(f"is longer than {NAME_BYTES} bytes in a name or {PATH_BYTES} in all")


def _locate(path: str, base: Path) -> Path:
    for name in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
        if os.path.lexists(base / name):
            return Path(os.path.realpath(base / name))
    return Path(os.path.realpath(base / path))


def _outside(path: str, origin: str, base: Path, roots: Sequence[Path]) -> DataError:
    named = os.path.abspath(path)
    declared = [os.path.abspath(root) for root in (base, *roots)]
    if os.path.isabs(path) and not any(Path(named).is_relative_to(root) for root in declared):
        message = f"absolute image path {_quoted(path)} is outside every declared folder"
        remedy = "add its folder to `data.media_roots`, or write paths relative to the data file"
        return DataError("PATH_ABSOLUTE", message, where=origin, remedy=remedy)
    message = f"image path {_quoted(path)} leads outside {_quoted(str(base))} (by '..' or a symbolic link)"
    remedy = "if this is meant, add the folder that holds the file to `data.media_roots`"
    return DataError("PATH_ESCAPE", message, where=origin, remedy=remedy)


def _check_kind(path: Path) -> None:
    """Looks without opening: opening a device can have effects of its own."""
    if any(path.is_relative_to(root) for root in _PSEUDO_ROOTS):
        raise Drop("PATH_KIND", "a file of the system, not of a data set")
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except OSError as error:
        raise _unreadable(error) from None
    if not stat.S_ISREG(mode):
        raise Drop("PATH_KIND", "a folder" if stat.S_ISDIR(mode) else "not a regular file")


_NOT_THE_FILE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What the process lacks: every picture would be refused alike."""


def _unreadable(error: OSError) -> Drop:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return Drop("IMG_MISSING", "no such file")
    if error.errno in _NOT_THE_FILE:
        raise error
    return Drop("IMG_READ", os.strerror(error.errno or 0))


def _quoted(text: str) -> str:
    """`repr` escapes control, ANSI and bidirectional characters: this text ends up in logs and terminals."""
    return repr(text if len(text) <= 200 else text[:200] + "...")
