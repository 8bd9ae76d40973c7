"""Gemma 3 against transformers' processor (PIL image processor) and model, on tiny weights.

The chat template is the published one in other words (`tiny_gemma3.TEMPLATE`), the tokenizer a tiny one of its kind.
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
import tiny_gemma3
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
    TOOL_CONVERSATIONS,
    WIDE,
    chat,
    hidden_of,
    message,
    opened,
    picture,
    root_of,
    row_of,
    set_mode,
)
from transformers import AutoModelForImageTextToText, Gemma3Config
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from lensmith.core.encoded import IMAGE, Segment
from lensmith.core.errors import ConfigError, Drop, ModelError
from lensmith.core.sample import Conversation, Document, Message, Sample, Text, Video
from lensmith.data.encode import Placed
from lensmith.family.gemma3 import Gemma3, PanAndScan, from_config
from lensmith.family.registry import load_family
from lensmith.model.attention import AttentionPlan, segment_attention
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.vision_cache import VisionCache

SIDE, PER_PICTURE, WINDOW = tiny_gemma3.SIDE, tiny_gemma3.PER_PICTURE, tiny_gemma3.WINDOW
MORE = {
    "html": chat(("user", "<table><td>a</td></table> <b>c"), ("assistant", "<b> x\n<table>\n\n</table>")),
    "runs": chat(("user", "a  b   c\n\n\n\nd" + "\n" * 40 + "e" + " " * 40 + "f"), ("assistant", "1\n \n\n  2")),
    "system and picture": chat(("system", " S \n"), ("user", [SMALL, " q "]), ("assistant", " a ")),
    "bytes": chat(("user", "\U0001f9ff \u0f00 \u3042"), ("assistant", "\u0416\u0416 \U0001f9ff")),
}
ALL = {**CONVERSATIONS, **MORE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gemma3.make_model(tmp_path_factory.mktemp("gemma3") / "base")


@pytest.fixture(scope="module", params=["narrow", "wide", "pan and scan"])
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    """Narrow: every sample, and every picture, is longer than the window. Wide: none is."""
    pan = request.param == "pan and scan"
    window = 10_000 if request.param == "wide" else WINDOW
    folder = tiny_gemma3.make_model(tmp_path_factory.mktemp("gemma3") / "kit", window=window, pan_and_scan=pan)
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 32} if pan else {}
    return stock_kit.make_kit(folder, tiny_gemma3.processor_of(folder), **options)


# -- tokens -------------------------------------------------------------------------------------------------------


def test_ids_equal_the_vendors(kit: Kit) -> None:
    assert isinstance(kit.family, Gemma3)
    for name, conversation in ALL.items():
        encoded = kit.encode(conversation)
        assert encoded.ids_L.tolist() == kit.vendor_inputs(conversation)["input_ids"][0].tolist(), name
        image = encoded.ids_L == tiny_gemma3.token_id("<image_soft_token>")
        assert ((encoded.kind_L == IMAGE) == image).all(), name
        assert encoded.position_ids_3L.tolist() == [list(range(encoded.num_tokens))] * 3
        prompt = kit.encoder().encode_prompt(conversation)
        assert prompt.ids_L.tolist() == kit.vendor_inputs(conversation, ask=True)["input_ids"][0].tolist(), name
    shown = [len(kit.encode(CONVERSATIONS[name]).images) for name in ("picture", "picture last")]
    assert shown == ([1, 3] if kit.family.pan_and_scan else [1, 1])


def test_mask_covers_exactly_the_answers(kit: Kit) -> None:
    assert kit.trained(CONVERSATIONS["turns"]) == "yes<end_of_turn>no<end_of_turn>blue<end_of_turn>"
    assert kit.trained(MORE["system and picture"]) == "a<end_of_turn>"
    assert kit.trained(MORE["html"]) == "<b> x\n<table>\n\n</table><end_of_turn>"
    for conversation in ALL.values():
        assert stock_kit.image_tokens_are_never_trained(kit.encode(conversation))


def test_documents(folder: Path) -> None:
    kit = stock_kit.make_kit(folder, None)
    parts = (Text(" a red\n"), SMALL, Text("\n\nblue", train=False), Text(" <eos>"))
    encoded = kit.encoder().encode(Sample("test", Document(parts)))
    plain, control = kit.tokenizer.plain, kit.tokenizer.control
    block = [control("<start_of_image>"), *[control("<image_soft_token>")] * PER_PICTURE, control("<end_of_image>")]
    ids = [control("<bos>"), *plain(" a red\n")[0], *plain("\n\n")[0], *block, *plain("\n\n")[0]]
    assert encoded.ids_L.tolist() == [*ids, *plain("\n\nblue <eos>")[0], control("<eos>")]
    assert kit.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist()) == " a red\n <eos><eos>"


# -- deliberate differences ---------------------------------------------------------------------------------------


def test_typed_control_tokens_stay_text(kit: Kit) -> None:
    typed = "<end_of_turn>\n<start_of_turn><start_of_image><image_soft_token><bos>"
    encoded = kit.encode(chat(("system", typed), ("user", [typed, SMALL]), ("assistant", typed)))
    text = kit.tokenizer.text_tokens
    named = {v: k for k, v in kit.tokenizer.added.items() if k not in text}
    block = ["<start_of_image>", *["<image_soft_token>"] * PER_PICTURE, "<end_of_image>"]
    turn = ["<start_of_turn>", "<end_of_turn>"]
    planned = ["<bos>", turn[0], *block * len(encoded.images), turn[1], *turn]
    assert [named[i] for i in encoded.ids_L.tolist() if i in named] == planned
    assert set(kit.processor.tokenizer(typed, add_special_tokens=False).input_ids) & set(named)
    assert kit.tokenizer.mentions_control(typed) and not kit.tokenizer.mentions_control("a\n\n  <table>")


def test_texts_side_by_side(kit: Kit) -> None:
    texts = (Text(" no ", train=False), Text(" yes "), Text(" \n"))
    encoded = kit.encode(Conversation((message("user", "q"), Message("assistant", texts))))
    text = kit.tokenizer.decode(encoded.ids_L.tolist())
    assert text.endswith("<start_of_turn>model\nno  yes<end_of_turn>\n")
    assert kit.tokenizer.decode(encoded.ids_L[encoded.trained_L].tolist()).endswith("yes<end_of_turn>")


def test_system_pictures(kit: Kit) -> None:
    encoded = kit.encode(chat(("system", ["see ", LARGE]), ("user", "q"), ("assistant", "a")))
    assert len(encoded.images) == (3 if kit.family.pan_and_scan else 1)
    text = kit.tokenizer.decode(encoded.ids_L.tolist())
    assert text.startswith("<bos><start_of_turn>user\nsee ") and "<end_of_image>\n\n\n\nq<end_of_turn>" in text


@pytest.mark.parametrize("name", TOOL_CONVERSATIONS)
def test_no_tools(kit: Kit, name: str) -> None:
    with pytest.raises(Drop, match="TOOL_FORM"):
        kit.encode(TOOL_CONVERSATIONS[name])


def test_no_videos(kit: Kit) -> None:
    with pytest.raises(Drop, match="VIDEO_KIND"):
        kit.encoder().encode(Sample("test", Document((Video(path="a.mp4"), Text("a")))))


# -- pixels -------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (112, 112), (57, 43), (150, 60), (60, 150), (200, 1), (640, 480), (501, 90), (33, 900), (400, 333)]


@pytest.mark.parametrize("noise", [False, True], ids=["smooth", "noise"])
def test_pixels_equal_the_vendors(kit: Kit, noise: bool) -> None:
    worst, most = 0.0, 0
    for seed, (width, height) in enumerate(SIZES):
        image = opened(picture(width, height, seed))
        if noise:
            image = pillow.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
        placed = [p.block for p in kit.family.place_image(SMALL, width, height) if isinstance(p, Placed)]
        options = {"do_pan_and_scan": False, "pan_and_scan_max_num_crops": 4, **kit.options}
        theirs = kit.processor.image_processor(
            images=[image], pan_and_scan_min_ratio_to_activate=1.2, return_tensors="pt", **options
        )
        assert theirs["num_crops"].tolist() == [len(placed) - 1]
        patches = [kit.family.patches(image, block) for block in placed]
        assert all(p.dtype == np.uint8 and p.shape == (64, 3 * 14 * 14) for p in patches)
        ours = kit.family.normalise(torch.from_numpy(np.concatenate(patches)))
        assert ours.dtype == torch.float32 and ours.shape == theirs["pixel_values"].shape
        worst, most = max(worst, (ours - theirs["pixel_values"]).abs().max().item()), max(most, len(placed))
    print("gap", worst)
    assert worst <= 1e-6 and most == (5 if kit.family.pan_and_scan else 1)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 500), st.integers(2, 8), st.floats(1, 4))
def test_crops_equal_the_vendors(width: int, height: int, low: int, most: int, ratio: float) -> None:
    crops = Gemma3ImageProcessorPil().pan_and_scan(np.zeros((1, height, width), np.uint8), low, most, ratio)
    boxes = PanAndScan(low, most, ratio).boxes(width, height)
    assert [(b[3] - b[1], b[2] - b[0]) for b in boxes] == [c.shape[1:] for c in crops]
    assert not boxes or (boxes[0][:2], boxes[-1][2:]) == ((0, 0), (width, height))


# -- the model ----------------------------------------------------------------------------------------------------


def test_packed_equals_transformers_one_by_one(kit: Kit) -> None:
    gaps = stock_kit.packed_gaps(kit, list(ALL.values()))
    print("gap", gaps)
    assert max(gaps.values()) < GAP, gaps


def test_text_rows_equal_transformers_one_by_one(kit: Kit) -> None:
    gaps = stock_kit.packed_gaps(kit, [MORE["html"], MORE["runs"], CONVERSATIONS["code"], CONVERSATIONS["text"]])
    assert max(gaps.values()) < GAP, gaps


def test_branches_equal_each_alone(kit: Kit) -> None:
    gaps = {n: stock_kit.branches_gap(kit, group, CONVERSATIONS["two pictures"]) for n, group in BRANCHES.items()}
    print("gap", gaps)
    assert max(gaps.values()) < GAP, gaps


def test_gradients_equal_transformers(kit: Kit) -> None:
    gap = stock_kit.gradient_gap(kit, [BRANCHES["one picture"], BRANCHES["other pictures"], [CONVERSATIONS["turns"]]])
    print("gap", gap)
    assert gap < 1e-5, gap


def test_a_plan_with_a_sight_of_its_own_equals_a_dense_mask() -> None:
    """Unlike lengths in one stack, prefixes, and any relation in which a token sees itself."""
    segments = (Segment(0, 5), Segment(5, 4, 0, 5), Segment(9, 5, 0, 5), Segment(14, 7), Segment(21, 8), Segment(29, 8))
    num, generator = 37, torch.Generator().manual_seed(0)
    table = torch.rand(num, num, generator=generator) < 0.5
    table |= torch.eye(num, dtype=torch.bool)
    query, key, value = (torch.randn(1, heads, num, 8, generator=generator) for heads in (4, 2, 2))
    visible = torch.zeros(num, num, dtype=torch.bool)
    for s in segments:
        own = slice(s.start, s.start + s.length)
        visible[own, own] = True
        visible[own, s.prefix_start : s.prefix_start + s.prefix_length] = True
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible & table, enable_gqa=True
    )
    plan = AttentionPlan(segments, num, True, lambda q, k: table[q, k])
    found, _ = segment_attention(torch.nn.Identity(), query, key, value, None, attention_plans={None: plan})
    assert (found.transpose(1, 2) - expected).abs().max() < 1e-6


@torch.no_grad()
def test_which_rows_need_masks(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without pictures and longer samples than the window runs as rows of other families do."""
    made: list[int] = []

    def count(self: AttentionPlan) -> Any:
        made.append(int(self.sees is not None))
        return original(self)

    original: Any = AttentionPlan.stacks.func  # type: ignore[attr-defined]
    monkeypatch.setattr(AttentionPlan, "stacks", property(count))
    narrow = kit.model.config.text_config.sliding_window == WINDOW
    for conversation, plain, narrow_plans in (("text", 0, {0, 1}), ("picture", 1, {1})):
        made.clear()
        hidden_of(kit, row_of(kit, [kit.encode(CONVERSATIONS[conversation])]))  # type: ignore[arg-type]
        assert set(made) == (narrow_plans if narrow else {plain}), conversation


@torch.no_grad()
def test_features_are_not_scaled_and_see_each_other(kit: Kit) -> None:
    """The last token of a picture changes what its first token becomes; a later text does not."""
    sample = kit.encode(chat(("user", [SMALL, "a"]), ("assistant", "b")))
    row = row_of(kit, [sample])  # type: ignore[arg-type]
    at = np.flatnonzero(sample.kind_L == IMAGE)
    features = root_of(kit).features(row)  # type: ignore[arg-type]
    assert features is not None

    def first(changed: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
        plan = AttentionPlan(row.segments, row.num_tokens, causal=True)
        position = torch.from_numpy(row.position_ids_3T)[:, None].long()
        mask = torch.from_numpy(row.kind_T == IMAGE)[None]
        out = kit.family.hidden(
            kit.model, torch.from_numpy(ids)[None].long(), changed, mask, position,
            attention_mask=None, use_cache=False, attention_plans={None: plan},
        )  # fmt: skip
        return out.last_hidden_state[0, at[0]]

    other = features.clone()
    other[WINDOW // 2] += 1.0
    later = row.ids_T.copy()
    later[-1] = 5
    before = first(features, row.ids_T)
    assert (first(other, row.ids_T) - before).abs().max() > 1e-3
    assert torch.equal(first(features, later), before)


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
    tower = kit.family.tower_only(kit.model, torch.zeros(64, 588, dtype=torch.uint8), [(1, 8, 8)])
    assert tower[0].shape == (PER_PICTURE, kit.family.feature_width(kit.model.config.to_dict(), "projector"))


def test_parts(folder: Path) -> None:
    family = load_family(folder)

    def trains(tune: Full | Freeze | Lora) -> set[str]:
        return stock_kit.what_trains(folder, family, tune)

    names = trains(Full())
    parts = {p: {n for n in names if family.part_of(n) == p} for p in ("vision", "projector", "embeddings")}
    assert parts["projector"] == {n for n in names if "multi_modal_projector" in n} and len(parts["projector"]) == 2
    assert parts["vision"] == {n for n in names if "vision_tower" in n}
    assert parts["embeddings"] == {"model.language_model.embed_tokens.weight"}
    for part, expected in parts.items():
        assert trains(Freeze(train=(part,))) == expected  # type: ignore[arg-type]
    last = trains(Freeze(train=("vision",), last_layers=1))
    assert last == {n for n in names if "vision_tower.encoder.layers.1." in n}
    counts = {p: len(trains(Lora(rank=2, parts=(p,)))) for p in ("language", "vision")}  # type: ignore[arg-type]
    assert counts == {"language": 4 * 7 * 2, "vision": 2 * 6 * 2}
    with pytest.raises(ConfigError, match="projector"):
        trains(Lora(parts=("language", "projector")))


def test_generation_equals_transformers(kit: Kit) -> None:
    """Prompts of unlike lengths, with and without pictures, in one padded batch, past the window."""
    turns = [chat(("user", [LARGE, "what is it?"])), chat(("user", "a")), chat(("user", [TALL, WIDE, "same?"]))]
    answers = stock_kit.greedy_equals_generate(kit, turns, new_tokens=WINDOW + 4)
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


@pytest.mark.parametrize("change", [
    {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0}, {"use_bidirectional_attention": True},
])  # fmt: skip
def test_what_transformers_does_not_compute_is_refused(change: dict[str, Any]) -> None:
    config = tiny_gemma3.config_of()
    with pytest.raises(ModelError, match=next(iter(change))):
        from_config({**config, "text_config": {**config["text_config"], **change}}, {}, None)


def test_other_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="height"):
        from_config(tiny_gemma3.config_of(), {"size": {"height": 64, "width": SIDE}}, None)
    with pytest.raises(ModelError, match="PIXELS"):
        load_family(folder, max_pixels=50_000)


def test_published_sizes() -> None:
    """gemma-3-4b-it has 4,300,079,472 parameters; its parts by the family's own names."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
        "num_attention_heads": 16, "patch_size": 14, "image_size": 896, "vision_use_head": False,
    }  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(Gemma3Config(text_config=text, vision_config=vision))
    family = from_config({"text_config": text, "vision_config": vision}, {}, None)
    sizes: dict[str, int] = {}
    for name, p in model.named_parameters():
        part = family.part_of(name)
        sizes[part] = sizes.get(part, 0) + p.numel()
    assert sum(sizes.values()) == 4_300_079_472
    assert sizes["embeddings"] == 262208 * 2560 and sizes["projector"] == 1152 + 1152 * 2560
    (block,) = (p.block for p in family.place_image(SMALL, 1920, 1080) if isinstance(p, Placed))
    assert (block.width, block.height, block.grid_thw, block.num_tokens) == (896, 896, (1, 64, 64), 256)


# -- frozen -------------------------------------------------------------------------------------------------------

GOLDEN = chat(("system", "You see"), ("user", [LARGE, " is there a red circle?"]), ("assistant", "yes,  a square\n"))


def test_golden_row(folder: Path) -> None:
    kit = stock_kit.make_kit(folder, None)
    row = row_of(kit, [kit.encode(GOLDEN)])  # type: ignore[arg-type]
    total, count = root_of(kit)(row)["loss"]  # type: ignore[arg-type]
    after = [493, 8, 374, 467, 372, 465, 483, 335, 6, 7, 5, 350, 352, 402, 349, 7, 432, 116, 38, 339, 490, 6, 7]
    assert row.ids_T.tolist() == [2, 5, 430, 7, 469, 383, 343, 343, 10, 492, *[494] * PER_PICTURE, *after]
    digest = hashlib.sha256(row.pixels_PD.tobytes()).hexdigest()
    assert digest == "e74f214fdd63fa78c788dbb8dfa0ba33d16136a559f7c277dd430ac2cf73f652"
    assert (total / count).item() == pytest.approx(6.355798244476318, abs=1e-5)
