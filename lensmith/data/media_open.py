"""From the bytes of a picture to canonical RGB: 8 bits per channel, sRGB assumed, upright, no alpha.

`probe` reads the header only and is what the index calls; `open_rgb` runs the same header checks first, so it never
accepts what `probe` refuses. Pillow's global settings are neither read nor changed: the format is told by its first
bytes and its plugin is called directly, so our limits come before Pillow's own (`Image.open` warns from 89 megapixels
and fails from 179).

What each mode becomes (Pillow's mode after decoding; `v` a sample, `a` its alpha, all roundings to nearest):

| mode                      | rule                                                                            | note   |
|---------------------------|---------------------------------------------------------------------------------|--------|
| RGB, RGBX                 | as is                                                                           |        |
| 1, L                      | v in all three channels (1-bit: 0 or 255)                                       |        |
| P                         | through its palette                                                             |        |
| RGBA, LA, PA, RGBa        | over white: (v * a + 255 * (255 - a)) / 255                                     | alpha  |
| P with transparency       | palette alpha, over white                                                       | alpha  |
| 1, L, I;16, RGB with tRNS | pixels equal to the transparent colour become white                             | alpha  |
| I;16, I;16B, I in 0..65535| v / 257 in all three channels (`convert("RGB")` would saturate at 255)          | 16bit  |
| 16-bit RGB, RGBA, LA PNG  | v // 256: Pillow keeps the high byte, which is within 1 of v / 257              | 16bit  |
| 16-bit RGB PNG with tRNS  | Drop IMG_MODE (the low bytes that decide equality are gone)                     |        |
| CMYK, and YCCK by libjpeg | R = (255 - C) * (255 - K) / 255. A JPEG's stored values are taken as inverted   | cmyk   |
|                           | (Adobe's convention) with or without an Adobe marker, as Pillow does            |        |
| YCbCr                     | Pillow's conversion (BT.601, full range)                                        |        |
| F, LAB, I beyond 65535,   | Drop IMG_MODE: no scale is known                                                |        |
| anything else             |                                                                                 |        |

- EXIF orientation 1..8 is applied; sizes are those after it. Only an EXIF block before the pixels counts (a PNG may
  have one behind them; XMP and ImageMagick's text profile are ignored). Another value or a broken block: as is, note
  `exif_bad`.
- An ICC profile is ignored, note `icc`.
- Animations and multi-page files: Drop IMG_FRAMES, or the first frame with note `first_frame`. A JPEG with further
  pictures behind its end (MPO: stereo, gain map) is its first picture.
- Bytes after the end of a JPEG or PNG: note `trailing`. File name of another format: note `ext` (only where a name is
  given).
- Every checksum of a PNG is verified and its end must be there. What libjpeg cannot notice, we cannot: a JPEG cut
  short whose end marker was put back decodes with a grey rest.

Pillow prints a Python warning of its own for a damaged TIFF or APNG header; the verdict does not depend on it. Drop
details are fixed texts and numbers, never Pillow's messages (they hold memory addresses).
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from lensmith.core.errors import Drop
from lensmith.data.media import Format, ImageLimits, check_size, open_media

ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAGIC: tuple[tuple[bytes, Format], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
}
_END: dict[str, bytes] = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}  # IEND is always empty, so its CRC is constant
_OPAQUE_MODES = frozenset({"RGB", "RGBX", "1", "L", "P", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "RGBa"})
_DEEP_GREY_MODES = frozenset({"I;16", "I;16B", "I;16L", "I"})
_KEY_SCALE = {"L;2": 85, "L;4": 17}  # PNG grey of 2 or 4 bits: Pillow widens the pixels, but not the transparent colour
_ROWS = 512  # per block when 16-bit grey is scaled: keeps the temporaries small

# What Pillow's plugins raise on bytes they cannot read, found by flipping bytes of every format (tests/test_media.py).
_PILLOW_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


class _JpegFile(JpegImagePlugin.JpegImageFile):
    """JPEG without Pillow's EXIF reader, which looks for a resolution at open and warns when the block is malformed.

    Also leaves out `jpeg_factory`, which turns a phone's picture with a gain map into an animation of two frames.
    """

    def getexif(self) -> Image.Exif:
        return Image.Exif()


_PLUGINS: dict[Format, type[ImageFile.ImageFile]] = {
    "JPEG": _JpegFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
}


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What the header says. `width` and `height` in pixels, as `open_rgb` will give them (after EXIF orientation).

    `mode` is Pillow's; `frames` is exact except in a GIF, where 2 means "more than one" (counting reads
    the whole file).
    """

    width: int
    height: int
    format: Format
    mode: str
    frames: int
    orientation: int
    notes: tuple[str, ...]


def probe(source: bytes | BinaryIO, limits: ImageLimits, path: Path | None = None) -> ImageInfo:
    """Read the header and check every limit; no pixel is decoded. `path` is only for the note `ext`.

    Raises Drop IMG_EMPTY, IMG_BYTES, IMG_FORMAT, IMG_TRUNCATED, IMG_CORRUPT, IMG_METADATA, IMG_PIXELS (area or side),
    IMG_TINY, IMG_ASPECT, IMG_FRAMES, IMG_MODE.
    """
    stream = io.BytesIO(source) if isinstance(source, bytes) else source
    return _read_header(stream, limits, path)[1]


def probe_file(path: Path, limits: ImageLimits) -> ImageInfo:
    """`probe` of a file that `resolve_media` has found. Raises also what `open_media` raises."""
    with open_media(path) as file:
        return probe(file, limits, path)


def open_rgb(data: bytes, limits: ImageLimits, path: Path | None = None) -> tuple[Image.Image, tuple[str, ...]]:
    """The canonical picture (mode RGB, height x width of `probe`) and the notes of what was done to get it.

    Raises Drop as `probe` does, and IMG_TRUNCATED, IMG_CORRUPT, IMG_METADATA, IMG_MODE from the pixels.
    """
    stream = io.BytesIO(data)
    image, info = _read_header(stream, limits, path)
    pixels_at = stream.tell()
    rgb = _decode(image, info, data)
    if info.orientation != 1:
        rgb = rgb.transpose(_TRANSPOSE[info.orientation])
    if rgb.size != (info.width, info.height):
        raise Drop("IMG_CORRUPT", "the pixels have another size than the header says")
    end = data.find(_END[info.format], pixels_at) if info.format in _END else -1
    trailing = 0 <= end < len(data) - len(_END.get(info.format, b""))
    return rgb, (*info.notes, "trailing") if trailing else info.notes


def _read_header(stream: BinaryIO, limits: ImageLimits, path: Path | None) -> tuple[ImageFile.ImageFile, ImageInfo]:
    num_bytes = stream.seek(0, os.SEEK_END)
    check_size(num_bytes, limits)
    kind = _identify(stream, num_bytes, limits)
    try:
        image = _PLUGINS[kind](stream)
        _check_size_and_mode(image, limits)
        num_frames = _count_frames(image, kind)
    except _BOMBS:  # a GIF frame larger than its screen
        raise Drop("IMG_PIXELS", "decompression bomb") from None
    except _PILLOW_ERRORS as error:
        raise _coded(error, "IMG_FORMAT", f"unreadable {kind} header") from None
    if num_frames > 1 and limits.frames == "drop":
        raise Drop("IMG_FRAMES", "more than one frame")
    return image, _describe(image, kind, num_frames, path)


def _identify(stream: BinaryIO, num_bytes: int, limits: ImageLimits) -> Format:
    stream.seek(0)
    head = stream.read(16)
    stream.seek(0)
    kind = next((name for magic, name in _MAGIC if head.startswith(magic)), None)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        kind = "WEBP"
    if kind is None or kind not in limits.formats:
        raise Drop("IMG_FORMAT", f"not one of {', '.join(limits.formats)}: starts with {head!r}")
    if kind == "WEBP" and int.from_bytes(head[4:8], "little") + 8 > num_bytes:
        raise Drop("IMG_TRUNCATED", "the file is shorter than its RIFF header says")
    return kind


def _check_size_and_mode(image: ImageFile.ImageFile, limits: ImageLimits) -> None:
    width, height = image.size
    size = f"{width} x {height} pixels"
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        raise Drop("IMG_PIXELS", f"{size}; max_pixels {limits.max_pixels}, max_side {limits.max_side}")
    if min(width, height) < limits.min_side:
        raise Drop("IMG_TINY", f"{size}; min_side {limits.min_side}")
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Drop("IMG_ASPECT", f"{size}; max_aspect {limits.max_aspect:g}")
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES | _DEEP_GREY_MODES:
        raise Drop("IMG_MODE", f"mode {image.mode}")
    if _raw_mode(image) == "RGB;16B" and "transparency" in image.info:
        raise Drop("IMG_MODE", "16-bit RGB with a transparent colour")


def _count_frames(image: ImageFile.ImageFile, kind: Format) -> int:
    if not getattr(image, "is_animated", False):  # Pillow: only formats that can be animated have the attribute
        return 1
    return 2 if kind == "GIF" else int(getattr(image, "n_frames", 2))


def _describe(image: ImageFile.ImageFile, kind: Format, num_frames: int, path: Path | None) -> ImageInfo:
    orientation = read_orientation(image.info["exif"]) if "exif" in image.info else 1
    width, height = image.size if (orientation or 1) < 5 else image.size[::-1]
    deep = image.mode in _DEEP_GREY_MODES or _raw_mode(image).endswith(";16B")
    notes = {
        "alpha": image.mode in _ALPHA_MODES or "transparency" in image.info,
        "16bit": deep,
        "cmyk": image.mode == "CMYK",
        "icc": bool(image.info.get("icc_profile")),
        "exif_bad": orientation is None,
        "first_frame": num_frames > 1,
        "ext": path is not None and path.suffix.lower() not in _SUFFIXES[kind],
    }
    taken = tuple(note for note, applies in notes.items() if applies)
    return ImageInfo(width, height, kind, image.mode, num_frames, orientation or 1, taken)


def read_orientation(exif: bytes) -> int | None:
    """The orientation (1..8) of an EXIF block, 1 where it states none, None where block or value is malformed.

    Source: Exif 2.32, 4.6.4 (tag 0x0112, SHORT) on TIFF 6.0 section 2. A LONG is accepted too, as Pillow does.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return None
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (num_entries,) = struct.unpack_from(order + "H", tiff, directory)
        for index in range(num_entries):
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, directory + 2 + 12 * index)
            if tag == ORIENTATION_TAG:
                letter = {3: "H", 4: "I"}.get(kind)
                if letter is None or count != 1:
                    return None
                (value,) = struct.unpack_from(order + letter, tiff, directory + 2 + 12 * index + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        return None
    return 1


def _decode(image: ImageFile.ImageFile, info: ImageInfo, data: bytes) -> Image.Image:
    raw_mode = _raw_mode(image)
    try:
        if info.format == "PNG":
            # Decoding skips the checksums of the image data.
            PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()
        image.load()
        return _to_rgb(image, raw_mode)
    except _BOMBS:
        raise Drop("IMG_PIXELS", "decompression bomb") from None
    except _PILLOW_ERRORS as error:
        raise _coded(error, "IMG_CORRUPT", f"undecodable {info.format} data") from None


def _to_rgb(image: Image.Image, raw_mode: str) -> Image.Image:
    key = image.info.get("transparency")
    if image.mode in _DEEP_GREY_MODES or (image.mode == "L" and key is not None):
        return _grey_to_rgb(image, key, raw_mode)
    if image.mode in _ALPHA_MODES or key is not None:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba)
        return white
    return image.convert("RGB")


def _grey_to_rgb(image: Image.Image, key: int | None, raw_mode: str) -> Image.Image:
    values_HW = np.asarray(image)
    if values_HW.dtype.itemsize > 2 and (values_HW.min() < 0 or values_HW.max() > 65535):
        raise Drop("IMG_MODE", "grey values beyond 16 bits")
    grey_HW = np.empty(values_HW.shape, np.uint8)
    for top in range(0, len(values_HW), _ROWS):
        block_HW = values_HW[top : top + _ROWS].astype(np.uint32)
        scaled_HW = block_HW if image.mode == "L" else (block_HW + 128) // 257
        if key is not None:
            scaled_HW[block_HW == key * _KEY_SCALE.get(raw_mode, 1)] = 255
        grey_HW[top : top + _ROWS] = scaled_HW
    return Image.fromarray(grey_HW).convert("RGB")


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the samples are stored, where the plugin says so ("RGB;16B", "L;4"); empty once the pixels are loaded."""
    arguments = image.tile[0].args if image.tile else ""
    return arguments if isinstance(arguments, str) else ""


def _coded(error: BaseException, otherwise: str, detail: str) -> Drop:
    """Pillow tells a cut file, a wrong checksum and a text bomb apart only by their messages."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error  # the disk failed, not the picture
    message = str(error).lower()
    if "max_text" in message:
        return Drop("IMG_METADATA", "a compressed text or profile is too large")
    if "truncated" in message or "incomplete" in message:
        return Drop("IMG_TRUNCATED", "the file ends before the picture does")
    if "checksum" in message:
        return Drop("IMG_CORRUPT", "wrong checksum")
    return Drop(otherwise, detail)
