"""The options of the training loop: optimizer, schedule, length, saving, stopping, guard."""

from __future__ import annotations

from typing import Annotated, Literal, cast

from pydantic import Field

from lensmith.config.part import Part, choice

TrainedPart = Literal["vision", "projector", "language", "embeddings", "head", "adapter"]


class PartRate(Part):
    """Rates of one part that differ from the optimizer's."""

    lr: float | None = Field(default=None, ge=0)
    """Learning rate of this part."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Weight decay of this part."""


class _Rates(Part):
    lr: float = Field(default=1e-4, ge=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay; never on vectors (norms, biases)."""
    parts: dict[TrainedPart, PartRate] = Field(default_factory=dict[TrainedPart, PartRate])
    """Other rates for single parts, e.g. {vision: {lr: 2e-6}}."""
    lora_b_ratio: float | None = Field(default=None, gt=0)
    """LoRA+ (arXiv 2402.12354): the B matrices of adapters train at so many times the rate of the A matrices. 16 is
    usual, with a lower `lr`. null: at the same rate."""

    def rate(self, part: str) -> tuple[float, float]:
        """(learning rate, weight decay) of a part."""
        own = cast("dict[str, PartRate]", self.parts).get(part, PartRate())
        lr = self.lr if own.lr is None else own.lr
        return lr, self.weight_decay if own.weight_decay is None else own.weight_decay


class AdamW(_Rates):
    """AdamW (arXiv 1711.05101), fused where torch has it."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class AdamW8bit(_Rates):
    """AdamW with moments in 8 bits (arXiv 2110.02861), through bitsandbytes: `pip install 'lensmith[optimizers]'`.
    Parameters of fewer than 4,096 values keep theirs in float32."""

    kind: Literal["adamw_8bit"] = "adamw_8bit"
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the denominator."""


class Muon(_Rates):
    """Muon (arXiv 2502.16982; torch.optim.Muon) for the matrices inside the model, AdamW for embeddings, head, vectors
    and convolutions."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the momentum."""
    nesterov: bool = True
    """Look ahead by one step of the momentum."""
    steps: int = Field(default=5, ge=1)
    """Newton-Schulz iterations that make an update orthogonal."""
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How large an update is. `match_rms_adamw`: as AdamW's, 0.2 sqrt(larger side), so that its rates fit; `original`:
    sqrt(max(1, rows / columns)), which wants rates of its own."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay of the two moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW's, added to the denominator."""


class Adafactor(_Rates):
    """Adafactor (arXiv 1804.04235; torch.optim.Adafactor): the second moment of a matrix as one row and one column, no
    first moment. Updates are as large as `lr` says, relative to the parameters."""

    kind: Literal["adafactor"] = "adafactor"
    beta2_decay: float = Field(default=-0.8, le=0)
    """Exponent of the step in the decay of the second moment."""
    clip: float = Field(default=1.0, gt=0)
    """Largest root mean square of an update."""


class _Warm(Part):
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up from 0. Wins over `warmup`."""
    warmup: float = Field(default=0.03, ge=0, le=1)
    """Share of all steps that warm up."""


class Constant(_Warm):
    """Warm-up, then the peak rate."""

    kind: Literal["constant"] = "constant"


class Linear(_Warm):
    """Warm-up, then a straight line to `final` of the peak."""

    kind: Literal["linear"] = "linear"
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate at the last step."""


class Cosine(_Warm):
    """Warm-up, then half a cosine to `final` of the peak."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate at the last step."""


class WSD(_Warm):
    """Warm-up, stable, decay (arXiv 2404.06395): constant, then a straight line to `final` over the last `decay`."""

    kind: Literal["wsd"] = "wsd"
    decay: float = Field(default=0.1, gt=0, le=1)
    """Share of all steps that decay."""
    final: float = Field(default=0.0, ge=0, le=1)
    """Share of the peak rate at the last step."""


Schedule = Annotated[Constant | Linear | Cosine | WSD, Field(discriminator="kind"), choice("cosine")]
Optimizer = Annotated[AdamW | AdamW8bit | Muon | Adafactor, Field(discriminator="kind"), choice("adamw")]


class EarlyStop(Part):
    """Stop when a held-out metric no longer gets better."""

    metric: str = "loss"
    """`loss`, or a metric of the evaluation such as `exact_match`."""
    patience: int = Field(default=3, ge=1)
    """Evaluations without improvement before the run stops."""
    min_change: float = Field(default=0.0, ge=0)
    """Smaller improvements do not count."""


class Train(Part):
    """Length and conduct of the run."""

    epochs: float | None = Field(default=1.0, gt=0)
    """Passes over the data. null: endless, bounded by `max_steps`."""
    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Decides order, initialisation of adapters and dropout."""
    neftune_alpha: float | None = Field(default=None, gt=0)
    """Noise on the embeddings of text while training (NEFTune, arXiv 2310.05914): uniform in [-1, 1] times
    alpha / sqrt(L H), with L tokens of the sample and H values of an embedding. 5 is usual. null: none."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Largest gradient norm; larger ones are scaled down. null: never."""
    recompute: bool = False
    """Keep only the inputs of each block and compute the rest again in the backward pass: less memory, a third more
    compute."""
    compile: bool = False
    """torch.compile every block of the language model."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:1`."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of torch on a CPU. Left out: the processors this process may use, less the data workers, at least 1."""
    early_stop: EarlyStop | None = None
    """Left out: never early."""


class Save(Part):
    """When checkpoints are made and which are kept."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save after so many steps. The end of the run is always saved."""
    every_minutes: float | None = Field(default=30.0, gt=0)
    """Save when the last save is so many minutes ago. null: not by time."""
    background: bool | None = None
    """Copy the state to the host and write it while training goes on. Needs room for the copy. Left out: on a GPU."""
    keep_last: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    keep_best: str | None = None
    """Keep also the best by this held-out metric: `loss` or e.g. `exact_match`."""
    fall_back: bool = True
    """When the newest checkpoint is damaged, go on from the one before it, with a warning. Off: stop."""
    grace_seconds: float | None = Field(default=30.0, gt=0)
    """Seconds that the scheduler gives a job between SIGTERM and SIGKILL (Slurm and Kubernetes: 30 unless set). When a
    step and a save take longer, the run warns. null: never."""
    shard_gb: float = Field(default=5.0, gt=0)
    """Largest file of full weights, in GB."""
    remote: str | None = Field(default=None, pattern=r"^[A-Za-z][A-Za-z0-9+.-]*://[^/]*/.+")
    """Keep the checkpoints in an object store too, e.g. `s3://bucket/runs/one`: copied behind the training, and fetched
    from there when the run folder has none or older ones. One prefix for each run. null: only in the run folder."""


class Guard(Part):
    """Steps that are not finite: what is done about them, and what is watched to see them coming."""

    on_nonfinite: Literal["skip", "roll_back", "stop"] = "skip"
    """The first answer to a loss or gradient that is not finite: leave the step out, go back to the last checkpoint
    without the samples at fault, or stop. At the limits below skipping becomes rolling back, and that stopping. Weights
    or moments that are not finite are never skipped: the run goes back at once."""
    max_in_a_row: int = Field(default=3, ge=1)
    """So many skips in a row roll back."""
    max_share: float = Field(default=0.01, ge=0, le=1)
    """More skips than this share of `share_window` steps roll back."""
    share_window: int = Field(default=500, ge=1)
    """The last steps that `max_share` looks at."""
    roll_back_window: int = Field(default=200, ge=1)
    """A second roll-back within so many steps stops the run."""
    max_transient: int = Field(default=2, ge=1)
    """So many steps that come out finite when they are computed again stop the run: the machine is at fault."""
    exclude_after: int | None = Field(default=2, ge=1)
    """A sample that was at fault in so many steps is left out from then on. null: never."""
    spike_z: float = Field(default=6.0, gt=0)
    """Loss and gradient norm both so many standard deviations above the mean of `spike_window` steps are a spike."""
    spike_window: int = Field(default=128, ge=16)
    """Steps that spikes are measured against."""
    clip_spikes: bool = False
    """Clip a gradient norm above `spike_z` down to it. Else spikes are only logged."""
    watch_every: int = Field(default=50, ge=0)
    """Log the largest activation and the size of the update for every part, each so many steps. 0: never."""
    check_every: int = Field(default=50, ge=0)
    """Look through weights and moments each so many steps, and before every save. 0: only before saves."""
    keep: int = Field(default=20, ge=1)
    """Newest incident folders that are kept."""
    dump_mb: int = Field(default=256, ge=0)
    """Largest size of an incident's tensors, in MB. What does not fit is left to the last checkpoint."""
    dump_text: bool = False
    """Write the text of the samples into incidents too. Token ids are always in them."""
