"""Losses that compare whole answers: DPO and its kin, ORPO, SimPO, KTO. Pure functions of log-probabilities, and the
objectives that take them from a row.

Shape letters: B sequences of a row, P pairs. log pi(y | x): sum over the answer's tokens, float64.
"""

# pyright: reportUnknownMemberType=false
# (the stubs of torch leave parts of these types open)

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lensmith.core.encoded import CHOSEN, GOOD, Compared, PackedRow
from lensmith.objective import options
from lensmith.objective.base import Objective, Terms, by_source, negative_log_likelihood

PairLoss = Literal["sigmoid", "hinge", "ipo", "robust"]
Average = Literal["tokens", "sequences"]


# -- losses -----------------------------------------------------------------------------------------------------------


def dpo_loss(delta_P: Tensor, beta: float, kind: PairLoss = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair by d = log pi/ref(chosen) - log pi/ref(rejected); for `ipo`, each divided by its length.

    sigmoid: -(1 - e) log s(b d) - e log s(-b d) (DPO, arXiv 2305.18290 eq. 7; e: conservative DPO).
    hinge: max(0, 1 - b d) (SLiC, arXiv 2305.10425; RSO, 2309.06657). ipo: (d - 1 / (2 b))^2 (arXiv 2310.12036 eq. 17).
    robust: (-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e) (arXiv 2403.00409).
    """
    if kind == "hinge":
        return torch.relu(1 - beta * delta_P)
    if kind == "ipo":
        return (delta_P - 1 / (2 * beta)).square()
    right, flipped = F.logsigmoid(beta * delta_P), F.logsigmoid(-beta * delta_P)
    if kind == "robust":
        return (label_smoothing * flipped - (1 - label_smoothing) * right) / (1 - 2 * label_smoothing)
    return -(1 - label_smoothing) * right - label_smoothing * flipped


def orpo_log_odds(chosen_P: Tensor, rejected_P: Tensor) -> Tensor:
    """log of odds(chosen) / odds(rejected), with odds(p) = p / (1 - p) of the mean probability a token
    (ORPO, arXiv 2403.07691 eq. 4 and 7)."""
    return (chosen_P - rejected_P) - (_log1mexp(chosen_P) - _log1mexp(rejected_P))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without loss of digits near 0 and far from it. An answer that is certain (x = 0)
    counts as certain to the last digit of float64."""
    x = torch.clamp(x, max=-torch.finfo(torch.float64).eps)
    near = x > -0.6931471805599453
    # either branch is given what it can take, so that neither makes the gradient of the other NaN
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )


def simpo_loss(margin_P: Tensor, beta: float, gamma: float) -> Tensor:
    """-log s(b m - g) with m the difference of mean log-probabilities a token (SimPO, arXiv 2405.14734 eq. 6)."""
    return -F.logsigmoid(beta * margin_P - gamma)


def kto_loss(ratio_B: Tensor, good_B: Tensor, kl: float, beta: float, good: float = 1.0, bad: float = 1.0) -> Tensor:
    """Loss of each answer by r = log pi/ref(answer): good * (1 - s(b (r - kl))) of a good one, of a bad one
    bad * (1 - s(b (kl - r))) (KTO, arXiv 2402.01306 eq. 8). `kl`: of the whole step, without gradient, at least 0."""
    away = torch.where(good_B, ratio_B - kl, kl - ratio_B)
    return torch.where(good_B, good, bad) * (1 - torch.sigmoid(beta * away))


# -- sequences --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sequences:
    """What a row says of its answers, on the device: log-probabilities under the model and the reference [B]."""

    of: Compared
    logp_B: Tensor
    length_B: Tensor
    weight_B: Tensor
    source_B: Tensor
    reference_B: Tensor | None

    @classmethod
    def read(cls, nll_S: Tensor, row: PackedRow) -> Sequences:
        of, device = row.compared, nll_S.device
        assert of is not None
        sequence_S = torch.from_numpy(of.sequence_S).to(device, torch.long)
        reference = None if of.reference_B is None else torch.from_numpy(of.reference_B).to(device).double()
        if reference is not None:
            # behind an infinite ratio some losses are flat, and the answer would silently not train
            reference = torch.where(reference.isfinite(), reference, torch.nan)
        return cls(
            of,
            -nll_S.new_zeros(len(of.role_B), dtype=torch.float64).index_add(0, sequence_S, nll_S.double()),
            torch.from_numpy(of.length_B).to(device).double(),
            torch.from_numpy(of.weight_B).to(device),
            torch.from_numpy(of.source_B).to(device, torch.long),
            reference,
        )

    @property
    def ratio_B(self) -> Tensor:
        """log pi/ref of each answer."""
        if self.reference_B is None:
            raise ValueError("a row without log-probabilities of the reference")
        return self.logp_B - self.reference_B

    @property
    def num_sources(self) -> int:
        return int(self.of.source_B.max(initial=-1)) + 1


def log_probabilities(nll_S: Tensor, row: PackedRow) -> Tensor:
    """log pi(y | x) of the answers of a row [B], float64."""
    return Sequences.read(nll_S, row).logp_B


def _pairs(values_B: Tensor) -> tuple[Tensor, Tensor]:
    return values_B[0::2], values_B[1::2]


def _nothing(at_SK: Tensor, units: Mapping[str, str]) -> Terms:
    """Of a row in which nothing is compared (it keeps a rank in step with others): zero, with its gradient."""
    return {name: (at_SK.sum() * 0.0, at_SK.new_zeros(())) for name in units}


def _likelihood(at: Sequences, nll_S: Tensor, average: Average) -> tuple[Tensor, Tensor]:
    """(sum, count) of the negative log-likelihood of chosen answers: over their tokens, or of each answer's mean."""
    if average == "sequences":
        chosen_P, weight_P = (-at.logp_B / at.length_B)[0::2], at.weight_B[0::2]
        return (chosen_P * weight_P).sum().float(), weight_P.sum()
    sequence_S = torch.from_numpy(at.of.sequence_S).to(nll_S.device, torch.long)
    chosen_S = torch.from_numpy(at.of.role_B == CHOSEN).to(nll_S.device)[sequence_S]
    weight_S = torch.where(chosen_S, at.weight_B[sequence_S], 0.0)
    return (nll_S * weight_S).sum(), weight_S.sum()


_UNITS: dict[Average, str] = {"tokens": "chosen", "sequences": "samples"}


class _Answers:
    """What the objectives of this file have in common: they need log-probabilities alone."""

    def at(self, logits_SV: Tensor, target_S: Tensor) -> Tensor:
        return negative_log_likelihood(logits_SV, target_S)[:, None]


# -- objectives -------------------------------------------------------------------------------------------------------

PAIR_FIGURES = (
    "loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "kl", "nll_chosen", "length_chosen",
    "length_rejected",
)  # fmt: skip
"""kl: log pi/ref for each token of the chosen answers: an estimate as far as the model itself would say them.
nll_chosen: -log pi for each token of the chosen answers."""


@dataclass(frozen=True)
class _Pairs(_Answers, ABC):
    """Pairs of answers. `sft`: weight of the likelihood of the chosen answers beside the loss."""

    beta: float
    sft: float = 0.0
    sft_average: Average = "tokens"

    @property
    def units(self) -> Mapping[str, str]:
        return {"loss": "samples"} | ({"sft": _UNITS[self.sft_average]} if self.sft else {})

    @property
    def figures(self) -> tuple[str, ...]:
        return PAIR_FIGURES

    @abstractmethod
    def rewards(self, at: Sequences) -> Tensor:
        """Implicit reward of each answer [B]: what is logged."""

    @abstractmethod
    def losses(self, at: Sequences) -> Tensor:
        """Of each pair [P]."""

    def terms(self, at_SK: Tensor, row: PackedRow) -> Terms:
        if row.compared is None:
            return _nothing(at_SK, self.units)
        at = Sequences.read(at_SK[:, 0], row)
        loss_P, weight_P = self.losses(at), at.weight_B[0::2]
        found: Terms = {"loss": ((loss_P * weight_P).sum().float(), weight_P.sum())}
        if self.sft:
            total, count = _likelihood(at, at_SK[:, 0], self.sft_average)
            found["sft"] = self.sft * total, count
        found["by_source"] = self._figures(at, loss_P.detach())
        return found

    @torch.no_grad()
    def _figures(self, at: Sequences, loss_P: Tensor) -> tuple[Tensor, Tensor]:
        chosen, rejected = _pairs(self.rewards(at).detach())
        lengths = _pairs(at.length_B)
        if at.reference_B is None:
            kl = torch.full_like(loss_P, torch.nan)
        else:
            kl = _pairs(at.ratio_B.detach())[0] / lengths[0]
        values = torch.stack([
            loss_P, chosen, rejected, chosen - rejected, (chosen > rejected).double(), kl,
            -_pairs(at.logp_B.detach())[0] / lengths[0], *lengths,
        ])  # fmt: skip
        return by_source(values, at.source_B[0::2], at.num_sources)


@dataclass(frozen=True)
class DPO(_Pairs):
    """Direct preference optimisation and its kin (`dpo_loss`). Rewards: beta * log pi/ref.

    length_normalised: log-ratios are divided by the length of the answer (as in SimPO and for IPO always).
    """

    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    length_normalised: bool = False

    def rewards(self, at: Sequences) -> Tensor:
        return self.beta * at.ratio_B

    def losses(self, at: Sequences) -> Tensor:
        ratio_B = at.ratio_B / at.length_B if self.length_normalised or self.loss == "ipo" else at.ratio_B
        chosen, rejected = _pairs(ratio_B)
        return dpo_loss(chosen - rejected, self.beta, self.loss, self.label_smoothing)


@dataclass(frozen=True)
class ORPO(_Pairs):
    """Likelihood of the chosen answers plus beta times -log s(log odds ratio) (arXiv 2403.07691 eq. 6)."""

    sft: float = 1.0

    def rewards(self, at: Sequences) -> Tensor:
        return self.beta * at.logp_B / at.length_B

    def losses(self, at: Sequences) -> Tensor:
        return -self.beta * F.logsigmoid(orpo_log_odds(*_pairs(at.logp_B / at.length_B)))


@dataclass(frozen=True)
class SimPO(_Pairs):
    """`simpo_loss`; with `sft` CPO-SimPO. Rewards: beta times the mean log-probability a token."""

    gamma: float = 0.5

    def rewards(self, at: Sequences) -> Tensor:
        return self.beta * at.logp_B / at.length_B

    def losses(self, at: Sequences) -> Tensor:
        chosen, rejected = _pairs(at.logp_B / at.length_B)
        return simpo_loss(chosen - rejected, self.beta, self.gamma)


@dataclass(frozen=True)
class KTO(_Answers):
    """`kto_loss` over labelled answers. The KL to the reference is taken from mismatched answers of the whole step."""

    beta: float
    good: float = 1.0
    bad: float = 1.0

    @property
    def units(self) -> Mapping[str, str]:
        return {"loss": "samples"}

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss", "reward_good", "reward_bad", "kl", "length_good", "length_bad")

    def terms(self, at_SK: Tensor, row: PackedRow) -> Terms:
        if row.compared is None:
            return _nothing(at_SK, self.units)
        at = Sequences.read(at_SK[:, 0], row)
        good_B = torch.from_numpy(at.of.role_B == GOOD).to(at_SK.device)
        loss_B = kto_loss(at.ratio_B, good_B, at.of.statistic, self.beta, self.good, self.bad)
        found: Terms = {"loss": ((loss_B * at.weight_B).sum().float(), at.weight_B.sum())}
        with torch.no_grad():
            reward_B, kl_B = self.beta * at.ratio_B.detach(), torch.full_like(loss_B, at.of.statistic)
            split = [torch.where(side, x, torch.nan) for x in (reward_B, at.length_B) for side in (good_B, ~good_B)]
            values = torch.stack([loss_B.detach(), split[0], split[1], kl_B, split[2], split[3]])
            found["by_source"] = by_source(values, at.source_B, at.num_sources)
        return found


@dataclass(frozen=True)
class Reward(_Answers):
    """-log s(r(chosen) - r(rejected) - margin) + center * (r(chosen) + r(rejected))^2 (arXiv 2009.01325 eq. 1; margin:
    Llama 2, arXiv 2307.09288 eq. 2; center: arXiv 2312.09244). `at` holds the value head's number of each answer."""

    center: float = 0.0

    @property
    def units(self) -> Mapping[str, str]:
        return {"loss": "samples"}

    @property
    def figures(self) -> tuple[str, ...]:
        return ("loss", "reward_chosen", "reward_rejected", "margin", "accuracy", "length_chosen", "length_rejected")

    def terms(self, at_SK: Tensor, row: PackedRow) -> Terms:
        of, device = row.compared, at_SK.device
        if of is None:
            return _nothing(at_SK, self.units)
        chosen, rejected = _pairs(at_SK[:, 0].double())
        weight_P = torch.from_numpy(of.weight_B).to(device)[0::2]
        loss_P = -F.logsigmoid(chosen - rejected - torch.from_numpy(of.margin_B).to(device)[0::2])
        loss_P = loss_P + self.center * (chosen + rejected).square()
        with torch.no_grad():
            lengths = _pairs(torch.from_numpy(of.length_B).to(device).double())
            values = torch.stack([
                loss_P, chosen, rejected, chosen - rejected, (chosen > rejected).double(), *lengths,
            ])  # fmt: skip
            source_B = torch.from_numpy(of.source_B).to(device, torch.long)
            said = by_source(values.detach(), source_B[0::2], int(of.source_B.max(initial=-1)) + 1)
        return {"loss": ((loss_P * weight_P).sum().float(), weight_P.sum()), "by_source": said}


def preference_objective(asked: options.DPO | options.ORPO | options.SimPO | options.KTO | options.Reward) -> Objective:
    """The objective that options ask for."""
    if isinstance(asked, options.DPO):
        return DPO(
            asked.beta, asked.sft_weight, asked.sft_average, asked.loss, asked.label_smoothing, asked.length_normalised
        )
    if isinstance(asked, options.ORPO):
        return ORPO(asked.beta, sft_average=asked.sft_average)
    if isinstance(asked, options.SimPO):
        return SimPO(asked.beta, asked.sft_weight, asked.sft_average, asked.gamma)
    if isinstance(asked, options.Reward):
        return Reward(asked.center)
    return KTO(asked.beta, asked.desirable_weight, asked.undesirable_weight)
