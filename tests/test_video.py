"""Containers and frames (made here with PyAV), sampling and sizes against the vendors' own functions, and the models.

The vendors' video processors need torchvision. What of them needs only torch and NumPy is taken out of the installed
source and run as it stands (`vendor_function`).
"""

from __future__ import annotations

import ast
import io
import json
import math
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import test_family_qwen as qwen
import tiny
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from pydantic import ValidationError
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from lensmith.core.encoded import IGNORED, IMAGE, Encoded, VideoInfo
from lensmith.core.errors import ConfigError, DataError, Drop
from lensmith.core.sample import Conversation, Document, Image, Sample, Text, Video
from lensmith.data.collate import Member, Pictures, load_row
from lensmith.data.encode import Placed, Template
from lensmith.data.index_build import build_index
from lensmith.data.load import Loader, LoaderSpec, SampleRef, SourceFile
from lensmith.data.media import ImageLimits, VideoLimits
from lensmith.data.readers import RowRef
from lensmith.data.video import probe_video, read_frames
from lensmith.family.qwen_vl import QwenVL, from_config
from lensmith.family.qwen_vl_video import frame_size, sample_frames, video_settings
from lensmith.model.vision_cache import VisionCache

LIMITS, PICTURES = VideoLimits(), ImageLimits()


def probe(data: bytes, **limits: Any) -> VideoInfo:
    return probe_video(data, VideoLimits(**limits), PICTURES)


def greys(data: bytes, indices: list[int]) -> list[tuple[int, int]]:
    """(number, which frame of `make_video` it looks like)."""
    found = []
    for n, picture in read_frames(data, indices, LIMITS):
        assert picture.mode == "RGB"
        blue = float(np.asarray(picture)[..., 2].mean())
        found.append((n, min(range(30), key=lambda i: abs(tiny.grey(i) - blue))))
    return found


def reason(work: Callable[[], Any]) -> str:
    with pytest.raises(Drop) as caught:
        work()
    return caught.value.reason


# -- containers ---------------------------------------------------------------------------------------------------

KINDS = [
    ("libx264", "mp4"), ("mpeg4", "mp4"), ("libx264", "matroska"), ("libvpx-vp9", "webm"), ("mpeg4", "avi"),
    ("libx264", "mpegts"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "kind"), KINDS, ids=[f"{c} in {k}" for c, k in KINDS])
def test_containers(codec: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Matroska, WebM and MPEG-TS have no number of frames in their headers."""
    data = tiny.make_video(24, fps=8, size=(96, 64), codec=codec, kind=kind)
    assert probe(data) == VideoInfo(96, 64, 24, 8.0)
    assert greys(data, [0, 1, 7, 22, 23]) == [(n, n) for n in (0, 1, 7, 22, 23)]
    assert capfd.readouterr() == ("", "")


def test_frames_come_once_and_in_order() -> None:
    assert greys(tiny.make_video(12), [5, 2, 5, 11]) == [(2, 2), (5, 5), (11, 11)]


def test_gif_is_a_video() -> None:
    out = io.BytesIO()
    frames = [pillow.new("RGB", (32, 20), (20 * i, 0, 0)) for i in range(5)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:], duration=500)
    assert probe(out.getvalue()) == VideoInfo(32, 20, 5, 2.0)
    assert len(list(read_frames(out.getvalue(), [0, 4], LIMITS))) == 2


@pytest.mark.parametrize(("turn", "left"), [(90, "bottom"), (-90, "top"), (180, "right"), (0, "left")])
def test_rotation(turn: int, left: str) -> None:
    """A display matrix turns the picture counterclockwise; the redder half is where its left half goes."""
    data = tiny.make_video(4, size=(96, 64), turn=turn)
    info = probe(data)
    ((_, picture),) = read_frames(data, [1], LIMITS)
    assert picture.size == (info.width, info.height) == ((96, 64) if turn in (0, 180) else (64, 96))
    a = np.asarray(picture).astype(int)
    redder = a[..., 0] - a[..., 2] > 20
    halves = {
        "left": redder[:, : redder.shape[1] // 2 - 4], "right": redder[:, redder.shape[1] // 2 + 4 :],
        "top": redder[: len(redder) // 2 - 4], "bottom": redder[len(redder) // 2 + 4 :],
    }  # fmt: skip
    assert halves[left].mean() > 0.95


@pytest.mark.parametrize("trimmed", [2, 13])
def test_frames_that_an_edit_list_passes_over_are_no_frames(trimmed: int) -> None:
    """2: packets that are decoded and not shown; 13: whole groups of packets that are not read at all."""
    data = tiny.make_video(20, trimmed=trimmed)
    assert probe(data) == VideoInfo(64, 64, 20 - trimmed, 10.0)
    assert greys(data, [0, 5]) == [(0, trimmed), (5, trimmed + 5)]


def with_number(data: bytes, frames: int) -> bytes:
    """An AVI whose headers (avih, strh) say another number of frames."""
    at = data.index(b"avih") + 8 + 16
    data = data[:at] + struct.pack("<I", frames) + data[at + 4 :]
    at = data.index(b"strh") + 8 + 32
    return data[:at] + struct.pack("<I", frames) + data[at + 4 :]


def faststart(frames: int = 30) -> bytes:
    """An MP4 with its index in front, as a file that is cut short still has it: fragments moved, offsets mended."""
    data = tiny.make_video(frames)
    boxes: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        boxes[data[at + 4 : at + 8]] = data[at : at + size]
        at += size
    index = boxes[b"moov"]
    start = index.index(b"stco") + 8
    (count,) = struct.unpack(">I", index[start : start + 4])
    offsets = struct.unpack(f">{count}I", index[start + 4 : start + 4 + 4 * count])
    moved = struct.pack(f">{count}I", *(o + len(index) for o in offsets))
    index = index[: start + 4] + moved + index[start + 4 + 4 * count :]
    rest = b"".join(v for k, v in boxes.items() if k not in (b"ftyp", b"moov"))
    return boxes[b"ftyp"] + index + rest


def test_what_a_header_says_of_the_number_is_not_believed() -> None:
    data = tiny.make_video(20, codec="mpeg4", kind="avi")
    for said in (0, 5, 600):
        assert probe(with_number(data, said)).num_frames == 20
    assert greys(with_number(data, 600), [0, 19]) == [(0, 0), (19, 19)]


def broken() -> dict[str, tuple[bytes, str]]:
    video, fast = tiny.make_video(30), faststart()
    index_only = fast[: fast.index(b"mdat") + 4]
    png = io.BytesIO()
    pillow.new("RGB", (64, 64)).save(png, "PNG")
    return {
        "cut short, index at the end": (video[: len(video) // 2], "VIDEO_FORMAT"),
        "cut short, index in front": (fast[: int(len(fast) * 0.7)], "VIDEO_DECODE"),
        "index without frames": (index_only, "VIDEO_EMPTY"),
        "nothing": (b"", "VIDEO_EMPTY"),
        "a text": (b"once upon a time\n" * 100, "VIDEO_FORMAT"),
        "sound only": (tiny.make_sound(), "VIDEO_FORMAT"),
        "a picture": (png.getvalue(), "VIDEO_FORMAT"),
        "a page": (b"<html><body>404 not found</body></html>", "VIDEO_FORMAT"),
    }


def test_broken_videos(capfd: pytest.CaptureFixture[str]) -> None:
    assert probe(faststart()).num_frames == 30
    for name, (data, code) in broken().items():
        assert reason(lambda data=data: probe(data)) == code, name
    assert capfd.readouterr() == ("", "")


def test_sound_beside_pictures_is_passed_over() -> None:
    data = tiny.make_video(6, sound=True)
    assert probe(data).num_frames == 6 and greys(data, [5]) == [(5, 5)]


def test_limits() -> None:
    data = tiny.make_video(30, fps=10, size=(128, 32))
    assert reason(lambda: probe(data, max_bytes=len(data) - 1)) == "VIDEO_BYTES"
    assert reason(lambda: probe(data, max_seconds=2.9)) == "VIDEO_LONG"
    assert probe(data, max_bytes=len(data), max_seconds=3).num_frames == 30
    for limits, code in (({"max_pixels": 4095}, "IMG_PIXELS"), ({"max_side": 127}, "IMG_PIXELS"),
                         ({"max_aspect": 3.9}, "IMG_ASPECT"), ({"min_side": 33}, "IMG_TINY")):  # fmt: skip
        assert reason(lambda limits=limits: probe_video(data, LIMITS, ImageLimits(**limits))) == code


def test_one_missing_frame_is_the_last_again() -> None:
    data = tiny.make_video(10)
    assert greys(data, [3, 10]) == [(3, 3), (10, 9)]
    assert reason(lambda: greys(data, [3, 11])) == "VIDEO_DECODE"


@pytest.mark.parametrize("name", ["a.mp4", "/a.mp4"])
def test_playlists_open_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """FFmpeg alone would read the file that the text names."""
    (tmp_path / "a.mp4").write_bytes(tiny.make_video(4))
    (tmp_path / "a.ts").write_bytes(tiny.make_video(4, kind="mpegts"))
    monkeypatch.chdir(tmp_path)
    name = str(tmp_path / "a.mp4") if name.startswith("/") else name
    texts = (
        f"ffconcat version 1.0\nfile '{name}'\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{name.replace('mp4', 'ts')}\n#EXT-X-ENDLIST\n",
        "http://127.0.0.1:9/a.mp4", f"concat:{name}", f"subfile,,start,0,end,0,,:{name}",
    )  # fmt: skip
    for text in texts:
        assert reason(lambda text=text: probe(text.encode())) == "VIDEO_FORMAT", text


@pytest.mark.parametrize(("codec", "kind"), [KINDS[0], KINDS[3], KINDS[4]], ids=["mp4", "webm", "avi"])
def test_damaged_bytes_become_frames_or_a_code(codec: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiny.make_video(8, codec=codec, kind=kind)
    rng = np.random.default_rng(0)
    codes = set()
    for _ in range(80):
        bad = bytearray(data)
        for at in rng.integers(0, len(bad), rng.integers(1, 12)):
            bad[at] = rng.integers(0, 256)
        bad = bad[: rng.integers(1, len(bad))] if rng.random() < 0.3 else bad
        try:
            info = probe(bytes(bad))
            assert min(info.width, info.height, info.num_frames, info.fps) > 0
            list(read_frames(bytes(bad), [0, info.num_frames - 1], LIMITS))
        except Drop as drop:
            codes.add(drop.reason)
    assert codes <= {
        "VIDEO_FORMAT",
        "VIDEO_DECODE",
        "VIDEO_EMPTY",
        "VIDEO_LONG",
        "IMG_PIXELS",
        "IMG_TINY",
        "IMG_ASPECT",
    }
    assert capfd.readouterr() == ("", "")


# -- the loader ---------------------------------------------------------------------------------------------------


def loader_of(folder: Path, family: Any = None, **over: Any) -> Loader:
    files = (SourceFile("train", str(folder / "train.jsonl"), None, str(folder)),)
    family = family or family_of("qwen2_5_vl")
    return LoaderSpec(
        files, family, tiny.tokenizer_json(), (), PICTURES, 1 << 16, "drop", 1 << 20, videos=VideoLimits(**over)
    ).build()


def family_of(name: str, own: dict[str, Any] | None = None, **limits: Any) -> QwenVL:
    config = tiny.config_of(name, 500)
    return from_config(config, {}, None, {} if own is None else own, VideoLimits(**limits))


def info_of(folder: Path, video: Video, **over: Any) -> VideoInfo:
    return loader_of(folder, **over).video_info(0, video, "train.jsonl:1")


def test_where_a_video_may_be(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.mp4").write_bytes(tiny.make_video(4))
    (tmp_path / "out.mp4").write_bytes(tiny.make_video(4))
    (folder / "link.mp4").symlink_to(tmp_path / "out.mp4")
    assert info_of(folder, Video(path="a.mp4")).num_frames == 4
    assert info_of(folder, Video(data=tiny.make_video(4))).num_frames == 4
    assert reason(lambda: info_of(folder, Video(path="b.mp4"))) == "VIDEO_MISSING"
    assert reason(lambda: info_of(folder, Video(path="."))) == "PATH_KIND"
    assert reason(lambda: info_of(folder, Video(path="data:video/mp4;base64,AAAA"))) == "VIDEO_FORMAT"
    for path, code in (("https://a.b/c.mp4", "URL_NOT_ALLOWED"), ("concat:/a.mp4", "URL_NOT_ALLOWED"),
                       ("../out.mp4", "PATH_ESCAPE"), ("link.mp4", "PATH_ESCAPE"), ("", "PATH_SYNTAX"),
                       (str(tmp_path / "out.mp4"), "PATH_ABSOLUTE")):  # fmt: skip
        with pytest.raises(DataError, match=code):
            info_of(folder, Video(path=path))


def test_a_video_that_changed_is_looked_at_again(tmp_path: Path) -> None:
    loader = loader_of(tmp_path)
    for frames in (4, 6):
        (tmp_path / "a.mp4").write_bytes(tiny.make_video(frames))
        assert loader.video_info(0, Video(path="a.mp4"), "train.jsonl:1").num_frames == frames


def frames_of(folder: Path, count: int, size: tuple[int, int] = (60, 44)) -> Video:
    names = [f"{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        pillow.new("RGB", size, (tiny.grey(i),) * 3).save(folder / name)
    return Video(frames=tuple(Image(path=n) for n in names), fps=4)


def test_a_video_by_its_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needs no PyAV."""
    monkeypatch.setitem(sys.modules, "av", None)
    video = frames_of(tmp_path, 6)
    loader = loader_of(tmp_path)
    assert info_of(tmp_path, video) == VideoInfo(60, 44, 6, 4.0)
    encoded = loader.encode(0, sample_of(["?", video]))
    assert [b.frames for b in encoded.images] == [(0, 1, 3, 4)]
    (pixels,) = loader.video_patches(0, encoded.images, "train.jsonl:1")
    levels = pixels.reshape(2, -1, 3, 2, 14 * 14).mean(axis=(1, 2, 4))
    assert levels.tolist() == [[tiny.grey(0), tiny.grey(1)], [tiny.grey(3), tiny.grey(4)]]
    pillow.new("RGB", (60, 45)).save(tmp_path / "3.png")
    assert reason(lambda: info_of(tmp_path, video)) == "VIDEO_FRAMES"
    (tmp_path / "3.png").write_bytes(b"")
    assert reason(lambda: info_of(tmp_path, video)) == "IMG_EMPTY"
    (tmp_path / "3.png").unlink()
    assert reason(lambda: info_of(tmp_path, video)) == "IMG_MISSING"


def test_rows_with_videos_are_indexed_and_read(tmp_path: Path) -> None:
    frames = frames_of(tmp_path, 4)
    (tmp_path / "a.mp4").write_bytes(tiny.make_video(24))
    (tmp_path / "text.mp4").write_bytes(b"hello")
    rows = []
    for video in ("a.mp4", "text.mp4", "none.mp4", [f.path for f in frames.frames]):
        turns = [{"role": "user", "content": "<video>what?"}, {"role": "assistant", "content": "yes"}]
        rows.append(json.dumps({"messages": turns, "videos": [video]}) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(rows))
    loader = loader_of(tmp_path)
    index = build_index(loader.spec, tmp_path / "cache")
    assert index.counts()["by_reason"] == {"VIDEO_FORMAT": 1, "VIDEO_MISSING": 1}
    tokens = index.column("tokens").tolist()
    row = load_row(loader, [Member(n, index.ref(n), tokens=t) for n, t in enumerate(tokens)], {})
    assert row.members == (0, 1) and not row.dropped and row.num_tokens == sum(tokens)
    assert row.image_grids_I3[:, 0].tolist() == [2, 2]  # 4 frames of 2.4 seconds, 4 frames whose rate nobody said


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny.make_video(4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"\[EXTRA\](.*\n)*.*lensmith\[video\]"):
        info_of(tmp_path, Video(data=data))


def test_handles(tmp_path: Path) -> None:
    loader, video = loader_of(tmp_path), frames_of(tmp_path, 3)
    (tmp_path / "a.mp4").write_bytes(tiny.make_video(4))
    assert loader.handle(0, Video(path="a.mp4"), "x:1") == str(tmp_path / "a.mp4")
    assert loader.handles(0, video, "x:1") == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert loader.handle(0, Video(data=b"1"), "x:1") != loader.handle(0, Video(data=b"2"), "x:1")


def sample_of(content: list[str | Image | Video], answer: str = "yes") -> Sample:
    return Sample("train.jsonl:1", (chat(content, answer),))


def chat(content: list[str | Image | Video], answer: str = "yes") -> Conversation:
    return qwen.chat(("user", content), ("assistant", answer))


# -- which frames, and how large ----------------------------------------------------------------------------------


@cache
def vendor_function(model: str, name: str, of: str | None = None) -> Any:
    """A function of transformers' `video_processing_<model>.py`, compiled from its source."""
    file = Path(transformers.__file__).parent / "models" / model / f"video_processing_{model}.py"
    body = ast.parse(file.read_text(encoding="utf-8")).body
    if of is not None:
        body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == of).body
    found = [n for n in body if isinstance(n, ast.FunctionDef) and n.name == name]
    names: dict[str, Any] = {"torch": torch, "np": np, "math": math}
    if of is not None and name == "get_num_of_video_patches":
        names["smart_resize"] = vendor_function(model, "smart_resize")
    # `from __future__ import annotations` of this file holds for what it compiles: their types need not exist here
    exec(compile(ast.Module(found, []), str(file), "exec"), names)  # noqa: S102
    return names[name]


def vendor_sample(name: str, info: VideoInfo, fps: float = 2.0, low: int = 4, high: int = 768) -> list[int]:
    metadata = VideoMetadata(total_num_frames=info.num_frames, fps=info.fps)
    me = SimpleNamespace(fps=None, num_frames=None, temporal_patch_size=2, min_frames=low, max_frames=high)
    model, of = ("qwen3_vl", "Qwen3VL") if name == "qwen3_vl" else ("qwen2_vl", "Qwen2VL")
    return vendor_function(model, "sample_frames", f"{of}VideoProcessor")(me, metadata, fps=fps).tolist()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_sampling_equals_the_vendors(name: str) -> None:
    model, of = ("qwen3_vl", "Qwen3VL") if name == "qwen3_vl" else ("qwen2_vl", "Qwen2VL")
    theirs = vendor_function(model, "sample_frames", f"{of}VideoProcessor")
    rates = (1.0, 7.0, 24000 / 1001, 25.0, 29.97, 30.0, 60.0)
    cases = [(n, r, 2.0, 4, 768) for n in range(2, 600) for r in rates]
    cases += [(n, 30.0, f, low, high) for n in range(2, 400, 3) for f in (0.3, 1.0, 4.0, 50.0)
              for low, high in ((2, 768), (4, 16), (8, 64))]  # fmt: skip
    longer = 0
    for total, rate, fps, low, high in cases:
        shown = video_settings(name, {}, 28, 2, VideoLimits(min_frames=low, max_frames=high))
        me = SimpleNamespace(fps=None, num_frames=None, temporal_patch_size=2, min_frames=low, max_frames=high)
        expected = theirs(me, VideoMetadata(total_num_frames=total, fps=rate), fps=fps).tolist()
        ours = sample_frames(name, VideoInfo(64, 64, total, rate), shown, 2, fps)
        if len(expected) > len(ours) and name != "qwen3_vl":  # no_frame_past_the_end
            assert expected.pop() == total
            longer += 1
        assert ours == expected, (total, rate, fps, low, high)
    assert (longer > 0) == (name != "qwen3_vl")


def test_sampling_by_hand() -> None:
    """4 seconds at 30 pictures a second, 2 shown of each: 8; Qwen3-VL's first and last are those of the video."""
    info, shown = VideoInfo(64, 64, 120, 30.0), video_settings("qwen2_vl", {}, 28, 2, LIMITS)
    assert sample_frames("qwen2_vl", info, shown, 2, 2.0) == [0, 15, 30, 45, 60, 75, 90, 105]
    assert sample_frames("qwen3_vl", info, shown, 2, 2.0) == [0, 17, 34, 51, 68, 85, 102, 119]
    assert sample_frames("qwen2_vl", replace(info, num_frames=3), shown, 2, 2.0) == [0, 1]
    assert sample_frames("qwen3_vl", replace(info, num_frames=3), shown, 2, 2.0) == [0, 1, 2]
    for name in ("qwen2_vl", "qwen3_vl"):
        assert sample_frames(name, replace(info, num_frames=1), shown, 2, 2.0) == [0]
        assert sample_frames(name, replace(info, num_frames=5, fps=0.0), shown, 2, 2.0) == [0, 1, 2, 3, 4]


SIDES, COUNTS = st.integers(1, 4000), st.integers(2, 768)


@given(SIDES, SIDES, COUNTS, st.integers(1, 1 << 18), st.integers(1, 1 << 26), st.booleans())
@settings(max_examples=300, deadline=None)
def test_sizes_equal_qwen3_vls(width: int, height: int, count: int, low: int, high: int, cap: bool) -> None:
    low, high = min(low, high), max(low, high)
    own = {"size": {"shortest_edge": low, "longest_edge": high}, "cap_pixels_per_frame": cap}
    me = SimpleNamespace(**own, patch_size=16, merge_size=2, temporal_patch_size=2, max_video_tokens=768)
    patches = vendor_function("qwen3_vl", "get_num_of_video_patches", "Qwen3VLVideoProcessor")
    pixels = replace(qwen.PIXELS, patch=16)
    ours = lambda: frame_size(  # noqa: E731
        "qwen3_vl", pixels, video_settings("qwen3_vl", own, 32, 2, LIMITS), VideoInfo(width, height, 900, 30), count
    )
    try:
        expected = patches(me, count, height, width)
    except ValueError:
        assert reason(ours) == "IMG_ASPECT"
        return
    wide, tall = ours()
    assert -(-count // 2) * (wide // 16) * (tall // 16) == expected
    if not cap:
        theirs = vendor_function("qwen3_vl", "smart_resize")(count, height, width, 2, 32, low, high)
        assert (tall, wide) == theirs


@given(SIDES, SIDES, COUNTS, st.integers(1, 1 << 18), st.integers(1, 1 << 22), st.booleans())
@settings(max_examples=300, deadline=None)
def test_sizes_equal_qwen2_vls(width: int, height: int, count: int, low: int, high: int, cap: bool) -> None:
    low, high = min(low, high), max(low, high)
    own = {"min_pixels": low, "max_pixels": high, "cap_pixels_per_frame": cap}
    most = max(min(high, int(128000 * 28 * 28 * 0.9) * 2 // count), int(low * 1.05)) if cap else high
    shown = video_settings("qwen2_vl", own, 28, 2, LIMITS)
    ours = lambda: frame_size("qwen2_vl", qwen.PIXELS, shown, VideoInfo(width, height, 900, 30), count)  # noqa: E731
    try:
        theirs = vendor_function("qwen2_vl", "smart_resize")(height, width, 28, low, most)
    except ValueError:
        assert reason(ours) == "IMG_ASPECT"
        return
    assert ours() == theirs[::-1]


def test_sizes_of_the_run_file() -> None:
    """1080p is 1092 x 1932 before Qwen3-VL and 1088 x 1920 since, where nothing limits it."""
    info, own = VideoInfo(1920, 1080, 900, 30.0), {"size": {"shortest_edge": 4096, "longest_edge": 1 << 40}}

    def area(name: str, frames: int, **limits: Any) -> int:
        patch = 16 if name == "qwen3_vl" else 14
        shown = video_settings(name, own, patch * 2, 2, VideoLimits(**limits))
        wide, high = frame_size(name, replace(qwen.PIXELS, patch=patch), shown, info, frames)
        return wide * high

    assert area("qwen2_vl", 8) == 1932 * 1092 and area("qwen3_vl", 8) == 1920 * 1088
    for name in ("qwen2_vl", "qwen3_vl"):
        assert 90_000 < area(name, 8, max_pixels=100_000) <= 100_000
        assert 90_000 < area(name, 8, total_pixels=800_000) <= 100_000
        assert 35_000 < area(name, 16, total_pixels=800_000) <= 50_000
        assert area(name, 80, total_pixels=800_000, min_pixels=60_000) >= 50_000
        assert 4_000_000 <= area(name, 8, min_pixels=4_000_000) < 4_400_000


def test_settings_come_from_the_model_then_the_run_file() -> None:
    assert family_of("qwen2_vl").video.fps == 2.0 and family_of("qwen2_vl").video.tokens_per_second == 0
    assert (family_of("qwen2_vl").video.min_pixels, family_of("qwen2_vl").video.max_pixels) == (100352, 602112)
    assert (family_of("qwen3_vl").video.min_total, family_of("qwen3_vl").video.max_total) == (131072, 786432)
    assert family_of("qwen2_5_vl").video.tokens_per_second == 2
    own = {"fps": 1, "min_frames": 6, "max_frames": 32, "size": {"shortest_edge": 4096, "longest_edge": 25165824}}
    found = family_of("qwen3_vl", own).video
    assert (found.fps, found.min_frames, found.max_frames, found.max_total) == (1, 6, 32, 25165824)
    found = family_of("qwen3_vl", own, fps=4.0, max_frames=8, min_frames=2).video
    assert (found.fps, found.min_frames, found.max_frames) == (4.0, 2, 8)
    pictures = {"min_pixels": 3136, "max_pixels": 12845056}  # as AutoProcessor does where there is no file for videos
    assert from_config(tiny.config_of("qwen2_vl", 500), pictures, None).video.max_pixels == 12845056
    for wrong in ({"min_frames": 8, "max_frames": 4}, {"min_pixels": 9, "max_pixels": 8}, {"fps": 0.0}):
        with pytest.raises(ValidationError):
            VideoLimits(**wrong)


# -- what stands in the place of a video --------------------------------------------------------------------------


def test_blocks_before_qwen3() -> None:
    """3 seconds of 10: 6 frames, two to a row of the grid, a row each second."""
    video = Video(path="a")
    for name in ("qwen2_vl", "qwen2_5_vl"):
        own = {"min_pixels": 1, "max_pixels": 1 << 20}
        start, placed, end = family_of(name, own).place_video(video, VideoInfo(112, 56, 30, 10.0))
        assert isinstance(start, Template) and isinstance(end, Template) and isinstance(placed, Placed)
        assert (start.text, end.text) == ("<|vision_start|>", "<|vision_end|>")
        block = placed.block
        assert (block.width, block.height, block.grid_thw, block.num_tokens) == (112, 56, (3, 4, 8), 24)
        assert block.frames == (0, 5, 10, 15, 20, 25) and block.seconds_per_grid == pytest.approx(1.0)
        assert block.image is video


def test_blocks_of_qwen3() -> None:
    """5 frames: the last one twice; each pair's time is the mean of its two."""
    own = {"size": {"shortest_edge": 1, "longest_edge": 1 << 20}}
    pieces = family_of("qwen3_vl", own, min_frames=5).place_video(Video(path="a"), VideoInfo(64, 96, 21, 10.0))
    blocks = [p.block for p in pieces if isinstance(p, Placed)]
    assert [b.frames for b in blocks] == [(0, 5), (10, 15), (20, 20)]
    assert [p.text for p in pieces if isinstance(p, Template)] == [
        t for s in ("0.2", "1.2", "2.0") for t in (f"<{s} seconds>", "<|vision_start|>", "<|vision_end|>")
    ]
    assert {b.grid_thw for b in blocks} == {(1, 6, 4)} and {b.num_tokens for b in blocks} == {6}


def test_fps_of_the_data() -> None:
    """Beside a file: how many are shown. Beside frames: how fast they were taken."""
    family = family_of("qwen2_vl", {"min_pixels": 1, "max_pixels": 1 << 20})

    def shown(video: Video, info: VideoInfo) -> Any:
        return next(p.block for p in family.place_video(video, info) if isinstance(p, Placed))

    info = VideoInfo(56, 56, 40, 10.0)
    assert shown(Video(path="a", fps=4.0), info).grid_thw[0] == 8 and shown(Video(path="a"), info).grid_thw[0] == 4
    taken = tuple(Image(path=str(i)) for i in range(10))
    block = shown(Video(frames=taken, fps=2.5), VideoInfo(56, 56, 10, 2.5))
    assert block.frames == (0, 1, 2, 3, 5, 6, 7, 8) and block.seconds_per_grid == pytest.approx(1.0)
    block = shown(Video(frames=taken[:5]), VideoInfo(56, 56, 5, 0.0))
    assert block.frames == (0, 1, 2, 3, 4, 4) and block.seconds_per_grid == pytest.approx(1.0)
    assert shown(Video(path="a"), VideoInfo(56, 56, 1, 10.0)).frames == (0, 0)
    assert reason(lambda: family.place_video(Video(path="a"), VideoInfo(201, 1, 10, 10.0))) == "IMG_ASPECT"


# -- the models ---------------------------------------------------------------------------------------------------

LONG, SHORT = Video(data=tiny.make_video(24, fps=6, size=(96, 64))), Video(data=tiny.make_video(9, fps=8))


@pytest.fixture(scope="module", params=qwen.NAMES)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> qwen.Kit:
    return qwen.make_kit(tmp_path_factory.mktemp("video") / request.param, request.param)


SMALL = qwen.SMALL
CHATS = {
    "video": chat([LONG, "what happens?"], "a red circle"),
    "mixed": chat(["first\n", SMALL, " then ", LONG, "\n\nand", SHORT, qwen.WIDE, "?"], "a square."),
    "turns": qwen.chat(("user", [SHORT, "is it red?"]), ("assistant", "yes"), ("user", ["and ", SMALL, LONG]),
                       ("assistant", "no")),
    "text": chat(["what is it?"], "a circle"),
}  # fmt: skip


def videos_of(conversation: Conversation) -> list[Video]:
    return Sample("test", (conversation,)).videos()


def metadata_of(kit: qwen.Kit, video: Video) -> VideoMetadata:
    info = kit.loader.video_info(0, video, "test")
    return VideoMetadata(info.num_frames, info.fps, frames_indices=vendor_sample(kit.name, info))


def frames_and_grid(kit: qwen.Kit, video: Video) -> tuple[torch.Tensor, list[int]]:
    """[frames, 3, H, W] as the vendor normalises them (resized by Pillow), and the grid of the vendor's `patchify`."""
    import av

    p, indices = kit.family.pixels, metadata_of(kit, video).frames_indices
    assert video.data is not None and indices is not None
    with av.open(io.BytesIO(video.data)) as container:
        frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    height, width, unit = *frames[0].shape[:2], p.patch * p.merge
    limits = p.min_pixels, p.max_pixels  # a tiny model has settings for pictures only
    if kit.name == "qwen3_vl":
        high, wide = vendor_function("qwen3_vl", "smart_resize")(len(indices), height, width, 2, unit, *limits)
    else:
        high, wide = vendor_function("qwen2_vl", "smart_resize")(height, width, unit, *limits)
    chosen = [pillow.fromarray(frames[i]).resize((wide, high), pillow.Resampling.BICUBIC) for i in indices]
    x = torch.from_numpy(np.stack([np.asarray(f) for f in chosen])).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(p.mean).view(3, 1, 1)) / torch.tensor(p.std).view(3, 1, 1)
    return x, [-(-len(indices) // 2), high // p.patch, wide // p.patch]


def vendor_pixels(kit: qwen.Kit, video: Video) -> tuple[torch.Tensor, list[int]]:
    model, of = ("qwen3_vl", "Qwen3VL") if kit.name == "qwen3_vl" else ("qwen2_vl", "Qwen2VL")
    x, grid = frames_and_grid(kit, video)
    p = kit.family.pixels
    patches, *found = vendor_function(model, "patchify", f"{of}VideoProcessor")(None, x[None], p.patch, p.merge, 2)
    assert found == grid
    return patches[0], grid


def vendor_ids(kit: qwen.Kit, conversation: Conversation) -> list[int]:
    text = qwen.vendor_text(kit, conversation)  # pictures are expanded
    pieces = text.split("<|vision_start|><|video_pad|><|vision_end|>")
    for video, after in zip(videos_of(conversation), pieces[1:], strict=True):
        _, grid = frames_and_grid(kit, video)
        if kit.name == "qwen3_vl":
            me = SimpleNamespace(
                video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), video_token="<|video_pad|>",
                vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
                _calculate_timestamps=lambda *a: Qwen3VLProcessor._calculate_timestamps(None, *a),  # type: ignore[arg-type]
            )  # fmt: skip
            given_ = {"video_grid_thw": torch.tensor([grid]), "video_metadata": [metadata_of(kit, video)]}
            pieces[0] += Qwen3VLProcessor.replace_video_token(me, given_, 0)  # type: ignore[arg-type]
        else:
            pieces[0] += "<|vision_start|>" + "<|video_pad|>" * (math.prod(grid) // 4) + "<|vision_end|>"
        pieces[0] += after
    return kit.hf(pieces[0]).input_ids


def types_of(ids: torch.Tensor) -> torch.Tensor:
    """0 text, 1 image, 2 video."""
    return (ids == tiny.token_id("<|image_pad|>")).int() + 2 * (ids == tiny.token_id("<|video_pad|>")).int()


def vendor_inputs(kit: qwen.Kit, conversation: Conversation) -> dict[str, torch.Tensor]:
    ids = torch.tensor([vendor_ids(kit, conversation)])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types_of(ids)}
    pictures = qwen.pictures_of(conversation)
    if pictures:
        inputs |= dict(kit.processor(images=pictures, return_tensors="pt"))
    found = [vendor_pixels(kit, v) for v in videos_of(conversation)]
    if found:
        inputs["pixel_values_videos"] = torch.cat([p for p, _ in found])
        inputs["video_grid_thw"] = torch.tensor([g for _, g in found])
        if kit.name == "qwen2_5_vl":
            rates = [metadata_of(kit, v).sampled_fps for v in videos_of(conversation)]
            inputs["second_per_grid_ts"] = torch.tensor([2 / r for r in rates])
    return inputs


def test_ids_equal_the_vendors(kit: qwen.Kit) -> None:
    for name, conversation in CHATS.items():
        encoded = kit.encode(conversation)
        assert encoded.ids_L.tolist() == vendor_ids(kit, conversation), name
        media = types_of(torch.from_numpy(encoded.ids_L)).bool().numpy()
        assert ((encoded.kind_L == IMAGE) == media).all(), name


def test_nothing_of_a_video_is_trained(kit: qwen.Kit) -> None:
    for name, conversation in CHATS.items():
        encoded = kit.encode(conversation)
        answers = "".join(
            p.text + "<|im_end|>" * (m.role == "assistant")
            for m in conversation.messages for p in m.parts if m.role == "assistant" and isinstance(p, Text)
        )  # fmt: skip
        assert kit.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist()) == answers, name
    whole = kit.encoder().encode(Sample("test", Document((Text("a "), LONG, Text(" b <|video_pad|>")))))
    assert kit.tokenizer.decode(whole.ids_L[whole.trained_L].tolist()) == "a  b <|video_pad|><|endoftext|>"


def test_typed_video_tokens_stay_text(kit: qwen.Kit) -> None:
    encoded = kit.encode(chat(["<|video_pad|>", "<|vision_start|><|video_pad|><|vision_end|>"], "<|video_pad|>"))
    assert not (encoded.ids_L == tiny.token_id("<|video_pad|>")).any() and not encoded.images


def test_positions_equal_get_rope_index(kit: qwen.Kit) -> None:
    for name, conversation in CHATS.items():
        encoded, inputs = kit.encode(conversation), vendor_inputs(kit, conversation)
        grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in inputs}
        theirs, _ = kit.stock.model.get_rope_index(
            inputs["input_ids"], mm_token_type_ids=inputs["mm_token_type_ids"], **grids
        )
        assert (torch.from_numpy(encoded.position_ids_3L) == theirs[:, 0]).all(), name


@given(st.floats(0.1, 60), st.integers(2, 300), st.floats(0.2, 30))
@settings(max_examples=60, deadline=None)
def test_time_equals_qwen25s(rate: float, total: int, fps: float) -> None:
    """Time is scaled in float32 and cut off; a row that falls short of a whole second is the one before."""
    from transformers import Qwen2_5_VLModel

    family = family_of("qwen2_5_vl", {"min_pixels": 1, "max_pixels": 28 * 28})
    placed = next(p for p in family.place_video(Video(path="a", fps=fps), VideoInfo(28, 28, total, rate))
                  if isinstance(p, Placed))  # fmt: skip
    kinds = np.full(placed.block.num_tokens, IMAGE, np.int8)
    me = SimpleNamespace(
        config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)),
        get_vision_position_ids=lambda *a, **k: Qwen2_5_VLModel.get_vision_position_ids(None, *a, **k),  # type: ignore[arg-type]
    )
    ids = torch.zeros(1, len(kinds), dtype=torch.long)
    theirs, _ = Qwen2_5_VLModel.get_rope_index(
        me, ids, mm_token_type_ids=ids.int() + 2, video_grid_thw=torch.tensor([placed.block.grid_thw]),
        second_per_grid_ts=torch.tensor([placed.block.seconds_per_grid]),
    )  # type: ignore[arg-type]  # fmt: skip
    assert (family.positions(kinds, [placed.block]) == theirs[:, 0].numpy()).all()


def test_pixels_equal_the_vendors(kit: qwen.Kit) -> None:
    for video in (LONG, SHORT):
        encoded = kit.encode(chat([video, "?"]))
        ours = np.concatenate(kit.loader.video_patches(0, encoded.images, "test"))
        theirs, grid = vendor_pixels(kit, video)
        assert ours.dtype == np.uint8 and ours.shape == (math.prod(grid), theirs.shape[1])
        assert (kit.family.normalise(torch.from_numpy(ours)) - theirs).abs().max() < 1e-6


@torch.no_grad()
def test_packed_equals_transformers_one_by_one(kit: qwen.Kit) -> None:
    """One row of all conversations, stills and videos together, against the stock model's own forward."""
    samples = [kit.encode(c) for c in CHATS.values()]
    row = qwen.row_of(kit, samples)
    objective = qwen.KeepLogits()
    qwen.root_of(kit, objective)(row)
    hidden, logits = qwen.hidden_of(kit, row), objective.logits_SV
    at, seen, worst = 0, 0, 0.0
    for conversation, sample in zip(CHATS.values(), samples, strict=True):
        theirs = kit.stock.model(**vendor_inputs(kit, conversation)).last_hidden_state[0]
        alone = qwen.hidden_of(kit, qwen.row_of(kit, [sample]))
        supervised = np.flatnonzero(sample.target_L != IGNORED)
        gap = logits[seen : seen + len(supervised)] - kit.stock.lm_head(theirs[supervised])
        gaps = (hidden[at : at + sample.num_tokens] - theirs, alone - theirs, gap)
        worst = max(worst, *(g.abs().max().item() for g in gaps))
        at, seen = at + sample.num_tokens, seen + len(supervised)
    assert seen == len(row.supervised_S) and not row.dropped
    print("gap", worst)
    assert worst < qwen.GAP, worst


def test_stills_stay_narrow_until_a_video_is_beside_them(kit: qwen.Kit) -> None:
    p = kit.family.pixels
    still, video = kit.encode(chat([SMALL, "?"])), kit.encode(chat([SHORT, "?"]))
    alone, both = qwen.row_of(kit, [still]), qwen.row_of(kit, [still, video])
    assert alone.pixels_PD.shape[1] == 3 * p.patch**2 and both.pixels_PD.shape[1] == 2 * 3 * p.patch**2
    count = len(alone.pixels_PD)
    narrow, wide = (torch.from_numpy(r.pixels_PD[:count]) for r in (alone, both))
    assert torch.equal(kit.family.normalise(narrow), kit.family.normalise(wide))


def test_branches_share_a_video(kit: qwen.Kit) -> None:
    branches = [chat([LONG, q], a) for q, a in (("is it red?", "yes"), ("what?", "a square"))]
    joined, alone = kit.encode(*branches), [kit.encode(b) for b in branches]
    assert len(joined.images) == len(alone[0].images)
    with torch.no_grad():
        hidden = qwen.hidden_of(kit, qwen.row_of(kit, [joined]))
        shared, own = qwen.own_slices(joined, 2)
        for branch, place in zip(alone, own, strict=True):
            theirs = qwen.hidden_of(kit, qwen.row_of(kit, [branch]))
            assert (hidden[place] - theirs[shared:]).abs().max() < qwen.GAP


class Counting(Loader):
    """Counts how often a video is decoded."""

    decoded = 0

    def _frames(self, *args: Any) -> Any:
        self.decoded += 1
        return super()._frames(*args)


def test_a_video_is_decoded_once(kit: qwen.Kit) -> None:
    loader = Counting(kit.loader.spec)
    pictures = Pictures(loader, {})
    encoded = kit.encode(chat([LONG, SMALL, "?"]))
    order = pictures.add(0, encoded, "test")
    assert loader.decoded == 1 and order == list(range(len(encoded.images)))
    assert pictures.add(0, kit.encode(chat(["again", LONG])), "test") == [n for n in order if n != order[-1]]
    assert loader.decoded == 1
    other = kit.encode(chat([replace(LONG, fps=1.0), "?"]))  # other frames of the same video
    assert not set(pictures.add(0, other, "test")) & set(order) and loader.decoded == 2


@torch.no_grad()
def test_the_vision_cache_knows_clips(kit: qwen.Kit) -> None:
    samples = [kit.encode(CHATS["mixed"]), kit.encode(chat([replace(LONG, fps=1.0), "?"]))]
    try:
        qwen.set_mode(kit, "frozen")
        plain, cached = qwen.root_of(kit), qwen.root_of(kit, cache=VisionCache(1 << 22))
        row = qwen.row_of(kit, samples)
        assert len(set(row.image_keys)) == len(row.image_keys)
        first = cached.features(row)
        assert cached.cache is not None and cached.ready(row)
        known = cached.cache.known()
        again = load_known(kit, samples, known)
        assert len(known) == len(row.image_keys) and not len(again.pixel_image) and cached.ready(again)
        second, expected = cached.features(again), plain.features(row)
        assert first is not None and second is not None and expected is not None
        assert torch.equal(first, second) and (first - expected).abs().max() < qwen.GAP
    finally:
        kit.model.requires_grad_(True)


def load_known(kit: qwen.Kit, samples: list[Encoded], known: dict[str, str]) -> Any:
    members = [Member(i, SampleRef(0, RowRef(i, i + 1, 0, 0))) for i in range(len(samples))]
    return load_row(kit.loader, members, known, lambda m: (f"test:{m.number}", samples[m.number]))


def test_a_broken_video_drops_its_sample_only(kit: qwen.Kit) -> None:
    good, bad = kit.encode(CHATS["video"]), kit.encode(chat([SHORT, "?"]))
    cut = tuple(replace(b, frames=tuple(f + 50 for f in b.frames)) for b in bad.images)
    row = qwen.row_of(kit, [good, replace(bad, images=cut)])
    assert [d[:2] for d in row.dropped] == [(1, "VIDEO_DECODE")] and row.members == (0,)


def test_gradients_of_a_packed_row(kit: qwen.Kit) -> None:
    kit.model.requires_grad_(True)
    kit.model.train()
    samples = [kit.encode(c) for c in CHATS.values()]
    loss, ours = qwen.gradients(kit, [qwen.row_of(kit, samples)])
    expected, theirs = qwen.gradients(kit, [qwen.row_of(kit, [s]) for s in samples])
    kit.model.eval()
    assert loss == pytest.approx(expected, rel=1e-6) and qwen.relative_gap(ours, theirs) < 1e-5
