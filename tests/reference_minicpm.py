"""MiniCPM-V-2 a second time, from its formulas over transformers' and torch's own modules: one slice and one sample at
a time, nothing packed. What `lensmith/model/minicpm_v.py` is held against. Everything is a function of the published
tensors, so it has gradients too."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny_minicpm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

State = dict[str, torch.Tensor]


def within(state: State, prefix: str) -> State:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def llama(config: dict[str, Any], state: State) -> tuple[LlamaForCausalLM, State]:
    """A stock Llama and the weights with which it computes the layers of the language model: their multiplier is put
    into what ends each branch. The other two are left to the caller."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "rms_norm_eps", "max_position_embeddings")  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{n: config[n] for n in names}, rope_theta=config["rope_theta"])).eval()
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    own = {
        n: t * depth if n.endswith(("o_proj.weight", "down_proj.weight")) else t
        for n, t in within(state, "llm.").items()
    }
    assert own.keys() == model.state_dict().keys()
    return model, own


def siglip(config: dict[str, Any], state: State, side: int | None = None) -> tuple[SiglipVisionModel, State]:
    """transformers' tower with exact GELU and no head, and its weights; the positions are resampled to `side`."""
    side = side or config["vision_side"]
    layers = config["vision_num_layers"] - 1
    sizes = SiglipVisionConfig(
        hidden_size=config["vision_hidden_size"], intermediate_size=config["vision_intermediate_size"],
        num_hidden_layers=layers, num_attention_heads=config["vision_num_heads"], image_size=side * 14,
        patch_size=14, hidden_act="gelu", layer_norm_eps=1e-6, vision_use_head=False,
    )  # fmt: skip
    model, own = SiglipVisionModel(sizes).eval(), within(state, "vpm.")
    new = {f"embeddings.patch_embedding.{p}": own[f"patch_embed.proj.{p}"] for p in ("weight", "bias")}
    new["embeddings.position_embedding.weight"] = tower_positions(own["pos_embed"], (side, side))
    new |= {f"post_layernorm.{p}": own[f"norm.{p}"] for p in ("weight", "bias")}
    for i, p in itertools.product(range(layers), ("weight", "bias")):
        at, qkv = f"encoder.layers.{i}.", own[f"blocks.{i}.attn.qkv.{p}"].chunk(3)
        new |= {f"{at}self_attn.{n}_proj.{p}": t for n, t in zip("qkv", qkv, strict=True)}
        new |= {f"{at}self_attn.out_proj.{p}": own[f"blocks.{i}.attn.proj.{p}"]}
        new |= {f"{at}layer_norm{n}.{p}": own[f"blocks.{i}.norm{n}.{p}"] for n in (1, 2)}
        new |= {f"{at}mlp.fc{n}.{p}": own[f"blocks.{i}.mlp.fc{n}.{p}"] for n in (1, 2)}
    assert new.keys() == model.state_dict().keys()
    return model, new


def tower_positions(pos_embed: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[rows * columns, C]: both axes at once by torch, as timm does it."""
    side = math.isqrt(pos_embed.shape[1])
    grid = pos_embed.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if size == (side, side):
        return grid[0].flatten(1).T
    return F.interpolate(grid, size=size, mode="bicubic", antialias=True)[0].flatten(1).T


def tower(config: dict[str, Any], state: State, pixels: torch.Tensor) -> torch.Tensor:
    """[patches, C] of one slice [3, height, width] of any size."""
    model, own = siglip(config, state)
    x = functional_call(model.embeddings.patch_embedding, within(own, "embeddings.patch_embedding."), pixels[None])
    size = (x.shape[2], x.shape[3])
    x = x[0].flatten(1).T + tower_positions(state["vpm.pos_embed"], size)
    out = functional_call(model.encoder, within(own, "encoder."), (), {"inputs_embeds": x[None]})
    return functional_call(model.post_layernorm, within(own, "post_layernorm."), out.last_hidden_state)[0]


def table(rows: int, columns: int, width: int) -> np.ndarray:
    """float64 [rows * columns, width], each patch by itself: sine and cosine of its column, then of its row."""
    out = np.zeros((rows * columns, width))
    quarter = width // 4
    for row in range(rows):
        for column in range(columns):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / quarter)
                angles = (math.sin(column * omega), math.cos(column * omega),
                          math.sin(row * omega), math.cos(row * omega))  # fmt: skip
                for part, value in enumerate(angles):
                    out[row * columns + column, part * quarter + k] = value
    return out


def resampler(config: dict[str, Any], state: State, features: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """[queries, H] of one slice, by torch's own multi-head attention."""
    own = within(state, "resampler.")
    width = config["hidden_size"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (width,), own[f"{name}.weight"], own[f"{name}.bias"], 1e-6)

    attention = nn.MultiheadAttention(width, width // config["resampler_head_size"])
    x = norm("ln_kv", features @ own["kv_proj.weight"].T)
    keys = x + torch.from_numpy(table(rows, columns, width)).to(x.dtype)
    query = norm("ln_q", own["query"]) + own["pos_embed"]
    out, _ = functional_call(attention, within(own, "attn."), (query, keys, x))
    return norm("ln_post", out) @ own["proj"]


def encode(text: str, found: Sequence[tiny_minicpm.Piece], *, in_front: bool = False) -> list[int]:
    """Ids as SentencePiece's byte-pair encoding gives them: of all pairs of neighbours that make a piece, the one with
    the best score is joined first, the leftmost of equals; characters with a piece of their own are left alone."""
    ids = {p[0]: i for i, p in enumerate(found)}
    score = {p[0]: p[1] for p in found if p[2] == tiny_minicpm.NORMAL}
    alone = {p[0] for p in found if p[2] == tiny_minicpm.USER_DEFINED}
    parts = list(tiny_minicpm.SPACE * in_front + text.replace(" ", tiny_minicpm.SPACE))
    while True:
        pairs = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(itertools.pairwise(parts))
            if a + b in score and a not in alone and b not in alone
        ]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    out: list[int] = []
    for part in parts:
        out += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return out


def encode_prompt(text: str, *, in_front: bool = False) -> list[int]:
    """Ids of a text in which names of control tokens mean those tokens, each stretch between them by itself."""
    names = [*tiny_minicpm.SPECIAL, *tiny_minicpm.MARKS]
    out: list[int] = []
    for stretch in re.split("(" + "|".join(map(re.escape, names)) + ")", text):
        if stretch in names:
            out.append(tiny_minicpm.piece_id(stretch))
        elif stretch:
            out += encode(stretch, tiny_minicpm.pieces(), in_front=in_front)
    return out


class Model:
    """The whole model over the weights of a folder, for one sample at a time."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.config, self.state = config, load_file(folder / "model.safetensors")

    def features(self, slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """[N, H] of slices [3, height, width]."""
        out = []
        for pixels in slices:
            rows, columns = (n // self.config["patch_size"] for n in pixels.shape[1:])
            out.append(resampler(self.config, self.state, tower(self.config, self.state, pixels), rows, columns))
        return torch.cat(out)

    def hidden(self, ids: Sequence[int], slices: Sequence[torch.Tensor]) -> torch.Tensor:
        """[T, H] before the head. Pictures stand where `<unk>` is."""
        model, own = llama(self.config, self.state)
        at = torch.tensor(ids)
        embeds = own["model.embed_tokens.weight"][at] * self.config["scale_emb"]
        if slices:
            mask = (at == tiny_minicpm.piece_id("<unk>"))[:, None]
            embeds = embeds.masked_scatter(mask, self.features(slices))
        out = functional_call(model.model, within(own, "model."), (), {"inputs_embeds": embeds[None]})
        return out.last_hidden_state[0] / (self.config["hidden_size"] / self.config["dim_model_base"])

    def logits(self, ids: Sequence[int], slices: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """float32 [T, V]."""
        return self.hidden(ids, slices) @ self.state["llm.lm_head.weight"].T
