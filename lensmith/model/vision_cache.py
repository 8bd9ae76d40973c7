"""Features of a frozen tower, kept by picture: in memory up to a limit, then on disk up to a limit, oldest out first.

A key says all a feature depends on: the picture's bytes, its placement, and (through `fingerprint`, which also names
the folder on disk) the tower's weights and the pixel settings. Features of a picture alone equal those of the picture
in a batch bit for bit, so a cache does not disturb a bit-identical resume.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class VisionCache:
    """`get` and `put` by key. Sizes in bytes; a limit of 0 switches that tier off."""

    def __init__(self, memory_bytes: int, disk_bytes: int = 0, folder: Path | None = None):
        self.memory_bytes, self.disk_bytes, self.folder = memory_bytes, disk_bytes, folder
        self._memory: OrderedDict[str, torch.Tensor] = OrderedDict()
        self._disk: OrderedDict[str, int] = OrderedDict()
        self._used = self._disk_used = 0
        self.hits = self.misses = 0
        self._keys_of: dict[str, str] = {}
        if folder is not None and disk_bytes:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_mtime):
                self._disk[file.stem] = file.stat().st_size
                self._disk_used += self._disk[file.stem]

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._disk

    def get(self, key: str) -> torch.Tensor | None:
        if key in self._memory:
            self._memory.move_to_end(key)
            self.hits += 1
            return self._memory[key]
        if key in self._disk and self.folder is not None:
            try:
                value = load_file(self.folder / f"{key}.safetensors")["features"]
            except (OSError, SafetensorError, KeyError):  # removed or cut short by someone else: computed anew
                self._disk_used -= self._disk.pop(key)
            else:
                self.hits += 1
                self._remember(key, value)
                return value
        self.misses += 1
        return None

    def put(self, key: str, value: torch.Tensor) -> None:
        value = value.detach().clone()
        self._remember(key, value)
        if self.folder is not None and self.disk_bytes and key not in self._disk:
            self._store(key, value)

    def _remember(self, key: str, value: torch.Tensor) -> None:
        size = value.numel() * value.element_size()
        if size > self.memory_bytes or key in self._memory:
            return
        self._memory[key] = value
        self._used += size
        while self._used > self.memory_bytes:
            _, old = self._memory.popitem(last=False)
            self._used -= old.numel() * old.element_size()

    def _store(self, key: str, value: torch.Tensor) -> None:
        assert self.folder is not None
        path = self.folder / f"{key}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        save_file({"features": value.cpu().contiguous()}, temporary)
        os.replace(temporary, path)
        self._disk[key] = path.stat().st_size
        self._disk_used += self._disk[key]
        while self._disk_used > self.disk_bytes:
            old, size = self._disk.popitem(last=False)
            self._disk_used -= size
            (self.folder / f"{old}.safetensors").unlink(missing_ok=True)

    # Handles: cheap identities of pictures (paths), so that the data path need not open a picture that is cached.

    def learn(self, handles: dict[str, str]) -> None:
        self._keys_of.update(handles)

    def known(self) -> dict[str, str]:
        """Handle -> content key of every picture whose features are here."""
        present = {k.rsplit("-", 1)[0] for k in self._memory} | {k.rsplit("-", 1)[0] for k in self._disk}
        return {h: k for h, k in self._keys_of.items() if k in present}


def feature_key(content_key: str, grid: tuple[int, int, int]) -> str:
    return f"{content_key}-{grid[0]}x{grid[1]}x{grid[2]}"


def fingerprint(tensors: Iterable[tuple[str, torch.Tensor]], settings: str) -> str:
    """Hash of names, types and values of the frozen weights, and of the pixel settings."""
    h = hashlib.blake2b(settings.encode(), digest_size=12)
    for name, tensor in tensors:
        h.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        h.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()
