"""Tiny random models of each family as ordinary model folders, and small data to train them on. No downloads."""

from __future__ import annotations

import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

DATA = Path(__file__).parent / "data"
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TEXTS = [
    "You are a helpful assistant. system user assistant what is in the picture? a red circle and a blue square\n\n",
    "is there a green triangle? yes no. 中文 图片 描述 \n \n\n  Hello World 123 é ü emoji 😀 def f(x):\n    return x\n",
] * 20


@lru_cache(maxsize=4)
def tokenizer_json(merges: int = 200) -> str:
    """A byte-level BPE of Qwen's kind, with its control tokens after the vocabulary."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()  # type: ignore[assignment]
    tok.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False)
    )
    tok.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN_ADDED])
    return tok.to_str()


def token_id(name: str) -> int:
    return next(t["id"] for t in json.loads(tokenizer_json())["added_tokens"] if t["content"] == name)


def config_of(model_type: str, vocab: int, *, hidden: int = 32, layers: int = 2, tie: bool = True) -> dict[str, Any]:
    """A hub-like config of a few ten thousand parameters; Qwen2.5-VL with windows and one full-attention block."""
    heads, kv = 4, 2
    ids = {
        k: token_id(v)
        for k, v in (
            ("image_token_id", "<|image_pad|>"),
            ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"),
            ("vision_end_token_id", "<|vision_end|>"),
        )
    }
    text = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocab,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": tie,
        "initializer_range": 0.1,
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    mrope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    if model_type == "qwen3_vl":
        vision = {
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 4,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
            "in_channels": 3,
            "hidden_act": "gelu_pytorch_tanh",
            "initializer_range": 0.1,
        }
        text |= {"head_dim": 8, "rope_parameters": {**mrope, "mrope_interleaved": True}, "model_type": "qwen3_vl_text"}
        return {
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "model_type": model_type,
            "text_config": text,
            "vision_config": {"model_type": "qwen3_vl", **vision},
            "tie_word_embeddings": tie,
            **ids,
        }
    vision = {
        "depth": 2,
        "num_heads": 4,
        "in_channels": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if model_type == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": hidden, "mlp_ratio": 2}
        name = "Qwen2VLForConditionalGeneration"
    else:
        vision |= {
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": hidden,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "hidden_act": "silu",
        }
        name = "Qwen2_5_VLForConditionalGeneration"
    return {
        "architectures": [name],
        "model_type": model_type,
        **text,
        "rope_scaling": mrope,
        "vision_config": vision,
        "use_sliding_window": False,
        **ids,
    }


def make_model(
    folder: Path,
    model_type: str = "qwen2_5_vl",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tie: bool = True,
    hidden: int = 32,
    layers: int = 2,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    vocab: int | None = None,
) -> Path:
    """A model folder as a user has it: config, safetensors, tokenizer, processor, chat template."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    vocab = vocab or 256 + 200 + len(SPECIAL) + len(PLAIN_ADDED)
    (folder / "config.json").write_text(json.dumps(config_of(model_type, vocab, hidden=hidden, layers=layers, tie=tie)))
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    for name, p in model.named_parameters():  # biases and norms away from their trivial initial values
        if p.ndim == 1:
            torch.nn.init.normal_(p, 1.0 if "norm" in name or "ln_q" in name else 0.0, 0.1)
    model.save_pretrained(folder)
    template = "qwen3_vl_instruct.jinja" if model_type == "qwen3_vl" else "qwen2_vl.jinja"
    (folder / "chat_template.jinja").write_text((DATA / template).read_text(encoding="utf-8"), encoding="utf-8")
    patch = 16 if model_type == "qwen3_vl" else 14
    half = [0.5, 0.5, 0.5]
    preprocessor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": min_pixels or (patch * 4) ** 2, "longest_edge": max_pixels or (patch * 16) ** 2},
        "image_mean": half if patch == 16 else [0.48145466, 0.4578275, 0.40821073],
        "image_std": half if patch == 16 else [0.26862954, 0.26130258, 0.27577711],
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 4096,
            }
        )
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": token_id("<|im_end|>"), "pad_token_id": token_id("<|endoftext|>")})
    )
    return folder


def make_pictures(folder: Path, count: int, seed: int = 0, sizes: tuple[int, int] = (30, 200)) -> list[str]:
    """`count` small PNGs of random sizes; names relative to `folder`."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(count):
        w, h = rng.integers(*sizes, 2)
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        name = f"images/{i}.png"
        Image.fromarray(pixels).resize((int(w), int(h)), Image.Resampling.BILINEAR).save(folder / name)
        names.append(name)
    return names


def make_video(
    frames: int = 30,
    *,
    fps: int = 10,
    size: tuple[int, int] = (64, 64),
    codec: str = "libx264",
    kind: str = "mp4",
    turn: int = 0,
    sound: bool = False,
    trimmed: int = 0,
) -> bytes:
    """A video whose frame i is grey of `grey(i)`, its left half a little redder. `turn` is written, not done; the first
    `trimmed` frames are there and passed over, by an edit list."""
    from fractions import Fraction

    import av

    out = io.BytesIO()
    fast = {"libx264": {"preset": "ultrafast"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    apart = {"avoid_negative_ts": "disabled"} if trimmed else {}
    with av.open(out, "w", format=kind, container_options=apart) as container:
        stream = container.add_stream(codec, rate=fps, options=fast.get(codec, {}))
        stream.bit_rate = 8_000_000
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count, stream.codec_context.gop_size = 1, 5
        if turn:
            stream.set_display_rotation(turn)
        voice = container.add_stream("aac", rate=8000) if sound else None
        for i in range(frames):
            pixels = np.full((size[1], size[0], 3), grey(i), np.uint8)
            pixels[:, : size[0] // 2, 0] += 40
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = i - trimmed, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(voice.encode(silence))
            container.mux(voice.encode(None))
    return out.getvalue()


def make_sound() -> bytes:
    """An MP4 without pictures."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return out.getvalue()


def grey(frame: int) -> int:
    return 10 + 6 * frame % 204


WORDS = [
    "a",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "triangle",
    "is",
    "there",
    "yes",
    "no",
    "picture",
    "what",
    "in",
    "the",
    "中文",
    "图片",
]


def make_chat(
    folder: Path, count: int, *, seed: int = 0, pictures: int = 4, text_only: float = 0.3, name: str = "train.jsonl"
) -> Path:
    """`count` conversations of one or two turns, some with one or two pictures, as JSONL in OpenAI's form."""
    rng = np.random.default_rng(seed)
    names = make_pictures(folder, pictures, seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    rows = []
    for _ in range(count):
        images = [] if rng.random() < text_only else list(rng.choice(names, rng.integers(1, 3)))
        messages = [
            {"role": "user", "content": "<image>" * len(images) + words(2, 9)},
            {"role": "assistant", "content": words(1, 7)},
        ]
        if rng.random() < 0.4:
            messages += [{"role": "user", "content": words(2, 6)}, {"role": "assistant", "content": words(1, 7)}]
        rows.append({"messages": messages, "images": images} if images else {"messages": messages})
    path = folder / name
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path
