"""The guard of a step: flags that all ranks agree on, read once before the optimizer moves, and the answer to a step
that is not finite. What went wrong so far is `History`; going back to a checkpoint keeps it.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from lensmith.engine.hooks import extremes, is_finite
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import Guard

Action = Literal["skip", "roll_back", "stop"]

RANKS_DIFFER = 1e-5
"""Gradient norms of ranks that have the same gradients differ by less than this share."""


@dataclass
class History:
    """What went wrong so far. It only grows: neither a roll-back nor a resume forgets it."""

    incidents: int = 0
    skipped: int = 0
    transient: int = 0
    spikes: int = 0
    roll_backs: list[list[int]] = field(default_factory=list[list[int]])
    """[step that was reached, step of the checkpoint] of each."""
    named: list[list[int]] = field(default_factory=list[list[int]])
    """[sample, number of the step from 0] for each sample that was found at fault."""

    def with_all_of(self, other: History) -> History:
        """What either of two records of one run knows: each has been written at another time."""
        largest = {k: max(getattr(self, k), getattr(other, k)) for k in ("incidents", "skipped", "transient", "spikes")}
        roll_backs = max(self.roll_backs, other.roll_backs, key=len)
        return History(**largest, roll_backs=roll_backs, named=max(self.named, other.named, key=len))

    def times(self, sample: int) -> int:
        """Steps in which a sample was at fault."""
        return len({step for other, step in self.named if other == sample})


@dataclass(frozen=True)
class Flags:
    """What all ranks know of a step. `loss_bad`, `norm_bad`: on any of them."""

    loss_bad: bool
    norm_bad: bool
    disagree: bool
    """The norms are finite, and not the same everywhere."""

    @property
    def good(self) -> bool:
        return not (self.loss_bad or self.norm_bad or self.disagree)


def agreed(loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """[4] float32 on the device of `norm`: loss bad, norm bad, norm, -norm; the largest over ranks in one all-reduce
    where there are several. `read_flags` takes it from the host."""
    bad = torch.stack([~torch.isfinite(loss), ~torch.isfinite(norm)]).to(torch.float32)
    known = torch.nan_to_num(norm.to(torch.float32), 0.0, 0.0, 0.0)
    flags = torch.cat([bad, torch.stack([known, -known])])
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return flags


def read_flags(values: Sequence[float]) -> Flags:
    """`values`: those of `agreed`."""
    loss_bad, norm_bad, high, low = values
    finite = not (loss_bad or norm_bad)
    return Flags(loss_bad > 0, norm_bad > 0, finite and high + low > RANKS_DIFFER * abs(high))


def bad_state(optimizer: MasterAdamW) -> list[str]:
    """Names (`param/NAME`, `exp_avg/NAME`, ...) in the training state that are not finite. One reduction and one read
    where all are."""
    found = [extremes(v) for _, v in optimizer.items() if v.is_floating_point() and v.numel()]
    if not found or is_finite(torch.stack([v.to(found[0].device) for v in found])):
        return []
    return [name for name, tensor in optimizer.items() if tensor.is_floating_point() and not is_finite(tensor)]


def to_exclude(rule: Guard, history: History, excluded: dict[int, int]) -> list[int]:
    """Samples that were at fault too often."""
    if rule.exclude_after is None:
        return []
    counts = Counter(sample for sample, _ in {(s, n) for s, n in history.named})
    return sorted(s for s, n in counts.items() if n >= rule.exclude_after and s not in excluded)


def decide(
    rule: Guard,
    history: History,
    *,
    step: int,
    in_a_row: int,
    recent: Sequence[int],
    cause: str,
    frozen: Sequence[str] = (),
) -> tuple[Action, str]:
    """What to do about an incident, and why. `recent`: steps not applied, this one included; `frozen`: parameters that
    are not finite and in no checkpoint's training state."""
    if rule.on_nonfinite == "stop":
        return "stop", "guard.on_nonfinite is stop"
    if frozen:
        return "stop", f"{frozen[0]} does not train, and no checkpoint of this run can bring it back"
    if cause == "overflow":
        return "stop", "the loss scale cannot be lowered any more"
    if cause == "transient":
        if history.transient >= rule.max_transient:
            return "stop", f"{history.transient} steps came out finite when they were computed again"
        return "skip", "it came out finite when it was computed again"
    why = _reason_to_go_back(rule, step, in_a_row, recent, cause)
    if not why:
        return "skip", "guard.on_nonfinite is skip"
    if history.roll_backs and step - history.roll_backs[-1][1] <= rule.roll_back_window:
        return "stop", f"{why}, and the run went back {step - history.roll_backs[-1][1]} steps ago already"
    return "roll_back", why


def _reason_to_go_back(rule: Guard, step: int, in_a_row: int, recent: Sequence[int], cause: str) -> str:
    if cause in ("bad_weights", "bad_state"):
        return "weights or moments are not finite"
    if rule.on_nonfinite == "roll_back":
        return "guard.on_nonfinite is roll_back"
    if in_a_row >= rule.max_in_a_row:
        return f"{in_a_row} steps in a row were not finite"
    inside = sum(step - rule.share_window < n for n in recent)
    if inside > rule.max_share * rule.share_window:
        return f"{inside} of the last {rule.share_window} steps were not finite"
    return ""
