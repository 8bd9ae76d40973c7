"""The options of the data path: what is read, how it is sized, how much may be left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lensmith.config.part import Part, choice
from lensmith.data.formats import Format
from lensmith.data.media import ImageLimits, VideoLimits


class Source(Part):
    """One source of samples: a file, a folder or a glob, and how its rows read."""

    path: str
    """File (.jsonl, .json, .parquet, .tar; a small one also .csv, .tsv, .txt or .arrow), folder, glob or
    `shard-{000..009}.tar`, relative to the run file; a saved Hugging Face dataset, or `hf://org/name`; or a URL of such
    files (s3, gs, https, ...)."""
    format: Format | None = None
    """Row layout: `messages`, `sharegpt`, `alpaca`, `document`, `interleaved`, `webdataset`, or a mapping with its
    options. Left out: detected from the first row."""
    media_dir: str | None = None
    """Folder that relative picture paths count from. Left out: the folder of the data file."""
    name: str | None = None
    """Name in ledger, log and report. Left out: the file name."""
    weight: float = Field(default=1.0, ge=0)
    """Weight of this source's tokens in the loss."""
    max_samples: int | None = Field(default=None, ge=1)
    """Read only the first so many rows of each file."""
    num_samples: int | None = Field(default=None, ge=1)
    """Of each file so many rows, chosen at random by `train.seed`; of these `max_samples` takes the first. A file with
    fewer rows is read whole."""
    share: float = Field(default=1.0, ge=0)
    """How much of the mixture this source is, against the others' shares (see `data.mixture`)."""
    epochs: float | None = Field(default=None, gt=0)
    """At most so many passes over this source, then it is left out. Left out: as `data.mixture` says."""
    subset: str | None = None
    """Configuration of a Hugging Face dataset."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    revision: str | None = None
    """Commit or branch of a dataset on the Hub."""


def _one_or_many(value: Any) -> Any:
    """`train: file.jsonl` means `train: [{path: file.jsonl}]`."""
    items = value if isinstance(value, list | tuple) else [value]
    return [{"path": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[
    tuple[Source, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=str | Source | tuple[str | Source, ...]),
]


class Concat(Part):
    """All sources as one: every sample is as likely as any other."""

    kind: Literal["concat"] = "concat"


class _Mixed(Part):
    exhausted: Literal["repeat", "leave_out"] = "repeat"
    """What happens to a source whose samples are used up before the run ends: it begins again, or the others go on
    without it in their own proportions."""


class Shares(_Mixed):
    """Sources in fixed proportions, by their `share`."""

    kind: Literal["shares"] = "shares"
    by: Literal["samples", "tokens"] = "samples"
    """Whether a share counts samples or tokens."""


class Temperature(_Mixed):
    """Sources in proportion to their number of samples to the power of 1 / `temperature` (arXiv 1907.05019, section
    4.2), times their `share`: 1 is the natural mixture, a large one makes all sources equal."""

    kind: Literal["temperature"] = "temperature"
    temperature: float = Field(default=2.0, ge=1)
    """Flattens the natural mixture."""


Mixture = Annotated[Concat | Shares | Temperature, Field(discriminator="kind"), choice("concat")]


class Documents(Part):
    """How documents (continued pretraining) become samples."""

    too_long: Literal["split", "drop"] = "split"
    """`split`: a document of more than `max_tokens` is cut into pieces, at part borders where these fit, else behind a
    sentence, else between two tokens; never inside an image. `drop`: it is left out."""
    overlap: int = Field(default=0, ge=0)
    """Tokens of a piece's end that the next piece begins with, as context that is not trained again."""


class Stream(Part):
    """Rows that are trained as they are read, without an index of the whole."""

    window: int = Field(default=4096, ge=1, le=1 << 20)
    """Rows that are measured together and shuffled among themselves."""
    wrong: Literal["stop", "drop"] = "stop"
    """What a wrong row does, one that an index would refuse before the first step: end the run, or be dropped."""


class Data(Part):
    """Where samples come from and how they are measured."""

    train: Sources
    """Sources to train on: a path, a list of paths, or a list of sources."""
    mixture: Mixture = Concat()
    """How the sources are mixed: `concat`, `shares` or `temperature`."""
    documents: Documents = Documents()
    """How documents become samples."""
    stream: Stream | None = None
    """Train the sources as they are read, without an index ahead; needs `train.max_steps`."""
    eval: Sources = ()
    """Held-out sources."""
    holdout: float = Field(default=0.0, ge=0)
    """Share of the training pictures whose samples are held out instead (split by picture, never by row; a sample
    without pictures counts as its own); from 1 on, about so many samples. Used when `eval` is empty."""
    media_roots: tuple[str, ...] = ()
    """Folders that absolute picture paths may point into. Relative paths stay inside `media_dir` or one of these."""
    max_tokens: int = Field(default=2048, ge=8)
    """Longest sample in tokens, images included."""
    too_long: Literal["drop", "cut", "llamafactory"] = "drop"
    """`drop`: a longer sample is left out, with its lengths in the ledger. `cut`: whole trailing messages are cut, then
    as `drop`. `llamafactory`: the ends of questions and answers are cut, turn by turn, as LLaMA-Factory does. An image
    block is never cut."""
    train_line_feed: bool = False
    """Train the line feed behind the end of an answer too, as LLaMA-Factory does."""
    wrong_rows: Literal["stop", "drop"] = "stop"
    """What a wrong row does (docs/data.md): end the run before it begins, or be dropped with its reason in the ledger.
    One that reaches outside the folders of the data always ends the run. Of a stream `stream.wrong` decides."""
    min_pixels: int | None = Field(default=None, ge=1)
    """Pictures below this area are enlarged. Left out: the model's own setting."""
    max_pixels: int | None = Field(default=None, ge=1)
    """Pictures above this area are reduced. Left out: the model's own setting."""
    resize: Literal["model", "llamafactory"] = "model"
    """`model`: pictures are sized once, by the model's rule within `min_pixels` and `max_pixels`. `llamafactory`: they
    are brought within these first (left out: 1,024 and 589,824), then sized by the model's rule and its own limits."""
    image: ImageLimits = ImageLimits()
    """What a picture may be at all."""
    video: VideoLimits = VideoLimits()
    """How videos are shown, and what a video may be at all."""
    max_dropped: float = Field(default=0.05, ge=0, le=1)
    """The run stops before step 1 when a larger share of the rows is dropped."""
    max_row_bytes: int = Field(default=64 << 20, ge=1024)
    """Longest row that is read."""
    workers: int | None = Field(default=None, ge=0)
    """Processes that read and decode ahead of training. Left out: one less than the processors this process may use,
    at most 4; 0 reads in the training process."""
    decode_timeout: float | None = Field(default=300.0, gt=0)
    """Seconds in which a data worker must have read a sample. One that takes longer is dropped with DECODE_TIMEOUT, and
    its process replaced. null: wait for ever. With `workers: 0` nothing can be ended."""
    cache: str | None = None
    """Folder of the index cache. Left out: `$LENSMITH_CACHE` or `~/.cache/lensmith`."""


class Batch(Part):
    """How many samples make a step, and how many tokens a device takes at once."""

    samples: int | None = Field(default=None, ge=1)
    """Samples of one optimizer step over all devices. Exactly one of `samples` and `tokens`; left out both: 16."""
    tokens: int | None = Field(default=None, ge=1)
    """A step takes the next samples as long as they have no more tokens than this in all."""
    device_tokens: int | None = Field(default=None, ge=8)
    """Tokens of one packed row (a micro-batch). Left out: `data.max_tokens`, at least 4096."""
    device_patches: int | None = Field(default=None, ge=1)
    """Most vision patches of one packed row. A sample with more of its own still trains, alone."""
    partial: Literal["carry", "epoch_end", "drop"] = "carry"
    """What an epoch's last samples do that do not fill a step: `carry` them into the next epoch's first step, make a
    smaller step at `epoch_end`, or `drop` them."""
    packing: bool = True
    """Pack samples side by side into rows (same loss and gradient, faster). Off: one sample per row."""


def data_root(source_file: Path, media_dir: str | None, run_folder: Path) -> Path:
    """The folder relative picture paths count from."""
    return (run_folder / media_dir).resolve() if media_dir else source_file.parent.resolve()
