"""Checkpoints that are published whole or do not exist.

Writing: a hidden staging folder, every file hashed (SHA-256) and fsynced, a manifest, fsync of the folder, one rename
to `step-00000012`, fsync of the parent. A published folder is never written again. Loading verifies every byte against
the manifest and falls back to the newest checkpoint that verifies, and says so. Deleting renames to `.trash-*` first,
so a half-deleted checkpoint is never seen.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import RunError

SCHEMA = 1
MANIFEST = "MANIFEST.json"
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

    def __init__(self, folder: Path):
        self.folder = folder

    def publish(self, step: int, write: Callable[[Path], None], about: dict[str, Any]) -> Published:
        """Make checkpoint `step` out of what `write` puts into an empty folder.

        Raises `RunError` SAVE when the disk refuses; then the staging folder is gone and all earlier checkpoints stand.
        """
        target = self.folder / f"step-{step:08d}"
        staging = self.folder / f".staging-{step:08d}-{os.getpid()}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if target.exists():
                self._trash(target)
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            write(staging)
            manifest = {"schema": SCHEMA, "step": step, **about, "files": _hash_all(staging)}
            _write_synced(staging / MANIFEST, json.dumps(manifest, indent=1).encode())
            for sub in [p for p in staging.rglob("*") if p.is_dir()]:
                sync_folder(sub)
            sync_folder(staging)
            os.rename(staging, target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free if self.folder.exists() else 0
            hint = f"; {free >> 20} MiB are free" if error.errno == errno.ENOSPC else ""
            raise RunError("SAVE", f"checkpoint {step} could not be written: {error.strerror or error}{hint}",
                           where=str(target), remedy="make room or name another output folder, then run the same command again") from error  # fmt: skip
        return Published(target, manifest)

    def steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending; not verified."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m.group(1)) for p in self.folder.iterdir() if p.is_dir() and (m := _NAME.fullmatch(p.name)))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def newest(self, warn: Callable[[str], None]) -> Published | None:
        """The newest checkpoint that verifies; each newer damaged one is named to `warn`.

        Raises `RunError` DAMAGED when there are checkpoints and none verifies: a run never starts over silently.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                found = verify(self.path(step))
            except Damaged as error:
                damaged.append(str(error))
                continue
            for text in damaged:
                warn(f"checkpoint is damaged and not used: {text}")
            return found
        if damaged:
            raise RunError("DAMAGED", "no checkpoint of this run verifies:\n  " + "\n  ".join(damaged), where=str(self.folder),
                           remedy="restore one of them, or start over in a new output folder")  # fmt: skip
        return None

    def clean(self) -> None:
        """Remove what an interrupted save or purge left behind."""
        if self.folder.is_dir():
            for path in list(self.folder.iterdir()):
                if path.name.startswith((".staging-", ".trash-")):
                    shutil.rmtree(path, ignore_errors=True)

    def purge(self, keep_last: int, keep: set[int]) -> None:
        """Delete all but the `keep_last` newest and those in `keep`."""
        steps = self.steps()
        for step in steps[:-keep_last] if keep_last else steps:
            if step not in keep:
                self._trash(self.path(step))

    def _trash(self, path: Path) -> None:
        trash = path.with_name(f".trash-{path.name}-{os.getpid()}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)


def verify(folder: Path) -> Published:
    """Check every file of a checkpoint against its manifest. Raises `Damaged` naming the file."""
    manifest = read_manifest(folder)
    listed: dict[str, Any] = manifest["files"]
    for name, entry in listed.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{path} is missing")
        if path.stat().st_size != entry["size"]:
            raise Damaged(f"{path} has {path.stat().st_size} bytes, {entry['size']} were written")
        if _sha256(path) != entry["sha256"]:
            raise Damaged(f"{path} differs from what was written (SHA-256)")
    extra = {name for name, _ in _files(folder)} - set(listed) - {MANIFEST}
    if extra:
        raise Damaged(f"{folder} holds a file that was not written with it: {sorted(extra)[0]}")
    return Published(folder, manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise Damaged(f"{path} cannot be read") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict) or "step" not in manifest:
        raise Damaged(f"{path} is not a manifest")
    if manifest.get("schema", 0) > SCHEMA:
        raise RunError("SCHEMA", f"checkpoint schema {manifest['schema']} is newer than this lensmith reads ({SCHEMA})", where=str(path),
                       remedy="update lensmith")  # fmt: skip
    return manifest


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
