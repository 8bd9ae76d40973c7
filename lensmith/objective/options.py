"""The options of objectives, apart from their computation so that reading a run file does not load torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lensmith.config.part import Part, choice
from lensmith.core.errors import ConfigError


class NextToken(Part):
    """Cross entropy of the next token over supervised positions: continued pretraining and SFT."""

    kind: Literal["next_token"] = "next_token"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that is spread over the whole vocabulary."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log of the softmax's denominator, which keeps logits from drifting; 1e-4 is usual."""


class Cached(Part):
    """Log-probabilities of the model as training begins, computed once before the first step and kept in the cache for
    later runs."""

    kind: Literal["cached"] = "cached"
    model: str | None = None
    """Folder or Hub name of another model of the same family, to be asked instead."""


class Adapter(Part):
    """The base with its adapter switched off, in each step (LoRA)."""

    kind: Literal["adapter"] = "adapter"


class Frozen(Part):
    """A second copy of the weights, in each step."""

    kind: Literal["frozen"] = "frozen"


Reference = Annotated[Cached | Adapter | Frozen, Field(discriminator="kind"), choice("cached")]
"""The model that preferences are measured against."""


class DPO(Part):
    """Direct preference optimisation (arXiv 2305.18290) on pairs of a chosen and a rejected answer."""

    kind: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "hinge", "ipo", "robust"] = "sigmoid"
    """`sigmoid`: DPO. `hinge`: SLiC. `ipo`: IPO (arXiv 2310.12036). `robust`: robust DPO (arXiv 2403.00409)."""
    beta: float = Field(default=0.1, gt=0)
    """How closely the reference is kept to: larger is closer. Of IPO its tau."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs that are taken to be the wrong way round (sigmoid and robust)."""
    length_normalised: bool = False
    """Divide log-ratios by the length of the answer."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the likelihood of the chosen answers, added to the loss (RPO, arXiv 2404.19733)."""
    sft_average: Literal["tokens", "sequences"] = "tokens"
    """That likelihood as the mean over all chosen tokens of the step, or of each answer's mean."""
    reference: Reference = Cached()
    """What the answers are measured against."""

    @model_validator(mode="after")
    def _smooth(self) -> DPO:
        if self.label_smoothing and self.loss not in ("sigmoid", "robust"):
            raise ConfigError("CONFIG", f"objective.label_smoothing means nothing for {self.loss}",
                              remedy="set objective.loss: sigmoid or robust")  # fmt: skip
        return self


class ORPO(Part):
    """Odds-ratio preference optimisation (arXiv 2403.07691): likelihood and preference at once, without a reference."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(default=0.1, gt=0)
    """Weight of the odds ratio; lambda in the paper."""
    sft_average: Literal["tokens", "sequences"] = "tokens"
    """The likelihood as the mean over all chosen tokens of the step, or of each answer's mean."""


class SimPO(Part):
    """SimPO (arXiv 2405.14734): mean log-probabilities with a margin, without a reference."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(default=2.0, gt=0)
    """Scale of the reward."""
    gamma: float = Field(default=0.5, ge=0)
    """Margin between the rewards."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the likelihood of the chosen answers, added to the loss (CPO-SimPO)."""
    sft_average: Literal["tokens", "sequences"] = "tokens"
    """That likelihood as the mean over all chosen tokens of the step, or of each answer's mean."""


class KTO(Part):
    """Kahneman-Tversky optimisation (arXiv 2402.01306) on single answers labelled good or bad."""

    kind: Literal["kto"] = "kto"
    beta: float = Field(default=0.1, gt=0)
    """How closely the reference is kept to: larger is closer."""
    desirable_weight: float = Field(default=1.0, ge=0)
    """Weight of good answers."""
    undesirable_weight: float = Field(default=1.0, ge=0)
    """Weight of bad answers."""
    reference: Reference = Cached()
    """What the answers are measured against."""


class Reward(Part):
    """A reward model (arXiv 2009.01325): a value head that tells chosen from rejected answers (Bradley-Terry). A margin
    of the rows is kept between the two (Llama 2, arXiv 2307.09288)."""

    kind: Literal["reward"] = "reward"
    center: float = Field(default=0.0, ge=0)
    """Weight of the squared sum of both rewards, which keeps them around zero (arXiv 2312.09244)."""


Compares = Literal["pairs", "labels"]

Objective = Annotated[NextToken | DPO | ORPO | SimPO | KTO | Reward, Field(discriminator="kind"), choice("next_token")]


def compares(objective: NextToken | DPO | ORPO | SimPO | KTO | Reward) -> Compares | None:
    """What an objective needs the rows to hold; None: answers to learn."""
    return {"next_token": None, "kto": "labels"}.get(objective.kind, "pairs")  # type: ignore[return-value]


def reference_of(objective: NextToken | DPO | ORPO | SimPO | KTO | Reward) -> Cached | Adapter | Frozen | None:
    return objective.reference if isinstance(objective, (DPO, KTO)) else None


PAIR_FIGURES = ("accuracy", "margin", "reward_chosen")


def figures_of(objective: NextToken | DPO | ORPO | SimPO | KTO | Reward) -> tuple[str, ...]:
    """What an objective says of held-out answers beside its loss, and a run may go by: larger is better."""
    if compares(objective) is None:
        return ()
    return ("reward_good",) if objective.kind == "kto" else PAIR_FIGURES
