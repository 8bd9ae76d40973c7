"""Idefics3 and SmolVLM: chat form, image splitting, parts, forward.

Checked against transformers' `Idefics3Processor` with the PIL image processors of both (token ids, tiles, pixel values;
what `SmolVLMProcessor` writes for a picture), the published chat template, which stands in the tests in our words, and
`modeling_idefics3`, `modeling_smolvlm`. SmolVLM-Instruct is an idefics3 model too.

A picture is resized, cut into tiles of the tower's size, and shown tile by tile with the name of its row and column
before each, then as a whole; every tile is a block, whose `view` is its row and column from 1, or () for the whole.

Deliberate differences from the vendor's template, by name:
- `typed_control_tokens`: `<image>`, `<end_of_utterance>`, ... inside data stay text;
- `plain_texts`: the template drops a content that is not a list of blocks; here it is a text like any other;
- tools and videos: left out (TOOL_FORM, VIDEO_KIND). SmolVLM2's videos would be single pictures with times.

Training: assistant text, the space before it and its `<end_of_utterance>` are targets. The space is: it is one token
with the first word, and what a model is asked to go on from ends with `Assistant:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Conversation, Image, Message, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Run, Template
from lensmith.data.media import VideoLimits
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, SIGLIP_LINEARS, LaidOut, Layout
from lensmith.family.tiles import Held, decode, straight_positions, tile_patches, tile_values

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn


LARGEST = 4096
LANCZOS = 1
END = "<end_of_utterance>"
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"
ENDS_OF_DOCUMENTS = {"<|im_start|>": "<|endoftext|>", "<|begin_of_text|>": "<|end_of_text|>"}
"""First token of a conversation, by language model (SmolLM2, Llama 3) -> last token of a document."""


@dataclass(frozen=True)
class Idefics3(LaidOut):
    """`start`: the first token of a conversation. `side`: of a tile in pixels. `longest`: to which the longer side of a
    picture is resized first. `shuffle`: a token is so many patches by so many. `split`: whether pictures are cut up."""

    name: Literal["idefics3", "smolvlm"]
    pixels: PixelSettings
    start: str
    side: int
    longest: int
    shuffle: int
    split: bool = True
    resample: int = LANCZOS
    video: VideoSettings = field(default_factory=VideoSettings)
    _held: Held = field(default_factory=Held, repr=False, compare=False)

    image_token: ClassVar[str] = "<image>"
    image_in_template: ClassVar[str] = "<image>"
    video_token: ClassVar[str | None] = None
    turn_end: ClassVar[str] = END
    packing: ClassVar[Packing] = "segments"
    layout: ClassVar[Layout] = Layout(
        projector=r"connector\.",
        vision=r"vision_model\.",
        vision_blocks="model.vision_model.encoder.layers",
        language_blocks="model.text_model.layers",
        lora={
            "language": rf".*text_model\.layers\.\d+\.{LLAMA_LINEARS}",
            "vision": rf".*vision_model\.encoder\.layers\.\d+\.{SIGLIP_LINEARS}",
            "projector": r".*connector\.modality_projection\.proj",
        },
    )

    @property
    def start_of_document(self) -> str:
        """Llama 3's tokenizer puts its token in front of every text, SmolLM2's none."""
        return self.start if self.start == "<|begin_of_text|>" else ""

    @property
    def end_of_document(self) -> str:
        return ENDS_OF_DOCUMENTS[self.start]

    @property
    def control_tokens(self) -> tuple[str, ...]:
        return (self.start, self.end_of_document, END, FAKE, WHOLE, "<image>")

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends where the assistant begins, for generation. Raises `Drop` TOOL_FORM."""
        if conversation.tools or any(m.role == "tool" or m.tool_calls for m in conversation.messages):
            raise Drop("TOOL_FORM", "tools have no place in this model's chat form")
        pieces: list[Piece] = [Template(self.start)]
        for message in conversation.messages:
            pieces += self._turn(message)
        return [*pieces, Template("Assistant:")] if ask else pieces

    def render_media(self, part: Image | Video) -> list[Piece]:
        return [Film(part)] if isinstance(part, Video) else [Picture(part)]

    def _turn(self, message: Message) -> list[Piece]:
        pieces: list[Piece] = [Template(f"{message.role.capitalize()}:")]
        first = message.parts[0] if message.parts else Text("")
        if isinstance(first, Text):  # of other turns the space is the template's
            given = message.trained if first.train is None else first.train
            pieces.append(Template(" ", given and message.role == "assistant"))
        for part in message.parts:
            if isinstance(part, Text):
                pieces.append(Run(part.text, message.trained if part.train is None else part.train))
            else:
                pieces += self.render_media(part)
        return [*pieces, Template(END, message.trained), Template("\n")]

    # -- images -------------------------------------------------------------------------------------------------

    @property
    def _grid(self) -> int:
        """Patches of a side of a tile. The tower does not look at pixels beyond the last whole patch."""
        return self.side // self.pixels.patch

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        """The tiles of a picture row by row, if it is cut up, then the whole of it."""
        n = self._grid
        tokens = (n // self.shuffle) ** 2

        def block(*view: int) -> Placed:
            return Placed(ImageBlock(image, self.side, self.side, (1, n, n), tokens, view=view))

        columns, rows = (x // self.side for x in self.cut(width, height))
        if columns * rows == 1:
            return [Template(FAKE + WHOLE), block(), Template(FAKE)]
        pieces: list[Piece] = []
        for row in range(1, rows + 1):
            for column in range(1, columns + 1):
                pieces += [Template(f"{FAKE}<row_{row}_col_{column}>"), block(row, column)]
            pieces.append(Template("\n"))
        return [*pieces, Template(f"\n{FAKE}{WHOLE}"), block(), Template(FAKE)]

    def first_size(self, width: int, height: int) -> tuple[int, int]:
        """Width and height with the longer side at `longest`, the other one even, and neither above 4,096."""
        ratio = width / height
        if width >= height:
            width, height = self.longest, int(self.longest / ratio)
            height = max(height + height % 2, 1)
        else:
            width, height = int(self.longest * ratio), self.longest
            width = max(width + width % 2, 1)
        ratio = width / height
        if width >= height and width > LARGEST:
            return LARGEST, max(int(LARGEST / ratio), 1)
        if height > width and height > LARGEST:
            return max(int(LARGEST * ratio), 1), LARGEST
        return width, height

    def cut(self, width: int, height: int) -> tuple[int, int]:
        """Width and height in which a picture is cut into tiles, multiples of `side`."""
        if not self.split:
            return self.side, self.side
        width, height = self.first_size(width, height)
        ratio, side = width / height, self.side
        if width >= height:
            width = ceil(width / side) * side
            return width, ceil(int(width / ratio) / side) * side
        height = ceil(height / side) * side
        return ceil(int(height * ratio) / side) * side, height

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch] of one tile, or of the whole picture."""
        from PIL import Image as pillow

        side = self.side
        area = self._held.of(picture, self._resized)
        if block.view:
            top, left = ((x - 1) * side for x in block.view)
            tile = area[top : top + side, left : left + side]
        elif area.shape[:2] == (side, side):
            tile = area
        else:
            tile = np.asarray(pillow.fromarray(area).resize((side, side), pillow.Resampling(self.resample)))
        used = self._grid * self.pixels.patch
        return tile_patches(tile[None, :used, :used], self.pixels.patch)

    def _resized(self, picture: PIL.Image.Image) -> np.ndarray:
        """uint8 [height, width, 3]; resized twice, as the vendor does."""
        from PIL import Image as pillow

        how, size = pillow.Resampling(self.resample), picture.size
        return np.asarray(picture.resize(self.first_size(*size), how).resize(self.cut(*size), how))

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        return straight_positions(len(kind_L))

    # -- model --------------------------------------------------------------------------------------------------

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one image token; before the projector, those of its patches."""
        from transformers import AutoConfig

        full: Any = AutoConfig.for_model(**config)  # what a published config leaves out has its default
        if mode == "frozen":
            return full.get_text_config().hidden_size
        return full.vision_config.hidden_size * self.shuffle**2

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and projector: per tile [tokens, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids, views), views)

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the projector: per tile [tokens, shuffle^2 * tower width]."""
        inner: Any = model.model
        tower, connector = inner.vision_model, inner.connector
        weight = tower.embeddings.patch_embedding.weight
        values = tile_values(pixels_PD.to(weight.device), self._grid, self._grid, self.pixels)
        x = tower(pixel_values=values.to(weight.dtype)).last_hidden_state
        return list(connector.pixel_shuffle(x, connector.scale_factor))

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The projector alone, on what `tower_only` gave."""
        import torch

        connector: Any = model.model.connector  # type: ignore[union-attr]
        return list(connector.modality_projection(torch.stack(features)))

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
        language: Any = model.model.text_model  # type: ignore[union-attr]
        return decode(language, ids_BT, features_NH, image_mask_BT, position_ids_3BT, **kwargs)


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> Idefics3:
    """Build from the model's own `config.json`, with its chat template under `chat_template`, and
    `preprocessor_config.json`. Raises `ModelError` PREPROCESSOR for what is not known here."""
    name, vision = config["model_type"], config["vision_config"]
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if preprocessor.get(key) is False:
            raise ModelError("PREPROCESSOR", f"{key} is false", where="preprocessor_config.json",
                             remedy="pictures are always resized, rescaled and normalised here")  # fmt: skip
    patch, shuffle = vision.get("patch_size", 32), config.get("scale_factor", 2)
    side = (preprocessor.get("max_image_size") or {"longest_edge": 364})["longest_edge"]
    longest = (preprocessor.get("size") or {}).get("longest_edge") or 4 * 364
    tower = vision.get("image_size", 224)
    if side != tower or side // patch % shuffle:
        raise ModelError("PREPROCESSOR", f"max_image_size {side}: the tower takes {tower} pixels, in patches of "
                         f"{patch}, {shuffle} x {shuffle} a token", where="preprocessor_config.json",
                         remedy="max_image_size must be image_size of config.json")  # fmt: skip
    mean_r, mean_g, mean_b = preprocessor.get("image_mean") or (0.5, 0.5, 0.5)
    std_r, std_g, std_b = preprocessor.get("image_std") or (0.5, 0.5, 0.5)
    usual = "<|im_start|>" if name == "smolvlm" else "<|begin_of_text|>"
    template = (config.get("chat_template") or "").lstrip()
    return Idefics3(
        name=name,
        pixels=PixelSettings(patch, (mean_r, mean_g, mean_b), (std_r, std_g, std_b)),
        start=next((s for s in ENDS_OF_DOCUMENTS if template.startswith(s)), usual),
        side=side,
        longest=longest,
        shuffle=shuffle,
        split=preprocessor.get("do_image_splitting", True),
        resample=preprocessor.get("resample", LANCZOS),
    )


DEFAULT_SYSTEM: dict[str, str | None] = {"idefics3": None, "smolvlm": None}
"""The published template puts none in front."""
