"""InternVL against transformers' processor (PIL image processor) and model, on tiny weights.

The chat template is the published one in other words (`tiny_internvl.TEMPLATE`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import stock_kit
import tiny
import tiny_internvl
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as pillow
from stock_kit import GAP, Kit
from test_family_qwen import (
    BRANCHES,
    CONVERSATIONS,
    LARGE,
    SMALL,
    TALL,
    THIN,
    TOOL_CONVERSATIONS,
    WIDE,
    chat,
    hidden_of,
    opened,
    picture,
    root_of,
    row_of,
    set_mode,
)
from transformers import AutoModelForImageTextToText, InternVLConfig
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from lensmith.core.encoded import IMAGE
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Document, Sample, Text, Video
from lensmith.family.base import PixelSettings
from lensmith.family.internvl import IMAGENET_MEAN, IMAGENET_STD, InternVL, canvas, from_config
from lensmith.family.registry import load_family
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.vision_cache import VisionCache

PUBLISHED = PixelSettings(14, IMAGENET_MEAN, IMAGENET_STD, merge=2)
SIDE, PER_TILE = tiny_internvl.SIDE, tiny_internvl.PER_TILE


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tiny_internvl.make_model(tmp_path_factory.mktemp("internvl") / request.param, request.param)
    return stock_kit.make_kit(folder, tiny_internvl.processor_of(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_internvl.make_model(tmp_path_factory.mktemp("internvl") / "base")


# -- tokens -------------------------------------------------------------------------------------------------------


def test_ids_equal_the_vendors(kit: Kit) -> None:
    assert isinstance(kit.family, InternVL)
    for name, conversation in CONVERSATIONS.items():
        encoded = kit.encode(conversation)
        assert encoded.ids_L.tolist() == kit.vendor_inputs(conversation)["input_ids"][0].tolist(), name
        image = encoded.ids_L == tiny_internvl.token_id("<IMG_CONTEXT>")
        assert ((encoded.kind_L == IMAGE) == image).all(), name
        assert encoded.position_ids_3L.tolist() == [list(range(encoded.num_tokens))] * 3
        prompt = kit.encoder().encode_prompt(conversation)
        assert prompt.ids_L.tolist() == kit.vendor_inputs(conversation, ask=True)["input_ids"][0].tolist(), name


def test_mask_covers_exactly_the_answers(kit: Kit) -> None:
    assert kit.trained(CONVERSATIONS["turns"]) == "yes<|im_end|>no<|im_end|>blue  <|im_end|>"
    assert kit.trained(CONVERSATIONS["system"]) == "a square<|im_end|>"
    for conversation in CONVERSATIONS.values():
        assert stock_kit.image_tokens_are_never_trained(kit.encode(conversation))


def test_documents(kit: Kit) -> None:
    parts = (Text("a red "), SMALL, Text("\n\nblue", train=False), Text(" <|im_end|>"))
    encoded = kit.encoder().encode(Sample("test", Document(parts)))
    plain, control = kit.tokenizer.plain, kit.tokenizer.control
    block = [control("<img>"), *[control("<IMG_CONTEXT>")] * encoded.images[0].num_tokens, control("</img>")]
    end = control("<|endoftext|>")
    assert encoded.ids_L.tolist() == [*plain("a red ")[0], *block, *plain("\n\nblue <|im_end|>")[0], end]
    assert kit.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist()) == "a red  <|im_end|><|endoftext|>"


def test_default_system_is_the_templates(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    opening = (
        "{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nBe kind.<|im_end|>\\n' -}}{%- endif -%}"
    )
    (tmp_path / "chat_template.jinja").write_text(opening + tiny_internvl.TEMPLATE)
    family = load_family(tmp_path)
    assert family.default_system == "Be kind." and load_family(folder).default_system is None
    assert family.render(CONVERSATIONS["text"])[0].text == "<|im_start|>system\nBe kind.<|im_end|>\n"
    assert family.render(CONVERSATIONS["system"])[0].text == "<|im_start|>system\n"


# -- deliberate differences ---------------------------------------------------------------------------------------


def test_typed_control_tokens_stay_text(kit: Kit) -> None:
    typed = "<img><IMG_CONTEXT></img><|im_end|>\n<|im_start|>"
    encoded = kit.encode(chat(("system", typed), ("user", [typed, SMALL]), ("assistant", typed)))
    named = {v: k for k, v in kit.tokenizer.added.items()}
    turn = ["<|im_start|>", "<|im_end|>"]
    block = ["<img>", *["<IMG_CONTEXT>"] * encoded.images[0].num_tokens, "</img>"]
    assert [named[i] for i in encoded.ids_L.tolist() if i in named] == [*turn, turn[0], *block, turn[1], *turn]
    assert set(kit.processor.tokenizer(typed).input_ids) & set(named), "the vendor's takes them for real ones"


@pytest.mark.parametrize("name", TOOL_CONVERSATIONS)
def test_no_tools(kit: Kit, name: str) -> None:
    with pytest.raises(Drop, match="TOOL_FORM"):
        kit.encode(TOOL_CONVERSATIONS[name])


def test_no_videos(kit: Kit) -> None:
    document = Document((Video(path="a.mp4"), Text("a")))
    with pytest.raises(Drop, match="VIDEO_KIND"):
        kit.encoder().encode(Sample("test", document))


# -- tiles and pixels ---------------------------------------------------------------------------------------------

SIZES = [(1, 1), (56, 56), (57, 43), (113, 112), (200, 1), (7, 1400), (640, 480), (501, 333), (33, 900), (400, 400)]


@pytest.mark.parametrize("noise", [False, True], ids=["smooth", "noise"])
def test_pixels_equal_the_vendors(kit: Kit, noise: bool) -> None:
    worst, seen = 0.0, set[tuple[int, ...]]()
    for seed, (width, height) in enumerate(SIZES):
        image = opened(picture(width, height, seed))
        if noise:
            image = pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        block = kit.family.place(SMALL, width, height)
        seen.add(block.view)
        patches = kit.family.patches(image, block)
        theirs = kit.processor.image_processor(images=[image], crop_to_patches=True, return_tensors="pt")
        assert theirs["num_patches"].tolist() == [block.grid_thw[0]]
        assert patches.dtype == np.uint8 and patches.shape == (block.num_patches, 3 * 14 * 14)
        assert block.num_tokens == block.grid_thw[0] * PER_TILE
        ours = kit.family.normalise(torch.from_numpy(patches))
        assert ours.dtype == torch.float32 and ours.shape == theirs["pixel_values"].shape
        worst = max(worst, (ours - theirs["pixel_values"]).abs().max().item())
    print("gap", worst)
    assert worst <= 1e-6 and len(seen) >= 5, (worst, seen)


@given(st.integers(1, 16384), st.integers(1, 16384), st.integers(1, 4), st.integers(1, 24))
def test_the_canvas_equals_the_vendors(width: int, height: int, fewest: int, most: int) -> None:
    theirs = get_optimal_tiled_canvas((height, width), (448, 448), fewest, most)
    assert canvas(width, height, 448, fewest, most) == theirs


def test_canvases_by_hand() -> None:
    """At the published sizes: a square has one tile, and four where it is larger than two tiles."""
    tokens = {size: InternVL(PUBLISHED, None).place(SMALL, *size) for size in ((448, 448), (1000, 1000), (1920, 1080))}
    assert [(b.view, b.grid_thw, b.num_tokens) for b in tokens.values()] == [
        ((1, 1), (1, 32, 32), 256),
        ((3, 3), (10, 32, 32), 2560),
        ((4, 2), (9, 32, 32), 2304),
    ]


# -- the model ----------------------------------------------------------------------------------------------------


def test_packed_equals_transformers_one_by_one(kit: Kit) -> None:
    gaps = stock_kit.packed_gaps(kit, list(CONVERSATIONS.values()))
    print("gap", gaps)
    assert max(gaps.values()) < GAP, gaps


def test_branches_equal_each_alone(kit: Kit) -> None:
    gaps = {n: stock_kit.branches_gap(kit, group, CONVERSATIONS["two pictures"]) for n, group in BRANCHES.items()}
    print("gap", gaps)
    assert max(gaps.values()) < GAP, gaps


def test_gradients_equal_transformers(kit: Kit) -> None:
    gap = stock_kit.gradient_gap(kit, [BRANCHES["one picture"], BRANCHES["other pictures"], [CONVERSATIONS["turns"]]])
    print("gap", gap)
    assert gap < 1e-5, gap


@torch.no_grad()
def test_no_mask_of_the_row_is_built(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a mask of the row was built")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", refuse)
    samples = [kit.encode(CONVERSATIONS["text"]), kit.encode(CONVERSATIONS["picture"])]
    hidden_of(kit, row_of(kit, samples))  # type: ignore[arg-type]


def test_vision_modes_agree_and_the_cache_is_exact(kit: Kit) -> None:
    sample = kit.encode(CONVERSATIONS["four, one twice"])
    found: list[torch.Tensor] = []
    try:
        for mode in ("trained", "projector", "frozen"):
            set_mode(kit, mode)  # type: ignore[arg-type]
            for cache in (None, VisionCache(1 << 20)):
                root = root_of(kit, cache=cache)  # type: ignore[arg-type]
                features = root.features(row_of(kit, [sample]))  # type: ignore[arg-type]
                assert root.vision_mode == mode and features is not None
                assert features.requires_grad == (mode != "frozen")
                found.append(features.detach())
    finally:
        kit.model.requires_grad_(True)
    assert all((f - found[0]).abs().max() < GAP for f in found)
    assert kit.family.feature_width(kit.model.config.to_dict(), "frozen") == found[0].shape[1]
    tower = kit.family.tower_only(kit.model, torch.zeros(16, 588, dtype=torch.uint8), [(1, 4, 4)])
    assert tower[0].shape == (PER_TILE, kit.family.feature_width(kit.model.config.to_dict(), "projector"))


def test_parts(folder: Path, kit: Kit) -> None:
    def trains(tune: Full | Freeze | Lora) -> set[str]:
        return stock_kit.what_trains(folder, load_family(folder), tune)

    names = trains(Full())
    parts = {p: {n for n in names if kit.family.part_of(n) == p} for p in ("vision", "projector", "embeddings")}
    assert parts["projector"] == {n for n in names if "multi_modal_projector" in n} and len(parts["projector"]) == 6
    assert parts["vision"] == {n for n in names if "vision_tower" in n}
    assert parts["embeddings"] == {"model.language_model.embed_tokens.weight"}
    for part, expected in parts.items():
        assert trains(Freeze(train=(part,))) == expected  # type: ignore[arg-type]
    last = trains(Freeze(train=("vision",), last_layers=1))
    assert last == {n for n in names if "vision_tower.encoder.layer.1." in n}
    counts = {p: len(trains(Lora(rank=2, parts=(p,)))) for p in ("language", "vision", "projector")}  # type: ignore[arg-type]
    assert counts == {"language": 2 * 7 * 2, "vision": 2 * 6 * 2, "projector": 2 * 2}


def test_generation_equals_transformers(kit: Kit) -> None:
    """Prompts of unlike lengths, with and without pictures, in one padded batch."""
    turns = [chat(("user", [LARGE, "what is it?"])), chat(("user", "a")), chat(("user", [TALL, WIDE, "same?"]))]
    answers = stock_kit.greedy_equals_generate(kit, turns)
    assert len({tuple(a) for a in answers}) > 1


def test_what_is_saved_is_the_vendors(kit: Kit, tmp_path: Path) -> None:
    stock_kit.saved_equals_stock(kit, CONVERSATIONS["two pictures"], tmp_path / "out")


@pytest.mark.parametrize("tune", [{"kind": "full"}, {"kind": "lora", "rank": 2}], ids=["full", "lora"])
def test_a_whole_run(tmp_path: Path, folder: Path, tune: dict[str, Any]) -> None:
    source = tiny.make_chat(tmp_path, 16)
    over: dict[str, Any] = {"tune": tune, "data": {"holdout": 0.2}, "evaluate": {"generate": {"max_new_tokens": 2}}}
    out = runs.quiet_train(runs.located(tmp_path / "run", folder, source, **over))
    losses = out.summary["losses"]
    assert out.summary["applied_steps"] == 4 and losses[-1] < losses[0]


def test_other_towers_are_refused(folder: Path) -> None:
    config = tiny_internvl.config_of()
    for change in ({"vision_feature_layer": -2}, {"vision_feature_select_strategy": "full"}):
        with pytest.raises(ModelError, match=next(iter(change))):
            from_config({**config, **change}, {}, None)
    with pytest.raises(ModelError, match="height"):
        from_config(config, {"size": {"height": 64, "width": SIDE}}, None)
    with pytest.raises(ModelError, match="not square"):
        from_config({**config, "vision_config": {**config["vision_config"], "image_size": [56, 28]}}, {}, None)
    with pytest.raises(ModelError, match="PIXELS"):
        load_family(folder, max_pixels=50_000)


def test_published_sizes() -> None:
    """InternVL3-1B-hf has 938,193,024 parameters; its parts by the family's own names."""
    text = {
        "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151674,
    }  # fmt: skip
    config = InternVLConfig(text_config=text, vision_config={"attention_bias": True}, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    family = InternVL(PUBLISHED, None)
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = family.part_of(name)
        sizes[part] = sizes.get(part, 0) + p.numel()
    assert sum(sizes.values()) == 938_193_024
    assert sizes["embeddings"] == sizes["head"] == 151674 * 896
    assert sizes["projector"] == 2 * 4096 + (4096 * 896 + 896) + (896 * 896 + 896)


# -- frozen -------------------------------------------------------------------------------------------------------

GOLDEN = chat(("system", "You see"), ("user", [THIN, "is there a red circle?"]), ("assistant", "yes, a blue square"))


def test_golden_row(folder: Path) -> None:
    kit = stock_kit.make_kit(folder, None)
    row = row_of(kit, [kit.encode(GOLDEN)])  # type: ignore[arg-type]
    total, count = root_of(kit)(row)["loss"]  # type: ignore[arg-type]
    before = [391, 82, 318, 262, 198, 367, 268, 68, 68, 392, 198, 391, 315, 198]
    after = [198, 258, 365, 256, 363, 378, 30, 392, 198, 391, 64, 264, 273, 83, 198, 317, 11, 256, 377, 388, 392, 198]
    assert row.ids_T.tolist() == [*before, 408, *[410] * 28, 409, *after]
    digest = hashlib.sha256(row.pixels_PD.tobytes()).hexdigest()
    assert digest == "67ae43e35264da73fa43997eddc9050cded6e16b31c62fab3b66d3c99ab1fc66"
    assert (total / count).item() == pytest.approx(6.2312750816345215, abs=1e-5)
