"""Rows of WebDataset shards (`.tar`): neighbouring files with one key are a row. Nothing is ever extracted.

`a/0001.jpg` and `a/0001.seg.PNG` have the key `a/0001` and the extensions `jpg` and `seg.png`: the key goes up to the
first dot of the last part of the path. A scan reads headers only; a row is read from the span of its files.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from operator import attrgetter
from typing import Any, BinaryIO, cast

from lensmith.core.errors import DataError
from lensmith.data.readers.base import BOM, CHUNK_BYTES, OnDisk, RowRef, StreamRow, no_rows, too_long
from lensmith.data.strict_json import check_strings, parse_json, printable

TEXTS = ("txt", "text", "caption", "cls")
KEY = "__key__"

_META = re.compile(r"__[^/]*__(?:$|/)")  # WebDataset's own notes about a shard
_HEADER_READS = 64
_HEADER_BYTES = 1 << 17
_REMEDY = "write the shard again or take it out"
_TOO_LONG = "make its files smaller, or raise data.max_row_bytes"


class TarRows(OnDisk):
    """`{"__key__": key, "txt": str, "json": object, "jpg": bytes, ...}`, by the last part of the extension: `txt`,
    `text`, `caption` and `cls` are text, `json` is parsed, all else is bytes.

    Passed over are folders, devices, dot files, `__.../` and files without an extension.
    """

    def scan(self) -> Iterator[RowRef]:
        number = -1
        with self.path.open("rb") as file:
            groups = groupby(_members(_Archive(file, self._name)), key=attrgetter("key"))
            for number, (_, group) in enumerate(groups):
                first = last = next(group)
                for last in group:  # noqa: B007
                    pass
                yield RowRef(number, number + 1, first.start, last.end - first.start)
        if number < 0:
            raise _nothing(self._name)

    def read(self, ref: RowRef) -> dict[str, Any]:
        origin = self.origin(ref)
        if ref.length > self._max_row_bytes:
            raise too_long(origin, self._max_row_bytes, _TOO_LONG)
        archive = _Archive(BytesIO(self._bytes(ref)), origin)
        files = [(member, archive.content(member.size)) for member in _members(archive, ref.length)]
        if len({member.key for member, _ in files}) != 1:
            raise DataError("TAR", "another row stands here than when the file was indexed", where=origin)
        return _row(files, origin)


def stream_tar(file: BinaryIO, name: str, start: int, max_row_bytes: int) -> Iterator[StreamRow]:
    """The rows from row `start` on, read from front to back. Raises DataError TAR, NO_ROWS."""
    archive = _Archive(file, name)
    number = -1
    for number, (_, group) in enumerate(groupby(_members(archive), key=attrgetter("key"))):
        if number >= start:
            yield _stream_row(archive, group, number, f"{name}:{number + 1}", max_row_bytes)
    if number < 0:
        raise _nothing(name)


def _stream_row(archive: _Archive, group: Iterator[_Member], number: int, origin: str, max_row_bytes: int) -> StreamRow:
    files: list[tuple[_Member, bytes]] = []
    begin, length = -1, 0
    for member in group:
        begin = member.start if begin < 0 else begin
        length = member.end - begin
        if length <= max_row_bytes:
            files.append((member, archive.content(member.size)))
    try:
        if length > max_row_bytes:
            raise too_long(origin, max_row_bytes, _TOO_LONG)
        return StreamRow(number, origin, _row(files, origin))
    except DataError as error:
        return StreamRow(number, origin, None, error)


# --- rows -------------------------------------------------------------------------------------------------------------


def _row(files: list[tuple[_Member, bytes]], origin: str) -> dict[str, Any]:
    key = files[0][0].key
    row: dict[str, Any] = {KEY: key}
    for member, data in files:
        extension = member.extension
        _check_name(f"{key}.{extension}", origin)
        if member.problem:
            raise DataError("TAR", f"{printable(f'{key}.{extension}')!r} {member.problem}", where=origin,
                            remedy="write it with `tar --dereference --hard-dereference`, not `--sparse`")  # fmt: skip
        if extension in row:
            raise DataError("SCHEMA", f"two files of the key {printable(key)!r} are called .{printable(extension)}",
                            where=origin, remedy="give each row its own key")  # fmt: skip
        row[extension] = _value(extension, data, origin)
    return row


def _check_name(name: str, origin: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError("ENCODING", f"the file name {printable(name)!r} is not UTF-8", where=origin) from None
    check_strings(name, origin, "a file name")


def _value(extension: str, data: bytes, origin: str) -> object:
    kind = extension.rpartition(".")[2]
    if kind == "json":
        return parse_json(data.removeprefix(BOM), f"{origin} (.{printable(extension)})")
    if kind not in TEXTS:
        return data
    try:
        text = data.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{data.removeprefix(BOM)[error.start]:02x} at byte {error.start + 1}"
        raise DataError("ENCODING", f"{printable(extension)}: not UTF-8: {found}", where=origin,
                        remedy="save the text as UTF-8") from None  # fmt: skip
    check_strings(text, origin, extension)
    return text


def _nothing(name: str) -> DataError:
    return no_rows(name, "no file of the archive has a name like `key.extension`")


# --- archives ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Member:
    key: str
    extension: str
    start: int  # of its first header
    end: int  # of its padded content
    size: int
    problem: str


def _members(archive: _Archive, end: int | None = None) -> Iterator[_Member]:
    """The files that belong to rows, up to `end` or the archive's end mark; each may be read before the next is asked
    for. Raises DataError TAR."""
    while end is None or archive.offset < end:
        info = archive.next()
        if info is None:
            return
        if name := _split(info.name) if info.isreg() or info.islnk() or info.issym() else None:
            problem = _problem(info)
            yield _Member(*name, info.offset, archive.offset, 0 if problem else info.size, problem)


def _split(path: str) -> tuple[str, str] | None:
    """Key and extension, or None for a file that WebDataset passes over."""
    folder, slash, name = path.rpartition("/")
    stem, dot, extension = name.partition(".")
    if not stem or not dot or _META.match(path):
        return None
    return folder + slash + stem, extension.lower()


def _problem(info: tarfile.TarInfo) -> str:
    if info.issparse():
        return "is stored with holes"
    return "" if info.isreg() else "is a link, which has no content of its own"


class _Archive:
    """Headers one after another, for files that can only be read forward too.

    `tarfile.TarFile` keeps every member it has met and takes a broken header for the end of the archive. This is what
    `TarInfo.fromtarfile` uses of one, with a bound on what a single header may read: a damaged size fills no memory.
    """

    encoding = "utf-8"
    errors = "surrogateescape"

    def __init__(self, file: BinaryIO, where: str):
        self.fileobj = self
        self.offset = 0  # `fromtarfile` sets it to the next header
        self.pax_headers: dict[str, str] = {}
        self._file = file
        self._size = file.seek(0, 2) if file.seekable() else None
        if self._size is not None:
            file.seek(0)
        self._where = where
        self._at = 0
        self._reads = self._bytes = 0  # what the header at hand may still read
        self._first: bytes | None = None

    def next(self) -> tarfile.TarInfo | None:
        """The next member, or None at the end mark. Raises DataError TAR."""
        start = self.offset
        self._skip_to(start)
        self._reads, self._bytes, self._first = _HEADER_READS, _HEADER_BYTES, None
        try:
            info = tarfile.TarInfo.fromtarfile(cast(Any, self))
        except (tarfile.TarError, ValueError, LookupError, ArithmeticError) as error:
            if self._first == bytes(tarfile.BLOCKSIZE):
                return self._check_end()
            raise self._broken(str(error), start) from None
        wrong_size = info.size < 0 or self.offset <= start
        if info.isreg() and not info.issparse():
            wrong_size |= self._at + info.size > self.offset
        if wrong_size or {"path", "size"} & self.pax_headers.keys():  # global headers: a row must be read without them
            raise self._broken("a header says what cannot be", start)
        if self._size is not None and self.offset > self._size:
            raise self._inside()
        return info

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        """For headers. Content is read by `content`."""
        self._reads -= 1
        self._bytes -= size
        if size < 0 or self._reads < 0 or self._bytes < 0:
            raise tarfile.ReadError("a header is too long")
        data = self._take(size)
        self._first = data if self._first is None else self._first
        return data

    def content(self, size: int) -> bytes:
        """The content of the member whose header was read last. Raises DataError TAR."""
        data = self._take(size)
        if len(data) < size:
            raise self._inside()
        return data

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        self._at += len(data)
        return data

    def _skip_to(self, offset: int) -> None:
        if offset != self._at and self._file.seekable():
            self._file.seek(offset - self._at, 1)
            self._at = offset
        while self._at < offset and self._take(min(CHUNK_BYTES, offset - self._at)):
            pass

    def _check_end(self) -> None:
        while rest := self._take(CHUNK_BYTES):
            if rest.count(0) != len(rest):
                raise DataError("TAR", "more stands behind the end of the archive", where=self._where,
                                remedy="`cat` does not join archives; keep them apart")  # fmt: skip

    def _inside(self) -> DataError:
        return DataError("TAR", "the file ends inside a member", where=self._where, remedy=_REMEDY)

    def _broken(self, problem: str, start: int) -> DataError:
        if not start:
            problem, remedy = f"not a tar archive: {problem}", f"{_REMEDY}; a shard is not compressed"
        elif not self._first:
            problem, remedy = "the file was cut short: it has no end mark", _REMEDY
        else:
            problem, remedy = f"damaged at byte {start}: {problem}", _REMEDY
        return DataError("TAR", problem, where=self._where, remedy=remedy)
