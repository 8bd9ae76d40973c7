"""The index: what its cache may and may not keep, that processes agree, that counts add up, and the held-out split."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageFile
import pyarrow as pa
import pytest
import tiny
from corpus.pieces import gradient, rgb_png
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.core.errors import ConfigError, DataError, RunError
from lensmith.data import index_build, index_store
from lensmith.data.formats import Messages
from lensmith.data.holdout import hold_out, seen_in_training
from lensmith.data.index import LEDGER_SCHEMA, SCHEMA, Index
from lensmith.data.index_build import build_index
from lensmith.data.load import Loader, LoaderSpec, SampleRef, SourceFile
from lensmith.data.measure import measure
from lensmith.data.media import ImageLimits
from lensmith.data.readers import RowRef
from lensmith.family.registry import load_family

FAILING = {"messages": [{"role": "user", "content": "no answer"}]}


def chat(text: str, *images: str, **more: Any) -> dict[str, Any]:
    asked = {"role": "user", "content": "<image>" * len(images) + text}
    row = {"messages": [asked, {"role": "assistant", "content": "yes"}], **more}
    return {**row, "images": list(images)} if images else row


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def spec_of(model: Path, *files: Path, **over: Any) -> LoaderSpec:
    sources = tuple(SourceFile(f.stem, str(f), None, str(f.parent)) for f in files)
    spec = LoaderSpec(
        files=sources, family=load_family(model), tokenizer_json=(model / "tokenizer.json").read_text(encoding="utf-8"),
        roots=(), limits=ImageLimits(), max_tokens=512, too_long="drop", max_row_bytes=1 << 20,
    )  # fmt: skip
    return replace(spec, **over)


def read_stored(path: Path) -> pa.Table:
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the rows that were really measured since the list was last cleared."""
    seen: list[int] = []

    def counted(loader: Loader, number: int, ref: RowRef) -> list[dict[str, Any]]:
        seen.append(ref.number)
        return measure(loader, number, ref)

    monkeypatch.setattr(index_build, "measure", counted)
    return seen


# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_build_measures_nothing(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    spec, cache = spec_of(qwen25, tiny.make_chat(tmp_path, 12)), tmp_path / "cache"
    first = build_index(spec, cache)
    assert measured == list(range(12))
    measured.clear()
    again = build_index(spec, cache)
    assert not measured and again.table.equals(first.table)
    (stored,) = cache.iterdir()
    assert stored.suffix == ".arrow" and read_stored(stored).equals(first.table)
    assert first.table.schema == SCHEMA


def test_without_a_cache_nothing_is_written(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    spec = spec_of(qwen25, write(tmp_path / "a.jsonl", chat("x")))
    before = sorted(tmp_path.rglob("*"))
    build_index(spec, None)
    build_index(spec, None)
    assert len(measured) == 2 and sorted(tmp_path.rglob("*")) == before


def _content(spec: LoaderSpec, tmp_path: Path) -> LoaderSpec:
    with open(spec.files[0].path, "a") as file:
        file.write(json.dumps(chat("more")) + "\n")
    return spec


def _file(spec: LoaderSpec, **over: Any) -> LoaderSpec:
    return replace(spec, files=(replace(spec.files[0], **over),))


def _moved(spec: LoaderSpec, tmp_path: Path) -> LoaderSpec:
    (tmp_path / "else").mkdir()
    path = tmp_path / "else/train.jsonl"
    path.write_bytes(Path(spec.files[0].path).read_bytes())
    return _file(spec, path=str(path))


def _tokenizer(spec: LoaderSpec, _: Path) -> LoaderSpec:
    return replace(spec, tokenizer_json=tiny.tokenizer_json(100))


def _pixels(spec: LoaderSpec, _: Path) -> LoaderSpec:
    return replace(spec, family=replace(spec.family, pixels=replace(spec.family.pixels, max_pixels=56 * 56)))


MISSES = {
    "content": _content,
    "moved": _moved,
    "tokenizer": _tokenizer,
    "added tokens": lambda s, _: replace(s, text_tokens=("<tool_call>",)),
    "pixels": _pixels,
    "system prompt": lambda s, _: replace(s, family=replace(s.family, default_system="Be brief.")),
    "max_tokens": lambda s, _: replace(s, max_tokens=100),
    "too_long": lambda s, _: replace(s, too_long="cut"),
    "max_row_bytes": lambda s, _: replace(s, max_row_bytes=1 << 21),
    "image limits": lambda s, _: replace(s, limits=ImageLimits(min_side=40)),
    "roots": lambda s, p: replace(s, roots=(str(p),)),
    "format": lambda s, _: _file(s, format=Messages(train="last")),
    "media_dir": lambda s, p: _file(s, base=str(p / "images" / "..")),
    "max_samples": lambda s, _: _file(s, max_samples=3),
}


@pytest.mark.parametrize("change", MISSES)
def test_what_changes_counts_is_measured_anew(change: str, tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    spec = spec_of(qwen25, tiny.make_chat(tmp_path, 6))
    build_index(spec, tmp_path / "cache")
    measured.clear()
    changed = MISSES[change](spec, tmp_path)
    found = build_index(changed, tmp_path / "cache")
    assert measured == list(range(found.table.num_rows))
    assert found.table.equals(build_index(changed, None).table)


def test_what_changes_no_count_is_not(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    path = tiny.make_chat(tmp_path, 6)
    spec = spec_of(qwen25, path)
    build_index(spec, tmp_path / "cache")
    measured.clear()
    other = _file(spec, source="another name", weight=3.0)
    os.utime(path)
    found = build_index(other, tmp_path / "cache")
    assert not measured and found.weights.tolist() == [3.0] * 6


def test_the_same_file_twice_and_in_another_order(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    one, two = write(tmp_path / "one.jsonl", chat("a")), write(tmp_path / "two.jsonl", chat("b"), chat("c"))
    build_index(spec_of(qwen25, one, two), tmp_path / "cache")
    measured.clear()
    found = build_index(spec_of(qwen25, two, one, one), tmp_path / "cache")
    assert not measured
    assert found.column("file").tolist() == [0, 0, 1, 2]
    assert [o.split("/")[-1] for o in found.table["origin"].to_pylist()] == [
        "two.jsonl:1", "two.jsonl:2", "one.jsonl:1", "one.jsonl:1"
    ]  # fmt: skip
    assert [found.ref(n).file for n in range(4)] == [0, 0, 1, 2]
    assert found.ref(2) == SampleRef(1, next(iter(found.spec.open(1).scan()))) == found.row_ref(2)


def test_mended_pictures_are_seen(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    """The row says the same, its picture does not: only such rows are measured again."""
    (tmp_path / "a.png").write_bytes(rgb_png(gradient(60, 60)))
    (tmp_path / "b.png").write_bytes(b"not yet")
    rows = [chat("x", "a.png"), chat("x", "b.png"), chat("x", "c.png"), chat("text"), chat("x", "a.png", "a.png")]
    spec, cache = spec_of(qwen25, write(tmp_path / "t.jsonl", *rows)), tmp_path / "cache"
    first = build_index(spec, cache)
    assert first.table["reason"].to_pylist() == [None, "IMG_FORMAT", "IMG_MISSING", None, None]
    measured.clear()

    assert build_index(spec, cache).table.equals(first.table)
    assert measured == [1, 2], "dropped rows with pictures are looked at again"

    for name in ("b.png", "c.png"):
        (tmp_path / name).write_bytes(rgb_png(gradient(90, 120)))
    measured.clear()
    mended = build_index(spec, cache)
    assert measured == [1, 2] and mended.counts()["by_reason"] == {}
    measured.clear()
    assert build_index(spec, cache).table.equals(mended.table) and not measured

    (tmp_path / "a.png").write_bytes(rgb_png(gradient(200, 60)))
    larger = build_index(spec, cache)
    assert measured == [0, 4]
    assert larger.table.equals(build_index(spec, None).table)
    tokens = [t["tokens"].to_pylist() for t in (mended.table, larger.table)]
    assert tokens[1][0] > tokens[0][0] and tokens[1][1:4] == tokens[0][1:4]

    (tmp_path / "c.png").unlink()
    assert build_index(spec, cache).counts()["by_reason"] == {"IMG_MISSING": 1}


def test_wrong_rows_are_never_cached(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    spec = spec_of(qwen25, write(tmp_path / "t.jsonl", chat("a"), FAILING))
    for _ in range(2):
        with pytest.raises(DataError, match="NO_TARGET"):
            build_index(spec, tmp_path / "cache")
    assert measured == [0, 1, 0, 1] and not list(tmp_path.glob("cache/*"))


@pytest.mark.parametrize("damage", [b"", b"ARROW1", b"\0" * 4096, None])
def test_a_damaged_cache_is_as_none(damage: bytes | None, tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    spec, cache = spec_of(qwen25, write(tmp_path / "t.jsonl", chat("a"), chat("b"))), tmp_path / "cache"
    first = build_index(spec, cache)
    (stored,) = cache.iterdir()
    whole = stored.read_bytes()
    stored.unlink()  # `first` has it mapped
    stored.write_bytes(whole[:-100] if damage is None else damage)
    measured.clear()
    assert build_index(spec, cache).table.equals(first.table) and len(measured) == 2
    assert read_stored(stored).num_rows == 2


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, cache = spec_of(qwen25, write(tmp_path / "t.jsonl", chat("a"))), tmp_path / "cache"

    class Half:
        def __init__(self, path: str, error: BaseException):
            self.error = error
            Path(path).write_bytes(b"ARROW1 half")

        def write_table(self, *_: Any) -> None:
            raise self.error

        def close(self) -> None:
            pass

    full = OSError(28, "No space left on device")
    for error, expected in ((KeyboardInterrupt(), KeyboardInterrupt), (full, ConfigError)):
        with monkeypatch.context() as patch:
            patch.setattr(pa.ipc, "new_file", lambda path, _, error=error: Half(path, error))
            with pytest.raises(expected, match=r"\[CACHE\].*No space left" if error is full else None):
                build_index(spec, cache)
        assert not list(cache.iterdir())

    def at_end(path: str, schema: pa.Schema) -> Any:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(pa.ipc, "new_file", at_end)
        with pytest.raises(ConfigError, match=r"\[CACHE\].*No space left"):
            build_index(spec, cache)
    assert not list(cache.iterdir())
    build_index(spec, cache)
    assert len(list(cache.iterdir())) == 1


def test_a_cache_folder_that_is_a_file(tmp_path: Path, qwen25: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(ConfigError, match=r"data\.cache"):
        build_index(spec_of(qwen25, write(tmp_path / "t.jsonl", chat("a"))), tmp_path / "cache")


def test_content_is_read_once(tmp_path: Path, qwen25: Path, measured: list[int]) -> None:
    """Under size, time and inode of a file that has settled; the clock of a file written just now says nothing."""
    path, cache = write(tmp_path / "t.jsonl", chat("a"), chat("b")), tmp_path / "cache"
    spec = spec_of(qwen25, path)
    build_index(spec, cache)
    assert not list(cache.glob("content-*")), "written just now"
    os.utime(path, ns=(1, 1))
    build_index(spec, cache)
    (memo,) = cache.glob("content-*.txt")
    assert len(memo.read_text()) == 32
    measured.clear()

    path.write_bytes(path.read_bytes().replace(b"a", b"c", 1))
    os.utime(path, ns=(1, 1))
    build_index(spec, cache)
    assert not measured, "of one size and time: not read again"
    os.utime(path, ns=(2, 2))
    with pytest.raises(DataError):
        build_index(spec, cache)
    path.write_bytes(path.read_bytes().replace(b"c", b"a", 1))
    os.utime(path, ns=(1, 1))
    memo.write_text("cut")
    build_index(spec, cache)
    assert not measured[2:] and len(memo.read_text()) == 32, "a damaged memo is as none"


def test_a_part_is_renewed_in_its_place(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over several stored batches, and where rows go from one verdict to the other and back."""
    monkeypatch.setattr(index_store, "STORED_ROWS", 5)
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(rgb_png(gradient(60, 60)))
    rows = [chat(f"row {i}", f"{i % 7}.png") if i % 3 else chat(f"row {i}") for i in range(33)]
    spec, cache = spec_of(qwen25, write(tmp_path / "t.jsonl", *rows)), tmp_path / "cache"
    first = build_index(spec, cache)
    assert first.tables[0]["row"].num_chunks > 4
    for change in (lambda p: p.write_bytes(rgb_png(gradient(90, 200))), Path.unlink):
        for n in (2, 5, 6):
            change(tmp_path / f"{n}.png")
        again = build_index(spec, cache)
        assert again.table.equals(build_index(spec, None).table) and not again.table.equals(first.table)
        assert build_index(spec, cache).table.equals(again.table)


def test_a_stamp_is_of_every_file(tmp_path: Path) -> None:
    """As of the frames of a video; data that is no file has none."""
    files = [tmp_path / f"{n}.png" for n in range(2)]
    for file in files:
        file.write_bytes(b"1")
    handles = [*map(str, files), "0123456789abcdef"]
    before = index_store.stamp(handles, {})
    assert before is not None and before == index_store.stamp(handles, {})
    files[1].write_bytes(b"22")
    assert index_store.stamp(handles, {}) != before
    assert index_store.stamp(handles[2:], {}) is None


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_no_pixel_is_decoded(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures cut off behind their headers are measured as whole ones are, and nothing is decoded."""
    for name, size in (
        ("a.jpg", (300, 200)),
        ("b.png", (90, 60)),
        ("c.webp", (64, 64)),
        ("d.gif", (70, 50)),
        ("e.bmp", (60, 80)),
    ):
        PIL.Image.effect_noise(size, 60).convert("P" if name == "d.gif" else "RGB").save(tmp_path / name)
    names = sorted(p.name for p in tmp_path.iterdir())
    for decode in ("load", "verify"):
        monkeypatch.setattr(PIL.ImageFile.ImageFile, decode, lambda self: pytest.fail("a picture is decoded"))
    monkeypatch.setattr(PIL.Image, "open", lambda *_: pytest.fail("a picture is opened"))
    spec = spec_of(qwen25, write(tmp_path / "t.jsonl", *[chat("x", name) for name in names]))
    index = build_index(spec, None)
    assert index.counts()["train"] == 5
    assert index.table["sizes"].to_pylist() == [[300, 200], [90, 60], [64, 64], [70, 50], [60, 80]]
    whole = index.table.drop(["stamp"])
    for name, marker in (("a.jpg", b"\xff\xda"), ("b.png", b"IDAT"), ("e.bmp", b"BM")):  # others say how long they are
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: data.index(marker) + 60])
    cut = build_index(spec, None)
    assert cut.table.drop(["stamp"]).equals(whole), cut.table["detail"].to_pylist()


# --- processes --------------------------------------------------------------------------------------------------------


def test_processes_give_the_serial_index(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny.make_chat(tmp_path, 60)
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[7] = json.dumps(chat("long " * 600))
    lines[20] = json.dumps(chat("gone", "images/gone.png"))
    path.write_text("\n".join(lines), encoding="utf-8")
    spec = spec_of(qwen25, path)
    serial = build_index(spec, None)
    reasons = {"IMG_MISSING": 1, "TOO_LONG": 1}
    assert serial.counts() == {"read": 60, "train": 58, "dropped": 2, "by_reason": reasons, "rows": 60}
    monkeypatch.setattr(index_build, "PARALLEL_FROM", 1)
    monkeypatch.setattr(index_build, "CHUNK", 7)
    told: list[tuple[int, int]] = []
    parallel = build_index(spec, None, workers=2, progress=lambda done, total: told.append((done, total)))
    assert parallel.table.equals(serial.table)
    refs, size = list(spec.open(0).scan()), path.stat().st_size
    ends = [min(i + 7, 60) for i in range(0, 60, 7)]
    reckoned = [(n, round(n / ((refs[n - 1].offset + refs[n - 1].length) / size))) for n in ends]
    assert told == [*reckoned, (60, 60)], "the rows in all are reckoned from the bytes read"


def test_many_small_files_share_the_processes(
    tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch, measured: list[int]
) -> None:
    """Shards of a few rows each are as much to do as one large file; rows measured elsewhere are not seen here."""
    monkeypatch.setattr(index_build, "PARALLEL_FROM", 5)
    files = [write(tmp_path / f"{n}.jsonl", *[chat(f"{n} {i}") for i in range(2)]) for n in range(6)]
    spec = spec_of(qwen25, *files)
    parallel = build_index(spec, None, workers=2)
    assert measured == [0, 1, 0, 1], "after five rows, the others in processes"
    assert parallel.table.equals(build_index(spec, None).table)


def test_every_process_reads_rows_alike(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout is told by the first row of the file, not by the first row that a process happens to read."""
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [chat("x"), {**chat("y"), "conversations": turns}, {"conversations": turns}] * 3
    spec = spec_of(qwen25, write(tmp_path / "t.jsonl", *rows))
    texts = []
    for workers in (1, 2):
        monkeypatch.setattr(index_build, "PARALLEL_FROM", workers)
        monkeypatch.setattr(index_build, "CHUNK", 1)
        with pytest.raises(DataError) as caught:
            build_index(spec, None, workers=workers)
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and "3 of 9 rows are wrong" in texts[0]
    one, other = spec.build(), spec.build()
    refs = list(one.rows(0).scan())
    one.sample(0, refs[0])
    assert other.sample(0, refs[1]) == one.sample(0, refs[1])


def test_pictures_are_found_where_the_first_row_has_none(tmp_path: Path, qwen25: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(rgb_png(gradient(60, 60)))
    one = {**chat("<image>x"), "image": "a.png"}
    rows = [chat("x"), one, {**one, "images": ["a.png"]}, chat("y", "b.png")]
    for order in (rows, rows[::-1], rows[1:]):
        index = build_index(spec_of(qwen25, write(tmp_path / "t.jsonl", *order)), None)
        assert sum(index.column("images")) == 3
    rows[2] = {**one, "images": ["b.png"]}
    with pytest.raises(DataError, match=r"t\.jsonl:3: image: there are other pictures under 'images'"):
        build_index(spec_of(qwen25, write(tmp_path / "t.jsonl", *rows)), None)


def test_the_layout_comes_from_the_first_readable_row(tmp_path: Path, qwen25: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("{broken\n" + json.dumps(chat("a")) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        build_index(spec_of(qwen25, path), None)
    assert caught.value.code == "JSON" and "1 of 2 rows" in caught.value.message
    with pytest.raises(DataError) as caught:
        build_index(spec_of(qwen25, write(path, {"prompt": "x"}, {"prompt": "y"})), None)
    assert caught.value.code == "UNKNOWN_FORMAT" and caught.value.where == f"{path}:1"


def test_a_killed_process_is_one_clear_error(tmp_path: Path, qwen25: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(qwen25, write(tmp_path / "t.jsonl", *[chat("a")] * 4))
    monkeypatch.setattr(index_build, "PARALLEL_FROM", 1)
    monkeypatch.setattr(index_build, "measure", lambda *_: os._exit(9))
    with pytest.raises(RunError, match="DATA_WORKER"):
        build_index(spec, None, workers=2)


# --- counts -----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(["good", "long", "gone", "white"]), min_size=1, max_size=12))
def test_read_is_train_plus_dropped(tmp_path_factory: pytest.TempPathFactory, qwen25: Path, kinds: list[str]) -> None:
    made = {
        "good": chat("a"),
        "long": chat("word " * 600),
        "gone": chat("a", "gone.png"),
        "white": {
            "messages": [{"role": "user", "content": "x" * (1 << 20) + "x"}, {"role": "assistant", "content": "y"}]
        },
    }
    path = write(tmp_path_factory.mktemp("counts") / "t.jsonl", *(made[k] for k in kinds))
    index = build_index(spec_of(qwen25, path, max_row_bytes=1 << 22), None)
    counts = index.counts()
    assert counts["read"] == len(kinds) == counts["train"] + counts["dropped"]
    assert counts["train"] == kinds.count("good") == len(index.trainable)
    assert counts["rows"] == len(kinds)
    names = {"long": "TOO_LONG", "gone": "IMG_MISSING", "white": "TEXT_BYTES"}
    assert counts["by_reason"] == {names[k]: kinds.count(k) for k in sorted(set(kinds) - {"good"}, key=names.get)}
    ledger = pa.Table.from_batches(index.ledger(), LEDGER_SCHEMA)
    assert ledger["source"].to_pylist() == ["t"] * len(kinds)
    assert ledger["origin"].to_pylist() == [f"{path}:{i + 1}" for i in range(len(kinds))]


def test_columns_are_over_trainable_samples(tmp_path: Path, qwen25: Path) -> None:
    (tmp_path / "a.png").write_bytes(rgb_png(gradient(60, 60)))
    spec = spec_of(
        qwen25, write(tmp_path / "t.jsonl", chat("x", "gone.png"), chat("a", "a.png"), chat("b"), chat("c", "a.png"))
    )
    index = build_index(spec, None)
    assert index.trainable.tolist() == [1, 2, 3]
    assert index.column("images").tolist() == [1, 0, 1] and index.column("file").tolist() == [0, 0, 0]
    looks = index.column("look").tolist()
    assert looks[0] == looks[2] != 0 == looks[1]
    assert [index.handles(n) for n in range(3)] == [(str(tmp_path / "a.png"),), (), (str(tmp_path / "a.png"),)]
    loader = spec.build()
    for position in range(3):
        at = index.ref(position)
        encoded = loader.encode(at.file, loader.sample(at.file, at.row), at.cut)
        assert encoded.num_tokens == index.column("tokens")[position]
        assert encoded.num_supervised == index.column("supervised")[position]
        assert encoded.num_patches == index.column("patches")[position]
        assert int((encoded.kind_L == 1).sum()) == index.column("media_tokens")[position]


def test_max_samples_reads_no_further(tmp_path: Path, qwen25: Path) -> None:
    spec = spec_of(qwen25, write(tmp_path / "t.jsonl", chat("a"), chat("b"), FAILING))
    assert build_index(_file(spec, max_samples=2), None).counts()["read"] == 2
    with pytest.raises(DataError):
        build_index(_file(spec, max_samples=3), None)


def test_wrong_rows_are_reported_together(tmp_path: Path, qwen25: Path) -> None:
    one = write(tmp_path / "one.jsonl", chat("a"), *[FAILING] * 7)
    two = write(tmp_path / "two.jsonl", *[{"messages": 3}] * 7)
    two.write_text(json.dumps(chat("a")) + "\n" + two.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        build_index(spec_of(qwen25, one, two), None)
    text = caught.value.render()
    assert text.startswith("[NO_TARGET] 14 of 16 rows are wrong:") and text.endswith("... and 4 more")
    assert [f"{one}:{line}:" in text for line in range(1, 9)] == [False] + [True] * 7
    assert [f"{two}:{line}:" in text for line in range(1, 7)] == [False, True, True, True, False, False]
    assert text.count("[SCHEMA]") == 3


def test_ids_are_unique_within_a_source(tmp_path: Path, qwen25: Path) -> None:
    one = write(tmp_path / "one.jsonl", chat("a", id="x"), chat("b", id=7), chat("c"), chat("d"))
    two = write(tmp_path / "two.jsonl", chat("a", id="x"), chat("b", id="7"))
    assert build_index(spec_of(qwen25, one, two), None).counts()["read"] == 6, "two sources number independently"
    spec = spec_of(qwen25, one, two)
    merged = replace(spec, files=tuple(replace(f, source="both") for f in spec.files))
    with pytest.raises(DataError) as caught:
        build_index(merged, None)
    assert caught.value.code == "DUP_ID" and "id_column" in caught.value.remedy
    assert f"'x' stands in {one}:1, {two}:1" in caught.value.message
    assert f"'7' stands in {one}:2, {two}:2" in caught.value.message


def test_notes_are_counted_with_their_first_row(tmp_path: Path, qwen25: Path) -> None:
    path = write(tmp_path / "t.jsonl", chat("a <|im_end|>"), chat("b"), chat("<|image_pad|> c"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    index = build_index(spec_of(qwen25, path), None)
    assert index.notes() == {"bom": (1, f"{path}:1"), "special_in_text": (2, f"{path}:1")}
    assert index.table["notes"].to_pylist() == [["bom", "special_in_text"], [], ["special_in_text"]]


# --- the split --------------------------------------------------------------------------------------------------------

_handles = st.lists(st.lists(st.integers(0, 12).map(str), max_size=3), min_size=1, max_size=30)


NOWHERE: Any = SimpleNamespace(files=())
"""A spec of no files: these pictures count from no folder."""


def index_of(handles: list[list[str]], texts: list[int] | None = None) -> Index:
    digests = texts or list(range(len(handles)))
    rows = [
        {"row": i, "origin": f"t:{i}", "verdict": "train", "handles": h, "notes": [], "digest": digests[i]}
        for i, h in enumerate(handles)
    ]
    return Index((pa.Table.from_pylist(rows, schema=SCHEMA),), NOWHERE)


@settings(max_examples=200, deadline=None)
@given(_handles, st.floats(0, 1), st.integers(0, 1000))
def test_no_picture_is_on_both_sides(handles: list[list[str]], share: float, seed: int) -> None:
    index = index_of(handles)
    train, held = hold_out(index, share, seed)
    both = [{h for hs in side.table["handles"].to_pylist() for h in hs} for side in (train, held)]
    assert not both[0] & both[1]
    origins = train.table["origin"].to_pylist() + held.table["origin"].to_pylist()
    assert sorted(origins) == sorted(index.table["origin"].to_pylist())
    again = hold_out(index, share, seed)[1]
    assert again.table.equals(held.table)


@settings(max_examples=50, deadline=None)
@given(_handles, st.integers(0, 1000), st.randoms())
def test_the_split_is_by_content_not_by_order(handles: list[list[str]], seed: int, random: Any) -> None:
    """Rows that share no picture with another keep their side when the file is shuffled."""
    single = [h[:1] for h in handles]
    order = list(range(len(single)))
    random.shuffle(order)
    digests = list(range(len(single)))
    sides = []
    for numbers in (digests, order):
        held = hold_out(index_of([single[i] for i in numbers], numbers), 0.5, seed)[1]
        sides.append(set(held.table["digest"].to_pylist()))
    assert sides[0] == sides[1]


def test_the_share_is_about_right() -> None:
    index = index_of([[str(i)] for i in range(4000)])
    for share in (0.0, 0.1, 0.5):
        assert abs(len(hold_out(index, share, 3)[1].trainable) / 4000 - share) < 0.03
    one, other = (set(hold_out(index, 0.5, seed)[1].table["row"].to_pylist()) for seed in (1, 2))
    assert one != other


def test_equal_texts_without_pictures_stay_together() -> None:
    train, held = hold_out(index_of([[]] * 100, [i % 10 for i in range(100)]), 0.5, 0)
    sides = [set(side.table["digest"].to_pylist()) for side in (train, held)]
    assert not sides[0] & sides[1] and all(sides)


def test_seen_in_training(tmp_path: Path, qwen25: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(rgb_png(gradient(60, 60)))
    train = write(tmp_path / "train.jsonl", chat("x"), chat("q", "a.png"), chat("r", "b.png"))
    held = write(tmp_path / "held.jsonl", chat("x", id="other id"), chat("q", "a.png"), chat("q", "b.png"), chat("y"))
    one, two = (build_index(spec_of(qwen25, f), None) for f in (train, held))
    assert seen_in_training(one, two) == 2
    assert seen_in_training(one, one) == 3
    nothing = two.select(np.zeros(4, bool))
    assert seen_in_training(one, nothing) == 0
