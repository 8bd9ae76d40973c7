"""InternVL 3 and 3.5 as transformers builds them (`internvl`): chat form, tiles, parts, forward.

A picture is resized to a canvas of square tiles whose shape is nearest to its own, cut into them, and shown once more
as a whole behind them. A tile is 256 tokens at the published sizes.

Held against the installed transformers: token ids, tile counts and pixel values against its `InternVLProcessor` with
the PIL image processor, features, hidden states, losses and generation against `InternVLForConditionalGeneration`.
The chat form is that of the published `-hf` folders (chatml, a picture as `<IMG_CONTEXT>` and a line feed).

Deliberate differences from the vendor's, by name:
- `typed_control_tokens`: `<|im_end|>`, `<IMG_CONTEXT>`, `<img>`, ... inside data stay text;
- `no_tools`: its template leaves tools out without a word; here a conversation with tools is left out, as TOOL_FORM;
- `no_videos`: the vendor shows frames as single tiles; here the family takes no videos.

Training: assistant text and its `<|im_end|>` are targets; role headers, images and the line feed behind it are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Conversation, Image, Message, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Run, Template
from lensmith.data.media import VideoLimits
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, LaidOut, Layout
from lensmith.family.tiles import decode, tile_values

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InternVL(LaidOut):
    """`side`: pixels of a tile; `tiles`: the fewest and the most that a picture is cut into, the whole one apart."""

    pixels: PixelSettings
    default_system: str | None
    side: int = 448
    tiles: tuple[int, int] = (1, 12)
    resample: int = 3
    """How pillow resizes; 3: bicubic."""
    video: VideoSettings = field(default_factory=VideoSettings)

    name: ClassVar[str] = "internvl"
    image_token: ClassVar[str] = "<IMG_CONTEXT>"
    image_in_template: ClassVar[str] = "<IMG_CONTEXT>"
    video_token: ClassVar[str | None] = None
    start_of_document: ClassVar[str] = ""
    end_of_document: ClassVar[str] = "<|endoftext|>"
    turn_end: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<img>", "</img>", "<IMG_CONTEXT>",
    )  # fmt: skip
    packing: ClassVar[Packing] = "segments"
    layout: ClassVar[Layout] = Layout(
        projector=r"multi_modal_projector\.",
        vision=r"vision_tower\.",
        vision_blocks="model.vision_tower.encoder.layer",
        language_blocks="model.language_model.layers",
        lora={
            "language": rf".*language_model\.layers\.\d+\.{LLAMA_LINEARS}",
            "vision": r".*vision_tower\.encoder\.layer\.\d+\.(attention\.([qkv]_proj|projection_layer)|mlp\.fc[12])",
            "projector": r".*multi_modal_projector\.linear_[12]",
        },
    )

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends with the header of an assistant turn. Raises `Drop` TOOL_FORM."""
        if conversation.tools or any(m.role == "tool" or m.tool_calls for m in conversation.messages):
            raise Drop("TOOL_FORM", f"the chat form of {self.name} has no place for tools")
        pieces: list[Piece] = []
        if self.default_system is not None and conversation.messages[0].role != "system":
            pieces.append(Template(f"<|im_start|>system\n{self.default_system}<|im_end|>\n"))
        for message in conversation.messages:
            pieces += self._turn(message)
        return [*pieces, Template("<|im_start|>assistant\n")] if ask else pieces

    def render_media(self, part: Image | Video) -> list[Piece]:
        return [Film(part)] if isinstance(part, Video) else [Picture(part)]

    def _turn(self, message: Message) -> list[Piece]:
        pieces: list[Piece] = [Template(f"<|im_start|>{message.role}\n")]
        for part in message.parts:
            if isinstance(part, Text):
                pieces.append(Run(part.text, message.trained if part.train is None else part.train))
            else:
                pieces += [*self.render_media(part), Template("\n")]
        return [*pieces, Template("<|im_end|>", message.trained), Template("\n")]

    # -- images -------------------------------------------------------------------------------------------------

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        return [Template("<img>"), Placed(self.place(image, width, height)), Template("</img>")]

    def place(self, image: Image, width: int, height: int) -> ImageBlock:
        """All tiles of a picture of `width` x `height` as one block; `view` is its columns and rows of tiles."""
        columns, rows = canvas(width, height, self.side, *self.tiles)
        count = columns * rows + (columns * rows > 1)
        n = self.side // self.pixels.patch
        tokens = count * (n // self.pixels.merge) ** 2
        return ImageBlock(
            image, columns * self.side, rows * self.side, (count, n, n), tokens, view=(columns, rows)
        )  # fmt: skip

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch]: tile by tile, the whole picture last; in a patch channel, row, column."""
        from PIL import Image as pillow

        (columns, rows), side, how = block.view, self.side, pillow.Resampling(self.resample)
        a = np.asarray(picture.resize((block.width, block.height), how))
        a = a.reshape(rows, side, columns, side, 3).swapaxes(1, 2).reshape(-1, side, side, 3)
        if len(a) > 1:
            a = np.concatenate([a, np.asarray(picture.resize((side, side), how))[None]])
        n, p = side // self.pixels.patch, self.pixels.patch
        a = a.reshape(-1, n, p, n, p, 3).transpose(0, 1, 3, 5, 2, 4)
        return np.ascontiguousarray(a).reshape(block.num_patches, -1)

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        """int32 [3, L]: one after the other, in all three rows."""
        return np.tile(np.arange(len(kind_L), dtype=np.int32), (3, 1))

    # -- model --------------------------------------------------------------------------------------------------

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one image token; before the projector, of the patches that it is made of."""
        if mode == "projector":
            return self.pixels.merge**2 * config["vision_config"].get("hidden_size", 1024)
        return config["text_config"]["hidden_size"]

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and projector: per picture [tokens, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids))

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the projector: per picture [tokens, merge^2 * tower width]. Every tile is a picture to the tower."""
        inner: Any = model.model
        weight = inner.vision_tower.embeddings.patch_embeddings.projection.weight
        values = self.normalise(pixels_PD.to(weight.device)).to(weight.dtype)
        n, merge = self.side // self.pixels.patch, self.pixels.merge
        x = inner.vision_tower(pixel_values=values).last_hidden_state[:, 1:]
        x = inner.pixel_shuffle(x.unflatten(1, (n, n)), scale_factor=1 / merge).flatten(0, 2)
        return list(x.split([t * h * w // merge**2 for t, h, w in grids]))

    def normalise(self, pixels_PD: torch.Tensor) -> torch.Tensor:
        """float32 [tiles, 3, side, side] of uint8 patches: rescaled and normalised."""
        n = self.side // self.pixels.patch
        return tile_values(pixels_PD, n, n, self.pixels)

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The projector alone, on what `tower_only` gave."""
        import torch

        inner: Any = model.model
        return list(inner.multi_modal_projector(torch.cat(features)).split([f.shape[0] for f in features]))

    def hidden(
        self,
        model: nn.Module,
        ids_BT: torch.Tensor,
        features_NH: torch.Tensor | None,
        image_mask_BT: torch.Tensor,
        position_ids_3BT: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """The language model's output (`last_hidden_state` [B, T, H]) with image features in their places."""
        language: Any = model.model.language_model  # type: ignore[union-attr]
        return decode(language, ids_BT, features_NH, image_mask_BT, position_ids_3BT, **kwargs)


@lru_cache(maxsize=16)
def _canvases(fewest: int, most: int) -> tuple[tuple[int, int], ...]:
    """(columns, rows) of `fewest` to `most` tiles, by their number."""
    sides = range(1, most + 1)
    return tuple(sorted(((c, r) for c in sides for r in sides if fewest <= c * r <= most), key=lambda x: x[0] * x[1]))


def canvas(width: int, height: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """(columns, rows) of tiles whose shape is nearest to the picture's; of equally near ones the largest that has less
    than twice its area."""
    best, least = (1, 1), float("inf")
    for columns, rows in _canvases(fewest, most):
        gap = abs(width / height - columns / rows)
        if gap < least or (gap == least and width * height > 0.5 * side * side * columns * rows):
            best, least = (columns, rows), gap
    return best


def _square(value: int | Sequence[int], what: str) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ModelError("VISION", f"{what} is {value}, which is not square", where="config.json")
    return sides.pop()


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> InternVL:
    """Build from the model's own `config.json` and `preprocessor_config.json`.

    Raises `ModelError` VISION for a tower that is used otherwise than in the published models.
    """
    vision = config["vision_config"]
    side = _square(vision.get("image_size", 448), "image_size")
    size = preprocessor.get("size") or {}
    for what, found, known in (
        ("vision_feature_layer", config.get("vision_feature_layer", -1), -1),
        ("vision_feature_select_strategy", config.get("vision_feature_select_strategy", "default"), "default"),
        ("the height of preprocessed pictures", size.get("height", side), side),
        ("the width of preprocessed pictures", size.get("width", side), side),
    ):
        if found != known:
            raise ModelError("VISION", f"{what} is {found!r}; {known!r} is supported", where="config.json")
    red_mean, green_mean, blue_mean = preprocessor.get("image_mean") or IMAGENET_MEAN
    red_std, green_std, blue_std = preprocessor.get("image_std") or IMAGENET_STD
    pixels = PixelSettings(
        patch=_square(vision.get("patch_size", 14), "patch_size"),
        merge=round(1 / config.get("downsample_ratio", 0.5)),
        mean=(red_mean, green_mean, blue_mean),
        std=(red_std, green_std, blue_std),
    )
    tiles = preprocessor.get("min_patches") or 1, preprocessor.get("max_patches") or 12
    return InternVL(pixels, default_system, side, tiles, preprocessor.get("resample", 3))


DEFAULT_SYSTEM: dict[str, str | None] = {"internvl": None}
"""The published templates put nothing in front; for a model folder without a template of its own."""
