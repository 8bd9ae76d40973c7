"""Gemma 3 with pictures (`gemma3`): chat form, pan and scan, masks, parts, forward.

Held against the installed transformers: token ids, crops and pixel values against its `Gemma3Processor` with the PIL
image processor, features, hidden states, losses and generation against `Gemma3ForConditionalGeneration`. The chat form
is that of the published folders: turns of `user` and `model`, texts trimmed, the system text at the front of the first
turn.

A picture's tokens see each other in both directions, and of the layers most see only a window behind them. A packed row
is exact because each segment has that mask of its own; where a row has no picture, or no segment longer than the
window, its layers run without one.

Pan and scan is on where the folder's preprocessor config sets `do_pan_and_scan`. transformers' processor asks for it
only when it is called with it.

Deliberate differences from the vendor's, by name:
- `typed_control_tokens`: `<end_of_turn>`, `<start_of_image>`, `<unused0>`, ... inside data stay text. Runs of line
  feeds and spaces and the HTML tags of the vocabulary (`text_tokens`) are tokens, as the vendor's tokenizer has them;
- `texts_side_by_side`: neighbouring texts of a turn are trimmed as one, so a space between them stays;
- `system_pictures`: pictures of the system message are kept, before the first turn's own; the template drops them;
- `no_tools`: its template leaves tools out without a word; here a conversation with tools is left out, as TOOL_FORM.

Training: the model's text and its `<end_of_turn>` are targets; headers, images and the line feed behind it are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import ConfigError, Drop, ModelError
from lensmith.core.sample import Conversation, Image, Message, Part, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Run, Template
from lensmith.data.media import VideoLimits
from lensmith.family.base import Grid, Packing, PartName, PixelSettings, VideoSettings, View
from lensmith.family.layout import LLAMA_LINEARS, SIGLIP_LINEARS, LaidOut, Layout
from lensmith.family.tiles import tile_values
from lensmith.model.loading import Loading

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn

    from lensmith.model.attention import AttentionPlan

TAGS = (
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote",
    "strong", "em", "b", "i", "u", "s", "sub", "sup", "code",
)  # fmt: skip
MASKS = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class PanAndScan:
    """Crops of a long picture, shown behind the whole one."""

    min_side: int = 256
    most: int = 4
    min_ratio: float = 1.2

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """(left, top, right, bottom) of each crop: side by side along the longer side."""
        long, short = max(width, height), min(width, height)
        if long / short < self.min_ratio:
            return []
        count = min(self.most, max(2, min(long // self.min_side, math.floor(long / short + 0.5))))
        step = math.ceil(long / count)
        if min(step, short) < self.min_side:
            return []
        spans = [(at * step, min(long, (at + 1) * step)) for at in range(count)]
        return [(a, 0, b, height) if width >= height else (0, a, width, b) for a, b in spans]


@dataclass(frozen=True)
class Gemma3(LaidOut):
    """`side`: pixels of every shown picture, whose shape is not kept."""

    pixels: PixelSettings
    side: int = 896
    resample: int = 2
    """How pillow resizes; 2: bilinear."""
    pan_and_scan: PanAndScan | None = None
    video: VideoSettings = field(default_factory=VideoSettings)

    name: ClassVar[str] = "gemma3"
    image_token: ClassVar[str] = "<image_soft_token>"
    image_in_template: ClassVar[str] = "<start_of_image>"
    video_token: ClassVar[str | None] = None
    start_of_document: ClassVar[str] = "<bos>"
    end_of_document: ClassVar[str] = "<eos>"
    turn_end: ClassVar[str] = "<end_of_turn>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>",
        "<image_soft_token>",
    )  # fmt: skip
    text_tokens: ClassVar[tuple[str, ...]] = (
        *("\n" * n for n in range(1, 32)), *("\u2581" * n for n in range(2, 32)),
        *(f"<{tag}>" for tag in TAGS), *(f"</{tag}>" for tag in TAGS),
    )  # fmt: skip
    """Added tokens of these tokenizers that are no control tokens."""
    packing: ClassVar[Packing] = "own_mask"
    layout: ClassVar[Layout] = Layout(
        projector=r"multi_modal_projector\.",
        vision=r"vision_tower\.",
        vision_blocks="model.vision_tower.encoder.layers",
        language_blocks="model.language_model.layers",
        lora={
            "language": rf".*language_model\.layers\.\d+\.{LLAMA_LINEARS}",
            "vision": rf".*vision_tower\.encoder\.layers\.\d+\.{SIGLIP_LINEARS}",
        },
    )
    loading: ClassVar[Loading] = Loading(layer_kinds=frozenset(MASKS))

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends with the header of the model's turn. Raises `Drop` TOOL_FORM."""
        messages = list(conversation.messages)
        if conversation.tools or any(m.role == "tool" or m.tool_calls for m in messages):
            raise Drop("TOOL_FORM", f"the chat form of {self.name} has no place for tools")
        # the check of a template renders it without the names of special tokens
        pieces: list[Piece] = [Template("<bos>", vendor="")]
        system = messages.pop(0) if messages and messages[0].role == "system" else None
        for number, message in enumerate(messages):
            role = "model" if message.role == "assistant" else message.role
            pieces.append(Template(f"<start_of_turn>{role}\n"))
            if system is not None and number == 0:
                pieces += [*self._parts(system, trim=False), Template("\n\n")]
            pieces += [*self._parts(message, trim=True), Template("<end_of_turn>", message.trained), Template("\n")]
        return [*pieces, Template("<start_of_turn>model\n")] if ask else pieces

    def render_media(self, part: Image | Video) -> list[Piece]:
        return [Film(part)] if isinstance(part, Video) else [Picture(part)]

    def _parts(self, message: Message, *, trim: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for group in _together(message.parts):
            if not isinstance(group, list):
                pieces += self.render_media(group)
                continue
            whole = "".join(text.text for text in group)
            begin, end = (len(whole) - len(whole.lstrip()), len(whole.rstrip())) if trim else (0, len(whole))
            at = 0
            for text in group:
                kept = text.text[max(begin - at, 0) : max(end - at, 0)]
                at += len(text.text)
                if kept:
                    pieces.append(Run(kept, message.trained if text.train is None else text.train))
        return pieces

    # -- images -------------------------------------------------------------------------------------------------

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        boxes = self.pan_and_scan.boxes(width, height) if self.pan_and_scan else []
        if not boxes:
            return self._shown(image, ())
        pieces: list[Piece] = [Template("Here is the original image "), *self._shown(image, ())]
        pieces.append(Template(" and here are some crops to help you see better "))
        for number, box in enumerate(boxes):
            pieces += [Template(" ")] if number else []
            pieces += self._shown(image, box)
        return pieces

    def _shown(self, image: Image, box: View) -> list[Piece]:
        n = self.side // self.pixels.patch
        block = ImageBlock(image, self.side, self.side, (1, n, n), (n // self.pixels.merge) ** 2, view=box)
        return [Template("\n\n<start_of_image>"), Placed(block), Template("<end_of_image>\n\n")]

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch], row by row; in a patch channel, row, column."""
        from PIL import Image as pillow

        if block.view:
            left, top, right, bottom = block.view
            picture = picture.crop((left, top, right, bottom))
        a = np.asarray(picture.resize((self.side, self.side), pillow.Resampling(self.resample)))
        n, p = self.side // self.pixels.patch, self.pixels.patch
        a = a.reshape(n, p, n, p, 3).transpose(0, 2, 4, 1, 3)
        return np.ascontiguousarray(a).reshape(block.num_patches, -1)

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        """int32 [3, L]: one after the other, in all three rows."""
        return np.tile(np.arange(len(kind_L), dtype=np.int32), (3, 1))

    # -- model --------------------------------------------------------------------------------------------------

    def lora_pattern(self, parts: Sequence[PartName]) -> str:
        """Raises `ConfigError` for the projector, which is one matrix and no linear layer."""
        if "projector" in parts:
            raise ConfigError("TUNE", "the projector of gemma3 is a matrix that LoRA cannot adapt",
                              remedy="leave projector out of tune.parts, or train it with tune: freeze")  # fmt: skip
        return super().lora_pattern(parts)

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one image token; before the projector, of the tower (pooled: pooling trains nothing)."""
        if mode == "projector":
            return config["vision_config"].get("hidden_size", 768)
        return config["text_config"].get("hidden_size", 2304)

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and projector: per block [tokens, H]."""
        return self.project(model, self.tower_only(model, pixels_PD, grids))

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and pooling: per block [tokens, tower width]."""
        inner: Any = model.model
        weight = inner.vision_tower.embeddings.patch_embedding.weight
        n = self.side // self.pixels.patch
        values = self.normalise(pixels_PD.to(weight.device)).to(weight.dtype)
        x = inner.vision_tower(pixel_values=values).last_hidden_state
        x = inner.multi_modal_projector.avg_pool(x.transpose(1, 2).unflatten(2, (n, n)))
        return list(x.flatten(2).transpose(1, 2).unbind())

    def normalise(self, pixels_PD: torch.Tensor) -> torch.Tensor:
        """float32 [blocks, 3, side, side] of uint8 patches: rescaled and normalised."""
        n = self.side // self.pixels.patch
        return tile_values(pixels_PD, n, n, self.pixels)

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The projector's norm and matrix, on what `tower_only` gave."""
        import torch

        projector: Any = model.model.multi_modal_projector  # type: ignore[union-attr]
        x = torch.cat(features)
        projected = torch.matmul(projector.mm_soft_emb_norm(x), projector.mm_input_projection_weight)
        return list(projected.type_as(x).split([f.shape[0] for f in features]))

    def hidden(
        self,
        model: nn.Module,
        ids_BT: torch.Tensor,
        features_NH: torch.Tensor | None,
        image_mask_BT: torch.Tensor,
        position_ids_3BT: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """The language model's output (`last_hidden_state` [B, T, H]) with image features in their places. Embeddings
        of tokens are scaled by the embedding itself; features are not."""
        language: Any = model.model.language_model  # type: ignore[union-attr]
        embeds = language.embed_tokens(ids_BT)
        position_ids_BT = position_ids_3BT[0]
        if features_NH is not None:
            embeds = embeds.masked_scatter(image_mask_BT[..., None], features_NH.to(embeds.dtype))
        if kwargs.get("attention_plans"):
            plan = kwargs["attention_plans"][None]
            images = image_mask_BT if features_NH is not None else None
            kwargs["attention_plans"] = _plans(language, plan, images, position_ids_BT)
            kwargs["attention_mask"] = dict.fromkeys(MASKS)
        elif features_NH is not None:
            kwargs["attention_mask"] = _prefill_masks(language, embeds, image_mask_BT, position_ids_BT, kwargs)
        return language(inputs_embeds=embeds, position_ids=position_ids_BT, **kwargs)


def _together(parts: Sequence[Part]) -> list[Image | Video | list[Text]]:
    """Parts in order, neighbouring texts as one list."""
    groups: list[Image | Video | list[Text]] = []
    for part in parts:
        if not isinstance(part, Text):
            groups.append(part)
        elif groups and isinstance(groups[-1], list):
            groups[-1].append(part)
        else:
            groups.append([part])
    return groups


def _plans(
    language: Any, plan: AttentionPlan, image_mask_BT: torch.Tensor | None, position_ids_BT: torch.Tensor
) -> dict[Any, AttentionPlan]:
    """The plan of full layers under None, that of sliding ones under their attention modules."""
    from lensmith.model.attention import AttentionPlan

    window = language.config.sliding_window
    longest = max(s.prefix_length + s.length for s in plan.segments)
    full = plan
    if image_mask_BT is not None:
        full = AttentionPlan(plan.segments, plan.num_tokens, True, _sight(image_mask_BT, position_ids_BT, None))
    if longest <= window:
        return {None: full}
    sliding = AttentionPlan(plan.segments, plan.num_tokens, True, _sight(image_mask_BT, position_ids_BT, window))
    return {None: full, **{x.self_attn: sliding for x in language.layers if x.self_attn.is_sliding}}


def _sight(
    image_mask_BT: torch.Tensor | None, position_ids_BT: torch.Tensor, window: int | None
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Who sees whom in a segment: what came before and the rest of the own picture, all less than `window` behind.

    Positions count within a sample, through its prefix, so they are the distances that the sample has alone.
    """
    position_T = position_ids_BT[0].cpu()
    picture_T = None
    if image_mask_BT is not None:
        mask_T = image_mask_BT[0].cpu().int()
        first_T = mask_T.diff(prepend=mask_T.new_zeros(1)) == 1
        picture_T = first_T.cumsum(0) * mask_T  # 0: text

    def sees(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        seen = position_T[key] <= position_T[query]
        if picture_T is not None:
            seen = seen | ((picture_T[key] == picture_T[query]) & (picture_T[query] > 0))
        return seen if window is None else seen & (position_T[query] - position_T[key] < window)

    return sees


def _prefill_masks(
    language: Any,
    embeds: torch.Tensor,
    image_mask_BT: torch.Tensor,
    position_ids_BT: torch.Tensor,
    attention: Mapping[str, Any],
) -> dict[str, torch.Tensor]:
    """Masks of a padded batch of prompts, as transformers makes them from token types."""
    from transformers.models.gemma3.modeling_gemma3 import (
        create_masks_for_vision_model,
        get_block_sequence_ids_for_mask,
    )

    return create_masks_for_vision_model(
        config=language.config,
        inputs_embeds=embeds,
        attention_mask=attention["attention_mask"],
        past_key_values=attention["past_key_values"],
        position_ids=position_ids_BT,
        block_sequence_ids=get_block_sequence_ids_for_mask(image_mask_BT.int()),
    )


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> Gemma3:
    """Build from the model's own `config.json` and `preprocessor_config.json`.

    Raises `ModelError` CONFIG for what the published models do not have and transformers' class does not compute.
    """
    vision, text = config["vision_config"], config["text_config"]
    side, size = vision.get("image_size", 224), preprocessor.get("size") or {}
    for what, found, known in (
        ("attn_logit_softcapping", text.get("attn_logit_softcapping"), None),
        ("final_logit_softcapping", text.get("final_logit_softcapping"), None),
        ("use_bidirectional_attention", text.get("use_bidirectional_attention") or False, False),
        ("the height of preprocessed pictures", size.get("height", side), side),
        ("the width of preprocessed pictures", size.get("width", side), side),
    ):
        if found != known:
            raise ModelError("CONFIG", f"{what} is {found!r}; {known!r} is supported", where="config.json")
    red_mean, green_mean, blue_mean = preprocessor.get("image_mean") or (0.5, 0.5, 0.5)
    red_std, green_std, blue_std = preprocessor.get("image_std") or (0.5, 0.5, 0.5)
    patch = vision.get("patch_size", 16)
    pixels = PixelSettings(
        patch=patch,
        merge=side // patch // math.isqrt(config.get("mm_tokens_per_image", 256)),
        mean=(red_mean, green_mean, blue_mean),
        std=(red_std, green_std, blue_std),
    )
    pan = PanAndScan(
        preprocessor.get("pan_and_scan_min_crop_size") or 256,
        preprocessor.get("pan_and_scan_max_num_crops") or 4,
        preprocessor.get("pan_and_scan_min_ratio_to_activate") or 1.2,
    )
    shown = pan if preprocessor.get("do_pan_and_scan") else None
    return Gemma3(pixels, side, preprocessor.get("resample", 2), shown)


DEFAULT_SYSTEM: dict[str, str | None] = {"gemma3": None}
