"""Which paths and URLs of a data file are followed: rows B35-B42 of the bad-input list beyond what the corpus holds."""

from __future__ import annotations

import os
import socket
import time
import unicodedata
from pathlib import Path

import pytest
from corpus.pieces import gradient, rgb_png

from lensmith.core.errors import DataError, Drop
from lensmith.data.media import ImageLimits, parse_data_url, read_bytes, resolve_media
from lensmith.data.media_open import probe_file

ORIGIN = "train.jsonl:17"
LIMITS = ImageLimits()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder `images` with a picture, a folder `other` beside it, and a sibling whose name starts alike."""
    for name in ("images", "other", "images_evil"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes(rgb_png(gradient()))
    return tmp_path


def refused(path: str, base: Path, *roots: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        resolve_media(path, roots, ORIGIN, base)
    assert caught.value.where == ORIGIN
    return caught.value


def dropped(path: str, base: Path, *roots: Path) -> str:
    with pytest.raises(Drop) as caught:
        resolve_media(path, roots, ORIGIN, base)
    return caught.value.reason


@pytest.mark.parametrize("path", ["x.png", "./x.png", "../images/x.png", "..//images/./x.png"])
def test_paths_inside_are_found(path: str, place: Path) -> None:
    assert resolve_media(path, (), ORIGIN, place / "images") == (place / "images/x.png").resolve()


def test_absolute_paths_need_a_declared_root(place: Path) -> None:
    inside, outside = str(place / "images/x.png"), str(place / "other/x.png")
    assert resolve_media(inside, (), ORIGIN, place / "images") == Path(inside)
    error = refused(outside, place / "images")
    assert error.code == "PATH_ABSOLUTE" and "data.media_roots" in error.remedy
    assert resolve_media(outside, (place / "other",), ORIGIN, place / "images") == Path(outside)
    assert resolve_media("../other/x.png", (place / "other",), ORIGIN, place / "images") == Path(outside)


@pytest.mark.parametrize("path", ["/etc/passwd", "//etc/passwd", "/proc/self/environ", "/dev/zero"])
def test_system_files_are_refused(path: str, place: Path) -> None:
    assert refused(path, place / "images").code == "PATH_ABSOLUTE"


@pytest.mark.parametrize(
    "path", ["../../etc/passwd", "../images_evil/x.png", "../other/x.png", "../other/missing.png", "..", "a/../../b"]
)
def test_escapes_are_refused(path: str, place: Path) -> None:
    assert refused(path, place / "images").code == "PATH_ESCAPE"


def test_sibling_prefix_as_an_absolute_path(place: Path) -> None:
    assert refused(str(place / "images_evil/x.png"), place / "other", place / "images").code == "PATH_ABSOLUTE"


def test_links_out_are_refused_and_links_within_are_not(place: Path) -> None:
    images = place / "images"
    (images / "out.png").symlink_to(place / "other/x.png")
    (images / "etc").symlink_to("/etc")
    (images / "in.png").symlink_to("x.png")
    (images / "loop.png").symlink_to("loop.png")
    (images / "zero.png").symlink_to("/dev/zero")
    assert refused("out.png", images).code == "PATH_ESCAPE"
    assert refused(str(images / "out.png"), images).code == "PATH_ESCAPE"
    assert refused("etc/passwd", images).code == "PATH_ESCAPE"
    assert refused("zero.png", images).code == "PATH_ESCAPE"
    assert resolve_media("in.png", (), ORIGIN, images) == images / "x.png"
    assert dropped("loop.png", images) == "PATH_KIND"
    (place / "link").symlink_to(images)
    assert resolve_media("x.png", (), ORIGIN, place / "link") == images / "x.png"


def test_things_that_are_no_files(place: Path) -> None:
    images = place / "images"
    os.mkfifo(images / "fifo.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(images / "s"))
        start = time.monotonic()
        kinds = {path: dropped(path, images, Path("/")) for path in ("fifo.png", ".", "s", "/dev/zero", "/dev/null")}
        assert time.monotonic() - start < 1
    assert set(kinds.values()) == {"PATH_KIND"}
    assert dropped("/proc/self/environ", images, Path("/")) == "PATH_KIND"
    assert dropped("missing.png", images) == "IMG_MISSING"
    assert dropped("x.png/y.png", images) == "IMG_MISSING"


@pytest.mark.parametrize("swap", ["fifo", "link", "folder", "gone"])
def test_a_file_swapped_after_it_was_found(swap: str, place: Path) -> None:
    path = resolve_media("x.png", (), ORIGIN, place / "images")
    path.unlink()
    if swap == "fifo":
        os.mkfifo(path)
    elif swap == "link":
        path.symlink_to(place / "other/x.png")
    elif swap == "folder":
        path.mkdir()
    start = time.monotonic()
    for look_at in (read_bytes, probe_file):
        with pytest.raises(Drop) as caught:
            look_at(path, LIMITS)
        assert caught.value.reason == ("IMG_MISSING" if swap == "gone" else "PATH_KIND")
    assert time.monotonic() - start < 1


def test_fifo_put_there_between_check_and_open(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(place / "images/fifo.png")
    monkeypatch.setattr("lensmith.data.media._check_kind", lambda path: None)
    start = time.monotonic()
    with pytest.raises(Drop, match="PATH_KIND"):
        read_bytes(place / "images/fifo.png", LIMITS)
    (place / "images/link.png").symlink_to("x.png")
    with pytest.raises(Drop, match="IMG_READ"):
        read_bytes(place / "images/link.png", LIMITS)
    assert time.monotonic() - start < 1


SYNTAX = ["", "a\0b.png", "C:\\x.png", "c:/x.png", "C:", "\\\\host\\share", "file:///etc/passwd", "FILE:x", "~user/x",
          "~/x.png", "a" * 256, "a/" * 2500, "é" * 128, "\ud800.png"]  # fmt: skip


@pytest.mark.parametrize("path", SYNTAX, ids=lambda path: ascii(path)[:24])
def test_syntax(path: str, place: Path) -> None:
    error = refused(path, place / "images")
    assert error.code == "PATH_SYNTAX"
    assert len(error.message) < 400 and error.message.isprintable()


URLS = ["http://169.254.169.254/", "http://127.1", "http:127.1", "https://0x7f000001/x.png", "gopher://a", "gopher:",
        "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://a@b", "http:\\\\b", "HTTP://b", " http://b",
        "http:", "s3://bucket/x.png", "hf://datasets/x", "ftp:x", "foo+bar://x", "javascript:1", "jar:\\x",
        "data:image/png;base64,AA=="]  # fmt: skip


@pytest.mark.parametrize("path", URLS)
def test_urls_are_refused_without_a_connection(path: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def canary(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", canary)
    monkeypatch.setattr(socket, "getaddrinfo", canary)
    assert refused(path, place / "images", Path("/")).code == "URL_NOT_ALLOWED"


@pytest.mark.parametrize(
    "name", ["scene:1.png", "12:30.png", "a b.png", "http", "x~.png", "画像.png", "a\\b.png", "C:x"]
)
def test_odd_names_are_still_names(name: str, place: Path) -> None:
    (place / "images" / name).write_bytes(b"x")
    assert resolve_media(name, (), ORIGIN, place / "images").name == name


@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_either_unicode_form_finds_the_file(stored: str, place: Path) -> None:
    forms = {form: unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")}
    (place / "images" / forms[stored]).write_bytes(b"x")
    for name in forms.values():
        assert resolve_media(name, (), ORIGIN, place / "images").name == forms[stored]


def test_exact_name_wins_over_the_other_form(place: Path) -> None:
    names = [unicodedata.normalize(form, "caf\u00e9.png") for form in ("NFC", "NFD")]
    for name in names:
        (place / "images" / name).write_bytes(b"x")
    assert [resolve_media(name, (), ORIGIN, place / "images").name for name in names] == names


def test_size_is_checked_before_reading(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.touch()
    os.truncate(path, 2**40)  # sparse; reading half of it would be a MemoryError
    for look_at in (read_bytes, probe_file):
        with pytest.raises(Drop, match="IMG_BYTES"):
            look_at(path, ImageLimits(max_bytes=2**39))


def test_large_data_url_is_refused_before_decoding() -> None:
    with pytest.raises(Drop, match="IMG_BYTES"):
        parse_data_url("data:image/png;base64," + "A" * (100 * 2**20), LIMITS)
