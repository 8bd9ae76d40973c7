"""MiniCPM-V 4.6 and 4.7: chat form, slices of pictures, parts, forward.

Sources: the published chat template of MiniCPM-V 4.6, and transformers' `processing_minicpmv4_6`,
`image_processing_pil_minicpmv4_6`, `modeling_minicpmv4_6` and `modeling_minicpmv4_7`. Token ids, pixel values,
positions and hidden states are tested against these classes on tiny random models; the template in the tests is that
form in our own words. 4.7 is taken to have the chat form of 4.6: a model folder whose template differs is refused. Its
mixture-of-experts models, and videos of both, are not taken.

The language model has linear-attention layers, so a row is computed one segment at a time (`model/segments.py`).

Deliberate differences from the vendor, by name:
- `typed_control_tokens`: `<|im_end|>`, `<image>`, `<think>`, ... inside data stay text;
- `texts_side_by_side`: texts of one message with nothing between them are one text; the template puts a line feed
  between any two blocks of a message;
- `pictures_of_system`: the template refuses pictures in a system message; here they are shown;
- `no_ids_in_documents`: pictures of documents have no `<image_id>`; a piece of a document does not know how many came
  before it;
- `halfway_on_the_canvas` (4.7): a place exactly between two rows of the canvas goes to the even one; transformers
  computes it in float32, and the processor's vector width decides.

As the template does: contents are stripped; blocks are joined by line feeds; answers behind the last question begin
with a block of reasoning, empty if they have none, and earlier answers lose theirs.

Training: assistant text and its `<|im_end|>` are targets, and so are reasoning and its end where the data has it. An
empty block of reasoning belongs to the prompt; of models that reason unless told not to, its end to the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import ModelError
from lensmith.core.sample import Conversation, Image, Message, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Template
from lensmith.data.media import VideoLimits
from lensmith.data.resize import Rule
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, SIGLIP_LINEARS, LaidOut, Layout
from lensmith.family.minicpm_v4_chat import (
    contents_of,
    is_tool_response,
    split_reasoning,
    system_with_tools,
    tool_call,
)
from lensmith.family.minicpm_v4_slices import Marks, Slicing, canvas_positions
from lensmith.family.template import render_vendor
from lensmith.family.tiles import straight_positions
from lensmith.model.loading import Loading

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn


@dataclass(frozen=True)
class MiniCPMV46(LaidOut):
    """`image_ids`: pictures of a conversation are numbered. `thinks`: prompts ask for reasoning."""

    name: str
    pixels: PixelSettings
    slicing: Slicing
    image_ids: bool = True
    thinks: bool = False
    default_system: str | None = None
    video: VideoSettings = field(default_factory=VideoSettings)

    image_token: ClassVar[str] = "<|image_pad|>"
    image_in_template: ClassVar[str] = "<|image_pad|>"
    video_token: ClassVar[str | None] = None
    start_of_document: ClassVar[str] = ""
    end_of_document: ClassVar[str] = "<|endoftext|>"
    turn_end: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<image>", "</image>", "<slice>", "</slice>",
        "<image_id>", "</image_id>",
    )  # fmt: skip
    packing: ClassVar[Packing] = "one_sample_per_row"
    first_resize: ClassVar[Rule] = "none"
    layout: ClassVar[Layout] = Layout(
        projector=r"merger\.",  # `vit_merger`, between layers of the tower, is vision
        vision=r"vision_tower\.",
        vision_blocks="model.vision_tower.encoder.layers",
        language_blocks="model.language_model.layers",
        lora={
            "language": rf".*language_model\.layers\.\d+\.({LLAMA_LINEARS}"
            r"|linear_attn\.(in_proj_(qkv|z|b|a)|out_proj))",
            "vision": rf".*vision_tower\.(encoder\.layers\.\d+\.{SIGLIP_LINEARS}"
            r"|vit_merger\.(self_attn\.([qkv]|out)_proj|linear_[12]))",
            "projector": r"(.*\.)?merger\.mlp\.\d+\.linear_[12]",
        },
    )
    loading: ClassVar[Loading] = Loading(layer_kinds=frozenset({"full_attention", "linear_attention"}))

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends with the header of an assistant turn, for generation.

        Raises `Drop` TOOL_FORM for a tool call whose arguments are no JSON object.
        """
        contents = contents_of(conversation, self.image_ids)
        roles = [m.role for m in conversation.messages]
        questions = [n for n, role in enumerate(roles) if role == "user" and not is_tool_response(contents[n])]
        last = questions[-1] if questions else len(roles)
        pieces: list[Piece] = []
        if conversation.tools:
            pieces += system_with_tools(conversation.tools, contents[0] if roles[:1] == ["system"] else [])
        for n, (message, content) in enumerate(zip(conversation.messages, contents, strict=True)):
            if message.role == "tool":
                pieces += [] if roles[n - 1 : n] == ["tool"] else [Template("<|im_start|>user")]
                pieces += [Template("\n<tool_response>\n"), *content, Template("\n</tool_response>")]
                pieces += [] if roles[n + 1 : n + 2] == ["tool"] else [Template("<|im_end|>\n")]
            elif message.role == "assistant":
                pieces += self._answer(message, content, reasons=n > last)
            elif not (message.role == "system" and n == 0 and conversation.tools):
                end = [Template("<|im_end|>", message.trained), Template("\n")]
                pieces += [Template(f"<|im_start|>{message.role}\n"), *content, *end]
        if ask:
            pieces.append(Template("<|im_start|>assistant\n<think>\n" + ("" if self.thinks else "\n</think>\n\n")))
        return pieces

    def _answer(self, message: Message, content: list[Piece], reasons: bool) -> list[Piece]:
        trained = message.trained
        reasoning, content = split_reasoning(content)
        pieces: list[Piece] = [Template("<|im_start|>assistant\n")]
        if reasons:
            own = trained and (self.thinks or bool(reasoning))
            pieces += [Template("<think>\n"), *reasoning, Template("\n</think>\n\n", own)]
        pieces += content
        border = "\n\n" if any(isinstance(p, Picture) or p.text.strip() for p in content) else ""  # type: ignore[union-attr]
        for call in message.tool_calls:
            pieces += [Template(f"{border}<tool_call>\n", trained), *tool_call(call, trained)]
            border = "\n"
        return [*pieces, Template("<|im_end|>", trained), Template("\n")]

    def render_media(self, part: Image | Video) -> list[Piece]:
        return [Film(part)] if isinstance(part, Video) else [Picture(part)]

    # -- images -------------------------------------------------------------------------------------------------

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        """The whole picture between `<image>` marks, then its slices between `<slice>` marks, rows apart by line
        feeds."""
        whole, *slices = self.slicing.blocks(image, width, height)
        pieces: list[Piece] = [Template("<image>"), Placed(whole), Template("</image>")]
        for block in slices:
            row, column = block.view[:2]
            pieces += [Template("\n")] if row and not column else []
            pieces += [Template("<slice>"), Placed(block), Template("</slice>")]
        return pieces

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        return self.slicing.patches(picture, block)

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        """int32 [3, L]: 4.6 counts tokens, the same in all three rows."""
        return straight_positions(len(kind_L))

    # -- model --------------------------------------------------------------------------------------------------

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        if mode == "frozen":
            return config["text_config"]["hidden_size"]
        return 4 * config["vision_config"]["hidden_size"]

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and merger: per block [tokens, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids, views), views)

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the merger, 2 x 2 neighbours side by side: per block [tokens, 4 * tower width]."""
        from lensmith.family.minicpm_v4_tower import run_tower

        vision: Any = model.model.vision_tower  # type: ignore[union-attr]
        weight = vision.embeddings.patch_embedding.weight
        values = self.normalise(pixels_PD.to(weight.device)).to(weight.dtype)
        return run_tower(vision, values, [(h, w) for _, h, w in grids], merge_inside=self.slicing.unit == 4)

    def normalise(self, pixels_PD: torch.Tensor) -> torch.Tensor:
        """float32 [P, 3, patch, patch], rescaled and normalised."""
        import torch

        x = pixels_PD.unflatten(1, (3, self.pixels.patch, self.pixels.patch)).to(torch.float32) * (1 / 255)
        mean = torch.tensor(self.pixels.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(self.pixels.std, device=x.device).view(1, 3, 1, 1)
        return (x - mean) / std

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The merger alone, on what `tower_only` gave."""
        import torch

        merger: Any = model.model.merger  # type: ignore[union-attr]
        return list(merger.mlp[0](torch.cat(features)).split([f.shape[0] for f in features]))

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
        embeds = language.embed_tokens(ids_BT)
        if features_NH is not None:
            embeds = embeds.masked_scatter(image_mask_BT[..., None], features_NH.to(embeds.dtype))
        plans = kwargs.pop("attention_plans", None)
        if plans is None:
            return language(inputs_embeds=embeds, position_ids=position_ids_3BT, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPast

        from lensmith.model.segments import each_by_itself

        def forward(embeds_nLH: torch.Tensor, position_ids_3nL: torch.Tensor) -> torch.Tensor:
            out = language(inputs_embeds=embeds_nLH, position_ids=position_ids_3nL, **kwargs)
            return out.last_hidden_state

        return BaseModelOutputWithPast(last_hidden_state=each_by_itself(embeds, position_ids_3BT, plans[None], forward))


@dataclass(frozen=True)
class MiniCPMV47(MiniCPMV46):
    """4.7: as 4.6, with a picture's tokens at places of a canvas."""

    marks: Marks = field(kw_only=True)

    def token_positions(self, ids_L: np.ndarray, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        return canvas_positions(ids_L, kind_L, blocks, self.marks, self.slicing.unit)


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> MiniCPMV46:
    """Build from the model's own `config.json`, chat template and settings of its image processor.

    Raises `ModelError` MODEL_FORM for forms of these models that are not known here.
    """
    mode = preprocessor.get("downsample_mode", "16x")
    wanted = {
        "text_config.model_type": (config["text_config"].get("model_type"), "qwen3_5_text"),
        "merge_kernel_size": (list(config.get("merge_kernel_size", (2, 2))), [2, 2]),
        "vision_config.window_kernel_size": (list(config["vision_config"].get("window_kernel_size", (2, 2))), [2, 2]),
        "merger_times": (config.get("merger_times", 1), 1),
        "downsample_mode": (config.get("downsample_mode", "16x"), mode),
    }
    for key, (found, known) in wanted.items():
        if found != known:
            raise ModelError("MODEL_FORM", f"{key} is {found!r}; only {known!r} is known for {config['model_type']}",
                             where="config.json")  # fmt: skip
    half = (0.5, 0.5, 0.5)
    mean_r, mean_g, mean_b = preprocessor.get("image_mean") or half
    std_r, std_g, std_b = preprocessor.get("image_std") or half
    patch, unit = preprocessor.get("patch_size", 14), 2 if mode == "4x" else 4
    sliced = preprocessor.get("slice_mode", True)
    slicing = Slicing(
        patch, unit, preprocessor.get("scale_resolution", 448), preprocessor.get("max_slice_nums", 9) if sliced else 1
    )
    pixels = PixelSettings(patch, (mean_r, mean_g, mean_b), (std_r, std_g, std_b), merge=unit)
    thinks = _thinks(config.get("chat_template"))
    shared = (config["model_type"], pixels, slicing, preprocessor.get("use_image_id", True), thinks, default_system)
    if config["model_type"] == "minicpmv4_6":
        return MiniCPMV46(*shared)
    names = ("image_start_id", "image_end_id", "slice_start_id", "slice_end_id", "newline_id")
    if missing := [name for name in names if config.get(name) is None]:
        raise ModelError("MODEL_FORM", f"no {', '.join(missing)}: pictures have no place on the canvas",
                         where="config.json")  # fmt: skip
    return MiniCPMV47(*shared, marks=Marks(*(config[name] for name in names)))


def _thinks(template: str | None) -> bool:
    """Whether the model's own template leaves an answer open inside a block of reasoning."""
    if template is None:
        return False
    question = Conversation((Message("user", (Text("q"),)),))
    try:
        return render_vendor(template, question, add_generation_prompt=True).endswith("<think>\n")
    except ModelError:  # what the check of the template reports
        return False


DEFAULT_SYSTEM: dict[str, str | None] = {"minicpmv4_6": None, "minicpmv4_7": None}
"""The templates put nothing in front."""
