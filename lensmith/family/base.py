"""What lensmith needs to know of a model family. One file per family implements it; `registry` finds the file.

The data half (rendering, image placement, patches, positions) is pure and needs neither torch nor weights. The model
half works on a loaded transformers model and is called only inside the root module's forward.

Shape letters: T tokens of a packed row, P patches, D values of a patch, I images, N tokens of images, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from lensmith.core.encoded import ImageBlock, VideoInfo
from lensmith.core.sample import Conversation, Image, Video
from lensmith.data.encode import Piece
from lensmith.data.resize import FirstResize, Rule

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn

    from lensmith.model.loading import Loading

Grid = tuple[int, int, int]
View = tuple[int, ...]

Packing = Literal["segments", "own_mask", "one_sample_per_row"]
"""How a family keeps the segments of a row apart, exactly: `segments`, every layer attends through the attention
interface; `own_mask`, the family builds a mask from segments and pictures (bidirectional image blocks, windows);
`one_sample_per_row`, some layer is recurrent, so every segment runs by itself, behind its prefix."""
PartName = Literal["vision", "projector", "language", "embeddings", "head"]
PARTS: tuple[PartName, ...] = ("vision", "projector", "language", "embeddings", "head")


@dataclass(frozen=True, slots=True)
class PixelSettings:
    """How pictures are sized and normalised, from the model's own preprocessor config or the run file."""

    patch: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    merge: int = 1
    grouped: bool = False
    """Whether patches come in groups of merge x merge; else row by row."""
    temporal: int = 1
    min_pixels: int = 0
    max_pixels: int | None = None
    """None: the family has a grid of its own, and data.min_pixels and data.max_pixels mean nothing."""

    @property
    def limits(self) -> dict[str, int] | None:
        """What a saved model's preprocessor config says of sizes."""
        return None if self.max_pixels is None else {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}


@dataclass(frozen=True, slots=True)
class VideoSettings:
    """How many frames of a video are shown and how large, from the model's own files or the run file."""

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    min_pixels: int = 0
    """Of one frame."""
    max_pixels: int | None = None
    min_total: int = 0
    """Of all shown frames together."""
    max_total: int | None = None
    floor: int = 0
    """Pixels of one frame below which `max_total` does not press."""
    tokens_per_second: float = 0.0
    """Rotary positions of a second; 0: a row of the grid is one position, however long it lasts."""
    first: FirstResize | None = None
    """LLaMA-Factory's rule: it chooses the frames, and each is brought to this size before the model's own."""


class Family(Protocol):
    """See `qwen_vl.py` for the reference implementation and docs/adding_a_family.md for the steps."""

    name: str
    image_token: str
    image_in_template: str
    """What the model's own chat template writes where a picture is, before its processor expands it."""
    video_token: str | None
    start_of_document: str
    end_of_document: str
    control_tokens: tuple[str, ...]
    packing: Packing
    pixels: PixelSettings
    video: VideoSettings
    turn_end: str
    loading: Loading
    first_resize: Rule

    # data half
    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]: ...
    def render_media(self, part: Image | Video) -> list[Piece]: ...
    def place_image(self, image: Image, width: int, height: int) -> list[Piece]: ...
    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray: ...
    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray: ...

    # model half
    def part_of(self, name: str) -> PartName: ...
    def blocks(self, model: nn.Module, part: PartName) -> Sequence[nn.Module]: ...
    def lora_pattern(self, parts: Sequence[PartName]) -> str: ...
    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int: ...
    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]: ...
    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]: ...
    def project(
        self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()
    ) -> list[torch.Tensor]: ...
    def hidden(
        self,
        model: nn.Module,
        ids_BT: torch.Tensor,
        features_NH: torch.Tensor | None,
        image_mask_BT: torch.Tensor,
        position_ids_3BT: torch.Tensor,
        **attention: Any,
    ) -> Any: ...


class VideoFamily(Family, Protocol):
    """What a family whose `video_token` is not None has besides."""

    def place_video(self, video: Video, info: VideoInfo) -> list[Piece]: ...
    def resized(self, picture: PIL.Image.Image, block: ImageBlock) -> PIL.Image.Image: ...
    def video_patches(self, frames: Sequence[PIL.Image.Image], block: ImageBlock) -> np.ndarray: ...
