"""Features of a frozen tower, kept by picture: in memory up to a limit and on disk up to a limit, least recently used
out first.

A key says all a feature depends on: the picture's bytes, its placement, and (through `fingerprint`, which also names
the folder on disk) the tower's weights and the pixel settings. Features of a picture alone do not depend on what stands
beside it, so a cache does not disturb a bit-identical resume.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORSAKEN_SECONDS = 3600
"""A temporary file this old was left by a dead run."""


class VisionCache:
    """`get` and `put` by key. Sizes in bytes; a limit of 0 switches that tier off.

    Features are kept in the memory of the machine, never of the GPU. `trouble` says why the disk tier is off.
    """

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, folder: Path | None = None):
        self.memory_bytes, self.disk_bytes, self.folder = memory_bytes, disk_bytes, folder
        self._memory: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._disk: OrderedDict[str, int] = OrderedDict()
        self._held: dict[str, torch.Tensor] = {}
        self._used = self._disk_used = 0
        self.hits = self.misses = 0
        self.trouble: str | None = None
        self._content_of: dict[str, str] = {}
        self._keys_of: dict[str, set[str]] = {}
        if folder is not None and disk_bytes:
            self._open(folder)

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = [(file, file.stat()) for file in folder.iterdir()]
        except OSError as error:  # FileNotFoundError too: another run may evict while this one looks
            self._switch_off(error)
            return
        for file, stat in sorted(found, key=lambda f: (f[1].st_mtime_ns, f[0].name)):
            if file.suffix == ".safetensors":
                self._enter(file.stem)
                self._disk[file.stem] = stat.st_size
                self._disk_used += stat.st_size
            elif file.suffix == ".tmp" and time.time() - stat.st_mtime > FORSAKEN_SECONDS:
                file.unlink(missing_ok=True)
        self._shrink_disk()

    def __contains__(self, key: str) -> bool:
        return key in self._held or key in self._memory or key in self._disk

    def hold(self, keys: Iterable[str]) -> bool:
        """Make sure that the next `get` of each of these finds it, whatever is evicted meanwhile. False where one is
        not here, or is damaged on disk. What was held before is let go."""
        self._held = {}
        found = {key: self.get(key) for key in keys}
        if any(value is None for value in found.values()):
            return False
        self._held = {key: value for key, value in found.items() if value is not None}
        return True

    def get(self, key: str) -> torch.Tensor | None:
        value = self._held.get(key)
        if value is None and key in self._memory:
            self._memory.move_to_end(key)
            value = self._memory[key]
        if value is None and key in self._disk:
            value = self._load(key)
            if value is not None:
                self._remember(key, value)
        self.hits, self.misses = self.hits + (value is not None), self.misses + (value is None)
        return value

    def put(self, key: str, value: torch.Tensor) -> None:
        value = value.detach().to("cpu", copy=True)
        self._enter(key)
        self._remember(key, value)
        if self.folder is not None and self.disk_bytes and key not in self._disk:
            self._store(key, value)

    def drop_bad(self, keys: Iterable[str]) -> None:
        """Forget those of these features that are not finite, on disk too: computed anew they may be."""
        for key in keys:
            value = self.get(key)
            if value is None or bool(torch.isfinite(value).all()):
                continue
            self._held.pop(key, None)
            if (old := self._memory.pop(key, None)) is not None:
                self._used -= old.numel() * old.element_size()
            if self.folder is not None and key in self._disk:
                self._disk_used -= self._disk.pop(key)
                (self.folder / f"{key}.safetensors").unlink(missing_ok=True)

    def _enter(self, key: str) -> None:
        self._keys_of.setdefault(_content(key), set()).add(key)

    def _remember(self, key: str, value: torch.Tensor) -> None:
        size = value.numel() * value.element_size()
        if size > self.memory_bytes or key in self._memory:
            return
        self._memory[key] = value
        self._used += size
        while self._used > self.memory_bytes:
            _, old = self._memory.popitem(last=False)
            self._used -= old.numel() * old.element_size()

    # -- disk ---------------------------------------------------------------------------------------------------

    def _load(self, key: str) -> torch.Tensor | None:
        assert self.folder is not None
        try:
            with safe_open(self.folder / f"{key}.safetensors", "pt") as file:
                value = file.get_tensor("features").clone()  # no mapping into a file that others may change
                intact = (file.metadata() or {}).get("blake2b") == _digest(value)
        except (OSError, SafetensorError):  # removed or cut short by someone else: computed anew
            intact, value = False, None
        if not intact:
            self._disk_used -= self._disk.pop(key)
            return None
        self._disk.move_to_end(key)
        return value

    def _store(self, key: str, value: torch.Tensor) -> None:
        assert self.folder is not None
        path = self.folder / f"{key}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        value = value.contiguous()
        try:
            save_file({"features": value}, temporary, metadata={"blake2b": _digest(value)})
            self._disk[key] = temporary.stat().st_size
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            self._disk.pop(key, None)
            temporary.unlink(missing_ok=True)
            self._switch_off(error)
            return
        self._disk_used += self._disk[key]
        self._shrink_disk()

    def _shrink_disk(self) -> None:
        assert self.folder is not None
        while self._disk_used > self.disk_bytes:
            old, size = self._disk.popitem(last=False)
            self._disk_used -= size
            (self.folder / f"{old}.safetensors").unlink(missing_ok=True)

    def _switch_off(self, error: Exception) -> None:
        """A full disk ends the disk tier, not the run. What is on it is still read."""
        self.disk_bytes = 0
        self.trouble = f"vision_cache: nothing more is kept in {self.folder} ({error})"

    # -- handles: cheap identities of pictures (paths), so that the data path need not open a picture that is cached --

    def learn(self, handles: dict[str, str]) -> None:
        self._content_of.update(handles)

    def known(self, handles: Iterable[str] | None = None) -> dict[str, str]:
        """Handle -> content key of those pictures (all that were learnt, if None) whose features are here."""
        out: dict[str, str] = {}
        for handle in self._content_of if handles is None else handles:
            content = self._content_of.get(handle)
            if content is not None and any(key in self for key in self._keys_of.get(content, ())):
                out[handle] = content
        return out


def _content(key: str) -> str:
    return key.rsplit("-", 1)[0]


def _digest(value: torch.Tensor) -> str:
    return hashlib.blake2b(value.contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()


def feature_key(content_key: str, grid: tuple[int, int, int]) -> str:
    return f"{content_key}-{grid[0]}x{grid[1]}x{grid[2]}"


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], settings: str) -> str:
    """Hash of names, types and values of the frozen weights, and of the pixel settings."""
    h = hashlib.blake2b(settings.encode(), digest_size=12)
    for name, tensor in tensors:
        h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
