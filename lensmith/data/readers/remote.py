"""Data files elsewhere (`s3://`, `gs://`, `https://`, ...): listed, copied once into the cache, or read as a stream.

Only names from the run file come here. A URL that stands in the data is never opened.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from lensmith.core.errors import ConfigError, DataError, UserError
from lensmith.data.readers.base import CHUNK_BYTES, EXTENSIONS
from lensmith.data.readers.files import expand_braces
from lensmith.data.strict_json import printable

Progress = Callable[[int, int | None], None]
"""Bytes copied, and bytes in all where the other side says so."""

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local", "hf")
_SECRETS = re.compile(r"(?<=://)[^/\s'\"]*@|\?[^\s'\"]*=[^\s'\"]*")
# What the file systems call the state of a file. Not all they say: some tell when it was last read.
_STATE = ("etag", "contentmd5", "md5hash", "crc32c", "digest", "generation", "versionid", "lastmodified", "mtime",
          "modified", "updated", "modificationtime", "created")  # fmt: skip
_SOCKET_SECONDS = 60


def is_remote(path: str) -> bool:
    """A URL whose scheme fsspec knows, other than `file` and `hf`."""
    scheme = _SCHEME.match(path)
    return scheme is not None and scheme[1].lower() in fsspec.available_protocols() and scheme[1].lower() not in _LOCAL


def mask(url: str) -> str:
    """`url` on one line, without user, password and query, which carry keys. Origins and messages show this."""
    return printable(_SECRETS.sub(lambda found: "?***" if found[0][0] == "?" else "***@", url))


def url_path(url: str) -> PurePosixPath:
    """The path in a URL. In a bucket `?` and `#` are parts of a name."""
    return PurePosixPath(urlsplit(url).path if url.lower().startswith("http") else url.partition("://")[2])


def expand_remote(path: str) -> list[str]:
    """The URLs that `path` (a file, a folder, a glob or `shard-{000..009}.tar`) names, sorted.

    A name with a known extension is taken as it is. Raises ConfigError NO_FILES, FILE_PATTERN; DataError REMOTE.
    """
    found: list[str] = []
    for url in expand_braces(path):
        matches = [url] if _known(url) and not _is_glob(url) else _listed(url)
        if not matches:
            problem = f"{mask(url)!r} is no file, folder or glob with {', '.join(EXTENSIONS)} files"
            raise ConfigError("NO_FILES", problem, remedy="correct the path of this source")
        found += matches
    return sorted(set(found))


def fetch(url: str, cache: Path, progress: Progress | None = None) -> Path:
    """A local copy under `cache`/remote, made once: a file that changed there gets another name here.

    Several processes may fetch at once. Raises DataError REMOTE, ConfigError CACHE.
    """
    system, path = file_system(url)
    with remote_errors(url):
        info = system.info(path)
        if info.get("type") == "directory":
            raise IsADirectoryError("this is a folder")
        target = cache / "remote" / _cached_name(url, info, lambda: system.ukey(path))
    if target.is_file() and info.get("size") in (None, target.stat().st_size):
        return target
    with _staged(target) as temporary:
        with remote_errors(url):
            system.get_file(path, str(temporary), callback=_Reporter(progress))
        got, expected = temporary.stat().st_size, info.get("size")
        if expected not in (None, got):
            raise _refused(url, f"{got:,} of {expected:,} bytes came")
    return target


def open_remote(url: str, *, seek: bool = False) -> io.BufferedReader:
    """For reading from front to back, or with `seek` at random. Any failure, of reading too, is a DataError REMOTE."""
    file = _Remote(url)
    if seek and not file.seekable():
        file.close()
        raise _refused(url, "the server reads from front to back only", "read it without data.stream")
    return io.BufferedReader(file, CHUNK_BYTES)


class _Remote(io.RawIOBase):
    """A remote file as Python's own buffered reader wants it: fsspec's `readline` is slow, its errors are many."""

    def __init__(self, url: str):
        self._url = url
        system, path = file_system(url)
        with remote_errors(url):
            self._seekable = not url.lower().startswith("http") or _has_ranges(system, path)
            # block_size 0: one request for the whole, its answer read as it comes
            self._file: Any = system.open(path, "rb", **({} if self._seekable else {"block_size": 0}))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._seekable

    def readinto(self, buffer: Any) -> int:
        with remote_errors(self._url):
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        with remote_errors(self._url):
            return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _has_ranges(system: Any, path: str) -> bool:
    """Whether a web server sends parts of a file. fsspec finds that out with the second block."""
    with system.open(path, "rb", block_size=1) as probe:
        try:
            probe.seek(1)
            probe.read(1)
        except ValueError:
            return False
    return True


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it. Keys come from where the client library looks for them. Raises
    DataError REMOTE."""
    with remote_errors(url):
        if "::" in url:
            raise ValueError("a chain of file systems (::) is not supported")
        return url_to_fs(url, **_options(urlsplit(url).scheme.lower()))


def _options(scheme: str) -> dict[str, Any]:
    if scheme in ("file", "local"):
        return {"auto_mkdir": True}  # as a store does, which has no folders
    if scheme not in ("http", "https"):
        return {}
    from aiohttp import ClientTimeout

    # aiohttp's own limit is five minutes for the whole file
    timeout = ClientTimeout(total=None, sock_connect=_SOCKET_SECONDS, sock_read=_SOCKET_SECONDS)
    return {"client_kwargs": {"timeout": timeout, "trust_env": True}}


def _known(url: str) -> bool:
    return url_path(url).suffix.lower() in EXTENSIONS


def _is_glob(url: str) -> bool:
    return bool(re.search(r"[*\[]" if url.lower().startswith("http") else r"[*?\[]", url))


def _listed(url: str) -> list[str]:
    system, path = file_system(url)
    with remote_errors(url):
        if _is_glob(url):
            names = system.glob(path)
        else:
            names = [entry["name"] for entry in system.ls(path, detail=True) if entry["type"] == "file"]
        urls = [system.unstrip_protocol(name) for name in names]
    return [u for u in urls if _known(u) and not url_path(u).name.startswith(".")]


def _cached_name(url: str, info: dict[str, Any], otherwise: Callable[[], str]) -> str:
    """Readable stem, 16 digits of what the file is now, extension."""
    said = {re.sub(r"[^a-z0-9]", "", key.lower()): str(value) for key, value in info.items() if value is not None}
    state = {key: said[key] for key in _STATE if key in said} or {"ukey": str(otherwise())}
    text = json.dumps([url, info.get("size"), state])
    name = url_path(url)
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", name.stem)[:80].lstrip(".")
    return f"{stem}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}{name.suffix.lower()}"


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A temporary file beside `target` that takes its place, all or nothing. Raises ConfigError CACHE."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError("CACHE", f"a remote file cannot be kept: {error.strerror or error}", where=str(target.parent),
                          remedy="set data.cache to a folder with space") from None  # fmt: skip


class _Reporter(Callback):
    def __init__(self, progress: Progress | None):
        super().__init__()
        self._progress = progress

    def call(self, hook_name: str | None = None, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress(self.value, self.size)


@contextmanager
def remote_errors(url: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # s3fs, gcsfs, aiohttp and the others have errors without a common base
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        extra = EXTRAS.get(urlsplit(url).scheme.lower()) if isinstance(error, ImportError) else None
        raise _refused(url, cause_of(error), f'pip install "lensmith[{extra}]"' if extra else "") from None


def cause_of(error: BaseException) -> str:
    """What began it, on one line, without keys."""
    cause = _innermost(error)
    said = f"{type(cause).__name__}: {cause}".rstrip(": ")
    return mask(" ".join(said.split()))[:400]


def _innermost(error: BaseException) -> BaseException:
    """What it began with: fsspec calls every failure of a web server a file that is not found."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def _refused(url: str, cause: str, remedy: str = "") -> DataError:
    remedy = remedy or "see that the address, the access rights and the connection are right, or copy the file here"
    return DataError("REMOTE", cause, where=mask(url), remedy=remedy)
