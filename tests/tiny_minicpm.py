"""A tiny random MiniCPM-V-2 as a model folder: config in the published keys, `tokenizer.model`, no `tokenizer.json`."""

from __future__ import annotations

import json
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lensmith.model.minicpm_v import MiniCPMV, MiniCPMVConfig

SPACE = "\u2581"
SPECIAL = ("<unk>", "<s>", "</s>")
ALONE = ("\n", ".", "?")
"""Single characters that are pieces of their own, as in the published model."""
MARKS = ("<image>", "</image>", "<ref>", "</ref>", "<slice>", "</slice>")
CONTROL, NORMAL, UNKNOWN, USER_DEFINED, BYTE = 3, 1, 2, 4, 6

Piece = tuple[str, float, int]


@lru_cache(maxsize=1)
def pieces() -> tuple[Piece, ...]:
    """Control, characters of their own, marks, bytes, then pieces of a byte-pair encoding with falling scores."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")  # type: ignore[assignment]
    texts = [t.replace("\n", "").replace(" ", SPACE) for t in (*tiny.TEXTS, "<用户> <AI> 描述 >a >is <A")]
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=260, show_progress=False))
    vocab = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    merged = [t for t, _ in vocab if len(t) > 1]
    single = [t for t, _ in vocab if len(t) == 1 and t not in ALONE]
    found = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    found += [(c, 0.0, USER_DEFINED) for c in (*ALONE, *MARKS)]
    found += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    found += [(t, -float(rank), NORMAL) for rank, t in enumerate([*merged, *single])]
    return tuple(found)


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def tokenizer_model(
    found: tuple[Piece, ...] | None = None,
    *,
    in_front: bool = False,
    fewer_spaces: bool = False,
    kind: int = 2,
) -> bytes:
    """The bytes of a SentencePiece model: `kind` 2 is byte-pair encoding; `in_front`: a space before every text."""
    out = b""
    for text, score, piece_kind in pieces() if found is None else found:
        piece = _field(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score)
        out += _field(1, piece + (_field(3, piece_kind) if piece_kind != NORMAL else b""))
    out += _field(2, _field(3, kind) + _field(35, 1))
    return out + _field(3, _field(1, b"identity") + _field(3, int(in_front)) + _field(4, int(fewer_spaces)))


def piece_id(text: str) -> int:
    return next(i for i, piece in enumerate(pieces()) if piece[0] == text)


def config_of(*, layers: int = 2, hidden: int = 32) -> dict[str, Any]:
    """The published keys with small numbers, and the sizes of the tower, which the published name stands for."""
    return {
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig", "AutoModel": "modeling_minicpmv.MiniCPMV"},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dim_model_base": 8,
        "drop_vision_last_layer": True,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "image_size": 56,
        "initializer_range": 0.1,
        "intermediate_size": hidden * 2,
        "max_position_embeddings": 4096,
        "max_slice_nums": 9,
        "mm_use_im_start_end": True,
        "model_type": "minicpmv",
        "num_attention_heads": 4,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "patch_size": 14,
        "pretraining_tp": 1,
        "query_num": 4,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "scale_depth": 1.4,
        "scale_emb": 12,
        "scale_resolution": 56,
        "slice_mode": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "vision_encoder": "vit_so400m_patch14_siglip_384.webli",
        "vocab_size": len(pieces()),
        "vision_hidden_size": 24,
        "vision_num_layers": 3,
        "vision_num_heads": 2,
        "vision_intermediate_size": 40,
        "vision_side": 5,
        "resampler_head_size": 16,
    }


def make_model(
    folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int = 2, in_front: bool = False
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(layers=layers)))
    torch.manual_seed(seed)
    model = MiniCPMV._from_config(MiniCPMVConfig.from_pretrained(folder), dtype=dtype)
    for name, p in model.named_parameters():  # biases and norms away from their trivial initial values
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if ("norm" in name or "ln_" in name) and "bias" not in name else 0.0, 0.1)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config_of(layers=layers)))
    (folder / "tokenizer.model").write_bytes(tokenizer_model(in_front=in_front))
    added = {str(piece_id(t)): {"content": t, "special": True} for t in (*SPECIAL, *MARKS)}
    settings = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_minicpmv.MiniCPMVTokenizer", None]},
        "legacy": True,
        "tokenizer_class": "MiniCPMVTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shown = {"image_processor_type": "MiniCPMVImageProcessor", "norm_mean": [0.5] * 3, "norm_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(shown))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0}))
    return folder
