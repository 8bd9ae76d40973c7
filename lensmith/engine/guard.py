"""The guard of a step: flags that all ranks agree on, read once before the optimizer moves, and the answer to a step
that is not finite. What went wrong so far is `History`; going back to a checkpoint keeps it.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch

from lensmith.engine.hooks import extremes, is_finite
from lensmith.engine.optimizer import MasterAdamW
from lensmith.engine.options import Guard
from lensmith.parallel.ranks import Ranks

Action = Literal["skip", "roll_back", "stop"]

RANKS_DIFFER = 1e-5
"""Gradient norms of ranks that have the same gradients differ by less than this share."""
LARGEST = float(torch.finfo(torch.float32).max)


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


@dataclass(frozen=True)
class Figures:
    """What all ranks know of a step behind its backward passes, from one exchange."""

    loss: float
    """Of the whole step."""
    parts: dict[str, float]
    """Norm of the gradient per part."""
    flags: Flags
    votes: tuple[float, ...]
    """Of each question the largest answer."""
    sources: tuple[tuple[float, float], ...]
    """Of each source: sum of the losses and number of positions."""
    seconds: tuple[float, ...]
    """Of each rank."""

    @property
    def norm(self) -> float:
        return _total(self.parts.values())


@dataclass(frozen=True)
class Mine:
    """What one rank says. `whole`, `shares`: part -> norm of the gradients that every rank has, and of its shares of
    those that are spread over ranks; float32 scalars on the device."""

    loss: torch.Tensor
    whole: dict[str, torch.Tensor]
    shares: dict[str, torch.Tensor]
    votes: Sequence[float] = ()
    sources: Sequence[tuple[float, float]] = ()
    seconds: float = 0.0
    copies: int = 1
    """Ranks that hold the same shares."""
    scale: float = 1.0
    """What the gradients are to be divided by."""


def agree(mine: Mine, ranks: Ranks) -> Figures:
    """One all-gather of a few numbers, and one transfer from the device. Every rank adds them up in the same order, so
    all come to the same bits. The numbers of parts, votes and sources are the same on all ranks."""
    norms = [*mine.whole.values(), *mine.shares.values()]
    host = [*mine.votes, *(v for pair in mine.sources for v in pair), mine.seconds]
    device = mine.loss.device
    vector = torch.cat([
        mine.loss.double()[None],
        torch.stack(norms).double() if norms else torch.zeros(0, dtype=torch.float64, device=device),
        torch.tensor(host, dtype=torch.float64, device=device),
    ])  # fmt: skip
    found = ranks.gather_tensor(vector, "agree on the step") if ranks.several else vector[None]
    return read_figures(cast("list[list[float]]", found.tolist()), mine)


def read_figures(rows: Sequence[Sequence[float]], mine: Mine) -> Figures:
    """The numbers of every rank, by rank; `mine` says what they are."""
    columns = list(zip(*rows, strict=True))
    losses, columns = columns[0], columns[1:]
    whole = dict(zip(mine.whole, columns, strict=False))
    shares = dict(zip(mine.shares, columns[len(whole) :], strict=False))
    host = columns[len(whole) + len(shares) :]
    votes, pairs, seconds = host[: len(mine.votes)], host[len(mine.votes) : -1], host[-1]
    totals = [_total(values) for values in zip(*whole.values(), strict=True)]  # of each rank: equal where all is well
    squares = {part: values[0] ** 2 for part, values in whole.items()}
    for part, values in shares.items():
        squares[part] = squares.get(part, 0.0) + sum(v * v for v in values) / mine.copies
    parts = {part: math.sqrt(square) / mine.scale for part, square in squares.items()}
    norm_bad = not _total([*totals, *parts.values()]) <= LARGEST
    disagree = bool(totals) and not norm_bad and max(totals) - min(totals) > RANKS_DIFFER * max(totals)
    flags = Flags(not all(map(math.isfinite, losses)), norm_bad, disagree)
    sums = [sum(values) for values in pairs]
    return Figures(
        sum(losses), parts, replace(flags, disagree=disagree and not flags.loss_bad),
        tuple(max(v) for v in votes), tuple(zip(sums[::2], sums[1::2], strict=True)), tuple(seconds),
    )  # fmt: skip


def _total(norms: Iterable[float]) -> float:
    return math.sqrt(sum(n * n for n in norms))


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
        return "stop", "the gradient overflows at every loss scale that was tried"
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
