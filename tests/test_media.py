"""Pictures: the bad-picture corpus row by row, limits, header against pixels, and properties over modes and bytes."""

from __future__ import annotations

import errno
import io
import struct
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import pytest
from corpus.make_images import Case, make
from corpus.pieces import blocks, chunk, encoded, exif, interlaced, jpeg, rgb_png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from pydantic import ValidationError

from lensmith.core.errors import DataError, Drop
from lensmith.data.media import ImageLimits, is_data_url, parse_data_url, read_bytes, resolve_media
from lensmith.data.media_open import ImageInfo, open_rgb, probe, probe_file, read_orientation

ORIGIN = "train.jsonl:17"
LIMITS = ImageLimits()
ALL_FORMATS = ImageLimits(formats=("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"), frames="first")


@dataclass(frozen=True)
class Seen:
    """What the pipeline made of one case: verdicts of header and pixels, and what they gave."""

    header: str
    verdict: str
    info: ImageInfo | None
    rgb: Image.Image | None
    notes: tuple[str, ...]
    detail: str


def look(case: Case, folder: Path) -> Seen:
    limits = ImageLimits.model_validate(dict(case.limits))
    header, info, path = "", None, None
    try:
        if is_data_url(case.file):
            data = parse_data_url(case.file, limits)
            info = probe(data, limits)
        else:
            path = resolve_media(case.file, (), ORIGIN, folder)
            info = probe_file(path, limits)
        header = "OK"
    except Drop as drop:
        header = drop.reason
    except DataError as error:
        header = error.code
    try:
        if is_data_url(case.file):
            data = parse_data_url(case.file, limits)
        else:
            path = resolve_media(case.file, (), ORIGIN, folder)
            data = read_bytes(path, limits)
        rgb, notes = open_rgb(data, limits, path)
    except Drop as drop:
        return Seen(header, drop.reason, info, None, (), drop.detail)
    except DataError as error:
        return Seen(header, error.code, info, None, (), str(error))
    return Seen(header, "OK", info, rgb, notes, "")


def collect_cases(tmp: Path) -> list[Case]:
    folder = tmp / "images"
    folder.mkdir()
    return make(folder)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    tmp = tmp_path_factory.mktemp("corpus")
    return tmp / "images", {case.id: case for case in collect_cases(tmp)}


def case_ids() -> list[str]:
    with tempfile.TemporaryDirectory() as tmp:
        return [case.id for case in collect_cases(Path(tmp))]


@pytest.mark.parametrize("case_id", case_ids())
def test_corpus(case_id: str, corpus: tuple[Path, dict[str, Case]]) -> None:
    folder, cases = corpus
    case = cases[case_id]
    seen = look(case, folder)
    assert seen.verdict == case.expect, seen.detail
    assert seen.notes == case.notes
    assert seen.header == (case.expect if case.header is None else case.header)
    assert "0x" not in seen.detail and "object" not in seen.detail
    assert seen.detail.isprintable() or seen.verdict.startswith("PATH")
    if seen.rgb is None:
        return
    assert seen.info is not None and seen.rgb.mode == "RGB"
    assert seen.rgb.size == (seen.info.width, seen.info.height)
    assert set(seen.info.notes) == set(seen.notes) - {"trailing"}
    if case.pixels_HW3 is not None:
        got, want = np.asarray(seen.rgb).astype(int), case.pixels_HW3.astype(int)
        assert got.shape == want.shape
        assert int(np.abs(got - want).max()) <= case.tolerance


def test_corpus_covers_the_list(corpus: tuple[Path, dict[str, Case]]) -> None:
    rows = {case_id[:3] for case_id in corpus[1]}
    assert rows >= {f"B{row:02d}" for row in range(1, 37)} | {"B42"}


def test_first_bytes_are_escaped(corpus: tuple[Path, dict[str, Case]]) -> None:
    folder, cases = corpus
    assert look(cases["B02-html"], folder).detail.endswith(r"starts with b'<!DOCTYPE html><'")
    with pytest.raises(Drop, match=r"starts with b'\\x1b\[2J\\n'"):
        probe(b"\x1b[2J\n", LIMITS)


def test_orientations_give_identical_pixels(corpus: tuple[Path, dict[str, Case]]) -> None:
    folder, cases = corpus
    for suffix in ("png", "webp"):
        seen = [look(cases[f"B21-{value}-{suffix}"], folder).rgb for value in range(1, 9)]
        assert len({image.tobytes() for image in seen if image is not None}) == 1


def test_bombs_do_not_grow_memory(corpus: tuple[Path, dict[str, Case]]) -> None:
    folder, cases = corpus
    names = [case.file for case in cases.values() if case.id[:3] in ("B12", "B13", "B14", "B15")]
    assert len(names) >= 8
    script = """
import resource, sys, time
from pathlib import Path
from lensmith.core.errors import Drop
from lensmith.data.media import ImageLimits, read_bytes
from lensmith.data.media_open import open_rgb, probe_file
limits = ImageLimits()
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, start = peak(), time.monotonic()
for name in sys.argv[1:]:
    for look in (lambda p: probe_file(p, limits), lambda p: open_rgb(read_bytes(p, limits), limits)):
        try: look(Path(name))
        except Drop: continue
sys.stdout.write(f"{peak() - before} {time.monotonic() - start}")
"""
    command = [sys.executable, "-c", script, *(str(folder / name) for name in names)]
    root = Path(__file__).parents[1]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, timeout=60).stdout.split()
    grown_mib, seconds = int(output[0]), float(output[1])
    assert grown_mib < 200 and seconds < 5


def test_limit_borders() -> None:
    data = rgb_png(np.zeros((20, 30, 3), np.uint8))
    exact = ImageLimits(max_pixels=600, max_side=30, min_side=20, max_aspect=1.5, max_bytes=len(data))
    assert probe(data, exact) == ImageInfo(30, 20, "PNG", "RGB", 1, 1, ())
    for change, code in (
        ({"max_pixels": 599}, "IMG_PIXELS"),
        ({"max_side": 29}, "IMG_PIXELS"),
        ({"min_side": 21}, "IMG_TINY"),
        ({"max_aspect": 1.49}, "IMG_ASPECT"),
        ({"max_bytes": len(data) - 1}, "IMG_BYTES"),
    ):
        with pytest.raises(Drop, match=code):
            probe(data, ImageLimits.model_validate({**exact.model_dump(), **change}))


def test_every_limit_is_documented_and_closed() -> None:
    assert all(field.description for field in ImageLimits.model_fields.values())
    for wrong in ({"max_side": 0}, {"formats": ("EPS",)}, {"formats": ()}, {"frames": "all"}, {"max_pixel": 5}):
        with pytest.raises(ValidationError):
            ImageLimits.model_validate(wrong)


class CountingFile(io.FileIO):
    """An unbuffered file that counts the bytes taken from it."""

    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size) or b""
        self.taken += len(data)
        return data


def test_probe_reads_only_the_header(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    for data in (jpeg(noise), rgb_png(noise), encoded(Image.fromarray(noise), "BMP")):
        path = tmp_path / "picture"
        path.write_bytes(data)
        with CountingFile(path) as file:
            assert probe(cast(BinaryIO, file), LIMITS).width == 500
            assert 0 < file.taken < 2000


def test_a_failing_disk_is_not_a_bad_picture() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 16:
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    with pytest.raises(OSError, match="Input/output"):
        probe(Failing(jpeg(blocks())), LIMITS)


def test_pillow_settings_are_left_alone(corpus: tuple[Path, dict[str, Case]]) -> None:
    def settings_now() -> tuple[object, ...]:
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, tuple(warnings.filters)

    folder, cases = corpus
    before = settings_now()
    for name in ("B05-half.jpg", "B12", "B13", "B22-junk-jpg", "B21-6-jpg"):
        look(cases[name], folder)
    assert settings_now() == before
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_limits_above_pillows_own_are_ours() -> None:
    data = rgb_png(np.zeros((1, 1, 3), np.uint8)).replace(
        chunk(b"IHDR", bytes([0, 0, 0, 1, 0, 0, 0, 1, 8, 2, 0, 0, 0])),
        chunk(b"IHDR", bytes([0, 0, 0x40, 0, 0, 0, 0x40, 0, 8, 2, 0, 0, 0])),
    )
    assert probe(data, ImageLimits(max_pixels=2**28)).width == 2**14


@pytest.mark.parametrize("order", ["<", ">"])
def test_read_orientation(order: str) -> None:
    block = exif(6, order)
    assert read_orientation(block) == read_orientation(b"Exif\0\0" + block) == 6
    assert read_orientation(b"") is None
    for end in range(8, 20):
        assert read_orientation(block[:end]) is None
    empty = block[:8] + b"\0\0"
    assert read_orientation(empty) == 1
    entry = struct.Struct(order + "HHI")
    for kind, count, want in ((3, 1, 6), (3, 2, None), (2, 1, None)):
        assert read_orientation(block[:10] + entry.pack(0x0112, kind, count) + block[18:]) == want


# --- properties

MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F"]
KINDS = ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]


@settings(max_examples=300, deadline=None)
@given(
    mode=st.sampled_from(MODES),
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    orientation=st.integers(0, 9),
    seed=st.integers(0, 2**16),
)
def test_any_mode_becomes_rgb_or_a_code(
    mode: str, kind: str, width: int, height: int, orientation: int, seed: int
) -> None:
    noise = np.random.default_rng(seed).bytes(len(Image.new(mode, (width, height)).tobytes()))
    picture = Image.frombytes(mode, (width, height), noise)
    if mode in ("P", "PA"):
        picture.putpalette(list(range(256)) * 3)
    try:
        data = encoded(picture, kind, **({} if kind == "BMP" else {"exif": b"Exif\0\0" + exif(orientation)}))
    except (OSError, ValueError):
        return  # Pillow cannot write this mode in this format
    try:
        info = probe(data, ALL_FORMATS)
        rgb, notes = open_rgb(data, ALL_FORMATS)
    except Drop as drop:
        assert drop.reason == "IMG_MODE"
        return
    array = np.asarray(rgb)
    assert array.dtype == np.uint8 and array.shape == (info.height, info.width, 3)
    turned = 5 <= orientation <= 8 and kind in ("JPEG", "PNG", "WEBP")
    if kind != "TIFF":
        assert rgb.size == ((height, width) if turned else (width, height))
    assert set(info.notes) == set(notes)


def samples() -> dict[str, bytes]:
    pixels = blocks(1, 2)
    picture = Image.fromarray(pixels)
    more = [Image.fromarray(blocks(1, 2, seed)) for seed in (1, 2)]
    return {
        "JPEG": jpeg(pixels, exif=b"Exif\0\0" + exif(6)),
        "progressive": jpeg(pixels, progressive=True),
        "PNG": rgb_png(pixels, before=chunk(b"eXIf", exif(3)) + chunk(b"tEXt", b"a\0b")),
        "APNG": encoded(picture, "PNG", save_all=True, append_images=more),
        "interlaced": interlaced(pixels),
        "WEBP": encoded(picture, "WEBP"),
        "lossless": encoded(picture, "WEBP", lossless=True, exif=exif(2)),
        "GIF": encoded(picture, "GIF", save_all=True, append_images=more),
        "BMP": encoded(picture, "BMP"),
        "TIFF": encoded(picture, "TIFF"),
    }


SAMPLES = samples()


@pytest.mark.filterwarnings("ignore")  # Pillow's TIFF reader warns about what it then raises
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_bytes_become_a_picture_or_a_code(draw: st.DataObject) -> None:
    data = bytearray(SAMPLES[draw.draw(st.sampled_from(sorted(SAMPLES)))])
    # Half of the damage goes into the header, where the decisions are.
    place = st.one_of(st.integers(0, 120), st.integers(0, len(data) - 1)).map(lambda at: min(at, len(data) - 1))
    for at, value in draw.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=6)):
        data[at] = value
    data = data[: draw.draw(st.one_of(st.just(len(data)), place))]
    limits = ImageLimits.model_validate({**ALL_FORMATS.model_dump(), "max_pixels": 10**6})
    header: object = None
    try:
        header = probe(bytes(data), limits)
    except Drop as drop:
        header = drop.reason
    try:
        rgb, _ = open_rgb(bytes(data), limits)
    except Drop as drop:
        assert drop.reason.startswith("IMG_") and drop.detail.isprintable()
        if isinstance(header, str):
            assert drop.reason == header
        return
    assert isinstance(header, ImageInfo) and rgb.mode == "RGB" and rgb.size == (header.width, header.height)
