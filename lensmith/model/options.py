"""The options of the model part: which model, what of it trains, in which precision, what is cached."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lensmith.config.part import Part, choice

PartName = Literal["vision", "projector", "language", "embeddings", "head"]
LoraPart = Literal["vision", "projector", "language"]


class Model(Part):
    """The base model."""

    path: str
    """Local folder or Hub name."""
    revision: str | None = None
    """Commit, tag or branch on the Hub. A branch name is resolved once and its commit recorded with the run."""
    local_files_only: bool = False
    """Never ask the Hub; use the local cache. Also on with HF_HUB_OFFLINE=1."""
    add_tokens: tuple[str, ...] = ()
    """New tokens (for example `<box>`). They are recognised in the data's texts; the embedding grows by them where it
    is too small, and their rows are trained."""
    remote_code: str | None = Field(default=None, pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")
    """Run the code that the model brings, if it is this: the commit (40 hex digits) of its Hub repository, or the
    SHA-256 over its *.py files that lensmith prints. Left out, no such code is ever run."""
    template: Literal["check", "force"] = "check"
    """`check`: refuse a model whose chat template differs from the family's. `force`: render the family's anyway."""


Dtype = Literal["float32", "bfloat16", "float16"]
PrecisionPart = Literal["vision", "projector", "language", "embeddings", "head", "adapter"]


class PartPrecision(Part):
    """What one part keeps and computes in another type than the preset says."""

    parameters: Dtype | None = None
    """Of its parameters, trained or frozen. Trained ones in half precision are updated as the preset says, else through
    float32 masters."""
    compute: Dtype | None = None
    """Of its matrix products. `float32` needs float32 parameters."""
    gradients: Dtype | None = None
    """In which gradients are added up over micro-batches. Left out: float32."""
    optimizer: Dtype | None = None
    """Of the optimizer's moments. Left out: float32. bfloat16 ones are rounded stochastically."""
    saved: Dtype | None = None
    """Of its tensors in published weights. Left out: as the base model on disk; adapters float32."""


class Precision(Part):
    """What is kept and computed in which type (docs/numerics.md)."""

    preset: Literal[
        "auto", "fp32", "bf16", "bf16-params", "bf16-params-compensated", "bf16-params-stochastic", "fp16"
    ] = "auto"
    """`fp32`: all float32. `bf16`: float32 trained parameters, bfloat16 frozen base and compute. `bf16-params`:
    bfloat16 parameters and compute with float32 masters in the optimizer; `bf16-params-compensated` and
    `bf16-params-stochastic` keep the rounding error, or round at random, instead. `fp16`: float32 trained parameters,
    float16 frozen base and compute, a loss scale. `auto`: bf16 on a GPU, fp32 on a CPU."""
    parts: dict[PrecisionPart, PartPrecision] = Field(default_factory=dict[PrecisionPart, PartPrecision])
    """Single parts that differ, e.g. {vision: {parameters: float32, compute: float32}}."""


class Full(Part):
    """Every parameter trains."""

    kind: Literal["full"] = "full"


class Freeze(Part):
    """Only some parts, or some layers of them, train."""

    kind: Literal["freeze"] = "freeze"
    train: tuple[PartName, ...] = ("language",)
    """Parts that train: vision, projector, language, embeddings, head."""
    first_layers: int | None = Field(default=None, ge=1)
    """Of each trained part with layers, only the first so many."""
    last_layers: int | None = Field(default=None, ge=1)
    """Of each trained part with layers, only the last so many."""


class Quantize(Part):
    """Frozen weights in 4 bits (QLoRA, arXiv 2305.14314), through bitsandbytes: `pip install 'lensmith[qlora]'`."""

    bits: Literal[4] = 4
    """Of a weight."""
    type: Literal["nf4", "fp4"] = "nf4"
    """Which 16 values there are: quantiles of a normal distribution, or 4-bit floating point."""
    double: bool = True
    """Keep the scales of the blocks in 8 bits too."""
    parts: tuple[LoraPart, ...] = ("language",)
    """Parts whose linear layers are quantised, with adapters or without."""


class Lora(Part):
    """Low-rank adapters through PEFT (arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """Rank r of the update."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / r (alpha / sqrt(r) with rslora). Left out: 2 r."""
    ranks: dict[LoraPart, Annotated[int, Field(ge=1)]] = Field(default_factory=dict[LoraPart, int])
    """Other ranks of single parts, e.g. {vision: 4}."""
    alphas: dict[LoraPart, Annotated[float, Field(gt=0)]] = Field(default_factory=dict[LoraPart, float])
    """Other alphas of single parts. Left out: such that alpha / r is that of the whole."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    dora: bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""
    init: str = Field(default="default", pattern=r"^(default|gaussian|pissa|pissa_niter_[1-9][0-9]*|olora|loftq)$")
    """How adapters begin. `default`: as no change, A uniform; `gaussian`: A normal. `pissa` (arXiv 2404.02948;
    `pissa_niter_16` by a faster, approximate decomposition) and `olora` (arXiv 2406.01775): as the largest part of the
    weights, which is taken out of them; they are saved as an adapter of twice the rank for the model as it was.
    `loftq` (arXiv 2310.08659): as what `quantize` takes away."""
    parts: tuple[LoraPart, ...] = ("language",)
    """Parts whose linear layers get adapters. The default does not touch the vision tower's MLP."""
    pattern: str | None = None
    """A regular expression over full module names instead of `parts`. Matching nothing is an error."""
    full: tuple[PartName, ...] = ()
    """Parts that train in full beside the adapters, e.g. [embeddings, head, projector]; saved with the adapter."""
    adapter: str | None = None
    """Go on with this adapter: a PEFT folder (also of LLaMA-Factory or ms-swift), a checkpoint, a run folder or a Hub
    name. Its own rank, alpha and layers hold; those above must be left out, or equal."""
    merge: tuple[str, ...] = ()
    """Adapters that are merged into the model first, in this order."""
    quantize: Quantize | None = None
    """Keep frozen weights in 4 bits. Left out: as `precision` says."""


Tune = Annotated[Full | Freeze | Lora, Field(discriminator="kind"), choice("lora")]


class VisionCache(Part):
    """Keeps the outputs of a frozen vision tower between steps and epochs."""

    enabled: bool = True
    """Off: a frozen tower runs again for every step."""
    memory_mb: int = Field(default=2048, ge=0)
    """Most memory for features, in MiB; the least recently used go first."""
    disk_mb: int = Field(default=0, ge=0)
    """Most disk for features, in MiB; 0 keeps none on disk. Reused by later runs with equal weights and settings."""
    folder: str | None = None
    """Where features go on disk. Left out: beside the index cache."""
