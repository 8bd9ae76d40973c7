"""LLaVA-1.5 and LLaVA-NeXT: image placement, parts, forward. Their chat forms are in `llava_chat.py`.

Checked against transformers' `LlavaProcessor` and `LlavaNextProcessor` with their PIL image processors (token ids,
counts, pixel values) and `modeling_llava`, `modeling_llava_next`. Towers: CLIP. Language models: those whose layers all
attend fully.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import ModelError
from lensmith.core.sample import Conversation, Image, Video
from lensmith.data.encode import Piece, Placed
from lensmith.data.media import VideoLimits
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, SIGLIP_LINEARS, LaidOut, Layout
from lensmith.family.llava_chat import END, Form, media, render
from lensmith.family.tiles import decode, straight_positions, tile_patches, tile_values

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
BICUBIC = 3


@dataclass(frozen=True)
class Llava(LaidOut):
    """`side` is the tower's square in pixels. `shortest`: LLaVA-1.5 resizes the shorter side to it and cuts the middle
    out; None, it resizes both sides to `side`. `squared`: it first pads to a square. `pinpoints`: (height, width) of
    the areas that LLaVA-NeXT fits a picture into. `layers`: of which hidden states of the tower the features are made;
    `drop_class`: without the class token."""

    name: Literal["llava", "llava_next"]
    pixels: PixelSettings
    side: int
    form: Form
    shortest: int | None = None
    squared: bool = False
    resample: int = BICUBIC
    pinpoints: tuple[tuple[int, int], ...] = ()
    layers: int | tuple[int, ...] = -2
    drop_class: bool = True
    vendor_end: str = END
    """How the model's own template spells `</s>`."""
    video: VideoSettings = field(default_factory=VideoSettings)

    image_token: ClassVar[str] = "<image>"
    image_in_template: ClassVar[str] = "<image>"
    video_token: ClassVar[str | None] = None
    start_of_document: ClassVar[str] = "<s>"
    end_of_document: ClassVar[str] = END
    turn_end: ClassVar[str] = END
    control_tokens: ClassVar[tuple[str, ...]] = ("<s>", END, "<image>")
    packing: ClassVar[Packing] = "segments"
    layout: ClassVar[Layout] = Layout(
        projector=r"multi_modal_projector\.|image_newline$",  # image_newline ends the rows of LLaVA-NeXT
        vision=r"vision_tower\.",
        vision_blocks="model.vision_tower.encoder.layers",
        language_blocks="model.language_model.layers",
        lora={
            "language": rf".*language_model\.layers\.\d+\.{LLAMA_LINEARS}",
            "vision": rf".*vision_tower\..*layers\.\d+\.{SIGLIP_LINEARS}",
            "projector": r".*multi_modal_projector\.linear_[12]",
        },
    )

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends where the assistant begins, for generation. Raises `Drop` TOOL_FORM."""
        return render(conversation, self.form, self.vendor_end, ask=ask)

    def render_media(self, part: Image | Video) -> list[Piece]:
        return media(part)

    # -- images -------------------------------------------------------------------------------------------------

    @property
    def _grid(self) -> int:
        """Patches of a side of the tower's square."""
        return self.side // self.pixels.patch

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        """One block. LLaVA-NeXT: the whole picture and the tiles of the area that fits best; `view` is its size."""
        n = self._grid
        if self.name == "llava":
            tokens = n * n if self.drop_class else n * n + 1
            return [Placed(ImageBlock(image, self.side, self.side, (1, n, n), tokens))]
        high, wide = self.area(width, height)
        rows, columns = self.shown(width, height)
        tiles = 1 + (high // self.side) * (wide // self.side)
        tokens = n * n + rows * (columns + 1)
        return [Placed(ImageBlock(image, wide, high, (tiles, n, n), tokens, view=(width, height)))]

    def area(self, width: int, height: int) -> tuple[int, int]:
        """(height, width) of the area that keeps most of a picture, and of these the one that wastes least."""
        best, most, least = (0, 0), 0, float("inf")
        for high, wide in self.pinpoints:
            scale = min(wide / width, high / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            if kept > most or (kept == most and high * wide - kept < least):
                best, most, least = (high, wide), kept, high * wide - kept
        return best

    def shown(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of patches of the area that hold picture, not padding."""
        high, wide = (x // self.pixels.patch for x in self.area(width, height))
        if width / height > wide / high:
            pad = (high - int(round(height * (wide / width), 7))) // 2
            return high - 2 * pad, wide
        pad = (wide - int(round(width * (high / height), 7))) // 2
        return high, wide - 2 * pad

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch]: tile by tile, LLaVA-NeXT's whole picture first."""
        tiles = self._square(picture)[None] if self.name == "llava" else self._tiles(picture, block)
        return tile_patches(tiles, self.pixels.patch)

    def _square(self, picture: PIL.Image.Image) -> np.ndarray:
        """uint8 [side, side, 3]."""
        from PIL import Image as pillow

        if self.squared:
            longest = max(picture.size)
            ground = tuple(int(x * 255) for x in self.pixels.mean)
            padded = pillow.new("RGB", (longest, longest), ground)
            padded.paste(picture, ((longest - picture.width) // 2, (longest - picture.height) // 2))
            picture = padded
        size = (self.side, self.side)
        if self.shortest is not None:
            short, long = sorted(picture.size)
            long = int(self.shortest * long / short)
            size = (self.shortest, long) if picture.width <= picture.height else (long, self.shortest)
        a = np.asarray(picture.resize(size, pillow.Resampling(self.resample)))
        top, left = (a.shape[0] - self.side) // 2, (a.shape[1] - self.side) // 2
        return a[top : top + self.side, left : left + self.side]

    def _tiles(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [t, side, side, 3]: the picture squeezed into one square, then its area cut up, padded with black."""
        from PIL import Image as pillow

        how, wide, high = pillow.Resampling(self.resample), block.width, block.height
        across, down = wide / picture.width, high / picture.height
        size = (
            (wide, min(ceil(picture.height * across), high))
            if across < down
            else (min(ceil(picture.width * down), wide), high)
        )
        area = np.zeros((high, wide, 3), np.uint8)
        left, top = (wide - size[0]) // 2, (high - size[1]) // 2
        area[top : top + size[1], left : left + size[0]] = np.asarray(picture.resize(size, how))
        tiles = area.reshape(high // self.side, self.side, wide // self.side, self.side, 3).swapaxes(1, 2)
        whole = np.asarray(picture.resize((self.side, self.side), how))
        return np.concatenate([whole[None], tiles.reshape(-1, self.side, self.side, 3)])

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        return straight_positions(len(kind_L))

    # -- model --------------------------------------------------------------------------------------------------

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one image token; before the projector, those of the tower's chosen layers."""
        from transformers import AutoConfig

        full: Any = AutoConfig.for_model(**config)  # what a published config leaves out has its default
        if mode == "frozen":
            return full.get_text_config().hidden_size
        return full.vision_config.hidden_size * (1 if isinstance(self.layers, int) else len(self.layers))

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and projector: per image [tokens, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids, views), views)

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the projector: per image [tokens less ends of rows, width], without what is padding."""
        import torch

        tower: Any = model.model.vision_tower  # type: ignore[union-attr]
        weight = tower.embeddings.patch_embedding.weight
        values = tile_values(pixels_PD.to(weight.device), self._grid, self._grid, self.pixels).to(weight.dtype)
        chosen = self.layers if isinstance(self.layers, int) else list(self.layers)
        states = tower(values, output_hidden_states=chosen).hidden_states
        x = states[chosen] if isinstance(chosen, int) else torch.cat([states[i] for i in chosen], dim=-1)
        x = x[:, 1:] if self.drop_class else x
        tiles = x.split([grid[0] for grid in grids])
        if self.name == "llava":
            return [x.flatten(0, 1) for x in tiles]
        return [self._unpadded(x, view) for x, view in zip(tiles, views, strict=True)]

    def _unpadded(self, tiles: torch.Tensor, view: View) -> torch.Tensor:
        """[tiles, patches, width] -> [patches + rows * columns, width]: the whole picture, then its area by rows."""
        import torch

        n, (width, height) = self._grid, view
        high, wide = (x // self.pixels.patch for x in self.area(width, height))
        rows, columns = self.shown(width, height)
        area = tiles[1:].unflatten(0, (high // n, wide // n)).unflatten(2, (n, n))
        area = area.transpose(1, 2).reshape(high, wide, -1)
        top, left = (high - rows) // 2, (wide - columns) // 2
        return torch.cat([tiles[0], area[top : top + rows, left : left + columns].flatten(0, 1)])

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The projector on what `tower_only` gave, and the ends of rows."""
        import torch

        inner: Any = model.model
        projected = inner.multi_modal_projector(torch.cat(features)).split([len(x) for x in features])
        if self.name == "llava":
            return list(projected)
        found: list[torch.Tensor] = []
        for x, view in zip(projected, views, strict=True):
            whole, area = x[: self._grid**2], x[self._grid**2 :]
            rows, columns = self.shown(*view)
            ends = inner.image_newline.to(x.dtype).expand(rows, 1, -1)
            found.append(torch.cat([whole, torch.cat([area.view(rows, columns, -1), ends], dim=1).flatten(0, 1)]))
        return found

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


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> Llava:
    """Build from the model's own `config.json`, with its chat template under `chat_template`, and
    `preprocessor_config.json`. Raises `ModelError` VISION, ATTENTION and PREPROCESSOR for what is not known here."""
    name = config["model_type"]
    vision = config.get("vision_config") or {"image_size": 336, "patch_size": 14}
    if (tower := vision.get("model_type", "clip_vision_model")) != "clip_vision_model":
        raise ModelError("VISION", f"a {name} model with a tower of kind {tower!r}", where="config.json",
                         remedy="only CLIP towers (clip_vision_model) are known")  # fmt: skip
    _refuse_window(config.get("text_config") or {})
    _check_preprocessor(preprocessor)
    side, patch = vision.get("image_size", 224), vision.get("patch_size", 32)
    mean_r, mean_g, mean_b = preprocessor.get("image_mean") or CLIP_MEAN
    std_r, std_g, std_b = preprocessor.get("image_std") or CLIP_STD
    layers = config.get("vision_feature_layer", -2)
    template = config.get("chat_template")
    mistral = "[INST]" in template if template else name == "llava_next"
    family = Llava(
        name=name,
        pixels=PixelSettings(patch, (mean_r, mean_g, mean_b), (std_r, std_g, std_b)),
        side=side,
        form="mistral" if mistral else "vicuna",
        shortest=_shortest(preprocessor, side, name),
        squared=name == "llava" and bool(preprocessor.get("do_pad")),
        resample=preprocessor.get("resample", BICUBIC),
        pinpoints=_pinpoints(config, preprocessor, side) if name == "llava_next" else (),
        layers=layers if isinstance(layers, int) else tuple(layers),
        drop_class=config.get("vision_feature_select_strategy", "default") == "default",
        vendor_end="<\\s>" if template and re.search(r"<\\+s>", template) else END,
    )
    if name == "llava_next" and not family.drop_class:
        raise ModelError("VISION", "vision_feature_select_strategy 'full' leaves the class token among the patches",
                         where="config.json", remedy="LLaVA-NeXT with a CLIP tower needs 'default'")  # fmt: skip
    return family


def _refuse_window(text: Mapping[str, Any]) -> None:
    """transformers gives a Mistral config without the key a window of 4,096 tokens."""
    if text.get("model_type") == "mistral" and text.get("sliding_window", 4096) is not None:
        raise ModelError("ATTENTION", f"sliding_window {text.get('sliding_window', 4096)}: packed rows need full "
                         "attention", where="config.json",
                         remedy='set "sliding_window": null in text_config if the model does without')  # fmt: skip


def _check_preprocessor(preprocessor: Mapping[str, Any]) -> None:
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if preprocessor.get(key) is False:
            raise ModelError("PREPROCESSOR", f"{key} is false", where="preprocessor_config.json",
                             remedy="pictures are always resized, rescaled and normalised here")  # fmt: skip


def _shortest(preprocessor: Mapping[str, Any], side: int, name: str) -> int | None:
    """The length that the shorter side is resized to; None: both sides get the tower's."""
    size = preprocessor.get("size") or {"shortest_edge": side}
    shortest = size if isinstance(size, int) else size.get("shortest_edge")
    crop = preprocessor.get("crop_size") or side
    crops = {crop} if isinstance(crop, int) else {crop["height"], crop["width"]}
    cuts = preprocessor.get("do_center_crop", True)
    exact = not isinstance(size, int) and {size.get("height"), size.get("width")} == {side}
    fits = exact or (shortest is not None and cuts and crops == {side} and shortest >= side)
    if not fits or (name == "llava_next" and not exact and shortest != side):
        raise ModelError("PREPROCESSOR", f"size {size}, crop_size {crop}: the tower takes {side} x {side} pixels",
                         where="preprocessor_config.json",
                         remedy="size and crop_size must come to the tower's image_size")  # fmt: skip
    return None if exact else shortest


def _pinpoints(config: Mapping[str, Any], preprocessor: Mapping[str, Any], side: int) -> tuple[tuple[int, int], ...]:
    """The areas, which model and processor must agree on."""
    given = [c["image_grid_pinpoints"] for c in (config, preprocessor) if c.get("image_grid_pinpoints")]
    found = tuple((h, w) for h, w in given[0]) if given else PINPOINTS
    if (len(given) == 2 and given[0] != given[1]) or any(x % side for pair in found for x in pair):
        raise ModelError("PREPROCESSOR", f"image_grid_pinpoints {given}", where="preprocessor_config.json",
                         remedy=f"config.json must say the same, in multiples of {side}")  # fmt: skip
    return found


DEFAULT_SYSTEM: dict[str, str | None] = {"llava": None, "llava_next": None}
"""The published templates put none in front."""
