"""The one module that engines wrap: vision, body and head of a model and the objective, inside a single forward.

Batch in, named (sum, count) terms out. The head is called as a module (adapters on it work) and only at supervised
positions; above `CHUNK_VALUES` logits it runs in chunks that are recomputed in the backward pass, so that no tensor
with the vocabulary axis over all positions is ever kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lensmith.core.encoded import IMAGE, PackedRow
from lensmith.model.attention import AttentionPlan
from lensmith.model.value_head import NAME as HEAD_NAME
from lensmith.model.vision_cache import VisionCache, feature_key

CHUNK_VALUES = 1 << 26
"""Logits at once: 2^26 float32 values are 256 MiB, and cross entropy holds about three times that."""

MOST_POSITIONS = "most_positions"
"""In a row's `meta`: supervised positions of the largest row that any rank has in this step, where the ranks have to
call the head equally often."""

Terms = dict[str, tuple[torch.Tensor, torch.Tensor]]


class VisionLanguage(Protocol):
    """What the root needs of a family (see lensmith/family/base.py)."""

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Any, views: Any
    ) -> list[torch.Tensor]: ...
    def tower_only(self, model: nn.Module, pixels_PD: torch.Tensor, grids: Any, views: Any) -> list[torch.Tensor]: ...
    def project(self, model: nn.Module, features: list[torch.Tensor], views: Any) -> list[torch.Tensor]: ...
    def hidden(
        self, model: nn.Module, ids_BT: Any, features_NH: Any, image_mask_BT: Any, position_ids_3BT: Any, **kwargs: Any
    ) -> Any: ...
    def part_of(self, name: str) -> str: ...


class Objective(Protocol):
    """What the root needs of an objective (see lensmith/objective/base.py)."""

    @property
    def units(self) -> Mapping[str, str]: ...
    @property
    def figures(self) -> tuple[str, ...]: ...
    def at(self, logits_SV: torch.Tensor, target_S: torch.Tensor) -> torch.Tensor: ...
    def terms(self, at_SK: torch.Tensor, row: PackedRow) -> Terms: ...


VisionMode = Literal["trained", "projector", "frozen"]


@dataclass(frozen=True)
class Autocast:
    """`dtype` None: compute in the parameters' own type.

    `reuse`: a cast weight stays until the forward pass ends. Where blocks are computed again in the backward pass
    nothing else would keep it that long, so there it goes with its block.
    """

    device: str
    dtype: torch.dtype | None
    reuse: bool = True

    def __call__(self, reuse: bool | None = None) -> torch.autocast:
        dtype, reuse = self.dtype or torch.bfloat16, self.reuse if reuse is None else reuse
        return torch.autocast(self.device, dtype=dtype, enabled=self.dtype is not None, cache_enabled=reuse)


class Root(nn.Module):
    """Family model + objective. `cache` is used only while the tower is frozen."""

    def __init__(
        self,
        model: nn.Module,
        family: VisionLanguage,
        objective: Objective,
        *,
        autocast: Autocast,
        cache: VisionCache | None = None,
        value_head: nn.Module | None = None,
        chunk_values: int = CHUNK_VALUES,
    ):
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.family = family
        self.objective = objective
        self.autocast = autocast
        self.chunk_values = chunk_values
        self.vision_mode = vision_mode(model, family)
        self.cache = cache if self.vision_mode != "trained" else None
        self.vocabulary = int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
        """Asked before an engine spreads the head over ranks."""
        self.alone = True
        """Whether a picture that enters the cache is encoded by itself. The last bits of a matrix product depend on how
        many rows it has, so what is kept must not depend on what stood beside it."""
        self.reference: Callable[[PackedRow], None] | None = None
        """Tells a row what the reference says of its answers, where that is asked in each step."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def named(self) -> nn.Module:
        """The modules under the names that their parameters have: the model's, and a value head beside them."""
        if self.value_head is None:
            return self.model
        found = nn.Module()
        for name, module in [*self.model.named_children(), (HEAD_NAME, self.value_head)]:
            found.add_module(name, module)
        return found

    def ready(self, row: PackedRow) -> bool:
        """Every picture of the row has pixels, or features that stay until the next row is asked for. False when some
        were evicted since the row was read: it has to be read again."""
        have = set(row.pixel_image.tolist())
        if self.cache is None:
            return len(have) == len(row.image_keys)
        grids = row.image_grids_I3.tolist()
        keys = [feature_key(k, tuple(grids[i])) for i, k in enumerate(row.image_keys) if i not in have]
        held = self.cache.hold(keys)
        self.cache.learn(row.meta.get("handles", {}))
        return held

    def forward(self, row: PackedRow, *, figures_only: bool = False) -> Terms:
        """The objective's terms; with `figures_only` what it asks of each supervised position, as `at` [S, K]."""
        if self.reference is not None and not figures_only:
            with self.autocast(reuse=False):
                self.reference(row)
        with self.autocast():
            at_SK = self.figures(row, self.model, self.features(row))
            if figures_only:
                return {"at": (at_SK, at_SK.new_zeros(()))}
            return self.objective.terms(at_SK, row)

    def figures(self, row: PackedRow, model: nn.Module, features_NH: torch.Tensor | None) -> torch.Tensor:
        """What the objective asks of each supervised position [S, K], under `model`; with a value head the value of
        each answer [B, 1]."""
        device = self.device
        plan = AttentionPlan(row.segments, row.num_tokens, causal=True)
        out = self.family.hidden(
            model,
            torch.from_numpy(row.ids_T)[None].to(device, torch.long),
            features_NH,
            torch.from_numpy(row.kind_T == IMAGE)[None].to(device),
            torch.from_numpy(row.position_ids_3T)[:, None].to(device, torch.long),
            attention_mask=None,
            use_cache=False,
            attention_plans={None: plan},
        )
        if self.value_head is not None:
            last = np.array([row.num_tokens - 1]) if row.compared is None else row.compared.last_B
            hidden_TH: torch.Tensor = out.last_hidden_state[0]
            return self.value_head(hidden_TH[torch.from_numpy(last).to(device, torch.long)])[:, None]
        at = torch.from_numpy(row.supervised_S).to(device, torch.long)
        hidden_SH = out.last_hidden_state[0].index_select(0, at)
        target_S = torch.from_numpy(row.target_S).to(device, torch.long)
        return self._head(model, hidden_SH, target_S, int(row.meta.get(MOST_POSITIONS, 0)))

    @torch.no_grad()
    def warm(self, row: PackedRow) -> None:
        """Put the features of a row's pictures into the cache, encoded together."""
        self.alone = False
        with self.autocast():
            if len(row.image_keys):
                self._cached(row, self.model)
        self.alone = True

    def features(self, row: PackedRow, model: nn.Module | None = None) -> torch.Tensor | None:
        """Image features of every placed image in token order [N, H * levels]; each distinct picture computed once.

        `model`: another one with the same frozen parts, whose other parts are to be used.
        """
        if not len(row.image_keys):
            return None
        found = self._cached(row, model or self.model)
        if self.vision_mode == "projector":
            found = self.family.project(model or self.model, found, row.image_views)
        return torch.cat([found[i] for i in row.image_of_block.tolist()])

    def _cached(self, row: PackedRow, model: nn.Module) -> list[torch.Tensor]:
        grids = [tuple(g) for g in row.image_grids_I3.tolist()]
        if self.vision_mode == "trained":
            return self.family.encode_images(model, torch.from_numpy(row.pixels_PD), grids, row.image_views)
        found: dict[int, torch.Tensor] = {}
        keys = [feature_key(k, g) for k, g in zip(row.image_keys, grids, strict=True)]
        if self.cache is not None:
            hits = {i: self.cache.get(k) for i, k in enumerate(keys)}
            found = {i: v.to(self.device) for i, v in hits.items() if v is not None}
        fresh = [(n, int(i)) for n, i in enumerate(row.pixel_image.tolist()) if int(i) not in found]
        if fresh:
            sizes = [int(row.image_grids_I3[i].prod()) for i in row.pixel_image.tolist()]
            chunks = torch.from_numpy(row.pixels_PD).split(sizes)
            groups = [[f] for f in fresh] if self.cache is not None and self.alone else [fresh]
            for group in groups:
                pixels, of = torch.cat([chunks[n] for n, _ in group]), [i for _, i in group]
                new = self._encode(pixels, [grids[i] for i in of], [row.image_views[i] for i in of])
                for (_, i), value in zip(group, new, strict=True):
                    found[i] = value
                    if self.cache is not None and bool(torch.isfinite(value).all()):
                        self.cache.put(keys[i], value)
        return [found[i] for i in range(len(keys))]

    @torch.no_grad()
    def _encode(self, pixels_PD: torch.Tensor, grids: Any, views: Any) -> list[torch.Tensor]:
        run = self.family.encode_images if self.vision_mode == "frozen" else self.family.tower_only
        # a cast of a trained projector made here would put its gradient at another place in the backward pass than in
        # rows whose features are kept; DeepSpeed lays gradients out in the order in which they come, on every rank
        with self.autocast(reuse=False):
            return run(self.model, pixels_PD, grids, views)

    def _head(self, model: Any, hidden_SH: torch.Tensor, target_S: torch.Tensor, most: int) -> torch.Tensor:
        """`most`: positions in another rank's row; this one calls the head as often as for so many."""
        head = model.get_output_embeddings()

        def at(hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return self.objective.at(head(hidden), target)

        rows = max(1, self.chunk_values // self.vocabulary)
        chunks = -(-max(most, hidden_SH.shape[0]) // rows)
        if chunks <= 1:
            return at(hidden_SH, target_S)
        cuts = tuple(range(rows, chunks * rows, rows))
        each = zip(hidden_SH.tensor_split(cuts), target_S.tensor_split(cuts), strict=True)
        with self.autocast(reuse=True):  # all chunks have the same weight
            return torch.cat([checkpoint(at, *chunk, use_reentrant=False) for chunk in each])  # type: ignore[misc]


def vision_mode(model: nn.Module, family: VisionLanguage) -> VisionMode:
    """What of the vision path has gradients: all (`trained`), only the projector, or nothing (`frozen`)."""
    trained = {family.part_of(name) for name, p in model.named_parameters() if p.requires_grad}
    return "trained" if "vision" in trained else "projector" if "projector" in trained else "frozen"
