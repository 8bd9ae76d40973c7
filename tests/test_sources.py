"""Sources beyond plain files: tar shards, Hugging Face datasets, remote files, streams."""

from __future__ import annotations

import functools
import io
import itertools
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lensmith.core.errors import ConfigError, DataError, UserError
from lensmith.data.readers import (
    RowFile,
    RowRef,
    Shard,
    StreamRow,
    expand,
    expand_braces,
    expand_remote,
    fetch,
    files,
    hf_rows,
    is_remote,
    mask,
    open_rows,
    open_shards,
    pin_revision,
)
from lensmith.data.readers.tar_rows import TarRows, stream_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Files = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


def read_all(rows: RowFile) -> list[dict[str, Any]]:
    return [rows.read(ref) for ref in rows.scan()]


def all_rows(shard: Shard, start: int = 0) -> list[StreamRow]:
    return list(shard.rows(start))


# --- tar --------------------------------------------------------------------------------------------------------------


def add(archive: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    archive.addfile(info, io.BytesIO(data))


def write_tar(file: Path, files: Files, form: str = "pax") -> Path:
    with tarfile.open(file, "w", format=FORMATS[form]) as archive:
        for name, data in files:
            add(archive, name, data)
    return file


LETTERS = st.sampled_from("ab0_ é")
KEYS = st.builds(
    "{}{}{}".format,
    st.sampled_from(["", "./", "d.e/", "d" * 80 + "/"]),
    st.text(LETTERS, min_size=1, max_size=3),
    st.sampled_from(["", "x" * 60]),
)
EXTENSIONS = st.dictionaries(
    st.sampled_from(["jpg", "0.png", "txt", "CLS", "b.caption", "json", "meta.JSON", "bin"]),
    st.integers(0, 700),
    min_size=1,
)


def content(extension: str, size: int) -> tuple[bytes, object]:
    """What is written, and what is read."""
    kind = extension.lower().rpartition(".")[2]
    if kind == "json":
        value = {"size": size, "text": "é" * (size // 9)}
        return json.dumps(value).encode(), value
    if kind in ("txt", "cls", "caption"):
        return ("é" * (size // 2)).encode(), "é" * (size // 2)
    return os.urandom(size), None


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(KEYS, EXTENSIONS), min_size=1, max_size=5), st.sampled_from(sorted(FORMATS)), st.randoms())
def test_tar_round_trip(folder: Path, groups: list[tuple[str, dict[str, int]]], form: str, random: Any) -> None:
    files: Files = []
    expected: list[dict[str, Any]] = []
    for key, extensions in groups:
        if not expected or expected[-1]["__key__"] != key:
            expected.append({"__key__": key})
        for extension, size in extensions.items():
            written, value = content(extension, size)
            if extension.lower() not in expected[-1]:
                files.append((f"{key}.{extension}", written))
                expected[-1][extension.lower()] = written if value is None else value
    file = write_tar(folder / "round.tar", files, form)
    rows = open_rows(file)
    refs = list(rows.scan())
    order = random.sample(range(len(refs)), len(refs))
    assert [rows.read(refs[i]) for i in order] == [expected[i] for i in order]
    assert [ref.number for ref in refs] == list(range(len(expected)))
    start = random.randrange(len(refs))
    [shard] = open_shards("round.tar", folder)
    assert [row.row for row in shard.rows(start)] == expected[start:]


def test_tar_groups_neighbours_and_passes_over_what_is_no_sample(folder: Path) -> None:
    file = folder / "mixed.tar"
    with tarfile.open(file, "w") as archive:
        add(archive, "a", kind=tarfile.DIRTYPE)
        add(archive, "a/1.jpg", b"J")
        add(archive, "a/._1.jpg", b"mac")
        add(archive, "README", b"no extension")
        add(archive, "a/1.seg.PNG", b"P")
        add(archive, "a/pipe.x", kind=tarfile.FIFOTYPE)
        add(archive, "__bin__/2.txt", b"notes")
        add(archive, "a.b/1.jpg", b"other folder")
        add(archive, "a/1.txt", b"\xef\xbb\xbfagain\n")
    rows = open_rows(file, name="mixed.tar")
    assert read_all(rows) == [
        {"__key__": "a/1", "jpg": b"J", "seg.png": b"P"},
        {"__key__": "a.b/1", "jpg": b"other folder"},
        {"__key__": "a/1", "txt": "again\n"},
    ]
    assert [rows.origin(ref) for ref in rows.scan()] == ["mixed.tar:1", "mixed.tar:2", "mixed.tar:3"]
    assert rows.content_files() == [file]


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ([("a.jpg", b"1"), ("a.JPG", b"2")], "SCHEMA", "two files of the key 'a' are called .jpg"),
        ([("a.__key__", b"")], "SCHEMA", "__key__"),
        ([("a.txt", b"x\xff")], "ENCODING", "byte 0xff at byte 2"),
        ([("a.txt", b"\0")], "UNICODE", "NUL"),
        ([("a.json", b'{"a": 1, "a": 2}')], "JSON_DUP_KEY", "one.tar:1 (.json)"),
        ([("a.json", b"NaN")], "JSON_NUMBER", "NaN"),
        ([("a\udcff.txt", b"")], "ENCODING", "not UTF-8"),
    ],
)  # fmt: skip
def test_a_wrong_tar_row_is_one_error_with_its_place(folder: Path, files: Files, code: str, said: str) -> None:
    """The row behind it is read all the same."""
    file = write_tar(folder / "one.tar", [*files, ("z.txt", b"good")], "gnu")
    rows = open_rows(file, name="one.tar")
    wrong, good = rows.scan()
    with pytest.raises(DataError) as caught:
        rows.read(wrong)
    assert caught.value.code == code
    assert caught.value.where.startswith("one.tar:1")
    assert said in str(caught.value)
    assert rows.read(good) == {"__key__": "z", "txt": "good"}
    [shard] = open_shards("one.tar", folder)
    first, second = shard.rows()
    assert (first.row, first.error and str(first.error)) == (None, str(caught.value))
    assert (second.number, second.origin, second.row) == (1, "one.tar:2", rows.read(good))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_is_never_followed(folder: Path, kind: bytes) -> None:
    file = folder / "link.tar"
    with tarfile.open(file, "w") as archive:
        add(archive, "a.txt", b"text")
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"\[TAR\].*'a.jpg' is a link") as caught:
        read_all(open_rows(file))
    assert "--dereference" in caught.value.remedy


def test_a_tar_row_has_a_limit(folder: Path) -> None:
    file = write_tar(folder / "large.tar", [("a.bin", bytes(5000)), ("b.bin", bytes(10)), ("b.txt", b"t")])
    rows = open_rows(file, name="large.tar", max_row_bytes=2048)
    large, small = rows.scan()
    assert (large.length, small.offset, small.length) == (512 + 5120, 512 + 5120, 2048)
    with pytest.raises(DataError, match=r"\[ROW_BYTES\] large.tar:1"):
        rows.read(large)
    assert rows.read(small)["txt"] == "t"
    [shard] = open_shards("large.tar", folder, max_row_bytes=2048)
    assert [(row.error and row.error.code) for row in shard.rows()] == ["ROW_BYTES", None]


def small_tar(form: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[form]) as archive:
        for key in ("a", "folder-" * 12 + "/é" * 30):
            add(archive, f"{key}.txt", b"text")
            add(archive, f"{key}.jpg", b"\xff" * 600)
    return file.getvalue()


def rows_until_error(rows: Iterator[Any]) -> tuple[list[Any], str]:
    found: list[Any] = []
    try:
        for row in rows:
            found.append(row)
    except DataError as error:
        return found, error.code
    return found, ""


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_truncated_tar_gives_its_rows_or_a_data_error(folder: Path, form: str) -> None:
    data = small_tar(form)
    file = folder / "cut.tar"
    file.write_bytes(data)
    rows = TarRows(file, "cut.tar", 1 << 20)
    expected, end = read_all(rows), list(rows.scan())[-1]
    for cut in range(0, len(data), 64):
        with file.open("r+b") as opened:
            opened.write(data)
            opened.truncate(cut)
        complete = cut >= end.offset + end.length + 512  # an end mark is there
        for found, code in (
            rows_until_error(map(rows.read, rows.scan())),
            rows_until_error(row.row for row in stream_tar(io.BytesIO(data[:cut]), "cut.tar", 0, 1 << 20)),
        ):
            assert found == expected[: len(found)]
            assert code == ("" if complete else "TAR")
            assert not complete or len(found) == 2
        rows.close()


DAMAGE = st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 20), DAMAGE, st.booleans())
def test_a_damaged_tar_raises_only_data_errors(
    folder: Path, form: str, block: int, damage: list[tuple[int, int]], mend: bool
) -> None:
    data = bytearray(small_tar(form))
    header = memoryview(data)[block * 512 % len(data) :][:512]
    for at, value in damage:
        header[at] = value
    if mend:  # else nearly every damage stops at the checksum
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    file = folder / "damaged.tar"
    file.write_bytes(data)
    rows = TarRows(file, "damaged.tar", 1 << 20)
    try:
        for ref in rows.scan():
            rows_until_error(iter([rows.read(ref)]) if ref else iter([]))
    except DataError as error:
        assert error.where.startswith("damaged.tar")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a tar archive"),
        (b"\x1f\x8b" + bytes(2000), "a shard is not compressed"),
        (small_tar("gnu") + small_tar("gnu"), "`cat` does not join archives"),
    ],
)
def test_what_is_no_whole_archive_is_refused(folder: Path, data: bytes, said: str) -> None:
    file = folder / "no.tar"
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"\[TAR\] no.tar") as caught:
        list(open_rows(file, name="no.tar").scan())
    assert said in str(caught.value)


def test_an_archive_without_samples_and_a_compressed_one(folder: Path) -> None:
    with pytest.raises(DataError, match=r"\[NO_ROWS\].*key.extension"):
        list(open_rows(write_tar(folder / "none.tar", [("README", b"")])).scan())
    for name in ("shard.tar.gz", "shard.TGZ"):
        with pytest.raises(ConfigError, match=r"\[FILE_TYPE\].*\n.*unpack it to a .tar"):
            open_rows(folder / name)


def test_a_file_that_changed_since_the_scan_is_noticed(folder: Path) -> None:
    file = write_tar(folder / "changed.tar", [("a.txt", b"a"), ("b.txt", b"b")])
    rows = open_rows(file)
    [first, _] = rows.scan()
    with pytest.raises(DataError, match=r"\[TAR\].*than when the file was indexed"):
        rows.read(RowRef(0, 1, first.offset, 2 * first.length))
    with pytest.raises(DataError, match=r"\[TAR\]"):
        rows.read(RowRef(1, 2, 512, 1024))


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


PICTURE = {"bytes": b"\x89PNG is not decoded", "path": "a.png"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `Dataset` with pictures at three depths and JSON text, and a `DatasetDict`, both from `save_to_disk`."""
    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    image = datasets.Image()
    features = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "image": image,
            "images": datasets.List(image),
            "turns": datasets.List({"picture": image}),
            "extra": datasets.Json(),
        }
    )
    row = {"image": PICTURE, "images": [PICTURE, PICTURE], "turns": [{"picture": PICTURE}], "extra": {"a": [1, "é"]}}
    data = datasets.Dataset.from_list([{"id": i, **row} for i in range(7)], features=features)
    data.save_to_disk(folder / "single", num_shards=2)
    text = datasets.Dataset.from_dict({"id": [1, 2, 3]})
    datasets.DatasetDict({"train": text, "validation": text.select([1])}).save_to_disk(folder / "dict")
    return folder


def test_a_saved_dataset_gives_bytes_at_any_depth(saved: Path) -> None:
    assert expand("single", saved) == [saved / "single"]
    rows = open_rows(saved / "single", name="single")
    refs = list(rows.scan())
    assert refs[3] == RowRef(3, 4, -1, -1)
    assert rows.origin(refs[3]) == "single:4"
    copy: RowFile = pickle.loads(pickle.dumps(rows))  # noqa: S301
    expected = {"image": PICTURE, "images": [PICTURE] * 2, "turns": [{"picture": PICTURE}], "extra": {"a": [1, "é"]}}
    for i in (6, 0, 3):
        assert copy.read(refs[i]) == {"id": i, **expected}
    names = [file.name for file in rows.content_files()]
    assert names == ["dataset_info.json", "state.json", "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    assert all(file.is_file() for file in rows.content_files())
    with pytest.raises(DataError, match=r"\[ROW_BYTES\] single:1"):
        open_rows(saved / "single", name="single", max_row_bytes=40).read(refs[0])


def test_a_split_is_chosen_or_refused_with_the_choices(saved: Path) -> None:
    rows = open_rows(saved / "dict", name="dict", split="validation")
    assert read_all(rows) == [{"id": 2}]
    assert [rows.origin(ref) for ref in rows.scan()] == ["dict[validation]:1"]
    with pytest.raises(ConfigError, match=r"\[SPLIT\] dict\[test\]: there is no split 'test', only train, validation"):
        list(open_rows(saved / "dict", name="dict", split="test").scan())


def test_a_damaged_dataset_is_one_error(saved: Path, tmp_path: Path) -> None:
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=r"\[DATASET\] data: JSONDecodeError"):
        list(open_rows(tmp_path, name="data").scan())


def test_strict_json_holds_inside_of_datasets(tmp_path: Path) -> None:
    features = datasets.Features({"extra": datasets.Json()})
    table = pa.table({"extra": pa.array(['{"a": 1, "a": 2}', None], pa.string())})
    datasets.Dataset(table.cast(features.arrow_schema)).save_to_disk(tmp_path / "json")
    rows = open_rows(tmp_path / "json", name="json")
    with pytest.raises(DataError, match=r"\[JSON_DUP_KEY\] json:1"):
        rows.read(RowRef(0, 1, -1, -1))
    assert rows.read(RowRef(1, 2, -1, -1)) == {"extra": None}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """`load_dataset` of 10 rows in 3 shards; what it was asked for."""
    asked: list[tuple[Any, ...]] = []
    image = datasets.Features({"id": datasets.Value("int64"), "image": datasets.Image()})

    def load(path: str, subset: str | None, *, split: str, revision: str | None, streaming: bool) -> Any:
        asked.append((path, subset, split, revision))
        if split == "absent":
            raise ValueError("Unknown split \"absent\". Should be one of ['train'].")
        if path.endswith("gone"):
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'org/gone' doesn't exist")
        data = datasets.Dataset.from_list([{"id": i, "image": PICTURE} for i in range(10)], features=image)
        return data.to_iterable_dataset(num_shards=3) if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    hf_rows.hub_stream.cache_clear()
    yield asked
    hf_rows.hub_stream.cache_clear()


def test_a_hub_dataset_is_asked_for_by_its_options(hub: list[tuple[Any, ...]]) -> None:
    rows = open_rows("hf://org/name", subset="chat", split="train[:10]", revision="abc")
    refs = list(rows.scan())
    assert rows.read(refs[9]) == {"id": 9, "image": PICTURE}
    assert rows.origin(refs[9]) == "hf://org/name/chat[train[:10]]:10"
    assert hub == [("hf://datasets/org/name", "chat", "train[:10]", "abc")]
    with pytest.raises(ConfigError, match=r"\[SPLIT\].*Should be one of \['train'\]"):
        list(open_rows("hf://org/name", split="absent").scan())
    with pytest.raises(DataError, match=r"\[DATASET\].*DatasetNotFoundError"):
        list(open_rows("hf://org/gone").scan())
    with pytest.raises(ConfigError, match=r"\[DATASET_NAME\]"):
        list(open_rows("hf://org/name@main/x").scan())
    assert pin_revision("hf://org/name", "main") == "main"  # offline


def test_shards_of_a_hub_dataset(hub: list[tuple[Any, ...]], tmp_path: Path) -> None:
    shards = open_shards("hf://org/name", tmp_path)
    assert [shard.name for shard in shards][1:] == [f"hf://org/name[train]-0000{i}-of-00003" for i in (1, 2)]
    rows = [all_rows(shard) for shard in shards]
    assert [len(r) for r in rows] == [4, 3, 3]
    assert [row.row for r in rows for row in r] == [{"id": i, "image": PICTURE} for i in range(10)]
    copy: Shard = pickle.loads(pickle.dumps(shards[1]))  # noqa: S301
    assert all_rows(copy, 2) == rows[1][2:]
    assert rows[1][2].origin == "hf://org/name[train]-00001-of-00003:3"
    assert all_rows(copy, 3) == []
    assert len(hub) == 1
    [small, *_] = open_shards("hf://org/name", tmp_path, max_row_bytes=20)
    assert {row.error and row.error.code for row in small.rows()} == {"ROW_BYTES"}


def test_without_the_extra_the_error_says_how_to_get_it(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'\[EXTRA\].*\n.*pip install "lensmith\[datasets\]"'):
        list(open_rows(saved / "single").scan())


# --- processes --------------------------------------------------------------------------------------------------------


def _read_in_child(rows: RowFile, refs: list[RowRef]) -> bool:
    return all([rows.read(ref)["id"] for ref in refs] == list(range(len(refs))) for _ in range(3))


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["tar", "dataset"])
def test_forked_processes_do_not_disturb_each_other(folder: Path, saved: Path, kind: str) -> None:
    files = [(f"{i:03}.{e}", d) for i in range(40) for e, d in (("id.json", b"%d" % i), ("bin", bytes(i * 50)))]
    if kind == "tar":
        reader: Any = TarRows(write_tar(folder / "fork.tar", files), "fork.tar", 1 << 20)
        read = reader.read
        reader.read = lambda ref: {"id": read(ref)["id.json"]}
    else:
        reader = open_rows(saved / "single")
    refs = list(reader.scan())
    reader.read(refs[0])  # opened before the fork
    context = multiprocessing.get_context("fork")
    queue: Any = context.SimpleQueue()
    children = [context.Process(target=lambda: queue.put(_read_in_child(reader, refs))) for _ in range(2)]
    for child in children:
        child.start()
    assert _read_in_child(reader, refs)
    assert [queue.get() for _ in children] == [True, True]
    for child in children:
        child.join()


# --- remote files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has seen enough hangs up."""


class _Quiet(SimpleHTTPRequestHandler):
    """Answers range requests only below /ranges."""

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        if wanted is None or not self.path.startswith("/ranges/"):
            super().do_GET()
            return
        data = Path(self.translate_path(self.path)).read_bytes()
        start, end = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(len(data[start : end + 1])))
        self.end_headers()
        self.wfile.write(data[start : end + 1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server and its folder."""
    root = tmp_path / "www"
    (root / "ranges").mkdir(parents=True)
    with _Server(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(root))) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", root
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "remote"),
    [
        ("s3://bucket/a.jsonl", True),
        ("HTTPS://host/a.jsonl", True),
        ("memory://a", True),
        ("hf://org/name", False),
        ("file:///a", False),
        ("what://a", False),
        ("folder/a.jsonl", False),
        ("c:/a", False),
    ],
)
def test_is_remote(path: str, remote: bool) -> None:
    assert is_remote(path) is remote


def test_keys_are_masked() -> None:
    assert mask("https://me:pa@ss@host/a.jsonl?sig=x&b=y") == "https://***@host/a.jsonl?***"
    assert mask("s3://bucket/a@b?.jsonl\n") == "s3://bucket/a@b?.jsonl\\n"


def test_remote_paths_expand(memory: Any, server: tuple[str, Path]) -> None:
    for name in ("d/b.jsonl", "d/a.tar", "d/.hidden.tar", "d/notes.txt", "d/sub/c.tar"):
        memory.pipe(f"/{name}", b"x")
    assert expand_remote("memory://d") == ["memory:///d/a.tar", "memory:///d/b.jsonl"]
    assert expand_remote("memory://d/*.tar") == ["memory:///d/a.tar"]
    assert expand_remote("memory://d/**/*.tar") == ["memory:///d/a.tar", "memory:///d/sub/c.tar"]
    assert expand_remote("s3://b/s-{08..10}.tar") == ["s3://b/s-08.tar", "s3://b/s-09.tar", "s3://b/s-10.tar"]
    with pytest.raises(ConfigError, match=r"\[NO_FILES\]"):
        expand_remote("memory://d/*.parquet")
    with pytest.raises(DataError, match=r"\[REMOTE\].*FileNotFound"):
        expand_remote("memory://none")
    with pytest.raises(DataError, match="chain of file systems"):
        expand_remote("simplecache::memory://d")
    url, root = server
    (root / "x.jsonl").touch()
    assert expand_remote(f"{url}/*.jsonl") == expand_remote(f"{url}/") == [f"{url}/x.jsonl"]


def test_a_remote_file_is_fetched_once_and_again_when_it_changed(memory: Any, tmp_path: Path) -> None:
    url, seen = "memory://data/Train set.v1.JSONL", []
    memory.pipe("/data/Train set.v1.JSONL", b'{"a": 1}\n')
    first = fetch(url, tmp_path, lambda done, total: seen.append((done, total)))
    assert first.parent == tmp_path / "remote"
    assert first.name.startswith("Train_set.v1-")
    assert first.suffix == ".jsonl"
    assert seen[-1] == (9, 9)
    assert read_all(open_rows(first)) == [{"a": 1}]
    before = first.stat().st_mtime_ns
    assert fetch(url, tmp_path) == first
    assert first.stat().st_mtime_ns == before
    memory.pipe("/data/Train set.v1.JSONL", b'{"a": 2}\n')
    second = fetch(url, tmp_path)
    assert second != first
    assert read_all(open_rows(second)) == [{"a": 2}]
    assert sorted(p.name for p in first.parent.iterdir()) == sorted([first.name, second.name])  # no temporary file


def test_a_file_from_a_web_server(server: tuple[str, Path], tmp_path: Path) -> None:
    url, root = server
    (root / "a.jsonl").write_text('{"a": 1}\n')
    first = fetch(f"{url}/a.jsonl", tmp_path)
    assert fetch(f"{url}/a.jsonl", tmp_path) == first
    os.utime(root / "a.jsonl", (1, 1))  # Last-Modified
    assert fetch(f"{url}/a.jsonl", tmp_path) != first
    with pytest.raises(DataError, match=r"\[REMOTE\] http://\*\*\*@127.*404.*File not found") as caught:
        fetch(f"{url.replace('//', '//me:secret@')}/gone.jsonl?token=secret", tmp_path)
    assert "secret" not in str(caught.value)


def test_several_processes_may_fetch_at_once(server: tuple[str, Path], tmp_path: Path) -> None:
    url, root = server
    (root / "a.bin.tar").write_bytes(os.urandom(3 << 20))
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(f"{url}/a.bin.tar", tmp_path))) for _ in range(4)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert found[0].read_bytes() == (root / "a.bin.tar").read_bytes()


def test_failures_of_fetching(memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/a.jsonl", b"12345")
    with pytest.raises(DataError, match=r'\[REMOTE\] s3://b/a.jsonl.*\n.*"lensmith\[s3\]"'):
        monkeypatch.setitem(sys.modules, "s3fs", None)
        fetch("s3://b/a.jsonl", tmp_path)
    blocked = tmp_path / "blocked"
    blocked.touch()
    with pytest.raises(ConfigError, match=r"\[CACHE\]"):
        fetch("memory://a.jsonl", blocked)
    monkeypatch.setattr(type(memory), "get_file", lambda self, path, to, callback: Path(to).write_bytes(b"123"))
    with pytest.raises(DataError, match=r"\[REMOTE\].*3 of 5 bytes came"):
        fetch("memory://a.jsonl", tmp_path)
    assert list((tmp_path / "remote").iterdir()) == []


# --- streams ----------------------------------------------------------------------------------------------------------


def write_source(folder: Path, kind: str) -> str:
    """Seven rows with an `id`."""
    rows = [{"id": i, "text": "é" * i} for i in range(7)]
    name = f"source.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / name, row_group_size=3)
    elif kind == "json":
        (folder / name).write_text(json.dumps(rows))
    elif kind == "tar":
        write_tar(folder / name, [(f"{r['id']}.json", json.dumps(r).encode()) for r in rows])
    else:
        (folder / name).write_bytes(b"\xef\xbb\xbf\n" + b"\n\n".join(json.dumps(r).encode() for r in rows))
    return name


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "tar"])
def test_a_stream_gives_what_random_access_gives(folder: Path, kind: str) -> None:
    rows = open_rows(folder / write_source(folder, kind), name=f"source.{kind}")
    expected = [(ref.number, rows.origin(ref), rows.read(ref)) for ref in rows.scan()]
    assert len(expected) == 7
    [shard] = open_shards(f"source.{kind}", folder)
    shard = pickle.loads(pickle.dumps(shard))  # noqa: S301
    for start in (0, 1, 4, 6, 7, 100):
        assert [(row.number, row.origin, row.row) for row in shard.rows(start)] == expected[start:]
    next(iter(shard.rows()))  # left in the middle: nothing stays open


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        *itertools.product(["jsonl", "parquet", "tar"], ["memory://", "{}/ranges"]),
        *itertools.product(["jsonl", "tar"], ["{}"]),
    ],
)
def test_a_remote_stream_is_read_in_place(
    folder: Path, kind: str, place: str, memory: Any, server: tuple[str, Path]
) -> None:
    data = (folder / write_source(folder, kind)).read_bytes()
    [local] = open_shards(f"source.{kind}", folder)
    memory.pipe(f"/m.{kind}", data)
    for www in (server[1], server[1] / "ranges"):
        (www / f"m.{kind}").write_bytes(data)
    url = f"{place.format(server[0])}/m.{kind}"
    [shard] = open_shards(url, folder)
    for start in (0, 4):
        found = [(row.number, row.origin.removeprefix(url), row.row) for row in shard.rows(start)]
        assert found == [(r.number, r.origin.removeprefix(local.name), r.row) for r in local.rows(start)]


def test_a_large_file_of_a_server_without_ranges(server: tuple[str, Path], folder: Path) -> None:
    url, root = server
    write_tar(root / "large.tar", [("a.bin", bytes(6 << 20)), ("b.txt", b"b"), ("c.txt", b"c")])
    pq.write_table(pa.table({"noise": [os.urandom(6 << 20)]}), root / "large.parquet")
    [shard] = open_shards(f"{url}/large.tar", folder)
    assert [row.row for row in shard.rows(1)] == [{"__key__": "b", "txt": "b"}, {"__key__": "c", "txt": "c"}]
    [shard] = open_shards(f"{url}/large.parquet", folder)
    with pytest.raises(DataError, match=r"\[REMOTE\].*front to back only"):
        all_rows(shard)


def test_a_wrong_line_is_said_and_the_next_is_read(folder: Path) -> None:
    (folder / "wrong.jsonl").write_bytes(b'{"a": 1}\n{"a": \n[1]\n' + b"x" * 3000000 + b'\n{"a": 2}')
    [shard] = open_shards("wrong.jsonl", folder, max_row_bytes=1000)
    rows = all_rows(shard)
    assert [row.error.code if row.error else row.row for row in rows] == [
        {"a": 1},
        "JSON",
        "SCHEMA",
        "ROW_BYTES",
        {"a": 2},
    ]
    assert [row.origin for row in rows] == [f"wrong.jsonl:{i}" for i in range(1, 6)]
    assert all_rows(shard, 4) == rows[4:]


def test_a_row_behind_a_byte_order_mark_may_have_the_limit(folder: Path) -> None:
    (folder / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    [shard] = open_shards("bom.jsonl", folder, max_row_bytes=8)
    assert [row.row for row in shard.rows()] == [{"a": 1}]


def test_what_a_stream_cannot_read(folder: Path, memory: Any) -> None:
    memory.pipe("/array.json", b' \n[{"a": 1}]')
    memory.pipe("/cut.parquet", b"PAR1 and no more")
    memory.pipe("/empty.jsonl", b"\n")
    for name, code in (
        ("array.json", "FILE_TYPE"),
        ("cut.parquet", "PARQUET"),
        ("empty.jsonl", "NO_ROWS"),
        ("gone.tar", "REMOTE"),
    ):
        [shard] = open_shards(f"memory:///{name}", folder)
        with pytest.raises(UserError) as caught:
            all_rows(shard)
        assert caught.value.code == code
        assert name in caught.value.where


def test_a_connection_that_breaks_is_a_remote_error(memory: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("jsonl", "parquet", "tar"):
        memory.pipe(f"/m.{kind}", (folder / write_source(folder, kind)).read_bytes())

    def broken(self: Any, size: int = -1) -> bytes:
        raise RuntimeError("the other side is gone")

    monkeypatch.setattr(fsspec.implementations.memory.MemoryFile, "read", broken)
    for kind in ("jsonl", "parquet", "tar"):
        [shard] = open_shards(f"memory:///m.{kind}", folder)
        with pytest.raises(DataError, match=r"\[REMOTE\].*the other side is gone"):
            all_rows(shard)


def test_a_saved_dataset_is_one_shard(saved: Path) -> None:
    [shard] = open_shards("dict", saved, split="train")
    assert [(row.origin, row.row) for row in shard.rows(1)] == [
        ("dict[train]:2", {"id": 2}),
        ("dict[train]:3", {"id": 3}),
    ]


# --- which files ------------------------------------------------------------------------------------------------------


def test_braces_stand_for_names(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expand_braces("s-{008..010}.{tar,json}") == [
        f"s-0{n}.{e}" for n in ("08", "09", "10") for e in ("tar", "json")
    ]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    assert expand_braces("a{b}{}{x..y}") == ["a{b}{}{x..y}"]
    monkeypatch.setattr(files, "MAX_FILES", 1000)
    for large in ("{0..1000}", "{0..99}{0..9}{0..1}", "{0..99999999999999999}"):
        with pytest.raises(ConfigError, match=r"\[FILE_PATTERN\].*more than 1,000"):
            expand_braces(large)


def test_expand_finds_shards(tmp_path: Path) -> None:
    for name in ("s-00.tar", "s-01.tar", "s-02.tar", "odd{0,1}.tar"):
        (tmp_path / name).touch()

    def names(path: str) -> list[str]:
        return [p.name for p in expand(path, tmp_path)]

    assert names("s-{00..01}.tar") == ["s-00.tar", "s-01.tar"]
    assert names("*.tar") == names(".") == ["odd{0,1}.tar", "s-00.tar", "s-01.tar", "s-02.tar"]
    assert names("odd{0,1}.tar") == ["odd{0,1}.tar"]  # a file before a pattern
    assert names("s-{00..01}*") == ["s-00.tar", "s-01.tar"]
    with pytest.raises(ConfigError, match=r"\[NO_FILES\].*'s-03.tar'"):
        names("s-{00..03}.tar")


def test_a_range_that_counts_down_names_nothing() -> None:
    with pytest.raises(ConfigError, match=r"FILE_PATTERN[^$]*-> write \{1\.\.3\}"):
        expand_braces("b-{3..1}.jsonl")
