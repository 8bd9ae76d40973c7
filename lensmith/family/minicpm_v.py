"""MiniCPM-V-2: chat form, slices of pictures, parts, forward. Later versions are other models and are refused.

Sources: the published `config.json`, the tensor names and forms of its modelling files, the prompt that its `chat`
method writes, and the slicing of its `slice_image`. In the tests: the tower is held against transformers'
`SiglipVisionModel` with exact GELU, the language model against `LlamaForCausalLM` with the multipliers put into its
weights, the resampler against one written from the formulas; slices and pixels against transformers'
`MiniCPMV4_6ImageProcessorPil`, which cuts pictures alike.

Form: `<s><用户>{picture}\\n{question}<AI>{answer}</s>`, further turns the same without `<s>`. A picture is
`<image>`, 64 `<unk>`, `</image>`; a large one is followed by its slices between `<slice>` and `</slice>`, each written
like a picture, rows apart by line feeds. `<用户>` and `<AI>` are plain text.

Deliberate differences from the vendor, by name:
- `typed_control_tokens`: `<image>`, `</s>`, ... inside data stay text;
- `end_of_every_answer`: the vendor's prompt has no `</s>` behind earlier answers, and its training has the end as
  target there all the same; here it stands behind every answer and is a target like the others;
- `system_in_first_turn`: the model knows no system message; its text begins the first user turn, a line of its own;
- `line_feed_behind_pictures`: the vendor puts one picture in front of the first question, a line feed between them;
  here one stands behind any picture that something other than a line feed follows in its turn;
- `pictures_count_on`: its training (not its `chat`) gives all picture tokens position 0; here positions count on.
Conversations with tools have no form and are left out (`TOOL_FORM`).

Training: assistant text and its `</s>` are targets. The table of the resampler's queries (`resampler.pos_embed`) never
trains. Adapters fit on the resampler's `kv_proj` and `attn.out_proj`; its query, key and value share one tensor, and
`proj` is a bare matrix, so these take none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Conversation, Image, Message, Part, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Run, Template
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, LaidOut, Layout
from lensmith.family.minicpm_v4_slices import Slicing
from lensmith.family.tiles import straight_positions
from lensmith.model.loading import Loading

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn

    from lensmith.data.media import VideoLimits

USER, ASSISTANT = "<用户>", "<AI>"
NEEDED = (
    "scale_emb", "scale_depth", "dim_model_base", "query_num", "patch_size", "scale_resolution", "max_slice_nums",
    "slice_mode", "vision_encoder", "hidden_size", "drop_vision_last_layer",
)  # fmt: skip
"""Keys that the published config.json has and the model cannot do without."""


@dataclass(frozen=True)
class MiniCPMV2(LaidOut):
    """`queries`: tokens of a slice. `tower_width`: values of a patch behind the tower."""

    pixels: PixelSettings
    slicing: Slicing
    queries: int
    tower_width: int
    name: str = "minicpmv"
    default_system: str | None = None
    video: VideoSettings = field(default_factory=VideoSettings)

    image_token: ClassVar[str] = "<unk>"
    image_in_template: ClassVar[str] = "(<image>./</image>)"
    video_token: ClassVar[str | None] = None
    start_of_document: ClassVar[str] = "<s>"
    end_of_document: ClassVar[str] = "</s>"
    turn_end: ClassVar[str] = "</s>"
    control_tokens: ClassVar[tuple[str, ...]] = ("<unk>", "<s>", "</s>", "<image>", "</image>", "<slice>", "</slice>")
    packing: ClassVar[Packing] = "segments"
    layout: ClassVar[Layout] = Layout(
        projector=r"resampler\.",
        vision=r"vpm\.",
        vision_blocks="vpm.blocks",
        language_blocks="llm.model.layers",
        lora={
            "language": rf".*llm\.model\.layers\.\d+\.{LLAMA_LINEARS}",
            "vision": r".*vpm\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])",
            "projector": r".*resampler\.(kv_proj|attn\.out_proj)",
        },
    )
    loading: ClassVar[Loading] = Loading(native="lensmith.model.minicpm_v:MiniCPMV")

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends where the assistant begins. Raises `Drop` TOOL_FORM."""
        messages = list(conversation.messages)
        if conversation.tools or any(m.role == "tool" or m.tool_calls for m in messages):
            raise Drop("TOOL_FORM", "the chat form of MiniCPM-V-2 has no place for tools")
        pieces: list[Piece] = [Template("<s>")]
        if messages and messages[0].role == "system":
            system = messages.pop(0)
            pieces += [Template(USER), *self._parts(system)]
            if messages and messages[0].role == "user":
                pieces += [Template("\n"), *self._parts(messages.pop(0))]
        for message in messages:
            pieces += [Template(ASSISTANT if message.role == "assistant" else USER), *self._parts(message)]
            if message.role == "assistant":
                pieces.append(Template("</s>", message.trained))
        return [*pieces, Template(ASSISTANT)] if ask else pieces

    def render_media(self, part: Image | Video) -> list[Piece]:
        return [Film(part)] if isinstance(part, Video) else [Picture(part)]

    def _parts(self, message: Message) -> list[Piece]:
        pieces: list[Piece] = []
        parts: list[Part] = [p for p in message.parts if not isinstance(p, Text) or p.text]
        for position, part in enumerate(parts):
            if isinstance(part, Text):
                pieces.append(Run(part.text, message.trained if part.train is None else part.train))
                continue
            pieces += self.render_media(part)
            after = parts[position + 1] if position + 1 < len(parts) else None
            if after is not None and not (isinstance(after, Text) and after.text.startswith("\n")):
                pieces.append(Template("\n"))
        return pieces

    # -- images -------------------------------------------------------------------------------------------------

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        """The picture as a whole and, of a large one, its slices. The view of a block is (rows, columns) of its patches
        and, of a slice, (row, column, rows, columns) of its place."""
        blocks = [
            replace(block, num_tokens=self.queries, view=(*block.grid_thw[1:], *block.view))
            for block in self.slicing.blocks(image, width, height)
        ]
        pieces = self._framed(blocks[0])
        for number, block in enumerate(blocks[1:]):
            first_of_row = block.view[3] == 0
            pieces += [Template("\n" if number else "<slice>")] if first_of_row else []
            pieces += self._framed(block)
        return [*pieces, Template("</slice>")] if len(blocks) > 1 else pieces

    def _framed(self, block: ImageBlock) -> list[Piece]:
        return [Template("<image>"), Placed(block), Template("</image>")]

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch] of a block, row by row; channel, row, column within a patch."""
        return self.slicing.patches(picture, replace(block, view=block.view[2:]))

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        return straight_positions(len(kind_L))

    # -- model --------------------------------------------------------------------------------------------------

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one token; before the projector, its share of the patches of a slice of the usual area."""
        if mode == "frozen":
            return config["hidden_size"]
        patches = (self.slicing.resolution // self.slicing.patch) ** 2
        return -(-patches * self.tower_width // self.queries)

    def normalise(self, pixels_PD: torch.Tensor) -> torch.Tensor:
        """float32 [P, 3 * patch * patch], rescaled and normalised."""
        import torch

        p = self.pixels
        x = pixels_PD.unflatten(1, (3, -1)).to(torch.float32) * (1 / 255)
        mean = torch.tensor(p.mean, device=x.device).view(1, 3, 1)
        std = torch.tensor(p.std, device=x.device).view(1, 3, 1)
        return ((x - mean) / std).flatten(1)

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and resampler: per block [queries, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids), [grid[1:] for grid in grids])

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the resampler: per block [patches, tower width]."""
        tower: Any = model.vpm
        values = self.normalise(pixels_PD.to(tower.pos_embed.device))
        return list(tower(values, [grid[1:] for grid in grids]).split([h * w for _, h, w in grids]))

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The resampler alone, on what `tower_only` gave; `views` begin with rows and columns of patches."""
        import torch

        resampler: Any = model.resampler
        return list(resampler(torch.cat(features), [(view[0], view[1]) for view in views]))

    def hidden(
        self,
        model: nn.Module,
        ids_BT: torch.Tensor,
        features_NH: torch.Tensor | None,
        image_mask_BT: torch.Tensor,
        position_ids_3BT: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """The language model's output with picture features in their places, divided as its head expects it."""
        decoder: Any = model.llm.model  # type: ignore[union-attr]
        return decoder(decoder.embed(ids_BT, features_NH, image_mask_BT), position_ids_3BT[0], **kwargs)


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> MiniCPMV2:
    """Build from the model's own `config.json`. Raises `ModelError` MODEL_VERSION for any version but 2.0."""
    later = [key for key in ("version", "vision_config", "slice_config", "batch_vision_input") if config.get(key)]
    missing = [key for key in NEEDED if key not in config]
    if later or missing:
        found = f"it has {later[0]!r}, as later versions do" if later else f"it has no {missing[0]!r}"
        raise ModelError("MODEL_VERSION", f"not the config.json of MiniCPM-V-2: {found}",
                         remedy="2.5 and 2.6 have the model_type of 2.0, but are other models")  # fmt: skip
    for key in ("query_num", "patch_size", "scale_resolution", "max_slice_nums", "hidden_size"):
        if type(config[key]) is not int or config[key] < 1:
            raise ModelError("MODEL_FILE", f"{key} is {config[key]!r}, which is no whole number above 0",
                             where="config.json", remedy="set it as the published config.json does")  # fmt: skip
    red, green, blue = preprocessor.get("norm_mean") or (0.5, 0.5, 0.5)
    std_r, std_g, std_b = preprocessor.get("norm_std") or (0.5, 0.5, 0.5)
    patch = config["patch_size"]
    return MiniCPMV2(
        pixels=PixelSettings(patch=patch, mean=(red, green, blue), std=(std_r, std_g, std_b)),
        slicing=Slicing(patch, 1, config["scale_resolution"], config["max_slice_nums"] if config["slice_mode"] else 1),
        queries=config["query_num"],
        tower_width=config.get("vision_hidden_size", 1152),
    )


DEFAULT_SYSTEM: dict[str, str | None] = {"minicpmv": None}
