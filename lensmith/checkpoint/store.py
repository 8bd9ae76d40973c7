"""Checkpoints that are published whole or do not exist.

Writing: a hidden staging folder, every file hashed (SHA-256) and fsynced, a sealed manifest, fsync of the folder, one
rename to `step-00000012`, fsync of the parent. A published folder is never written again. Loading verifies every byte
against the manifest and falls back to the newest checkpoint that verifies, and says so. Deleting renames to `.trash-*`
first, so a half-deleted checkpoint is never seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from lensmith.core.errors import RunError
from lensmith.parallel.ranks import Ranks, attempt

SCHEMA = 1
MANIFEST = "MANIFEST.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class Published:
    """A checkpoint folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


class Damaged(Exception):
    """A checkpoint does not verify; the text names the file."""


class Store:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, ranks: Ranks | None = None):
        self.folder = folder
        self.ranks = ranks or Ranks()
        self._damaged: set[int] = set()

    def publish(
        self, step: int, write: Callable[[Path], None], about: dict[str, Any], ranks: Ranks | None = None
    ) -> Published:
        """Make checkpoint `step` out of what `write` puts into an empty folder. With several ranks all of them call it;
        each writes files of other names, and the first one publishes when all are done. `ranks`: others than the
        store's own, for a thread.

        Raises `RunError` SAVE when the disk refuses. Whatever is raised, the staging folder is gone and all earlier
        checkpoints stand.
        """
        ranks = ranks or self.ranks
        target = self.path(step)
        staging = self.folder / f".staging-{step:08d}-{ranks.broadcast_json(os.getpid(), 'begin a checkpoint')}"
        manifest: dict[str, Any] = {}
        try:
            _on_main(ranks, "make the staging folder", lambda: self._begin(staging))
            files = self._written(staging, write, ranks)
            manifest = {"schema": SCHEMA, "step": step, **about, "files": files}
            manifest["seal"] = _seal(manifest)
            _on_main(ranks, "publish the checkpoint", lambda: self._commit(staging, target, manifest))
            self._damaged.discard(step)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if isinstance(error, OSError | SafetensorError):
                raise self._refused(step, error) from error
            raise
        return Published(target, manifest)

    def _begin(self, staging: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()

    def _written(self, staging: Path, write: Callable[[Path], None], ranks: Ranks) -> dict[str, Any]:
        """What all ranks wrote: name -> size and hash. Each hashes its own."""
        if not ranks.several:
            write(staging)
            return _hash_all(staging)
        own = staging / f".rank-{ranks.rank}"

        def mine() -> dict[str, Any]:
            own.mkdir()
            write(own)
            return _hash_all(own)

        each = ranks.gather_json(ranks.together("write a checkpoint", mine), "count files")
        _on_main(ranks, "put files together", lambda: _join(staging, each))
        return {name: entry for files in each for name, entry in sorted(files.items())}

    def _commit(self, staging: Path, target: Path, manifest: dict[str, Any]) -> None:
        _write_synced(staging / MANIFEST, _manifest_text(manifest))
        for sub in [p for p in staging.rglob("*") if p.is_dir()]:
            sync_folder(sub)
        sync_folder(staging)
        if target.exists():  # one that did not verify, or the run would not have come back to this step
            self._trash(target)
        os.rename(staging, target)
        sync_folder(self.folder)

    def _refused(self, step: int, error: Exception) -> RunError:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = ""
        if getattr(error, "errno", None) in FULL or any(f"os error {number}" in reason for number in FULL):
            hint = f"; {_free(self.folder)} are free"
            if steps := self.steps():
                hint += f", the last checkpoint has {_size(self.path(steps[-1])) / 2**20:,.1f} MiB"
        return RunError("SAVE", f"checkpoint {step} could not be written: {reason}{hint}", where=str(self.path(step)),
                        remedy="make room or name another output folder, then run the same command again")  # fmt: skip

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending; not verified."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m.group(1)) for p in self.folder.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self, warn: Callable[[str], None], last: int | None = None) -> Published | None:
        """The newest checkpoint that verifies, up to step `last`; each newer damaged one is named to `warn`.

        Raises `RunError` DAMAGED when there are checkpoints and none verifies: a run never starts over silently.
        """
        damaged: list[str] = []
        for step in reversed([s for s in self.steps() if last is None or s <= last]):
            try:
                found = verify(self.path(step))
            except Damaged as error:
                damaged.append(str(error))
                self._damaged.add(step)
                continue
            for text in damaged:
                warn(f"checkpoint is damaged and not used: {text}")
            return found
        if damaged:
            text = "\n  ".join(["no checkpoint of this run verifies:", *damaged])
            raise RunError("DAMAGED", text, where=str(self.folder),
                           remedy="restore one of them, or start over in a new output folder")  # fmt: skip
        return None

    def clean(self) -> None:
        """Remove what an interrupted save or purge left behind."""
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if path.name.startswith((".staging-", ".trash-")):
                    shutil.rmtree(path, ignore_errors=True)

    def purge(self, keep_last: int, keep: set[int]) -> None:
        """Delete all but the `keep_last` newest and those in `keep`; called after a save. Those that `newest` found
        damaged go first: they must not count as kept, or they would push out the good ones."""
        for step in sorted(self._damaged.intersection(self.steps())):
            self._trash(self.path(step))
        self._damaged.clear()
        steps = self.steps()
        for step in steps[:-keep_last] if keep_last else steps:
            if step not in keep:
                self._trash(self.path(step))

    def forget_after(self, step: int) -> None:
        """Delete the checkpoints of later steps: the run went back and will come to these steps in another way."""
        for later in self.steps():
            if later > step:
                self._trash(self.path(later))

    def _trash(self, path: Path) -> None:
        trash = path.with_name(f".trash-{path.name}-{os.getpid()}-{time.time_ns()}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def _on_main(ranks: Ranks, what: str, work: Callable[[], None]) -> None:
    """`work` on the first rank; all of them wait for it, and fail where it fails."""
    error = attempt(work)[1] if ranks.is_main else None
    ranks.all_well(error, what)


def _join(staging: Path, each: list[dict[str, Any]]) -> None:
    """Move the files of every rank to where they belong."""
    for rank, files in enumerate(each):
        own = staging / f".rank-{rank}"
        for name in files:
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(own / name, staging / name)
        shutil.rmtree(own)


def verify(folder: Path) -> Published:
    """Check every file of a checkpoint against its manifest. Raises `Damaged` naming the file."""
    manifest = read_manifest(folder)
    listed: dict[str, Any] = manifest["files"]
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                raise Damaged(f"{path} has {size} bytes, {entry['size']} were written")
            if _sha256(path) != entry["sha256"]:
                raise Damaged(f"{path} differs from what was written (SHA-256)")
        except OSError as error:
            raise Damaged(f"{path} cannot be read ({error.strerror})") from None
    extra = {name for name, _ in _files(folder)} - set(listed) - {MANIFEST}
    if extra:
        raise Damaged(f"{folder} holds a file that was not written with it: {sorted(extra)[0]}")
    return Published(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A manifest that is byte for byte as written. Raises `Damaged`, and `RunError` SCHEMA for one of a later
    lensmith (every schema is sealed in the same way, so a damaged number is not taken for a later one)."""
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
        manifest = json.loads(data)
    except (OSError, ValueError, RecursionError):
        raise Damaged(f"{path} cannot be read") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("schema"), int):
        raise Damaged(f"{path} is not a manifest")
    if data != _manifest_text(manifest) or manifest.get("seal") != _seal(manifest):
        raise Damaged(f"{path} differs from what was written")
    if manifest["schema"] > SCHEMA:
        text = f"checkpoint schema {manifest['schema']} is newer than this lensmith reads ({SCHEMA})"
        raise RunError("SCHEMA", text, where=str(path), remedy="update lensmith")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_inside(name) and _is_entry(entry) for name, entry in files.items()):
        raise Damaged(f"{path} is not a manifest")
    named = _NAME.fullmatch(folder.name)
    if not isinstance(manifest.get("step"), int) or (named and int(named.group(1)) != manifest["step"]):
        raise Damaged(f"{path} is that of step {manifest.get('step')}, not of {folder.name}")
    return manifest


def _seal(manifest: dict[str, Any]) -> str:
    """What makes a changed manifest evident; it guards against damage, not against someone who means to deceive."""
    rest = {k: v for k, v in manifest.items() if k != "seal"}
    return hashlib.sha256(_manifest_text(rest)).hexdigest()


def _manifest_text(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def _inside(name: str) -> bool:
    """A name that stays in its folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _free(folder: Path) -> str:
    """Bytes, and files where the file system counts them: either may run out."""
    if not folder.exists():
        return "0 MiB"
    found = os.statvfs(folder)
    files = f"{found.f_favail:,} files and " if found.f_files else ""
    return f"{files}{found.f_bavail * found.f_frsize >> 20:,} MiB"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for _, path in _files(folder))


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path


def _hash_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and fsync every file."""
    out: dict[str, dict[str, Any]] = {}
    for name, path in _files(folder):
        out[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        with open(path, "rb") as f:
            os.fsync(f.fileno())
    return out


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _write_synced(path: Path, data: bytes) -> None:
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """A small file that is seen old or new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _write_synced(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)
