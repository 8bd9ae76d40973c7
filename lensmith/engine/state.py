"""The training state of a checkpoint: float32 parameters and moments by name, random state, progress. No pickle."""

# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false
# (the stubs of torch and safetensors leave parts of these types open)

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lensmith.core.errors import RunError
from lensmith.engine.determinism import random_state, restore, seed_all
from lensmith.engine.inner import Shape
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.progress import Progress
from lensmith.model.load import read_header
from lensmith.parallel.ranks import Ranks
from lensmith.parallel.shares import Piece


def write_state(folder: Path, optimizer: MasterAdamW, progress: Progress) -> None:
    """`training.safetensors`, `random.safetensors` and `progress.json`. With several ranks each writes its own pieces
    and its own random state, and the first one the progress."""
    taken_state(optimizer, progress, copy=False)(folder)


def taken_state(optimizer: MasterAdamW, progress: Progress, *, copy: bool) -> Callable[[Path], None]:
    """The state as it is now; what is returned writes it into a folder. With `copy` that may be later, while training
    goes on. Writing raises `RunError` NONFINITE."""
    ranks = optimizer.ranks
    tensors = dict(_on_host(piece, copy) for piece in optimizer.pieces())
    random_tensors, random = random_state()
    shapes = {name: list(shape) for name, shape in optimizer.shapes().items()}
    about = json.dumps({"progress": progress.to_json(), "shapes": shapes, "ranks": ranks.size}, allow_nan=False)

    def write(folder: Path) -> None:
        if bad := [k for k, v in tensors.items() if not bool(torch.isfinite(v).all())]:
            raise RunError("NONFINITE", f"{bad[0]} is not finite; this state is not saved",
                           remedy="resume from the last checkpoint")  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / _numbered("training", ranks))
        save_file(random_tensors, folder / _numbered("random", ranks), metadata={"random": random})
        if ranks.is_main:
            (folder / "progress.json").write_text(about, encoding="utf-8")

    return write


def _on_host(piece: Piece, copy: bool) -> tuple[str, torch.Tensor]:
    """`param/NAME` and a whole tensor; `param/NAME@START` and some of its elements, flat."""
    host = piece.values.detach().to("cpu", copy=copy).contiguous()
    return (piece.key, host) if piece.is_whole else (f"{piece.key}@{piece.start}", host.flatten())


def _numbered(name: str, ranks: Ranks) -> str:
    return f"{name}-{ranks.rank + 1:05d}-of-{ranks.size:05d}.safetensors" if ranks.several else f"{name}.safetensors"


class Saved:
    """The training state in a checkpoint's `state` folder, whatever engine and however many ranks wrote it. Headers are
    read here, values when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        state: dict[str, Any] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        self.progress = Progress.from_json(state["progress"])
        self.shapes = {name: tuple(shape) for name, shape in state["shapes"].items()}
        self.ranks = int(state["ranks"])
        self._pieces: dict[str, list[tuple[int, int, Path, str]]] = {}
        for file in sorted(folder.glob("training*.safetensors")):
            for key, entry in read_header(file).items():
                name, _, begin = key.rpartition("@") if "@" in key else (key, "", "0")
                size, begin = math.prod(entry["shape"]), int(begin)
                self._pieces.setdefault(name, []).append((begin, begin + size, file, key))
        self._kinds: dict[str, set[str]] = {}
        for key, pieces in self._pieces.items():
            pieces.sort()
            kind, _, name = key.partition("/")
            self._kinds.setdefault(name, set()).add(kind)

    def check(self, shapes: dict[str, Shape], moments: Callable[[str], Mapping[str, Shape]]) -> None:
        """`moments`: parameter name -> its moments and their shapes. Raises `RunError` RESUME where the state is not
        that of parameters of these shapes, or not whole."""
        if shapes != self.shapes:
            other = sorted(set(shapes.items()) ^ set(self.shapes.items()))[0]
            raise RunError("RESUME", f"the checkpoint trains other parameters: {other[0]} {other[1]}",
                           where=str(self.folder),
                           remedy="keep model.path and tune as they were, or start in a new output folder")  # fmt: skip
        missing = {f"param/{name}" for name in shapes} - set(self._pieces)
        for key in [*sorted(missing), *self._pieces]:
            kind, _, name = key.partition("/")
            own = {"param": self.shapes[name], **moments(name)} if name in self.shapes else {}
            if kind not in own or not self._covers(key, math.prod(own[kind])):
                remedy = "restore this checkpoint, or use a new output folder"
                raise RunError("RESUME", f"the state {key} belongs to no parameter of this run, or is not whole",
                               where=str(self.folder), remedy=remedy)  # fmt: skip

    def _covers(self, key: str, size: int) -> bool:
        at = 0
        for begin, end, _, _ in self._pieces.get(key, ()):
            if begin > at:
                return False
            at = max(at, end)
        return at == size

    def has(self, key: str) -> bool:
        return key in self._pieces

    def has_all(self, name: str, moments: Mapping[str, Shape]) -> bool:
        """Whether these are the moments that were saved: another optimizer keeps others."""
        return self._kinds.get(name) == {"param", *moments} and all(
            self._covers(f"{kind}/{name}", math.prod(shape)) for kind, shape in moments.items()
        )

    def read(self, key: str, start: int, stop: int) -> torch.Tensor | None:
        """Elements `start` to `stop` of a flattened tensor, from as many files as hold them (a rank may have a share of
        none); None where it was not saved."""
        if key not in self._pieces:
            return None
        if start == stop:
            return torch.zeros(0)
        parts: list[torch.Tensor] = []
        at = start
        for begin, end, file, name in self._pieces[key]:
            if begin <= at < end and at < stop:
                with safe_open(file, "pt") as f:
                    whole = f.get_tensor(name) if "@" not in name else f.get_slice(name)[at - begin : stop - begin]
                flat = whole.reshape(-1)[at:stop] if "@" not in name else whole
                parts.append(flat)
                at += flat.numel()
        if at < stop:
            raise RunError("RESUME", f"the state {key} is not whole", where=str(self.folder))
        return torch.cat(parts) if len(parts) != 1 else parts[0]

    def random(self, ranks: Ranks) -> None:
        """Set the generators as this rank's were. A rank that was not there goes on with a state of its own, drawn from
        the first one's."""
        name = _numbered("random", replace(ranks, size=self.ranks))
        known = ranks.rank < self.ranks
        file = self.folder / (name if known else _numbered("random", Ranks(0, self.ranks)))
        with safe_open(file, "pt") as f:
            restore({key: f.get_tensor(key) for key in f.keys()}, f.metadata()["random"])  # noqa: SIM118
        if not known:
            seed_all(int(torch.randint(1 << 62, ())) + ranks.rank)


def read_progress(folder: Path) -> Progress:
    """How far a checkpoint's run is, without its tensors."""
    return Progress.from_json(json.loads((folder / "progress.json").read_text(encoding="utf-8"))["progress"])


def read_state(folder: Path, optimizer: MasterAdamW) -> Progress:
    """Restore parameters, moments and random state, of any number of ranks and any engine. Names and shapes are checked
    before anything is touched."""
    saved = Saved(folder)
    saved.check(optimizer.shapes(), optimizer.moments)
    optimizer.begin_without(saved.has)  # moments that began later: as they were before they began
    optimizer.load_pieces(saved.read)
    saved.random(optimizer.ranks)
    return saved.progress


def carry_state(folder: Path, optimizer: MasterAdamW, *, moments: bool) -> None:
    """Take from another stage's state what this optimizer trains too, by name: float32 parameters, and its moments
    if `moments`. What only one of them trains is left as it is. Raises `RunError` RESUME for another shape."""
    saved = Saved(folder)
    for name, shape in optimizer.shapes().items():
        if saved.shapes.get(name, shape) != shape:
            raise RunError("RESUME", f"{name} had another shape in the stage before", where=str(folder))

    def read(key: str, start: int, stop: int) -> torch.Tensor | None:
        kind, _, name = key.partition("/")
        if kind == "param":
            return saved.read(key, start, stop)
        return saved.read(key, start, stop) if moments and saved.has_all(name, optimizer.moments(name)) else None

    optimizer.load_pieces(read)
