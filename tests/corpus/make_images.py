"""The bad-picture corpus (rows B01-B36 and B42 of the input list), written into a folder from a fixed seed.

Expected pixels are numpy arrays made by hand here, never by the code under test. Lossy files hold flat 16 x 16 blocks,
so that their pixels are known to within `tolerance`.
"""

from __future__ import annotations

import base64
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from corpus.pieces import (
    SIGNATURE,
    Pixels,
    blocks,
    chunk,
    encoded,
    exif,
    gradient,
    grey3,
    ihdr,
    interlaced,
    jpeg,
    large_webp,
    over_white,
    png,
    rgb_png,
    write,
    zeros_compressed,
)
from PIL import Image, ImageCms

JPEG_TOLERANCE = 2
WITH_TIFF: Mapping[str, object] = {"formats": ("JPEG", "PNG", "TIFF")}
FIRST: Mapping[str, object] = {"frames": "first"}


@dataclass(frozen=True)
class Case:
    """`file` is a path relative to the folder, or a `data:` URL. `expect` is "OK" or the code of the Drop or DataError.

    `header` is what the header alone must give, where that differs. `pixels_HW3` are the expected RGB values.
    """

    id: str
    file: str
    expect: str = "OK"
    notes: tuple[str, ...] = ()
    header: str | None = None
    pixels_HW3: Pixels | None = None
    tolerance: int = 0
    limits: Mapping[str, object] = field(default_factory=dict)


def make(folder: Path) -> list[Case]:
    """Write every file and return the cases, in the order of their ids."""
    groups = (
        not_pictures,
        cut_and_corrupt,
        sizes,
        modes,
        alphas,
        orientations,
        frames,
        other_formats,
        sound,
        places,
        urls,
    )
    return [case for group in groups for case in group(folder)]


def not_pictures(folder: Path) -> list[Case]:
    files = {
        "B02-html.jpg": b"<!DOCTYPE html><html><body>404 \x1b[2J</body></html>",
        "B03-text.png": b"this is not a picture\n",
        "B04-soi.jpg": b"\xff\xd8\xff\xe0",
        "B04-app0.jpg": jpeg(blocks())[:20],
        "B09-zero.png": png(ihdr(0, 0), []),
        "B25-svg.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "B25-pdf.pdf": b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
        "B26-eps.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    }
    empty = Case("B01", write(folder, "B01-empty.jpg", b""), "IMG_EMPTY")
    return [empty, *(Case(Path(name).stem, write(folder, name, data), "IMG_FORMAT") for name, data in files.items())]


def cut_and_corrupt(folder: Path) -> list[Case]:
    noise = np.random.default_rng(3).integers(0, 256, (64, 64, 3), np.uint8)
    whole_jpeg, whole_png = jpeg(noise), rgb_png(noise)
    webp, gif, bmp = (encoded(Image.fromarray(noise), kind) for kind in ("WEBP", "GIF", "BMP"))
    plain = rgb_png(gradient())
    at = plain.index(b"IDAT")
    length = struct.unpack(">I", plain[at - 4 : at])[0]
    wrong_crc = bytearray(plain)
    wrong_crc[at + 4 + length] ^= 1  # the checksum alone: the zlib stream stays sound
    wrong_bits = bytearray(plain)
    wrong_bits[at + 4 + length // 2] ^= 255
    wrong_header = bytearray(plain)
    wrong_header[19] ^= 1
    wrong_ancillary = rgb_png(gradient(), after=chunk(b"tIME", bytes(7), crc=1))
    files = [
        ("B05-half.jpg", whole_jpeg[: len(whole_jpeg) // 2], "IMG_TRUNCATED", "OK"),
        ("B05-in-header.jpg", whole_jpeg[:60], "IMG_TRUNCATED", None),
        ("B06-half.png", whole_png[: len(whole_png) // 2], "IMG_TRUNCATED", "OK"),
        ("B06-no-end.png", whole_png[:-12], "IMG_TRUNCATED", "OK"),
        ("B06-half.webp", webp[: len(webp) // 2], "IMG_TRUNCATED", None),
        ("B06-half.gif", gif[: len(gif) // 2], "IMG_TRUNCATED", "OK"),
        ("B06-half.bmp", bmp[: len(bmp) // 2], "IMG_TRUNCATED", "OK"),
        ("B07-crc.png", bytes(wrong_crc), "IMG_CORRUPT", "OK"),
        ("B07-bits.png", bytes(wrong_bits), "IMG_CORRUPT", "OK"),
        ("B07-header-crc.png", bytes(wrong_header), "IMG_CORRUPT", None),
        ("B07-after-crc.png", wrong_ancillary, "IMG_CORRUPT", "OK"),
    ]
    return [Case(name, write(folder, name, data), code, header=header) for name, data, code, header in files]


def sizes(folder: Path) -> list[Case]:
    one = np.full((1, 1, 3), 77, np.uint8)
    text = b"Comment\0\0" + zeros_compressed(80)
    cut = chunk(b"IDAT", zlib.compress(bytes(1000)))
    screen = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    frame = screen + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x4c\x01\0;"
    cases = [
        Case("B10-one", write(folder, "B10.png", rgb_png(one)), pixels_HW3=one),
        Case("B10-tiny", "B10.png", "IMG_TINY", limits={"min_side": 2}),
        Case("B11", write(folder, "B11.png", rgb_png(np.zeros((10000, 1, 3), np.uint8))), "IMG_ASPECT"),
        Case("B11-wide", write(folder, "B11w.png", rgb_png(np.zeros((1, 201, 3), np.uint8))), "IMG_ASPECT"),
        Case("B11-limit", write(folder, "B11l.png", rgb_png(np.zeros((1, 200, 3), np.uint8)))),
        Case("B12", write(folder, "B12.png", SIGNATURE + ihdr(100_000, 100_000) + cut), "IMG_PIXELS"),
        Case("B12-gif", write(folder, "B12.gif", frame), "IMG_PIXELS"),
        Case("B12-side", write(folder, "B12s.png", SIGNATURE + ihdr(16_385, 100) + cut), "IMG_PIXELS"),
        Case("B13", write(folder, "B13.png", SIGNATURE + ihdr(12_000, 8_000) + cut), "IMG_PIXELS"),
        Case("B13-webp", write(folder, "B13.webp", large_webp(12_000, 8_000)), "IMG_PIXELS"),
        Case("B14", write(folder, "B14.png", rgb_png(gradient(), before=chunk(b"zTXt", text))), "IMG_METADATA"),
        Case(
            "B14-after",
            write(folder, "B14a.png", rgb_png(gradient(), after=chunk(b"zTXt", text))),
            "IMG_METADATA",
            header="OK",
        ),
        Case("B15", write(folder, "B15.png", rgb_png(gradient())), "IMG_BYTES"),
    ]
    os.truncate(folder / "B15.png", 65 * 2**20)  # sparse
    return cases


def modes(folder: Path) -> list[Case]:
    rng = np.random.default_rng(5)
    deep = rng.integers(0, 65536, (9, 11)).astype(np.uint16)
    deep[0, :6] = (0, 65535, 128, 129, 257, 32896)
    scaled = np.floor(deep / 257 + 0.5)
    deep_png = png(ihdr(11, 9, depth=16, colour=0), [row.astype(">u2").tobytes() for row in deep])
    deep_rgb = rng.integers(0, 65536, (4, 5, 3)).astype(np.uint16)
    deep_rgb_png = png(ihdr(5, 4, depth=16), [row.astype(">u2").tobytes() for row in deep_rgb])
    float_tiff = encoded(Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)), "TIFF")
    wide = np.array([[0, 65535, 70_000]], np.int32)
    fits = np.array([[0, 65535, 257]], np.int32)
    # Stored values of an Adobe JPEG are inverted: 255 means no ink. Pillow's writer and reader both invert.
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, :16] = (200, 100, 0, 50)
    ink[:, 16:] = (0, 0, 0, 255)
    paper = np.floor((255 - ink[:, :, :3].astype(float)) * (255 - ink[:, :, 3:].astype(float)) / 255 + 0.5)
    cmyk = encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    return [
        Case("B16", write(folder, "B16.jpg", cmyk), "OK", ("cmyk",), None, paper.astype(np.uint8), 4),
        Case("B17", write(folder, "B17.png", deep_png), "OK", ("16bit",), None, grey3(scaled)),
        Case("B17-rgb", write(folder, "B17c.png", deep_rgb_png), "OK", ("16bit",), None,
             (deep_rgb >> 8).astype(np.uint8)),
        Case("B17-int", write(folder, "B17i.tif", encoded(Image.fromarray(fits), "TIFF")), "OK", ("16bit",), None,
             grey3(np.array([[0, 255, 1]])), limits=WITH_TIFF),
        Case("B17-wide", write(folder, "B17w.tif", encoded(Image.fromarray(wide), "TIFF")), "IMG_MODE", header="OK",
             limits=WITH_TIFF),
        Case("B18", write(folder, "B18.tif", float_tiff), "IMG_FORMAT"),
        Case("B18-tiff", "B18.tif", "IMG_MODE", limits=WITH_TIFF),
    ]  # fmt: skip


def alphas(folder: Path) -> list[Case]:
    colour, level = gradient(), np.tile(np.arange(12, dtype=np.uint8)[:, None] * 23, (1, 10))
    rgba = np.dstack([colour, level])
    rgba[:2] = (255, 0, 0, 0)  # transparent pixels that hide red
    expected = over_white(rgba[:, :, :3], rgba[:, :, 3])
    la = np.dstack([colour[:, :, 0], level])
    index = (np.arange(20).reshape(4, 5) % 4).astype(np.uint8)
    palette = np.array([[10, 20, 30], [200, 0, 0], [0, 200, 0], [255, 255, 255]], np.uint8)
    plte, rows = chunk(b"PLTE", palette.tobytes()), [row.tobytes() for row in index]
    p_head = ihdr(5, 4, colour=3)
    p_alpha = np.array([255, 0, 128, 255])
    grey4 = png(ihdr(4, 1, depth=4, colour=0), [bytes([0x0F, 0x37])], chunk(b"tRNS", struct.pack(">H", 3)))
    deep_key = png(ihdr(3, 1, depth=16, colour=0), [struct.pack(">3H", 0, 514, 515)], chunk(b"tRNS", b"\x02\x02"))
    rgb_key = rgb_png(palette[None], before=chunk(b"tRNS", struct.pack(">3H", 200, 0, 0)))
    deep_rgb_key = png(ihdr(1, 1, depth=16), [bytes(6)], chunk(b"tRNS", bytes(6)))
    bits = np.array([[0, 255, 0, 255, 255, 0, 0, 0]])
    one_bit = png(ihdr(8, 1, depth=1, colour=0), [b"\x58"])
    grey = colour[:, :, 1]
    note = ("alpha",)
    table: list[tuple[str, bytes, tuple[str, ...], Pixels]] = [
        ("B19.png", encoded(Image.fromarray(rgba), "PNG"), note, expected),
        ("B19.webp", encoded(Image.fromarray(rgba), "WEBP", lossless=True, exact=True), note, expected),
        ("B20-P.png", png(p_head, rows, plte), (), palette[index]),
        ("B20-P-one.png", png(p_head, rows, plte + chunk(b"tRNS", b"\xff\0")), note,
         over_white(palette[index], np.array([255, 0, 255, 255])[index])),
        ("B20-P-all.png", png(p_head, rows, plte + chunk(b"tRNS", bytes([255, 0, 128]))), note,
         over_white(palette[index], p_alpha[index])),
        ("B20-LA.png", encoded(Image.fromarray(la, "LA"), "PNG"), note, over_white(grey3(la[:, :, 0]), level)),
        ("B20-1.png", one_bit, (), grey3(bits)),
        ("B20-L.png", encoded(Image.fromarray(grey), "PNG"), (), grey3(grey)),
        ("B20-L.bmp", encoded(Image.fromarray(grey), "BMP"), (), grey3(grey)),
        ("B20-L4-key.png", grey4, note, grey3(np.array([[0, 255, 255, 119]]))),
        ("B20-16-key.png", deep_key, ("alpha", "16bit"), grey3(np.array([[0, 255, 2]]))),
        ("B20-RGB-key.png", rgb_key, note, np.where(palette[None] == (200, 0, 0), 255, palette[None])),
    ]  # fmt: skip
    table[-1][3][0, 1:3] = ((255, 255, 255), (0, 200, 0))
    cases = [Case(name, write(folder, name, data), "OK", notes, None, want) for name, data, notes, want in table]
    return [*cases, Case("B20-16-RGB-key", write(folder, "B20-deep-key.png", deep_rgb_key), "IMG_MODE")]


def orientations(folder: Path) -> list[Case]:
    upright = blocks()
    turned = upright.transpose(1, 0, 2)
    # Where the stored row 0 and column 0 lie in the upright picture: Exif 2.32, table of tag 0x0112.
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: turned, 6: turned[::-1], 7: turned[::-1, ::-1], 8: turned[:, ::-1],
    }  # fmt: skip
    cases: list[Case] = []
    for value, pixels in stored.items():
        pixels = np.ascontiguousarray(pixels)
        block = exif(value, "<" if value % 2 else ">")
        webp = encoded(Image.fromarray(pixels), "WEBP", lossless=True, exif=b"Exif\0\0" + block)
        for suffix, data in (
            ("jpg", jpeg(pixels, exif=b"Exif\0\0" + block)),
            ("png", rgb_png(pixels, before=chunk(b"eXIf", block))),
            ("webp", webp),
        ):
            name = write(folder, f"B21-{value}.{suffix}", data)
            tolerance = JPEG_TOLERANCE if suffix == "jpg" else 0
            cases.append(Case(f"B21-{value}-{suffix}", name, pixels_HW3=upright, tolerance=tolerance))
    broken = {
        "nine": exif(9),
        "zero": exif(0),
        "cut": exif(6)[:12],
        "offset": b"II*\0\xff\xff\xff\x7f",
        "junk": b"rubbish",
    }
    for title, block in broken.items():
        for suffix, data in (
            ("jpg", jpeg(upright, exif=b"Exif\0\0" + block, dpi=(0, 0))),
            ("png", rgb_png(upright, before=chunk(b"eXIf", block))),
        ):
            name = write(folder, f"B22-{title}.{suffix}", data)
            cases.append(Case(f"B22-{title}-{suffix}", name, "OK", ("exif_bad",), None, upright, JPEG_TOLERANCE))
    late = write(folder, "B22-late.png", rgb_png(upright, after=chunk(b"eXIf", exif(6))))
    return [*cases, Case("B22-late", late, pixels_HW3=upright)]


def frames(folder: Path) -> list[Case]:
    pictures = [Image.fromarray(blocks(1, 1, seed)) for seed in (1, 2, 3)]
    first = blocks(1, 1, 1)
    cases: list[Case] = []
    for kind, suffix in (("GIF", "gif"), ("PNG", "png"), ("WEBP", "webp"), ("TIFF", "tif")):
        row = "B24" if kind == "TIFF" else "B23"
        allowed: Mapping[str, object] = {"formats": (kind,)}
        lossless: dict[str, object] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(pictures[0], kind, save_all=True, append_images=pictures[1:], **lossless)
        name = write(folder, f"{row}.{suffix}", data)
        cases.append(Case(f"{row}-{kind}", name, "IMG_FRAMES", limits=allowed))
        cases.append(
            Case(f"{row}-{kind}-first", name, "OK", ("first_frame",), None, first, limits={**allowed, **FIRST})
        )
        alone = write(folder, f"{row}-one.{suffix}", encoded(pictures[0], kind, **lossless))
        cases.append(Case(f"{row}-{kind}-one", alone, pixels_HW3=first, limits=allowed))
    data = encoded(pictures[0], "MPO", save_all=True, append_images=pictures[1:], quality=100)
    mpo = Case("B23-MPO", write(folder, "B23-mpo.jpg", data), "OK", ("trailing",), None, first, JPEG_TOLERANCE)
    return [*cases, mpo]


def other_formats(folder: Path) -> list[Case]:
    picture = Image.fromarray(blocks())
    kinds = {"ICO": "ico", "TGA": "tga", "PPM": "ppm", "DDS": "dds", "JPEG2000": "jp2", "AVIF": "avif", "TIFF": "tif"}
    files = {f"B27-{kind}.{suffix}": encoded(picture, kind) for kind, suffix in kinds.items()}
    files["B27-PSD.psd"] = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(64)
    files["B27-FITS.fits"] = b"SIMPLE  =                    T".ljust(2880)
    return [Case(Path(name).stem, write(folder, name, data), "IMG_FORMAT") for name, data in files.items()]


def sound(folder: Path) -> list[Case]:
    flat, mixed, black = blocks(), gradient(), np.zeros((16, 16, 3), np.uint8)
    odd = np.full((13, 17, 3), (200, 60, 20), np.uint8)  # one colour: shared chroma bleeds over the edges of blocks
    grey = blocks()[:, :, 0]
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    garbage = b"\0\0garbage\xff\xd8" + bytes(100)
    thumbnail = exif(1) + b"\xff\xd8 a thumbnail ends \xff\xd9"
    column = np.ascontiguousarray(mixed[:, :1])
    table: list[tuple[str, bytes, tuple[str, ...], Pixels]] = [
        ("B08.jpg", jpeg(flat) + garbage, ("trailing",), flat),
        ("B08.png", rgb_png(mixed) + garbage, ("trailing",), mixed),
        ("B08-thumbnail.jpg", jpeg(flat, exif=b"Exif\0\0" + thumbnail), (), flat),
        ("B28.jpg", rgb_png(mixed), ("ext",), mixed),
        ("B28-no-suffix", rgb_png(mixed), ("ext",), mixed),
        ("B28-upper.PNG", rgb_png(mixed), (), mixed),
        ("B29.jpg", jpeg(flat, icc_profile=icc), ("icc",), flat),
        ("B29.png", encoded(Image.fromarray(mixed), "PNG", icc_profile=icc), ("icc",), mixed),
        ("B30.png", rgb_png(black), (), black),
        ("B31-L.jpg", jpeg(grey), (), grey3(grey)),
        ("B31-RGB.jpg", jpeg(grey3(grey)), (), grey3(grey)),
        ("B32-progressive.jpg", jpeg(flat, progressive=True), (), flat),
        ("B32-420.jpg", jpeg(odd, subsampling=2), (), odd),
        ("B32-422.jpg", jpeg(odd, subsampling=1), (), odd),
        ("B33-interlaced.png", interlaced(mixed), (), mixed),
        ("B33-column.png", interlaced(column), (), column),
        ("B34-a.png", rgb_png(mixed), (), mixed),
        ("B34-b.png", rgb_png(mixed), (), mixed),
    ]
    cases: list[Case] = []
    for name, data, notes, want in table:
        tolerance = JPEG_TOLERANCE if data.startswith(b"\xff\xd8") else 0
        cases.append(Case(name, write(folder, name, data), "OK", notes, None, want, tolerance))
    return cases


def places(folder: Path) -> list[Case]:
    """Things that are no files of this folder. The outside picture lies beside the folder."""
    (folder / "B35-folder.png").mkdir()
    os.mkfifo(folder / "B35-fifo.png")
    outside = folder.parent / f"{folder.name}_evil"
    outside.mkdir()
    write(outside, "x.png", rgb_png(gradient()))
    (folder / "B36-file.png").symlink_to(outside / "x.png")
    (folder / "B36-folder").symlink_to(outside)
    (folder / "B36-inside.png").symlink_to(folder / "B10.png")
    return [
        Case("B35-folder", "B35-folder.png", "PATH_KIND"),
        Case("B35-fifo", "B35-fifo.png", "PATH_KIND"),
        Case("B36-file", "B36-file.png", "PATH_ESCAPE"),
        Case("B36-folder", "B36-folder/x.png", "PATH_ESCAPE"),
        Case("B36-inside", "B36-inside.png"),
        Case("B39-sibling", f"../{outside.name}/x.png", "PATH_ESCAPE"),
    ]


def urls(folder: Path) -> list[Case]:
    text = base64.b64encode(rgb_png(gradient())).decode()
    svg = base64.b64encode(b"<svg/>").decode()
    small: Mapping[str, object] = {"max_bytes": 100}
    return [
        Case("B42-ok", f"data:image/png;base64,{text}", pixels_HW3=gradient()),
        Case("B42-type-lies", f"DATA:Image/JPEG;name=a.jpg;base64,{text}", pixels_HW3=gradient()),
        Case("B42-bytes", f"data:image/png;base64,{text}", "IMG_BYTES", limits=small),
        Case("B42-html", f"data:text/html;base64,{text}", "IMG_FORMAT"),
        Case("B42-no-type", f"data:;base64,{text}", "IMG_FORMAT"),
        Case("B42-svg", f"data:image/svg+xml;base64,{svg}", "IMG_FORMAT"),
        Case("B42-padding", f"data:image/png;base64,{text[:-1]}", "IMG_BASE64"),
        Case("B42-letters", f"data:image/png;base64,{text[:40]}!!{text[40:]}", "IMG_BASE64"),
        Case("B42-unicode", "data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "IMG_BASE64"),
        Case("B42-plain", "data:image/png,abc", "IMG_BASE64"),
        Case("B42-no-comma", "data:image/png;base64", "IMG_BASE64"),
        Case("B42-empty", "data:image/png;base64,", "IMG_EMPTY"),
    ]
