"""Checkpoints in an object store: the files of `step-00000012/`, and its MANIFEST.json last.

The manifest is the commit: a prefix without it is no checkpoint. It is written when every file of the checkpoint is
there in its size, and it is the first object to go when a checkpoint is deleted. Fetching verifies every byte.

A prefix belongs to one run (OWNER.json says which), and to the session of it that started last: whoever was there
before finds another name in OWNER.json before its next write, and stops.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import os
import random
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from lensmith.checkpoint.store import FULL, MANIFEST, Damaged, Published, Store, read_manifest, sync_folder
from lensmith.core.errors import RunError, UserError
from lensmith.data.readers.remote import cause_of, file_system, mask

OWNER = "OWNER.json"
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Before each repetition of a call that failed in passing."""
_FINAL = (
    FileExistsError, FileNotFoundError, ImportError, IsADirectoryError, NotADirectoryError, NotImplementedError,
    PermissionError, TypeError, ValueError,
)  # fmt: skip
_FINAL_NUMBERS = (*FULL, errno.EROFS, errno.ENAMETOOLONG, errno.ENOSYS)
_OBJECT = re.compile(r"step-(\d{8})/(.+)")

T = TypeVar("T")


class Unreachable(RunError):
    """The store failed in passing, each time it was asked."""


@dataclass(frozen=True)
class Owner:
    """Whose a prefix is."""

    run: str
    """Made up once for a run."""
    session: str
    """Made up at each start."""
    name: str
    """Of the run."""
    host: str
    process: int

    @staticmethod
    def new(run: str, name: str) -> Owner:
        return Owner(run, secrets.token_hex(8), name, socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"run {self.name!r} (process {self.process} on {self.host})"


class Remote:
    """The checkpoints under a URL that fsspec knows. Not verified unless said.

    Everything raises `RunError`: REMOTE where the store refuses, `Unreachable` when it failed in passing too often.
    """

    def __init__(self, url: str):
        self.shown = mask(url.rstrip("/"))
        try:
            self._system, self._root = file_system(url.rstrip("/"))
        except UserError as error:
            raise RunError(error.code, error.message, where=error.where, remedy=error.remedy) from None
        self.owner: Owner | None = None
        """Who this session is, once it has claimed the prefix."""
        self.damaged: set[int] = set()
        """Steps of checkpoints that did not verify."""

    # -- what is there ------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        return sorted(step for step, files in self._held().items() if MANIFEST in files)

    def newest(self, store: Store, after: int, warn: Callable[[str], None]) -> Published | None:
        """The newest checkpoint behind step `after` that verifies, in the local folder now; each newer damaged one is
        named to `warn`."""
        for step in reversed(self.steps()):
            if step <= after:
                break
            try:
                return self.receive(store, step)
            except Damaged as error:
                self.damaged.add(step)
                warn(f"checkpoint is damaged and not used: {error}")
        return None

    def manifest(self, step: int) -> bytes | None:
        return self._read(f"{_name(step)}/{MANIFEST}")

    # -- writing ------------------------------------------------------------------------------------------------

    def put(self, step: int, folder: Path, names: Iterable[str]) -> None:
        """Copy these files of a local checkpoint. With several ranks each puts those it wrote. What a failed attempt
        left under this step is to be removed before any rank puts."""
        for name in names:
            self._put_file(folder / name, f"{_name(step)}/{name}")

    def _put_file(self, source: Path, name: str) -> None:
        target = f"{self._root}/{name}"

        def send() -> None:
            self._system.put_file(str(source), target)
            self._check(source, target)

        try:
            self._ask(f"{name} was not copied", send)
        except FileNotFoundError as error:
            raise self._refused(f"{name} was not copied", error) from None

    def commit(self, step: int, folder: Path) -> None:
        """Make what was put a checkpoint. Raises `RunError` REMOTE when a file is missing, and OWNER."""
        there = self._held().get(step, {})
        for name, entry in read_manifest(folder)["files"].items():
            if there.get(name) != entry["size"]:
                self.require_owner()  # whoever took it over has cleaned it
                found = f"has {there[name]} bytes there, not {entry['size']}" if name in there else "is not there"
                remedy = "see what else writes there"
                raise RunError("REMOTE", f"{_name(step)}/{name} {found}", where=self.shown, remedy=remedy)
        self.require_owner()
        self._write(f"{_name(step)}/{MANIFEST}", (folder / MANIFEST).read_bytes())
        self.damaged.discard(step)

    def remove(self, step: int) -> None:
        """Its manifest first: from then on it is no checkpoint."""
        folder = f"{self._root}/{_name(step)}"
        for delete in (
            lambda: self._system.rm_file(f"{folder}/{MANIFEST}"),
            lambda: self._system.rm(folder, recursive=True),
        ):
            try:
                self._ask(f"{_name(step)} was not deleted", delete)
            except FileNotFoundError:
                continue

    # -- reading ------------------------------------------------------------------------------------------------

    def fetch(self, step: int, into: Path, under: str = "") -> dict[str, Any]:
        """Copy the files of a checkpoint, those below `under` only, into an empty folder, and verify and sync them; the
        manifest. Raises `Damaged` naming the file."""
        place = f"{self.shown}/{_name(step)}"
        data = self.manifest(step)
        if data is None:
            raise Damaged(f"{place}/{MANIFEST} is missing")
        (into / MANIFEST).write_bytes(data)
        try:
            manifest = read_manifest(into)
        except Damaged as error:
            raise Damaged(str(error).replace(str(into), place)) from None
        if manifest["step"] != step:
            raise Damaged(f"{place}/{MANIFEST} is that of step {manifest['step']}")
        for name, entry in manifest["files"].items():
            if name.startswith(under):
                self._fetch_file(step, name, into / name, entry)
        for path in [into / MANIFEST, *(p for p in into.rglob("*") if p.is_dir()), into]:
            sync_folder(path)
        return manifest

    def _fetch_file(self, step: int, name: str, path: Path, entry: dict[str, Any]) -> None:
        source, place = f"{self._root}/{_name(step)}/{name}", f"{self.shown}/{_name(step)}/{name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._ask(f"{_name(step)}/{name} was not fetched", lambda: self._system.get_file(source, str(path)))
        except FileNotFoundError:
            raise Damaged(f"{place} is missing") from None
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        if (size := path.stat().st_size) != entry["size"]:
            raise Damaged(f"{place} has {size} bytes, {entry['size']} were written")
        if digest != entry["sha256"]:
            raise Damaged(f"{place} differs from what was written (SHA-256)")

    def receive(self, store: Store, step: int) -> Published:
        """Fetch a checkpoint into the local folder, where it is published by a rename. Raises `Damaged`."""
        staging = store.folder / f".staging-{step:08d}-{os.getpid()}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            staging.mkdir(parents=True)
            manifest = self.fetch(step, staging)
            if (target := store.path(step)).exists():  # one that did not verify
                os.rename(target, store.folder / f".trash-{target.name}-{os.getpid()}-{time.time_ns()}")
            os.rename(staging, target)
            sync_folder(store.folder)
            store._damaged.discard(step)
        except OSError as error:
            text = f"{_name(step)} cannot be kept here: {error.strerror or error}"
            remedy = "make room or name another output folder"
            raise RunError("REMOTE", text, where=str(store.folder), remedy=remedy) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return Published(store.path(step), manifest)

    # -- whose it is --------------------------------------------------------------------------------------------

    def held_by(self) -> Owner | None:
        """The run that this prefix belongs to. Raises `RunError` OWNER when OWNER.json is not one."""
        data = self._read(OWNER)
        if data is None:
            return None
        try:
            return Owner(**json.loads(data))
        except (ValueError, TypeError, RecursionError):
            remedy = "name another save.remote, or delete it there to go on with these checkpoints"
            raise RunError("OWNER", f"{OWNER} is damaged", where=self.shown, remedy=remedy) from None

    def claim(self, owner: Owner) -> None:
        """From now on the prefix is that of this session. What interrupted copies left behind is removed."""
        self._write(OWNER, json.dumps(vars(owner), indent=1).encode())
        self.owner = owner
        for step, files in self._held().items():
            if MANIFEST not in files:
                self.remove(step)

    def require_owner(self) -> None:
        """Raises `RunError` OWNER when another session has claimed the prefix since."""
        if self.owner is not None and (now := self.held_by()) != self.owner:
            remedy = "stop the other run, or name another save.remote: one run at a time writes there"
            raise RunError("OWNER", f"{now or 'nobody'} has taken it over", where=self.shown, remedy=remedy)

    # -- the store ----------------------------------------------------------------------------------------------

    def _held(self) -> dict[int, dict[str, int]]:
        """Step -> file -> size, of everything that is there, committed or not."""

        def find() -> dict[str, Any]:
            self._system.invalidate_cache()
            return self._system.find(self._root, detail=True)

        try:
            found = self._ask("its objects cannot be listed", find)
        except FileNotFoundError:
            return {}
        held: dict[int, dict[str, int]] = {}
        for path, info in found.items():
            named = _OBJECT.fullmatch(path.removeprefix(f"{self._root}/"))
            if named is not None and info.get("type") != "directory":
                held.setdefault(int(named[1]), {})[named[2]] = int(info["size"])
        return held

    def _read(self, name: str) -> bytes | None:
        try:
            return self._ask(f"{name} cannot be read", lambda: self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._ask(f"{name} was not written", lambda: self._system.pipe_file(f"{self._root}/{name}", data))
        except FileNotFoundError as error:
            raise self._refused(f"{name} was not written", error) from None

    def _check(self, source: Path, target: str) -> None:
        """Size, and MD5 where the store says it. Another one counts as a passing failure: it is sent again."""
        self._system.invalidate_cache()
        info = self._system.info(target)
        if info["size"] != source.stat().st_size:
            raise OSError(errno.EIO, f"{info['size']} of {source.stat().st_size} bytes arrived")
        said = _md5(info)
        if said is not None:
            with open(source, "rb") as file:
                if hashlib.file_digest(file, "md5").digest() != said:
                    raise OSError(errno.EIO, "other bytes arrived than were sent (MD5)")

    def _ask(self, failed: str, call: Callable[[], T]) -> T:
        """What `call` gives; again after a pause when it fails in passing. Raises FileNotFoundError as it comes."""
        begin = time.monotonic()
        for pause in (*PAUSES_SECONDS, None):
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:  # noqa: BLE001 s3fs, gcsfs, aiohttp and the others have errors without a common base
                if isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_NUMBERS:
                    raise self._refused(failed, error) from None
                if pause is None:
                    text = f"{failed}: {cause_of(error)} (asked {len(PAUSES_SECONDS) + 1} times in "
                    raise Unreachable("REMOTE", f"{text}{time.monotonic() - begin:.0f} seconds)", where=self.shown,
                                      remedy="see that the store and the connection work") from None  # fmt: skip
                time.sleep(pause * random.SystemRandom().uniform(0.5, 1.5))  # the run's own random state stays as it is
        raise AssertionError

    def _refused(self, failed: str, error: Exception) -> RunError:
        full = getattr(error, "errno", None) in FULL
        remedy = "make room" if full else "see that the address and the access rights are right"
        return RunError("REMOTE", f"{failed}: {cause_of(error)}", where=self.shown, remedy=remedy)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _md5(info: dict[str, Any]) -> bytes | None:
    """The MD5 of an object, as Google's (`md5Hash`) and Microsoft's (`content_md5`) stores say it. The entity tag of S3
    is one only of some objects."""
    said = info.get("md5Hash") or (info.get("content_settings") or {}).get("content_md5")
    if isinstance(said, str):
        return base64.b64decode(said)
    return bytes(said) if said else None
