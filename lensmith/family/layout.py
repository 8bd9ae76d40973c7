"""Where the parts of a model are, by the names of its modules: what trains, what gets adapters, what is recomputed."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from lensmith.data.resize import Rule
from lensmith.family.base import PartName
from lensmith.model.loading import PLAIN, Loading

if TYPE_CHECKING:
    from torch import nn

LLAMA_LINEARS = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
"""Linear layers of a block of Llama's kind."""
SIGLIP_LINEARS = r"(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
"""Linear layers of a block of a CLIP or SigLIP tower, as transformers names them."""


@dataclass(frozen=True)
class Layout:
    """`projector` and `vision` begin the names of their parameters, at any depth; the first that fits counts.
    The head is called lm_head and the embedding embed_tokens in every model; the rest is the language model."""

    projector: str
    vision: str
    vision_blocks: str
    """Path of the tower's list of layers, from the model."""
    language_blocks: str
    lora: Mapping[PartName, str]
    """Of each part that takes adapters, a full-match pattern for its linear layers."""


class LaidOut:
    """The parts of a family by its layout."""

    layout: ClassVar[Layout]
    loading: ClassVar[Loading] = PLAIN
    first_resize: ClassVar[Rule] = "area"
    """Which sizes LLaMA-Factory brings this family's pictures to before the model's own rule."""

    @classmethod
    def part_of(cls, name: str) -> PartName:
        """The part a parameter belongs to, by its live name or that on disk."""
        if re.search(rf"(^|\.)({cls.layout.projector})", name):
            return "projector"
        if re.search(rf"(^|\.)({cls.layout.vision})", name):
            return "vision"
        if re.search(r"(^|\.)lm_head\.", name):
            return "head"
        return "embeddings" if ".embed_tokens." in name else "language"

    def blocks(self, model: nn.Module, part: PartName) -> Sequence[nn.Module]:
        """The repeated layers of a part, in forward order (freeze by layers, recomputation, compile)."""
        paths = {"vision": self.layout.vision_blocks, "language": self.layout.language_blocks}
        found: Any = operator.attrgetter(paths[part])(model) if part in paths else ()
        return list(found)

    def lora_pattern(self, parts: Sequence[PartName]) -> str:
        """A full-match pattern for the linear layers of `parts`."""
        return "|".join(f"({self.layout.lora[p]})" for p in parts if p in self.layout.lora)
