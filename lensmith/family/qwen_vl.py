"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: chat form, image placement, rotary positions, parts, forward.

Vendor sources: the models' chat templates, `preprocessor_config.json`, and transformers' `modeling_qwen2_vl`,
`modeling_qwen2_5_vl`, `modeling_qwen3_vl`. Equality with them is tested token by token and pixel by pixel. Videos are
in `qwen_vl_video.py`.

Deliberate differences from the vendor's template, by name:
- `typed_control_tokens`: `<|im_end|>`, `<|image_pad|>`, `<tool_call>`, ... inside data stay text;
- `tools_before_qwen3`: Qwen2-VL's and Qwen2.5-VL's templates drop tools and tool calls and print a `tool` role; here
  all three families write them in the form of the Qwen3-VL template (and of LLaMA-Factory's `tool_format: qwen`),
  behind the default system prompt where the model has one;
- `pictures_of_answers`: Qwen3-VL's template drops pictures of system and assistant turns; here they are kept.

Training: assistant text and its `<|im_end|>` are targets; role headers, images and the newline after `<|im_end|>` not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lensmith.core.encoded import IMAGE, ImageBlock, VideoInfo
from lensmith.core.sample import Conversation, Image, Message, Part, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Placed, Run, Template
from lensmith.data.media import VideoLimits
from lensmith.data.resize import Rule
from lensmith.family.base import Grid, Packing, PixelSettings, VideoSettings, View
from lensmith.family.layout import LaidOut, Layout
from lensmith.family.qwen_vl_video import place_video, smart_resize, video_settings

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from torch import nn

    from lensmith.model.attention import AttentionPlan

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

TOOLS_HEAD = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>"
)
TOOLS_TAIL = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
    "</tool_call>"
)


MLP = r"mlp\.((gate|up|down)_proj|(linear_)?fc[12])"


@dataclass(frozen=True)
class QwenVL(LaidOut):
    """One of the three Qwen-VL generations. `default_system` is what the model's own template puts in front."""

    name: Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    pixels: PixelSettings
    default_system: str | None
    video: VideoSettings = field(default_factory=VideoSettings)

    image_token: ClassVar[str] = "<|image_pad|>"
    video_token: ClassVar[str | None] = "<|video_pad|>"
    start_of_document: ClassVar[str] = ""
    end_of_document: ClassVar[str] = "<|endoftext|>"
    turn_end: ClassVar[str] = "<|im_end|>"
    control_tokens: ClassVar[tuple[str, ...]] = (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<|video_pad|>",
    )  # fmt: skip
    packing: ClassVar[Packing] = "segments"
    first_resize: ClassVar[Rule] = "sides"
    image_in_template: ClassVar[str] = "<|image_pad|>"
    layout: ClassVar[Layout] = Layout(
        projector=r"visual\.merger\.",  # the merger inside `.visual`, as in LLaMA-Factory
        vision=r"visual\.",
        vision_blocks="model.visual.blocks",
        language_blocks="model.language_model.layers",
        # the vision MLP of Qwen2.5-VL has layers called gate_proj, up_proj and down_proj too, so suffixes alone would
        # hit it (peft issue 2615)
        lora={
            "language": rf".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|{MLP})",
            "vision": rf".*visual\.(blocks\.\d+\.(attn\.(qkv|proj)|{MLP})|deepstack_merger_list\.\d+\.linear_fc[12])",
            "projector": r".*visual\.merger\.(mlp\.[02]|linear_fc[12])",
        },
    )

    # -- rendering ----------------------------------------------------------------------------------------------

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]:
        """Pieces of a conversation. `ask` ends with the header of an assistant turn, for generation."""
        messages = list(conversation.messages)
        pieces: list[Piece] = []
        system = messages.pop(0) if messages and messages[0].role == "system" else None
        if conversation.tools:
            pieces += self._system_with_tools(system, conversation.tools)
        elif system is not None:
            pieces += self._turn(system)
        elif self.default_system is not None:
            pieces.append(Template(f"<|im_start|>system\n{self.default_system}<|im_end|>\n"))
        for position, message in enumerate(messages):
            before = messages[position - 1].role if position else None
            after = messages[position + 1].role if position + 1 < len(messages) else None
            pieces += self._tool_result(message, before, after) if message.role == "tool" else self._turn(message)
        if ask:
            pieces.append(Template("<|im_start|>assistant\n"))
        return pieces

    def render_media(self, part: Image | Video) -> list[Piece]:
        if isinstance(part, Video):
            return [Film(part)]
        return [Template("<|vision_start|>"), Picture(part), Template("<|vision_end|>")]

    def _turn(self, message: Message) -> list[Piece]:
        trained = message.trained
        pieces: list[Piece] = [Template(f"<|im_start|>{message.role}\n"), *self._parts(message.parts, trained)]
        has_text = any(not isinstance(p, Text) or p.text for p in message.parts)
        for position, call in enumerate(message.tool_calls):
            border = "\n" if position or has_text else ""
            pieces += [
                Template(f'{border}<tool_call>\n{{"name": "', trained),
                Run(call.name, trained),
                Template('", "arguments": ', trained),
                Run(call.arguments, trained),
                Template("}\n</tool_call>", trained),
            ]
        return [*pieces, Template("<|im_end|>", trained), Template("\n")]

    def _parts(self, parts: Sequence[Part], trained: bool) -> list[Piece]:
        pieces: list[Piece] = []
        for part in parts:
            if isinstance(part, Text):
                pieces.append(Run(part.text, trained if part.train is None else part.train))
            else:
                pieces += self.render_media(part)
        return pieces

    def _system_with_tools(self, system: Message | None, tools: tuple[str, ...]) -> list[Piece]:
        pieces: list[Piece] = [Template("<|im_start|>system\n")]
        if system is not None:
            pieces += [*self._parts(system.parts, system.trained), Template("\n\n")]
        elif self.default_system is not None:
            pieces.append(Template(self.default_system + "\n\n"))
        pieces.append(Template(TOOLS_HEAD))
        for tool in tools:
            pieces += [Template("\n"), Run(_as_template_json(tool))]
        return [*pieces, Template(TOOLS_TAIL + "<|im_end|>\n")]

    def _tool_result(self, message: Message, before: str | None, after: str | None) -> list[Piece]:
        """Neighbouring tool results share one user turn."""
        pieces: list[Piece] = [] if before == "tool" else [Template("<|im_start|>user")]
        pieces += [
            Template("\n<tool_response>\n"),
            *self._parts(message.parts, message.trained),
            Template("\n</tool_response>"),
        ]
        return pieces if after == "tool" else [*pieces, Template("<|im_end|>\n")]

    # -- images -------------------------------------------------------------------------------------------------

    def place(self, image: Image, width: int, height: int) -> ImageBlock:
        """Size, grid and token count of a picture of `width` x `height` (after EXIF rotation).

        Both sides become multiples of patch * merge, the area lies within [min_pixels, max_pixels] and the aspect
        ratio is kept as near as that allows (the vendor's `smart_resize`). Raises `Drop` IMG_ASPECT above 200 : 1.
        """
        p = self.pixels
        assert p.max_pixels is not None
        wide, high = smart_resize(width, height, p.patch * p.merge, p.min_pixels, p.max_pixels)
        grid = (1, high // p.patch, wide // p.patch)
        return ImageBlock(image, wide, high, grid, grid[1] * grid[2] // p.merge**2)

    def place_image(self, image: Image, width: int, height: int) -> list[Piece]:
        return [Placed(self.place(image, width, height))]

    def place_video(self, video: Video, info: VideoInfo) -> list[Piece]:
        """What stands where a video is shown. Raises `Drop` IMG_ASPECT."""
        return place_video(self.name, self.pixels, self.video, video, info)

    def resized(self, picture: PIL.Image.Image, block: ImageBlock) -> PIL.Image.Image:
        from PIL import Image as pillow

        size = block.width, block.height
        return picture if picture.size == size else picture.resize(size, pillow.Resampling.BICUBIC)

    def patches(self, picture: PIL.Image.Image, block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * patch * patch] in the tower's order: merge blocks of patches, then channel, row, column."""
        return self._patches([picture], block, 1)

    def video_patches(self, frames: Sequence[PIL.Image.Image], block: ImageBlock) -> np.ndarray:
        """uint8 [P, 3 * temporal * patch * patch] of the frames of a block: as for a picture, time after channel."""
        return self._patches(frames, block, self.pixels.temporal)

    def _patches(self, pictures: Sequence[PIL.Image.Image], block: ImageBlock, times: int) -> np.ndarray:
        p = self.pixels
        t, rows, columns = block.grid_thw
        a = np.stack([np.asarray(self.resized(picture, block)) for picture in pictures])
        a = a.reshape(t, times, rows // p.merge, p.merge, p.patch, columns // p.merge, p.merge, p.patch, 3)
        return np.ascontiguousarray(a.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)).reshape(block.num_patches, -1)

    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray:
        """M-RoPE positions int32 [3, L] of one sample (Qwen2-VL, arXiv 2409.12191, section 2.1).

        Text counts up in all three rows; an image counts rows and columns from where it begins, a video its time too
        (Qwen2.5-VL: by the clock); the next text goes on at begin + max(rows, columns).
        """
        out = np.empty((3, len(kind_L)), np.int32)
        at, here = 0, 0
        remaining = list(blocks)
        while at < len(kind_L):
            if kind_L[at] == IMAGE:
                block = remaining.pop(0)
                end = at + block.num_tokens
                out[:, at:end] = self._places(block) + here
                here += max(block.grid_thw[1:]) // self.pixels.merge
            else:
                stop = np.flatnonzero(kind_L[at:] == IMAGE)
                end = at + int(stop[0]) if len(stop) else len(kind_L)
                out[:, at:end] = np.arange(here, here + end - at)
                here += end - at
            at = end
        return out

    def _places(self, block: ImageBlock) -> np.ndarray:
        """Time, row and column [3, N] of each token of a block, in float32 as the vendor scales time."""
        t, h, w = block.grid_thw
        places = np.indices((t, h // self.pixels.merge, w // self.pixels.merge), np.int32).reshape(3, -1)
        if block.frames and self.video.tokens_per_second:
            interval = np.float32(self.video.tokens_per_second) * np.float32(block.seconds_per_grid)
            places[0] = (places[0].astype(np.float32) * interval).astype(np.int32)
        return places

    # -- model --------------------------------------------------------------------------------------------------

    def tower(self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid]) -> Any:
        """transformers' vision output for uint8 patches [P, D]; one segment per frame or window, never a loop."""
        import torch

        visual: Any = model.model.visual  # type: ignore[union-attr]
        weight = visual.patch_embed.proj.weight
        plans, extra = self._vision_plans(model, tuple(grids))
        whole = torch.tensor([0, pixels_PD.shape[0]], dtype=torch.int32)
        grid_thw = torch.tensor(grids, device=weight.device)
        values = self.normalise(pixels_PD.to(weight.device)).to(weight.dtype)
        extra = {k: v.to(weight.device) for k, v in extra.items()}
        return visual(values, grid_thw=grid_thw, cu_seqlens=whole, attention_plans=plans, **extra)

    def normalise(self, pixels_PD: torch.Tensor) -> torch.Tensor:
        """float32 [P, 3 * temporal * patch * patch]: rescaled, normalised, a still picture repeated in time."""
        import torch

        p = self.pixels
        x = pixels_PD.unflatten(1, (3, -1, p.patch * p.patch)).to(torch.float32) * (1 / 255)
        mean = torch.tensor(p.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(p.std, device=x.device).view(1, 3, 1, 1)
        return ((x - mean) / std).expand(-1, -1, p.temporal, -1).flatten(1)

    def _vision_plans(self, model: nn.Module, grids: tuple[Grid, ...]) -> tuple[Any, dict[str, Any]]:
        visual: Any = model.model.visual  # type: ignore[union-attr]
        full, window, index = _segments_of(
            grids, self.pixels.merge, self.pixels.patch, getattr(visual, "window_size", 0)
        )
        if window is None or index is None:
            return {None: full}, {}
        import torch

        whole = torch.tensor([0, full.num_tokens], dtype=torch.int32)
        plans: dict[Any, AttentionPlan] = {None: window}
        plans.update({visual.blocks[i].attn: full for i in visual.fullatt_block_indexes})
        return plans, {"window_index": index, "cu_window_seqlens": whole}

    def feature_width(self, config: Mapping[str, Any], mode: Literal["projector", "frozen"]) -> int:
        """Values of one image token: of the deepstack levels too, and, before the projector, of its patches."""
        text, vision = {**config, **config.get("text_config", {})}, config["vision_config"]
        width = text["hidden_size"] * (1 + len(vision.get("deepstack_visual_indexes", ())))
        if mode == "projector":
            width += self.pixels.merge**2 * vision.get("embed_dim", vision["hidden_size"])
        return width

    def encode_images(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Tower and projector: per image [tokens, H * (1 + deepstack levels)]."""
        import torch

        out = self.tower(model, pixels_PD, grids)
        deep = list(getattr(out, "deepstack_features", None) or [])
        return list(torch.cat([out.pooler_output, *deep], dim=-1).split(self._token_counts(grids)))

    def tower_only(
        self, model: nn.Module, pixels_PD: torch.Tensor, grids: Sequence[Grid], views: Sequence[View] = ()
    ) -> list[torch.Tensor]:
        """Before the projector, in reading order: per image [tokens, merge^2 * tower width + deepstack]."""
        import torch

        out = self.tower(model, pixels_PD, grids)
        unit = self.pixels.merge**2
        x = out.last_hidden_state.reshape(out.last_hidden_state.shape[0] // unit, -1)
        index = self._vision_plans(model, tuple(grids))[1].get("window_index")
        if index is not None:
            x = x[torch.argsort(index).to(x.device)]
        deep = list(getattr(out, "deepstack_features", None) or [])
        return list(torch.cat([x, *deep], dim=-1).split(self._token_counts(grids)))

    def project(self, model: nn.Module, features: list[torch.Tensor], views: Sequence[View] = ()) -> list[torch.Tensor]:
        """The projector alone, on what `tower_only` gave."""
        import torch

        visual: Any = model.model.visual  # type: ignore[union-attr]
        x = torch.cat(features)
        unit = self.pixels.merge**2
        width = visual.config.hidden_size if self.name != "qwen2_vl" else visual.config.embed_dim
        body, deep = x[:, : unit * width], x[:, unit * width :]
        projected = visual.merger(body.reshape(-1, width))
        return list(torch.cat([projected, deep.to(projected.dtype)], dim=-1).split([f.shape[0] for f in features]))

    def _token_counts(self, grids: Sequence[Grid]) -> list[int]:
        return [t * h * w // self.pixels.merge**2 for t, h, w in grids]

    def hidden(
        self,
        model: nn.Module,
        ids_BT: torch.Tensor,
        features_NH: torch.Tensor | None,
        image_mask_BT: torch.Tensor,
        position_ids_3BT: torch.Tensor,
        **kwargs: Any,
    ) -> Any:
        """The language model's output (`last_hidden_state` [B, T, H]) with image features in their places.

        Calls the language model directly: `get_rope_index` knows no packing, and Qwen2.5-VL's outer forward falls
        back to 1-D positions without a word when a token-type argument is missing.
        """
        language: Any = model.model.language_model  # type: ignore[union-attr]
        embeds = language.embed_tokens(ids_BT)
        if features_NH is not None:
            width = embeds.shape[-1]
            levels = features_NH.to(embeds.dtype).split(width, dim=-1)
            embeds = embeds.masked_scatter(image_mask_BT[..., None], levels[0])
            if self.name == "qwen3_vl":
                kwargs |= {"visual_pos_masks": image_mask_BT, "deepstack_visual_embeds": list(levels[1:])}
        return language(inputs_embeds=embeds, position_ids=position_ids_3BT, **kwargs)


def _as_template_json(text: str) -> str:
    """As jinja's `tojson` of transformers' chat templates writes a tool: insertion order, non-ASCII kept."""
    return json.dumps(json.loads(text), ensure_ascii=False)


@lru_cache(maxsize=256)
def _segments_of(
    grids: tuple[tuple[int, int, int], ...], merge: int, patch: int, window_size: int
) -> tuple[AttentionPlan, AttentionPlan | None, torch.Tensor | None]:
    """Per-frame plan, per-window plan and the window order of merged tokens (Qwen2.5-VL only)."""
    import torch
    from transformers.vision_utils import get_vision_window_index

    from lensmith.model.attention import AttentionPlan

    full = AttentionPlan.from_lengths([h * w for t, h, w in grids for _ in range(t)], causal=False)
    if not window_size:
        return full, None, None
    index, cu = get_vision_window_index(torch.tensor(grids), merge, window_size, patch)
    return full, AttentionPlan.from_lengths(cu.diff().tolist(), causal=False), index


def from_config(
    config: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
    default_system: str | None,
    video: Mapping[str, Any] | None = None,
    limits: VideoLimits | None = None,
) -> QwenVL:
    """Build from the model's own `config.json`, `preprocessor_config.json` and settings for videos, which are in
    `video_preprocessor_config.json` or, where there are none, those for pictures."""
    name = config["model_type"]
    vision = config["vision_config"]
    size = preprocessor.get("size") or {}
    three = name == "qwen3_vl"
    half = (0.5, 0.5, 0.5)
    mean_r, mean_g, mean_b = preprocessor.get("image_mean") or (half if three else CLIP_MEAN)
    std_r, std_g, std_b = preprocessor.get("image_std") or (half if three else CLIP_STD)
    pixels = PixelSettings(
        min_pixels=preprocessor.get("min_pixels") or size.get("shortest_edge") or (65536 if three else 3136),
        max_pixels=preprocessor.get("max_pixels") or size.get("longest_edge") or (16777216 if three else 12845056),
        patch=vision.get("patch_size") or vision.get("spatial_patch_size") or (16 if three else 14),
        merge=vision.get("spatial_merge_size", 2),
        grouped=True,
        temporal=vision.get("temporal_patch_size", 2),
        mean=(mean_r, mean_g, mean_b),
        std=(std_r, std_g, std_b),
    )
    per_second = vision.get("tokens_per_second", 4) if name == "qwen2_5_vl" else 0
    own, unit = preprocessor if video is None else video, pixels.patch * pixels.merge
    shown = video_settings(name, own, unit, pixels.temporal, limits or VideoLimits())
    return QwenVL(name, pixels, default_system, replace(shown, tokens_per_second=per_second))


DEFAULT_SYSTEM: dict[str, str | None] = {
    "qwen2_vl": "You are a helpful assistant.",
    "qwen2_5_vl": "You are a helpful assistant.",
    "qwen3_vl": None,
}
"""What the published chat templates put in front; for a model folder without a template of its own."""
