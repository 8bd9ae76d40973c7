"""Reading rows: strict JSON, line numbers, random access, arrays by streaming, Parquet, memory."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.core.errors import ConfigError, DataError
from lensmith.data.readers import RowFile, RowRef, expand, json_rows, open_rows
from lensmith.data.strict_json import parse_json

CHARACTERS = st.characters(blacklist_categories=("Cs",), blacklist_characters="\0")
TRICKY = st.text(st.one_of(st.sampled_from('[]{}",\\\n\u2028é😀'), CHARACTERS), max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TRICKY,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TRICKY, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TRICKY, VALUES, max_size=3), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def read_all(rows: RowFile) -> list[dict[str, Any]]:
    return [rows.read(ref) for ref in rows.scan()]


# --- strict JSON ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{}",:\\u0d8 1eEN.-'), max_size=40).map(str.encode))
def test_parse_json_raises_only_data_errors(data: bytes) -> None:
    try:
        value = parse_json(data, "here:1")
    except DataError as error:
        assert error.where.startswith("here:1")
    else:
        assert value == json.loads(data)


@settings(deadline=None)
@given(VALUES, st.booleans())
def test_parse_json_agrees_with_json(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode(), "here:1") == value


@pytest.mark.parametrize("opening", ["[", '{"a":', '["]]", ', '{"\\\\": "\\"}}", "b": '])
@pytest.mark.parametrize("levels", [63, 64, 65, 100_000])
def test_depth_is_counted_outside_of_strings(opening: str, levels: int) -> None:
    with pytest.raises(DataError) as caught:
        parse_json((opening * levels).encode(), "here:1")
    assert caught.value.code == ("JSON_DEPTH" if levels > 64 else "JSON")


def test_depth_limit_is_64() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, "here:1")
    with pytest.raises(DataError, match="JSON_DEPTH"):
        parse_json(b"[" * 65 + b"]" * 65, "here:1")


@pytest.mark.parametrize("piece", [b'"', b'\\"', b"\\", b"[]", b"1", b"\\u0000", b" "])
def test_hostile_repetition_takes_linear_time(piece: bytes) -> None:
    with pytest.raises(DataError):
        parse_json(b'{"a":"' + piece * (1_000_000 // len(piece)), "here:1")


# --- lines ------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(ROWS, min_size=2, max_size=3), st.sampled_from(["\n", "\r\n", "\n\n", "\n \t\n"]))
def test_concatenated_files_give_concatenated_rows(folder: Path, parts: list[list[dict]], line_end: str) -> None:
    texts = ["".join(json.dumps(row, ensure_ascii=False) + line_end for row in rows) for rows in parts]
    file = folder / "lines.jsonl"
    file.write_bytes("".join(texts).encode())
    assert read_all(open_rows(file)) == list(itertools.chain(*parts))


def test_lines_are_counted_from_1_with_blank_ones(folder: Path) -> None:
    file = folder / "blank.jsonl"
    file.write_bytes('\n{"a": 1}\r\n\n\n{"a": "x\u2028y"}\n{"a": 3}'.encode())
    rows = open_rows(file, name="blank.jsonl")
    refs = list(rows.scan())
    assert [rows.origin(ref) for ref in refs] == ["blank.jsonl:2", "blank.jsonl:5", "blank.jsonl:6"]
    assert refs[0] == RowRef(0, 2, 1, 8)
    assert [ref.number for ref in refs] == [0, 1, 2]


def test_origin_is_the_path_as_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    Path("train.jsonl").write_text('{"a": 1}\n')
    rows = open_rows(Path("train.jsonl"))
    assert [rows.origin(ref) for ref in rows.scan()] == ["train.jsonl:1"]


@pytest.mark.parametrize(("before", "after", "size"), [(b"", b"\n", 101), (b"[", b"]", 100)])
def test_a_row_may_have_exactly_the_limit(folder: Path, before: bytes, after: bytes, size: int) -> None:
    """A line counts with its line feed."""
    file = folder / "limit.jsonl"
    file.write_bytes(before + b'{"a": "' + b"x" * 91 + b'"}' + after)
    assert len(read_all(open_rows(file, max_row_bytes=size))) == 1
    with pytest.raises(DataError, match="ROW_BYTES"):
        list(open_rows(file, max_row_bytes=size - 1).scan())


@pytest.mark.parametrize("start", [b'{"a": "', b'[{"a": "'])
def test_a_200_mb_row_is_refused_in_bounded_memory(folder: Path, start: bytes) -> None:
    file = folder / "long.json"
    file.write_bytes(start)
    with file.open("r+b") as opened:
        opened.truncate(200_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match="ROW_BYTES"):
        list(open_rows(file, max_row_bytes=8 << 20).scan())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20  # twice the row limit and some


# --- arrays -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ROWS, st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 40))
def test_array_scanner_equals_json_load(
    folder: Path, rows: list, indent: int | None, ascii_only: bool, chunk: int
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
    file = folder / "array.json"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_BYTES", chunk)
        array = open_rows(file)
        refs = list(array.scan())
    assert [array.read(ref) for ref in refs] == rows
    data = text.encode()
    for ref in refs:
        assert data[ref.offset : ref.offset + 1] == b"{"
        assert ref.line == 1 + data.count(b"\n", 0, ref.offset)


@settings(deadline=None)
@given(
    st.binary(max_size=40) | st.text(st.sampled_from('[]{}",:\\ \n1'), max_size=40).map(str.encode), st.integers(1, 9)
)
def test_any_array_file_is_read_as_json_load_does_or_refused(folder: Path, tail: bytes, chunk: int) -> None:
    file = folder / "any.json"
    file.write_bytes(b"[" + tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "CHUNK_BYTES", chunk)
        try:
            rows = read_all(open_rows(file))
        except DataError:
            return
    assert rows == json.loads(b"[" + tail)


# --- access -----------------------------------------------------------------------------------------------------------


def write_rows(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows-{kind}.{kind.partition('-')[0]}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=7)
    elif kind == "json":
        file.write_text(json.dumps(rows, indent=1))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_random_access_equals_sequential(folder: Path, kind: str) -> None:
    expected = [{"id": i, "text": f"row {i} é"} for i in range(30)]
    rows = open_rows(write_rows(folder, kind, expected))
    refs = list(rows.scan())
    assert [rows.read(ref) for ref in refs] == expected
    copy: RowFile = pickle.loads(pickle.dumps(rows))  # noqa: S301
    order = sorted(range(30), key=lambda i: (i * 17) % 30)
    assert [copy.read(refs[i]) for i in order] == [expected[i] for i in order]
    copy.close()
    assert copy.read(refs[3]) == expected[3]


def _read_in_child(rows: RowFile, refs: list[RowRef], times: int) -> bool:
    return all([rows.read(ref)["id"] for ref in refs] == list(range(len(refs))) for _ in range(times))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_forked_processes_do_not_disturb_each_other(folder: Path, kind: str) -> None:
    rows = open_rows(write_rows(folder, kind, [{"id": i, "text": "x" * (i * 7 % 90)} for i in range(60)]))
    refs = list(rows.scan())
    rows.read(refs[0])  # opened before the fork
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    children = [context.Process(target=lambda: queue.put(_read_in_child(rows, refs, 5))) for _ in range(2)]
    for child in children:
        child.start()
    assert _read_in_child(rows, refs, 5)
    assert [queue.get() for _ in children] == [True, True]
    for child in children:
        child.join()


def test_parquet_keeps_bytes_and_image_structs(folder: Path) -> None:
    row = {"images": [{"bytes": b"\x89PNG\xff", "path": None}], "raw": b"\0\1", "score": math.pi, "none": None}
    file = folder / "images.parquet"
    pq.write_table(pa.Table.from_pylist([row, row]), file)
    rows = open_rows(file, name="images.parquet")
    assert read_all(rows) == [row, row]
    assert [rows.origin(ref) for ref in rows.scan()] == ["images.parquet:1", "images.parquet:2"]
    with pytest.raises(DataError, match="ROW_BYTES"):
        open_rows(file, max_row_bytes=10).read(RowRef(0, 1, -1, -1))


def test_a_damaged_parquet_row_group_is_named(folder: Path) -> None:
    file = folder / "damaged.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" * 50 for i in range(500)]}), file)
    data = bytearray(file.read_bytes())
    data[4:400] = b"\xff" * 396
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"\[PARQUET\].*row group 0"):
        read_all(open_rows(file))


# --- which files ------------------------------------------------------------------------------------------------------


def test_expand_finds_files_folders_and_globs(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.PARQUET", "c[1].json", "notes.txt", ".hidden.json", "sub/d.ndjson"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()

    def names(path: str) -> list[str]:
        return [str(p.relative_to(tmp_path)) for p in expand(path, tmp_path)]

    assert names("b.jsonl") == ["b.jsonl"]
    assert names("c[1].json") == ["c[1].json"]  # a file before a glob
    assert names(".") == names(str(tmp_path)) == ["a.PARQUET", "b.jsonl", "c[1].json"]
    assert names("*.j*") == ["b.jsonl", "c[1].json"]
    assert names("**/*.ndjson") == ["sub/d.ndjson"]
    for missing in ("none.jsonl", "*.arrow"):
        with pytest.raises(ConfigError, match=r"\[NO_FILES\]") as caught:
            names(missing)
        assert missing in str(caught.value)
    with pytest.raises(ConfigError, match=r"\[FILE_TYPE\]"):
        open_rows(tmp_path / "notes.md")


def test_small_tables_are_read_where_they_are_named(tmp_path: Path) -> None:
    """Every value of a .csv is text, an empty one null; quotes and line feeds as in RFC 4180."""
    (tmp_path / "a.csv").write_text('instruction,input,output\n"a, ""b""\nc",,007\n1e5,true,x\n')
    (tmp_path / "a.tsv").write_text("text\tn\none, two\t3\n")
    (tmp_path / "a.txt").write_text("first\nsecond line\n")
    wanted = {
        "a.csv": [{"instruction": 'a, "b"\nc', "input": None, "output": "007"},
                  {"instruction": "1e5", "input": "true", "output": "x"}],
        "a.tsv": [{"text": "one, two", "n": "3"}],
        "a.txt": [{"text": "first"}, {"text": "second line"}],
    }  # fmt: skip
    for name, rows in wanted.items():
        reader = open_rows(tmp_path / name, name=name)
        refs = list(reader.scan())
        assert [reader.read(ref) for ref in refs] == rows
        assert [reader.origin(ref) for ref in refs] == [f"{name}:{n + 1}" for n in range(len(rows))]
    for text in ("a,a\n1,2\n", "a,b\n1\n", ""):
        (tmp_path / "b.csv").write_text(text)
        with pytest.raises(DataError, match=r"\[(TABLE|NO_ROWS)\]"):
            list(open_rows(tmp_path / "b.csv", name="b.csv").scan())
    (tmp_path / "b.arrow").write_bytes(b"ARROW1 no more")
    with pytest.raises(DataError, match=r"\[TABLE\]"):
        list(open_rows(tmp_path / "b.arrow", name="b.arrow").scan())
