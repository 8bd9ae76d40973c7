"""The head of a reward model: one number for each answer, from the hidden state of its last token.

Names and file are those that LLaMA-Factory and earlier TRL write beside a model: `v_head.summary.weight` and `.bias` in
`value_head.safetensors`.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of safetensors leave parts of these types open)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from lensmith.core.errors import ModelError

FILE = "value_head.safetensors"
NAME = "v_head"
PREFIX = f"{NAME}."


class ValueHead(nn.Module):
    """[N, H] -> [N], in the type of its own parameters, which are float32 unless an engine casts them."""

    def __init__(self, hidden: int, device: torch.device):
        super().__init__()
        self.summary = nn.Linear(hidden, 1, device=device, dtype=torch.float32)

    def forward(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.summary(hidden_NH.to(self.summary.weight.dtype))[:, 0].float()


def make(hidden: int, device: torch.device, seed: int, folders: Sequence[Path | None]) -> ValueHead:
    """As the first of the folders has it that has one; else weights of variance 1 / (H + 1) (arXiv 2009.01325,
    appendix) and no bias. Deterministic in `seed`, and the random state of the run stays as it is.

    Raises `ModelError` VALUE_HEAD.
    """
    head = ValueHead(hidden, device)
    with torch.no_grad():
        drawn = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
        head.summary.weight.copy_(drawn / (hidden + 1) ** 0.5)
        head.summary.bias.zero_()
        files = [folder / FILE for folder in folders if folder is not None and (folder / FILE).is_file()]
        if files:
            _load(head, files[0])
    return head


def _load(head: ValueHead, path: Path) -> None:
    from safetensors.torch import load_file

    found = {name.removeprefix(PREFIX): value for name, value in load_file(path).items()}
    mine = dict(head.named_parameters())
    wrong = [n for n in mine if n not in found or found[n].shape != mine[n].shape]
    if wrong or len(found) != len(mine):
        raise ModelError("VALUE_HEAD", f"holds {sorted(found)}, not {sorted(mine)} of this model's width",
                         where=str(path), remedy="remove the file to begin with a new head")  # fmt: skip
    for name, value in found.items():
        mine[name].copy_(value)


def write(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """`tensors` by their names without the prefix."""
    from safetensors.torch import save_file

    named = {PREFIX + name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
    save_file(named, folder / FILE, metadata={"format": "pt"})
