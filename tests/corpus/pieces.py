"""Pictures and parts of picture files, made by hand or by Pillow's writers, for `make_images`."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def blocks(rows: int = 2, columns: int = 3, seed: int = 7) -> Pixels:
    """Flat 16 x 16 blocks of random colours, no two alike: every flip and turn gives another picture."""
    colours = np.random.default_rng(seed).permutation(256)[: rows * columns * 3].reshape(rows, columns, 3)
    return np.kron(colours, np.ones((16, 16, 1))).astype(np.uint8)


def gradient(height: int = 12, width: int = 10) -> Pixels:
    return np.random.default_rng(11).integers(0, 256, (height, width, 3), np.uint8)


def grey3(values_HW: NDArray[np.generic]) -> Pixels:
    return np.repeat(values_HW.astype(np.uint8)[:, :, None], 3, axis=2)


def over_white(colour_HW3: Pixels, alpha_HW: NDArray[np.generic]) -> Pixels:
    alpha = alpha_HW.astype(np.float64)[:, :, None] / 255
    return np.floor(colour_HW3 * alpha + 255 * (1 - alpha) + 0.5).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg(pixels: Pixels, **options: object) -> bytes:
    return encoded(Image.fromarray(pixels), "JPEG", quality=100, **{"subsampling": 0, **options})


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + data) if crc is None else crc
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))


def png(header: bytes, rows: Sequence[bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    """A PNG of unfiltered rows; `before` and `after` are chunks around the image data."""
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return SIGNATURE + header + before + chunk(b"IDAT", data) + after + chunk(b"IEND", b"")


def rgb_png(pixels: Pixels, before: bytes = b"", after: bytes = b"") -> bytes:
    height, width = pixels.shape[:2]
    return png(ihdr(width, height), [row.tobytes() for row in pixels], before, after)


def exif(orientation: int, order: str = "<") -> bytes:
    """One IFD with one SHORT entry (TIFF 6.0, section 2)."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    return head + struct.pack(order + "HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


def zeros_compressed(num_mib: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(num_mib)) + packer.flush()


def large_webp(width: int, height: int) -> bytes:
    """A few bytes that claim a large canvas: an animation of one small frame (WebP container specification)."""

    def u24(*values: int) -> bytes:
        return b"".join(struct.pack("<I", value)[:3] for value in values)

    def piece(name: bytes, data: bytes) -> bytes:
        return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)

    frame = encoded(Image.fromarray(blocks(1, 1)), "WEBP", lossless=True)[12:]
    body = piece(b"VP8X", b"\x02" + u24(0, width - 1, height - 1)) + piece(b"ANIM", bytes(6))
    body += piece(b"ANMF", u24(0, 0, 15, 15, 100) + b"\0" + frame)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def interlaced(pixels: Pixels) -> bytes:
    """Adam7, PNG specification section 8.2: (first row, first column, row step, column step) of each pass."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx] if row.size]
    return png(ihdr(pixels.shape[1], pixels.shape[0], interlace=1), rows)


def write(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    return name
