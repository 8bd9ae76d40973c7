"""Losses that compare answers: derived by hand on a few numbers, equal to TRL's own code on whole micro-batches, sums
that add up over rows, and finite wherever log-probabilities lie."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from preference_kit import Answer, compared_row, nll_of
from torch import Tensor
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer

from lensmith.core.encoded import BAD, CHOSEN, GOOD, REJECTED, PackedRow
from lensmith.objective import options
from lensmith.objective.base import Objective, by_source
from lensmith.objective.next_token import NextTokenLoss
from lensmith.objective.preference import PAIR_FIGURES, orpo_log_odds, preference_objective

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "You are importing from 'trl.experimental'")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

GAP = 1e-6
"""Largest difference to TRL's code, of losses and of gradients."""


def made(kind: str, **asked: Any) -> Objective:
    kinds = {"dpo": options.DPO, "orpo": options.ORPO, "simpo": options.SimPO, "kto": options.KTO,
             "reward": options.Reward}  # fmt: skip
    return preference_objective(kinds[kind](**asked))


def mean(objective: Objective, at_SK: Tensor, row: PackedRow) -> Tensor:
    """What is trained on a step that is this row alone: each term by its own count."""
    terms = objective.terms(at_SK, row)
    return torch.stack([terms[n][0] / terms[n][1] for n in objective.units]).sum()


def loss_and_slopes(objective: Objective, answers: Sequence[Answer], kl: float = 0.0) -> tuple[float, list[float]]:
    """The loss, and its derivative by the log-probability of the tokens of each answer, which is one number."""
    nll_S1 = nll_of(answers)
    loss = mean(objective, nll_S1, compared_row(answers, kl))
    (slope_S1,) = torch.autograd.grad(loss, nll_S1)
    each = torch.split(-slope_S1[:, 0], [len(a.logps) for a in answers])
    assert all(float((e - e[0]).abs().max()) <= 1e-7 for e in each)
    return loss.item(), [float(e[0]) for e in each]


# -- by hand ----------------------------------------------------------------------------------------------------------


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log s(x), whose derivative is -s(-x)."""
    return math.log(1 + math.exp(-x))


PAIR = [Answer(CHOSEN, (-1.0, -0.5), -2.0), Answer(REJECTED, (-1.0,), -0.7)]
"""log pi/ref: -1.5 + 2.0 = 0.5 of two tokens and -1.0 + 0.7 = -0.3 of one: d = 0.8, by length 0.25 + 0.3 = 0.55."""
Z = math.log(math.exp(-0.75) / (1 - math.exp(-0.75))) - math.log(math.exp(-1.0) / (1 - math.exp(-1.0)))
"""Of the same pair the log of the ratio of odds. d odds: d log(p / (1 - p)) / d log p = 1 / (1 - p)."""
BY_HAND: dict[str, tuple[Objective, float, float, float]] = {
    # loss, and its derivative by a token's log-probability of the chosen and of the rejected answer
    "sigmoid": (made("dpo", beta=0.5), nls(0.4), -0.5 * s(-0.4), 0.5 * s(-0.4)),
    "conservative": (
        made("dpo", beta=0.5, label_smoothing=0.1), 0.9 * nls(0.4) + 0.1 * nls(-0.4),
        0.5 * (-0.9 * s(-0.4) + 0.1 * s(0.4)), 0.5 * (0.9 * s(-0.4) - 0.1 * s(0.4)),
    ),
    "robust": (
        made("dpo", loss="robust", beta=0.5, label_smoothing=0.1), (0.9 * nls(0.4) - 0.1 * nls(-0.4)) / 0.8,
        0.5 * (-0.9 * s(-0.4) - 0.1 * s(0.4)) / 0.8, 0.5 * (0.9 * s(-0.4) + 0.1 * s(0.4)) / 0.8,
    ),
    "hinge": (made("dpo", loss="hinge", beta=0.5), 1 - 0.4, -0.5, 0.5),
    "hinge, far enough": (made("dpo", loss="hinge", beta=2.0), 0.0, 0.0, 0.0),
    "ipo": (made("dpo", loss="ipo", beta=0.5), (0.55 - 1) ** 2, 2 * (0.55 - 1) / 2, -2 * (0.55 - 1)),
    "normalised": (
        made("dpo", length_normalised=True, beta=2.0), nls(1.1), -2.0 * s(-1.1) / 2, 2.0 * s(-1.1)
    ),
    "normalised hinge": (made("dpo", loss="hinge", length_normalised=True, beta=1.0), 1 - 0.55, -1 / 2, 1.0),
    "with likelihood": (
        made("dpo", beta=0.5, sft_weight=0.3), nls(0.4) + 0.3 * 1.5 / 2, -0.5 * s(-0.4) - 0.3 / 2, 0.5 * s(-0.4)
    ),
    "orpo": (
        made("orpo", beta=0.1), 1.5 / 2 + 0.1 * nls(Z), -1 / 2 - 0.1 * s(-Z) / (1 - math.exp(-0.75)) / 2,
        0.1 * s(-Z) / (1 - math.exp(-1.0)),
    ),
    "simpo": (made("simpo", beta=2.0, gamma=0.3), nls(2 * 0.25 - 0.3), -2 * s(-0.2) / 2, 2 * s(-0.2)),
    "simpo with likelihood": (
        made("simpo", beta=2.0, gamma=0.3, sft_weight=0.4), nls(0.2) + 0.4 * 0.75, -2 * s(-0.2) / 2 - 0.4 / 2,
        2 * s(-0.2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_pairs_by_hand(name: str) -> None:
    objective, loss, chosen, rejected = BY_HAND[name]
    found, slopes = loss_and_slopes(objective, PAIR)
    assert found == pytest.approx(loss, abs=GAP)
    assert slopes == pytest.approx([chosen, rejected], abs=GAP)


KTO_CASES = {
    # good answers: 1 - s(beta (r - kl)), bad ones: 1 - s(beta (kl - r)); d s(x) = s(x) s(-x)
    "below the kl": ({}, 0.9, 0.5 * (0.5 - 0.9), 0.5 * (0.9 + 0.3), 1.0, 1.0),
    "above the kl": ({}, 0.1, 0.5 * (0.5 - 0.1), 0.5 * (0.1 + 0.3), 1.0, 1.0),
    "no kl": ({}, 0.0, 0.25, 0.15, 1.0, 1.0),
    "weights": ({"desirable_weight": 0.7, "undesirable_weight": 1.2}, 0.1, 0.2, 0.2, 0.7, 1.2),
}


@pytest.mark.parametrize("name", KTO_CASES)
def test_labels_by_hand(name: str) -> None:
    asked, kl, good, bad, of_good, of_bad = KTO_CASES[name]
    answers = [Answer(GOOD, PAIR[0].logps, -2.0), Answer(BAD, PAIR[1].logps, -0.7)]
    loss, slopes = loss_and_slopes(made("kto", beta=0.5, **asked), answers, kl)
    assert loss == pytest.approx((of_good * (1 - s(good)) + of_bad * (1 - s(bad))) / 2, abs=GAP)
    expected = [-of_good * 0.5 * s(good) * s(-good) / 2, of_bad * 0.5 * s(bad) * s(-bad) / 2]
    assert slopes == pytest.approx(expected, abs=GAP)


def test_likelihoods_average_over_tokens_or_over_answers_by_hand() -> None:
    """Chosen answers of two tokens (1.0 + 0.5) and of one (2.0), the second of weight 3."""
    two = [*PAIR, Answer(CHOSEN, (-2.0,), weight=3.0), Answer(REJECTED, (-1.0, -1.0), weight=3.0)]
    row, nll_S1 = compared_row(two), nll_of(two)
    tokens = made("dpo", sft_weight=0.5).terms(nll_S1, row)["sft"]
    assert [x.item() for x in tokens] == pytest.approx([0.5 * (1.5 + 3 * 2.0), 1 * 2 + 3 * 1])
    answers = made("dpo", sft_weight=0.5, sft_average="sequences").terms(nll_S1, row)["sft"]
    assert [x.item() for x in answers] == pytest.approx([0.5 * (1.5 / 2 + 3 * 2.0), 1 + 3])
    (slope,) = torch.autograd.grad(answers[0], nll_S1)
    assert slope[:, 0].tolist() == pytest.approx([0.25, 0.25, 0, 1.5, 0, 0])
    orpo = made("orpo", sft_average="sequences")
    assert [x.item() for x in orpo.terms(nll_S1, row)["sft"]] == pytest.approx([1.5 / 2 + 3 * 2.0, 4])


def test_rewards_by_hand() -> None:
    """Of values 0.8 and 0.5 with a margin of 0.1: -log s(0.2), and 0.01 * 1.3^2."""
    answers = [Answer(CHOSEN, (0.0,), margin=0.1), Answer(REJECTED, (0.0,), margin=0.1)]
    value_B1 = torch.tensor([[0.8], [0.5]], requires_grad=True)
    loss = mean(made("reward", center=0.01), value_B1, compared_row(answers, reference=False))
    (slope,) = torch.autograd.grad(loss, value_B1)
    assert loss.item() == pytest.approx(nls(0.2) + 0.01 * 1.3**2, abs=GAP)
    assert slope[:, 0].tolist() == pytest.approx([-s(-0.2) + 0.02 * 1.3, s(-0.2) + 0.02 * 1.3], abs=GAP)
    heavy = compared_row([Answer(a.role, a.logps, weight=3.0, margin=0.1) for a in answers], reference=False)
    terms = made("reward", center=0.01).terms(value_B1, heavy)
    assert [x.item() for x in terms["loss"]] == pytest.approx([3 * loss.item(), 3])


def test_what_is_logged_by_hand() -> None:
    """Of two sources. A pair without a reference has no KL to it, which is then not counted."""
    answers = [*PAIR, Answer(CHOSEN, (-2.0,), -1.0, 5.0, 1), Answer(REJECTED, (-1.0, -1.0), -4.0, 5.0, 1)]
    objective = made("dpo", beta=0.5)
    terms = objective.terms(nll_of(answers), compared_row(answers))
    assert [x.item() for x in terms["loss"]] == pytest.approx([nls(0.4) + 5 * nls(-1.5), 6]), "weighted"
    sums, counts = terms["by_source"]
    assert objective.figures == PAIR_FIGURES and counts.tolist() == [[1, 1]] * 9
    second = [nls(-1.5), -0.5, 1.0, -1.5, 0.0, -1.0 / 1, 2.0 / 1, 1, 2]  # ratios -1 and 2: unweighted
    first = [nls(0.4), 0.25, -0.15, 0.4, 1.0, 0.5 / 2, 1.5 / 2, 2, 1]
    assert sums[:, 0].tolist() == pytest.approx(first) and sums[:, 1].tolist() == pytest.approx(second)
    sums, counts = made("simpo").terms(nll_of(answers), compared_row(answers, reference=False))["by_source"]
    at = PAIR_FIGURES.index("kl")
    assert counts[at].tolist() == [0, 0] == sums[at].tolist() and counts[0].tolist() == [1, 1]
    with pytest.raises(ValueError, match="without log-probabilities of the reference"):
        objective.terms(nll_of(answers), compared_row(answers, reference=False))


def test_what_is_logged_of_labels_by_hand() -> None:
    answers = [Answer(GOOD, (-1.0, -0.5), -2.0), Answer(BAD, (-1.0,), -0.7), Answer(BAD, (-3.0,), -1.0, 2.0, 2)]
    objective = made("kto", beta=0.5)
    terms = objective.terms(nll_of(answers), compared_row(answers, 0.1))
    assert [x.item() for x in terms["loss"]] == pytest.approx([2 * (1 - s(0.2)) + 2 * (1 - s(0.5 * 2.1)), 4]), (
        "weighted"
    )
    sums, counts = terms["by_source"]
    named = dict(zip(objective.figures, zip(sums.tolist(), counts.tolist(), strict=True), strict=True))
    assert named["reward_good"] == (pytest.approx([0.25, 0, 0]), [1, 0, 0])
    assert named["reward_bad"] == (pytest.approx([-0.15, 0, -1.0]), [1, 0, 1])
    assert named["length_good"] == ([2, 0, 0], [1, 0, 0]) and named["length_bad"] == ([1, 0, 1], [1, 0, 1])
    assert named["kl"] == (pytest.approx([0.2, 0, 0.1]), [2, 0, 1])
    assert named["loss"] == (pytest.approx([1 - s(0.2) + 1 - s(0.2), 0, 1 - s(0.5 * (0.1 + 2.0))]), [2, 0, 1])


def test_sums_by_source_leave_nan_out() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [torch.nan, 3.0, torch.nan]])
    sums, counts = by_source(values, torch.tensor([1, 0, 1]), 3)
    assert sums.tolist() == [[2, 5, 0], [3, 0, 0]] and counts.tolist() == [[1, 2, 0], [1, 0, 0]]


# -- TRL --------------------------------------------------------------------------------------------------------------


def alone() -> Any:
    """An accelerator of one process."""
    same = lambda x: x  # noqa: E731
    return SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same)


def trainer(kind: type, **own: Any) -> Any:
    """A trainer of TRL whose constructor, which loads models and data, has not run."""
    bare = object.__new__(kind)
    own = {"accelerator": alone(), "aux_loss_enabled": False, "_metrics": {"train": _Lists(), "eval": _Lists()},
           "_total_train_tokens": 0, "_tp_size": 1, "model": SimpleNamespace(training=True)} | own  # fmt: skip
    for name, value in own.items():
        setattr(bare, name, value)
    return bare


class _Lists(dict[str, list[float]]):
    def __missing__(self, key: str) -> list[float]:
        return self.setdefault(key, [])


class Batch:
    """Answers as TRL pads them: `prompt` tokens, the answer, padding. Their log-probabilities are a leaf of float64,
    with the numbers of `nll_of`."""

    def __init__(self, answers: Sequence[Answer], prompt: int, mark: int = 1):
        self.leaves = [torch.tensor(a.logps).double().requires_grad_() for a in answers]
        lengths, width = [len(a.logps) for a in answers], prompt + max(len(a.logps) for a in answers)
        self.ids_BL = torch.full((len(answers), width), mark)
        self.completion_BL = torch.zeros_like(self.ids_BL)
        self.attention_BL = torch.zeros_like(self.ids_BL)
        for n, length in enumerate(lengths):
            self.completion_BL[n, prompt : prompt + length] = 1
            self.attention_BL[n, : prompt + length] = 1
        self.prompt, self.width = prompt, width
        self.reference_B = torch.tensor([a.reference for a in answers]).double()

    @property
    def logps_BL(self) -> Tensor:
        """Of the token behind each position [B, L - 1]; 0 outside answers."""
        behind = self.width - self.prompt
        rows = [F.pad(leaf, (self.prompt - 1, behind - len(leaf))) for leaf in self.leaves]
        return torch.stack(rows)

    @property
    def slopes(self) -> list[Tensor]:
        return [leaf.grad for leaf in self.leaves if leaf.grad is not None]


def fused(*batches: Batch) -> Callable[..., Any]:
    """A model that says these log-probabilities; told apart by their first token."""

    def model(*, input_ids: Tensor, labels: Tensor, fused_lm_head: bool, **_: Any) -> Any:
        (batch,) = [b for b in batches if torch.equal(b.ids_BL, input_ids)]
        assert fused_lm_head and torch.equal(labels != -100, batch.completion_BL.bool())
        zeros = torch.zeros_like(batch.logps_BL)
        return SimpleNamespace(log_probs=batch.logps_BL, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return model


def pairs_of(rng: np.random.Generator, count: int) -> list[Answer]:
    """Pairs of random answers of 1 to 8 tokens."""
    return [_random(rng, role) for _ in range(count) for role in (CHOSEN, REJECTED)]


def labelled_of(rng: np.random.Generator, count: int) -> list[Answer]:
    return [_random(rng, (GOOD, BAD)[int(rng.integers(2))]) for _ in range(count)]


def _random(rng: np.random.Generator, role: int) -> Answer:
    logps = tuple((-rng.exponential(1.5, int(rng.integers(1, 9)))).astype(np.float32).tolist())
    return Answer(role, logps, float(np.float32(sum(logps) + rng.normal(0, 3))))


def batched(answers: Sequence[Answer]) -> list[Answer]:
    """TRL has all chosen answers in front of all rejected ones."""
    return [*answers[0::2], *answers[1::2]]


def compare(ours: Objective, answers: Sequence[Answer], theirs: Tensor, slopes: Sequence[Tensor], kl: float) -> None:
    """`slopes`: by the log-probabilities of each answer, in the order of `answers`."""
    nll_S1 = nll_of(answers)
    loss = mean(ours, nll_S1, compared_row(answers, kl))
    (slope,) = torch.autograd.grad(loss, nll_S1)
    assert loss.item() == pytest.approx(theirs.item(), abs=GAP, rel=GAP)
    assert float((-slope[:, 0].double() - torch.cat(list(slopes))).abs().max()) <= GAP


DPO_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_types": ["sigmoid"]}),
    "another beta": ({"beta": 0.7}, {"loss_types": ["sigmoid"], "beta": 0.7}),
    "hinge": ({"loss": "hinge"}, {"loss_types": ["hinge"]}),
    "ipo": ({"loss": "ipo", "beta": 0.3}, {"loss_types": ["ipo"], "beta": 0.3}),
    "robust": ({"loss": "robust", "label_smoothing": 0.2}, {"loss_types": ["robust"], "label_smoothing": 0.2}),
    "normalised": ({"length_normalised": True, "beta": 2.0}, {"loss_types": ["sigmoid_norm"], "beta": 2.0}),
    "with likelihood": ({"sft_weight": 0.4}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}),
    # sorting alone tells it from the conservative loss, and one pair is sorted
    "conservative": ({"label_smoothing": 0.1}, {"loss_types": ["aot"], "label_smoothing": 0.1}),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", DPO_CASES)
def test_dpo_is_trls(name: str, seed: int) -> None:
    """Of a micro-batch of five pairs, and what both log of it."""
    asked, own = DPO_CASES[name]
    answers = pairs_of(np.random.default_rng(seed), 1 if name == "conservative" else 5)
    batch = Batch(batched(answers), prompt=3)
    chosen, rejected = batch.reference_B.chunk(2)
    inputs = {"input_ids": batch.ids_BL, "attention_mask": batch.attention_BL, "completion_mask": batch.completion_BL,
              "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}  # fmt: skip
    own = {"loss_weights": [1.0], "beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, "precompute_ref_logps": True,
           "f_divergence_type": "reverse_kl", "use_weighting": False} | own  # fmt: skip
    dpo = trainer(DPOTrainer, **own)
    loss = dpo._compute_loss(fused(batch), inputs, return_outputs=False)
    loss.backward()
    half = len(answers) // 2
    slopes = [batch.slopes[n // 2 + (half if n % 2 else 0)] for n in range(len(answers))]
    ours = made("dpo", **asked)
    compare(ours, answers, loss, slopes, 0.0)
    sums, counts = ours.terms(nll_of(answers), compared_row(answers))["by_source"]
    logged = dict(zip(ours.figures, (sums / counts)[:, 0].tolist(), strict=True))
    for mine, its in (("reward_chosen", "chosen"), ("reward_rejected", "rejected"), ("margin", "margins"),
                      ("accuracy", "accuracies")):  # fmt: skip
        assert logged[mine] == pytest.approx(dpo._metrics["train"][f"rewards/{its}"][0], abs=GAP)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("apart", [-5.0, 0.5, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, 1.3)])
def test_kto_is_trls(weights: tuple[float, float], apart: float, seed: int) -> None:
    """Of a micro-batch of six answers with its KL, which is clamped at 0 where the model is below the reference on
    average (`apart`)."""
    rng = np.random.default_rng(seed)
    answers, others = labelled_of(rng, 6), labelled_of(rng, 6)
    others = [Answer(a.role, a.logps, float(np.float32(sum(a.logps) - apart))) for a in others]
    batch, of_kl = Batch(answers, prompt=3), Batch(others, prompt=2, mark=2)
    inputs = {
        "input_ids": batch.ids_BL, "attention_mask": batch.attention_BL, "completion_mask": batch.completion_BL,
        "KL_input_ids": of_kl.ids_BL, "KL_attention_mask": of_kl.attention_BL,
        "KL_completion_mask": of_kl.completion_BL, "label": torch.tensor([a.role == GOOD for a in answers]),
        "ref_logps": batch.reference_B, "ref_KL_logps": of_kl.reference_B,
    }  # fmt: skip
    kto = trainer(KTOTrainer, beta=0.1, calculate_KL=True, precompute_ref_logps=True, loss_type="kto",
                  desirable_weight=weights[0], undesirable_weight=weights[1])  # fmt: skip
    loss = kto._compute_loss(fused(batch, of_kl), inputs, return_outputs=False)
    loss.backward()
    kl = max(0.0, sum(math.fsum(a.logps) - a.reference for a in others) / len(others))
    assert kto._metrics["train"]["kl"] == [pytest.approx(kl)] and (kl == 0) == (apart < 0)
    ours = made("kto", beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1])
    compare(ours, answers, loss, batch.slopes, kl)


def spelled(batch: Batch) -> Callable[..., Any]:
    """A model over two tokens: those of answers are the second, and its probability is the given one; in front of
    answers one half."""

    def model(input_ids: Tensor, **_: Any) -> Any:
        assert torch.equal(input_ids, batch.ids_BL)
        given_BL = F.pad(batch.logps_BL, (0, 1))
        told_BL = F.pad(batch.completion_BL[:, 1:], (0, 1)).bool()
        p_BL = torch.where(told_BL, given_BL, math.log(0.5))
        return SimpleNamespace(logits=torch.stack([torch.log(-torch.expm1(p_BL)), p_BL], dim=-1))

    return model


def concatenated(batch: Batch, half: int) -> dict[str, Tensor]:
    labels = batch.ids_BL.masked_fill(batch.completion_BL == 0, -100)
    values = {"input_ids": batch.ids_BL, "attention_mask": batch.attention_BL, "labels": labels}
    sides = {"chosen": slice(None, half), "rejected": slice(half, None)}
    return {f"{side}_{name}": values[name][part] for side, part in sides.items() for name in values}


def interleaved(slopes: Sequence[Tensor]) -> list[Tensor]:
    half = len(slopes) // 2
    return [slopes[n // 2 + (half if n % 2 else 0)] for n in range(len(slopes))]


@pytest.mark.parametrize("seed", range(3))
def test_orpo_is_trls(seed: int) -> None:
    """Its likelihood counts the tokens of the prompt too, ours those of the answer (as in the paper). Behind a prompt
    of one token, which nothing predicts, the two are one loss; behind a longer one the odds are still the same."""
    answers = pairs_of(np.random.default_rng(seed), 5)
    ours = made("orpo", beta=0.3)
    for prompt in (1, 4):
        batch = Batch(batched(answers), prompt)
        orpo = trainer(ORPOTrainer, beta=0.3, is_encoder_decoder=False, padding_value=1)
        whole, logged = orpo.get_batch_loss_metrics(spelled(batch), concatenated(batch, 5))
        if prompt == 1:
            whole.backward()
            compare(ours, answers, whole, interleaved(batch.slopes), 0.0)
        total, count = ours.terms(nll_of(answers), compared_row(answers))["loss"]
        assert (total / count).item() == pytest.approx(-0.3 * logged["log_odds_ratio"], abs=GAP)
        tokens = sum(len(a.logps) for a in answers[0::2])
        nll = -sum(math.fsum(a.logps) for a in answers[0::2])
        asked = 5 * (prompt - 1)
        assert logged["nll_loss"] == pytest.approx((nll + asked * math.log(2)) / (tokens + asked), abs=GAP)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sft", [0.0, 0.6])
def test_simpo_is_trls(sft: float, seed: int) -> None:
    answers = pairs_of(np.random.default_rng(seed), 5)
    batch = Batch(batched(answers), prompt=3)
    cpo = trainer(CPOTrainer, beta=2.0, simpo_gamma=0.7, cpo_alpha=sft, alpha=0.0, label_smoothing=0.0, pad_token_id=1,
                  loss_type="simpo", is_encoder_decoder=False)  # fmt: skip
    loss, _ = cpo.get_batch_loss_metrics(spelled(batch), concatenated(batch, 5))
    loss.backward()
    compare(made("simpo", beta=2.0, gamma=0.7, sft_weight=sft), answers, loss, interleaved(batch.slopes), 0.0)


@pytest.mark.parametrize("center", [0.0, 0.01])
@pytest.mark.parametrize("margins", [False, True])
def test_rewards_are_trls(margins: bool, center: float) -> None:
    rng = np.random.default_rng(0)
    margin_P = rng.normal(size=5).astype(np.float32) if margins else np.zeros(5, np.float32)
    answers = [Answer(role, (0.0,), margin=float(m)) for m in margin_P for role in (CHOSEN, REJECTED)]
    value_B1 = torch.from_numpy(rng.normal(0, 2, (10, 1)).astype(np.float32)).requires_grad_()
    ours = mean(made("reward", center=center), value_B1, compared_row(answers, reference=False))
    (slope,) = torch.autograd.grad(ours, value_B1)
    logits = value_B1.double()
    model = lambda **_: SimpleNamespace(logits=torch.cat([logits[0::2], logits[1::2]]))  # noqa: E731
    reward = trainer(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=center or None))
    inputs: dict[str, Any] = {"attention_mask": torch.ones(10, 1)}
    loss = reward.compute_loss(model, inputs | ({"margin": torch.from_numpy(margin_P)} if margins else {}))
    (its,) = torch.autograd.grad(loss, value_B1)
    assert ours.item() == pytest.approx(loss.item(), abs=GAP) and float((slope - its).abs().max()) <= GAP


# -- sums -------------------------------------------------------------------------------------------------------------

EVERY: dict[str, Objective] = {name: case[0] for name, case in BY_HAND.items()} | {
    "orpo by answers": made("orpo", sft_average="sequences"),
    "dpo and likelihood by answers": made("dpo", sft_weight=0.5, sft_average="sequences"),
    "kto": made("kto", desirable_weight=0.7),
    "reward": made("reward", center=0.01),
}


def answers_for(name: str, rng: np.random.Generator, count: int) -> list[Answer]:
    """Of three sources, whose weights differ."""
    plain = labelled_of(rng, 2 * count) if name == "kto" else pairs_of(rng, count)
    found: list[Answer] = []
    for n, a in enumerate(plain):
        source = n % 3 if name == "kto" else n // 2 % 3
        logps = a.logps[:1] if name == "reward" else a.logps
        found.append(Answer(a.role, logps, a.reference, (1.0, 0.5, 3.0)[source], source, 0.25 * (n // 2)))
    return found


@pytest.mark.parametrize("name", EVERY)
def test_terms_of_rows_add_up(name: str) -> None:
    """Sums, counts and figures of rows of two, one and three pairs are those of one row with all of them; the counts
    are what `units` says."""
    objective, answers = EVERY[name], answers_for(name, np.random.default_rng(5), 6)
    parts = [answers[:4], answers[4:6], answers[6:]]
    whole = objective.terms(nll_of(answers), compared_row(answers, 0.3))
    rows = [objective.terms(nll_of(part), compared_row(part, 0.3)) for part in parts]
    assert whole.keys() == {*objective.units, "by_source"}
    samples = answers if name == "kto" else answers[0::2]
    counted = {"samples": sum(a.weight for a in samples),
               "chosen": sum(a.weight * len(a.logps) for a in answers if a.role == CHOSEN)}  # fmt: skip
    for term, unit in objective.units.items():
        for n in (0, 1):
            assert sum(row[term][n].item() for row in rows) == pytest.approx(whole[term][n].item(), rel=1e-6)
        assert whole[term][1].item() == pytest.approx(counted[unit])
    for n in (0, 1):
        added = torch.zeros_like(whole["by_source"][n])
        for row in rows:
            added[:, : row["by_source"][n].shape[1]] += row["by_source"][n]
        torch.testing.assert_close(added, whole["by_source"][n], rtol=1e-9, atol=1e-9)
    assert whole["by_source"][0].shape == (len(objective.figures), 3)
    assert not whole["by_source"][0].requires_grad


@pytest.mark.parametrize("name", EVERY)
def test_a_row_without_answers_is_zero(name: str) -> None:
    """For every term, with a gradient: ranks stay in step, and sums over rows need no exception for it."""
    row = compared_row([])
    row.compared = None
    for count in (0, 3):
        at_SK = torch.rand(count, 1, requires_grad=True)
        terms = EVERY[name].terms(at_SK, row)
        assert {*EVERY[name].units} <= terms.keys()
        for total, weight in (terms[term] for term in EVERY[name].units):
            assert total.item() == 0 == weight.item()
            (slope,) = torch.autograd.grad(total, at_SK, retain_graph=True)
            assert slope.shape == at_SK.shape and not slope.any()


EXTREMES: dict[str, list[tuple[tuple[float, ...], float]]] = {
    "as unlikely as can be": [((-1e4,), 0.0), ((-1e4, -1e4), 0.0)],
    "far apart": [((-1e4,), -1e4), ((-1e-12,), -1e4)],
    "far apart, the wrong way round": [((-1e-12,), -1e4), ((-1e4,), 0.0)],
    "as good as certain": [((-1e-12, -1e-12), -1e-12), ((-1e-12,), -1.0)],
    "certain": [((0.0, 0.0), 0.0), ((0.0,), -1.0)],
    "the worse one certain": [((-3.0,), -1.0), ((0.0,), 0.0)],
    "the better one certain": [((0.0,), 0.0), ((-1e4,), -1.0)],
}


@pytest.mark.parametrize("case", EXTREMES)
@pytest.mark.parametrize("name", EVERY)
def test_extreme_values_are_finite(name: str, case: str) -> None:
    roles = (GOOD, BAD) if name == "kto" else (CHOSEN, REJECTED)
    for order in (EXTREMES[case], EXTREMES[case][::-1]):
        answers = [Answer(role, *found) for role, found in zip(roles, order, strict=True)]
        if name == "reward":
            answers = [Answer(a.role, a.logps[:1]) for a in answers]
        nll_S1 = nll_of(answers)
        terms = EVERY[name].terms(nll_S1, compared_row(answers, 2.0))
        assert all(bool(t.isfinite().all()) for pair in terms.values() for t in pair)
        (slope,) = torch.autograd.grad(mean(EVERY[name], nll_S1, compared_row(answers, 2.0)), nll_S1)
        assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_from_certain_to_impossible(dtype: torch.dtype) -> None:
    """log p - log(1 - p), against Python's; an answer that is certain counts as 2^-52 from it. Finite, derivatives too,
    in float32 as well."""
    at = [-1e4, -50.0, -2.0, -0.7, -0.6, -1e-3, -1e-12]
    chosen_P = torch.tensor([*at, 0.0], dtype=dtype, requires_grad=True)
    found = orpo_log_odds(chosen_P, torch.full_like(chosen_P, -math.log(2)))  # odds of 1
    exact = [x - math.log(-math.expm1(x)) for x in at] + [52 * math.log(2)]
    assert found.tolist() == pytest.approx(exact, rel=1e-6, abs=1e-6)
    (slope,) = torch.autograd.grad(found.sum(), chosen_P)
    assert slope[:-1].tolist() == pytest.approx([-1 / math.expm1(x) for x in at], rel=1e-5)
    assert slope.isfinite().all()


floats = st.floats(-30, 0, width=32)
sides = st.tuples(st.lists(floats, min_size=1, max_size=4).map(tuple), st.floats(-60, 0, width=32))


@given(sides, sides, st.floats(0.01, 2), st.integers(-20, 20))
def test_of_a_dpo_pair(chosen: Any, rejected: Any, beta: float, shift: int) -> None:
    """Swapped sides negate the margin, as much for both changes nothing, and equal ones give log 2 (in all of which
    likelihoods have no part)."""
    objective = made("dpo", beta=beta)

    def told(first: Any, second: Any, more: float = 0.0) -> dict[str, float]:
        answers = [Answer(CHOSEN, first[0], first[1] + more), Answer(REJECTED, second[0], second[1] + more)]
        sums, _ = objective.terms(nll_of(answers), compared_row(answers))["by_source"]
        return dict(zip(objective.figures, sums[:, 0].tolist(), strict=True))

    plain, swapped = told(chosen, rejected), told(rejected, chosen)
    assert swapped["margin"] == -plain["margin"]
    assert plain["loss"] - swapped["loss"] == pytest.approx(-plain["margin"], abs=1e-9)
    assert told(chosen, rejected, shift)["margin"] == pytest.approx(plain["margin"], abs=1e-4 * beta)
    assert told(chosen, chosen)["loss"] == math.log(2) and told(chosen, chosen)["accuracy"] == 0


# -- next token -------------------------------------------------------------------------------------------------------


def row_of(weights: Sequence[float], sources: Sequence[int]) -> PackedRow:
    row = compared_row([Answer(CHOSEN, (0.0,), weight=w, source=n) for w, n in zip(weights, sources, strict=True)])
    row.compared = None
    return row


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_label_smoothing_is_torchs(smoothing: float) -> None:
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 50, generator=rng) * 4).requires_grad_()
    target, weights = torch.randint(0, 50, (7,), generator=rng), [1.0, 2.0, 0.5, 1.0, 0.0, 1.0, 3.0]
    loss = NextTokenLoss(smoothing)
    at_SK = loss.at(logits, target)
    terms = loss.terms(at_SK, row_of(weights, [0, 1, 0, 1, 0, 1, 1]))
    each = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    expected = (each * torch.tensor(weights)).sum()
    assert terms["loss"][0].item() == pytest.approx(expected.item(), rel=GAP) and terms["loss"][1].item() == 8.5
    (ours,), (theirs,) = torch.autograd.grad(terms["loss"][0], logits), torch.autograd.grad(expected, logits)
    assert float((ours - theirs).abs().max()) <= GAP
    plain = F.cross_entropy(logits, target, reduction="none")
    sums, counts = terms["by_source"]
    assert sums[0].tolist() == pytest.approx([plain[[0, 2, 4]].sum().item(), plain[[1, 3, 5, 6]].sum().item()])
    assert counts.tolist() == [[3, 4]] and not sums.requires_grad


def test_z_loss_by_hand() -> None:
    """Of two logits log 3 and log 1, whose denominator is 4: -log(3/4) + z (log 4)^2; smoothed by 0.2 the first term is
    0.8 * -log(3/4) + 0.2 * (log 4 - (log 3 + log 1) / 2). Its derivative by a logit is p - target + 2 z log 4 p."""
    target = torch.tensor([0])
    for smoothing in (0.0, 0.2):
        logits = torch.tensor([[math.log(3), 0.0]], requires_grad=True)
        at_SK = NextTokenLoss(smoothing, 0.5).at(logits, target)
        nll, whole = -math.log(3 / 4), math.log(4)
        first = (1 - smoothing) * nll + smoothing * (whole - math.log(3) / 2)
        assert at_SK[0].tolist() == pytest.approx([first + 0.5 * whole**2, nll], abs=GAP)
        (slope,) = torch.autograd.grad(at_SK[0, 0], logits, retain_graph=True)
        aim = (1 - smoothing + smoothing / 2, smoothing / 2)
        expected = [p - t + 2 * 0.5 * whole * p for p, t in zip((3 / 4, 1 / 4), aim, strict=True)]
        assert slope[0].tolist() == pytest.approx(expected, abs=GAP)
        (logged,) = torch.autograd.grad(at_SK[0, 1] + logits.sum() * 0, logits)
        assert not logged.any()


def test_logits_of_half_precision_are_taken_in_float32() -> None:
    logits = torch.tensor([[40.0, 39.0, 0.1]], dtype=torch.bfloat16)
    target = torch.tensor([1])
    exact = float(F.cross_entropy(logits.double(), target))
    for objective in (NextTokenLoss(), NextTokenLoss(z_loss=1e-30), made("dpo")):
        at_SK = objective.at(logits, target)
        assert at_SK.dtype == torch.float32 and float(at_SK[0, -1]) == pytest.approx(exact, rel=1e-6)
