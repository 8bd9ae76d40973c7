"""MiniCPM-V-2 as a module of our own: the published tensor names and config, no remote code, no timm.

`llm` is a Llama with three multipliers: embeddings times `scale_emb`, what every layer adds times `scale_depth` over
the root of the number of layers, and what the head sees divided by `hidden_size / dim_model_base`. `vpm` is the tower,
`resampler` the projector (`minicpm_v_vision.py`). Picture features are put in behind the first multiplier and are not
scaled. Rotary tables are float32, and queries and keys are rotated in float32.

Shape letters: B rows, T tokens, H hidden, N tokens of pictures, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, LlamaConfig, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from lensmith.model.minicpm_v_vision import Resampler, ResamplerAttention, Size, Tower, places

TOWER = {"vision_hidden_size": 1152, "vision_num_layers": 27, "vision_num_heads": 16, "vision_intermediate_size": 4304,
         "vision_side": 27, "resampler_head_size": 128}  # fmt: skip
"""What `vision_encoder: vit_so400m_patch14_siglip_384.webli` means. A config may say otherwise under these names, which
the published one does not have."""


class MiniCPMVConfig(LlamaConfig):
    """`config.json` of MiniCPM-V-2: all keys at the top level."""

    model_type = "minicpmv"

    scale_emb: int | float = 12
    scale_depth: int | float = 1.4
    dim_model_base: int = 256
    query_num: int = 64
    patch_size: int = 14
    drop_vision_last_layer: bool = True
    vision_hidden_size: int = TOWER["vision_hidden_size"]
    vision_num_layers: int = TOWER["vision_num_layers"]
    vision_num_heads: int = TOWER["vision_num_heads"]
    vision_intermediate_size: int = TOWER["vision_intermediate_size"]
    vision_side: int = TOWER["vision_side"]
    resampler_head_size: int = TOWER["resampler_head_size"]

    def to_diff_dict(self) -> dict[str, Any]:
        """In the published form: the base of the rotary angles as `rope_theta`, nothing of the tower but its name."""
        out = {k: v for k, v in super().to_diff_dict().items() if TOWER.get(k) != v}
        rope = dict(out.pop("rope_parameters"))
        theta = rope.pop("rope_theta")
        return out | {"rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}


class Attention(LlamaAttention):
    """Rotates queries and keys in float32 and hands them on in the type of the values."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (p(hidden_states).view(shape).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (x.to(v.dtype) for x in apply_rotary_pos_emb(q.float(), k.float(), *position_embeddings))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        out, _ = attend(self, q, k, v, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(out.flatten(2))


class DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: Any, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.residual_scale = config.scale_depth / math.sqrt(config.num_hidden_layers)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        h = hidden_states + self.self_attn(self.input_layernorm(hidden_states), **kwargs) * self.residual_scale
        return h + self.mlp(self.post_attention_layernorm(h)) * self.residual_scale


class Decoder(nn.Module):
    """Embeddings to what the head sees, its division done."""

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)

    def embed(
        self, ids_BT: torch.Tensor, features_NH: torch.Tensor | None = None, image_mask_BT: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Scaled embeddings [B, T, H] with picture features, which are not scaled, where the mask says."""
        embeds = self.embed_tokens(ids_BT) * self.config.scale_emb
        if features_NH is None or image_mask_BT is None:
            return embeds
        return embeds.masked_scatter(image_mask_BT[..., None], features_NH.to(embeds.dtype))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """A packed row comes with `attention_plans`, and no mask is built for it."""
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen)[None]
        mask = None
        if "attention_plans" not in kwargs:
            mask = create_causal_mask(
                config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
                past_key_values=past_key_values, position_ids=position_ids,
            )  # fmt: skip
        tables = self.rotary_emb(torch.empty(0, dtype=torch.float32, device=inputs_embeds.device), position_ids)
        h = inputs_embeds
        for layer in self.layers:
            h = layer(
                h, position_embeddings=tables, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )  # fmt: skip
        h = self.norm(h) / (self.config.hidden_size / self.config.dim_model_base)
        return BaseModelOutputWithPast(last_hidden_state=h, past_key_values=past_key_values)


class LanguageModel(nn.Module):
    """`model` and `lm_head`, as the published names have them. The head is never tied: both tensors are published."""

    def __init__(self, config: Any):
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)


class MiniCPMV(PreTrainedModel, GenerationMixin):
    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config: Any):
        super().__init__(config)
        layers = config.vision_num_layers - int(config.drop_vision_last_layer)
        self.llm = LanguageModel(config)
        self.vpm = Tower(
            config.vision_hidden_size, layers, config.vision_num_heads, config.vision_intermediate_size,
            config.patch_size, config.vision_side,
        )  # fmt: skip
        self.resampler = Resampler(
            config.hidden_size, config.vision_hidden_size, config.query_num,
            config.hidden_size // config.resampler_head_size,
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, Tower):
            init.normal_(module.pos_embed, std=std)
        elif isinstance(module, ResamplerAttention):
            init.normal_(module.in_proj_weight, std=std)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, Resampler):
            init.normal_(module.query, std=std)
            init.normal_(module.proj, std=std)
            side = math.isqrt(module.query.shape[0])
            init.copy_(module.pos_embed, places([(side, side)], module.query.shape[1]))

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.model.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        self.llm.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.lm_head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.llm.lm_head = new_embeddings

    def image_features(self, values: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
        """Normalised patches [P, 3 * patch * patch] of slices of `sizes` -> features [N, H] in their order."""
        return self.resampler(self.vpm(values, sizes), sizes).flatten(0, 1)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits float32 [B, T, V]. `features` [N, H] stand where `image_mask` [B, T] says; with `inputs_embeds`, which
        `llm.model.embed` makes, they are in it already."""
        if inputs_embeds is None:
            assert input_ids is not None, "either input_ids or inputs_embeds"
            inputs_embeds = self.llm.model.embed(input_ids, features, image_mask)
        kwargs = {k: v for k, v in kwargs.items() if k == "attention_plans"}
        out = self.llm.model(inputs_embeds, position_ids, attention_mask, past_key_values, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.llm.lm_head(out.last_hidden_state[:, kept]).float()
        return CausalLMOutputWithPast(logits=logits, past_key_values=out.past_key_values)
