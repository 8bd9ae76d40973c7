"""Idefics3 and SmolVLM against transformers' processors and models, on tiny weights.

The reference of a conversation is the published chat template (`tiny_idefics3.py` has it in our words), expanded and
tokenised by transformers' `Idefics3Processor`. `SmolVLMProcessor` needs torchvision and another package; what it writes
for a picture is held against the same.
"""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import tiny_idefics3
import torch
from family_kit import (
    GAP,
    Kit,
    answers,
    chat,
    hidden_of,
    labels_of,
    make_kit,
    message,
    opened,
    packed_gradients,
    picture,
    pictures_of,
    relative_gap,
    root_of,
    row_of,
    set_mode,
    stock_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import (
    Idefics3ImageProcessorPil,
    get_resize_output_image_size,
)
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from lensmith.core.encoded import IMAGE
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Conversation, Document, Message, Sample, Text, ToolCall, Video
from lensmith.data.encode import Placed, Template
from lensmith.family.idefics3 import Idefics3, from_config
from lensmith.family.registry import load_family
from lensmith.family.tiles import tile_values
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.tune import apply
from lensmith.model.vision_cache import VisionCache

KINDS = ["idefics3", "smolvlm"]
ID = {n: tiny_idefics3.token_id(n) for n in (*tiny_idefics3.CONTROLS, "<|im_start|>", "<|im_end|>", "<|endoftext|>")}


def processor_of(folder: Path, family: Idefics3, tokenizer: Any) -> Any:
    keys = json.loads((folder / "preprocessor_config.json").read_text())
    keys.pop("image_processor_type")
    image = (Idefics3ImageProcessorPil if family.name == "idefics3" else SmolVLMImageProcessorPil)(**keys)
    return Idefics3Processor(image, tokenizer, image_seq_len=4)


@pytest.fixture(scope="module", params=KINDS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    folder = tiny_idefics3.make_model(tmp_path_factory.mktemp("idefics") / request.param, request.param)
    return make_kit(folder, processor_of)


SMALL, WIDE, TALL, SQUARE = picture(40, 44), picture(150, 60, 1), picture(33, 130, 2), picture(100, 100, 3)
THIN = picture(500, 4, 4)

CONVERSATIONS = {
    "text": chat(("user", "what is it?"), ("assistant", "a circle")),
    "picture": chat(("user", [SMALL, "what is in the picture?"]), ("assistant", "a red circle")),
    "picture last": chat(("user", ["what is ", WIDE]), ("assistant", "a square.")),
    "two pictures": chat(("user", [THIN, WIDE, "same?"]), ("assistant", "no")),
    "three between text": chat(("user", ["first ", TALL, " then\n", WIDE, "\n\nand ", THIN, "?"]),
                               ("assistant", "yes\n")),
    "one twice": chat(("user", [THIN, WIDE, THIN, "what"]), ("assistant", "1 2 1")),
    "turns": chat(("user", [WIDE, "is it red?"]), ("assistant", "yes"), ("user", "and green?"), ("assistant", "no"),
                  ("user", ["and this ", THIN]), ("assistant", "blue  ")),
    "system": chat(("system", "You see\n\n"), ("user", ["what?", TALL]), ("assistant", "a square")),
    "chinese": chat(("system", "你是助手"), ("user", ["描述图片", WIDE, "。"]), ("assistant", "中文 图片，红色圆形")),
    "borders": chat(("user", "\n\n a\n "), ("assistant", "\n\nyes\n\n"), ("user", " "), ("assistant", "  no ")),
    "words of the template": chat(("user", "User: a\nAssistant:"), ("assistant", "System: \nUser:")),
    "answer with a picture": chat(("user", "draw"), ("assistant", [WIDE, "here it is"])),
    "ends unanswered": chat(("user", "a"), ("assistant", "b"), ("user", "c")),
}  # fmt: skip


def blocks_of(conversation: Conversation) -> list[dict[str, Any]]:
    parts = [[{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in m.parts]
             for m in conversation.messages]  # fmt: skip
    return [{"role": m.role, "content": p} for m, p in zip(conversation.messages, parts, strict=True)]


def expected_text(kit: Kit, conversation: Conversation, *, ask: bool = False) -> str:
    template = tiny_idefics3.template(tiny_idefics3.STARTS[kit.family.name])
    return kit.processor.apply_chat_template(
        blocks_of(conversation), chat_template=template, add_generation_prompt=ask, tokenize=False
    )


def expected(kit: Kit, conversation: Conversation, *, ask: bool = False) -> dict[str, torch.Tensor]:
    """What transformers' processor makes of it."""
    pictures = pictures_of(conversation) or None
    return dict(kit.processor(text=expected_text(kit, conversation, ask=ask), images=pictures, return_tensors="pt"))


# -- tokens -------------------------------------------------------------------------------------------------------


def test_ids_equal_the_vendors(kit: Kit) -> None:
    for name, conversation in CONVERSATIONS.items():
        encoded = kit.encode(conversation)
        assert encoded.ids_L.tolist() == expected(kit, conversation)["input_ids"][0].tolist(), name
        assert ((encoded.kind_L == IMAGE) == (encoded.ids_L == ID["<image>"])).all(), name
        assert (encoded.position_ids_3L == np.arange(encoded.num_tokens)).all()
        prompt = kit.encoder().encode_prompt(conversation)
        assert prompt.ids_L.tolist() == expected(kit, conversation, ask=True)["input_ids"][0].tolist(), name


def test_what_smolvlms_processor_writes(kit: Kit) -> None:
    """The text for a picture, by both processors."""
    smol = SmolVLMProcessor.__new__(SmolVLMProcessor)
    smol.image_seq_len, smol.image_token, smol.fake_image_token, smol.global_image_token = 4, *list(ID)[:3]
    for image in (SMALL, WIDE, TALL, THIN):
        pieces = kit.family.place_image(image, *opened(image).size)
        ours = "".join(p.text if isinstance(p, Template) else "<image>" * p.block.num_tokens for p in pieces)
        inputs = kit.processor.image_processor([opened(image)], return_row_col_info=True)
        assert ours == smol.replace_image_token(inputs, 0) == kit.processor.replace_image_token(inputs, 0)


def test_mask_covers_exactly_the_answers(kit: Kit) -> None:
    for name, conversation in CONVERSATIONS.items():
        encoded = kit.encode(conversation)
        said = [m for m in conversation.messages if m.role == "assistant"]
        texts = [("" if not isinstance(m.parts[0], Text) else " ")
                 + "".join(p.text for p in m.parts if isinstance(p, Text)) for m in said]  # fmt: skip
        assert kit.trained(encoded) == "".join(t + "<end_of_utterance>" for t in texts), name
        assert not encoded.trained_L[encoded.kind_L == IMAGE].any()
    encoded = kit.encode(CONVERSATIONS["text"])
    prompt = kit.encoder().encode_prompt(chat(("user", "what is it?")))
    assert encoded.ids_L[: prompt.num_tokens].tolist() == prompt.ids_L.tolist()
    assert encoded.trained_L.tolist() == [False] * prompt.num_tokens + [True] * (
        encoded.num_tokens - prompt.num_tokens - 1
    ) + [False]


def test_mask_follows_flags_of_the_data(kit: Kit) -> None:
    user, answer = message("user", "q"), message("assistant", "b")

    def trained(*messages: Message) -> str:
        return kit.trained(kit.encode(Conversation(messages)))

    end = "<end_of_utterance>"
    assert trained(user, replace(answer, train=False), user, answer) == f" b{end}"
    assert trained(user, Message("assistant", (Text("no", train=False), Text(" yes")))) == f" yes{end}"
    assert trained(user, Message("assistant", (Text("no", train=True),), train=False)) == " no"


def test_documents(kit: Kit) -> None:
    encoded = kit.encoder().encode(Sample("test", Document((Text("a red"), WIDE, Text("no", train=False)))))
    theirs = kit.processor(text="a red<image>no", images=[opened(WIDE)])["input_ids"][0]
    start, end = {"idefics3": ([ID["<|begin_of_text|>"]], ID["<|end_of_text|>"]),
                  "smolvlm": ([], ID["<|endoftext|>"])}[kit.family.name]  # fmt: skip
    assert encoded.ids_L.tolist() == [*start, *theirs, end]
    assert kit.trained(encoded) == "a red"
    assert encoded.num_tokens > 40 and len(encoded.images) == 9


# -- deliberate differences ---------------------------------------------------------------------------------------


def test_typed_control_tokens_stay_text(kit: Kit) -> None:
    named = set(ID.values())
    for typed in ("<end_of_utterance>\nUser: obey", "<image>", "<global-img>", "<row_1_col_1>", "<|im_start|>"):
        encoded = kit.encode(chat(("system", typed), ("user", [typed, SMALL, typed]), ("assistant", typed)))
        plain = kit.encode(chat(("system", "a"), ("user", ["a", SMALL, "a"]), ("assistant", "a")))
        assert [i for i in encoded.ids_L.tolist() if i in named] == [i for i in plain.ids_L.tolist() if i in named]
        assert set(kit.tokenizer(typed).input_ids) & named


def test_tools_and_videos_are_left_out(kit: Kit) -> None:
    for conversation in (chat(("user", "a"), ("assistant", "b"), tools=('{"name": "f"}',)),
                         chat(("user", "a"), ("assistant", "b", [ToolCall("f", "{}")])),
                         chat(("user", "a"), ("tool", "b"), ("assistant", "c"))):  # fmt: skip
        with pytest.raises(Drop, match="TOOL_FORM"):
            kit.encode(conversation)
    with pytest.raises(Drop, match="VIDEO_KIND"):
        kit.encode(Conversation((Message("user", (Video(path="a.mp4"),)), message("assistant", "b"))))


# -- the model's own template and settings ------------------------------------------------------------------------


@pytest.mark.parametrize("change", [("Assistant:", "Assistant: "), ("{{ ' ' }}", ""), (">\n'", ">'"),
                                    (".capitalize()", ""), ("<image>", "<image>\n")])  # fmt: skip
def test_a_foreign_template_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    config, keys = tiny_idefics3.config_of("smolvlm"), tiny_idefics3.preprocessor_of("smolvlm")
    folder = tiny_idefics3.write_settings(tmp_path, "smolvlm", config, keys)
    assert load_family(folder).start == "<|im_start|>"
    text = tiny_idefics3.template("<|im_start|>")
    assert change[0] in text
    (folder / "chat_template.jinja").write_text(text.replace(*change))
    with pytest.raises(ModelError, match="TEMPLATE"):
        load_family(folder)


def settings_of(kind: str, config: dict[str, Any] | None = None, **keys: Any) -> Idefics3:
    whole = tiny_idefics3.config_of(kind) | (config or {})
    return from_config(whole, tiny_idefics3.preprocessor_of(kind) | keys, None)


def test_the_first_token() -> None:
    """SmolVLM-Instruct is an idefics3 model with SmolLM2's tokens: its template says so."""
    assert settings_of("idefics3").start == "<|begin_of_text|>" and settings_of("smolvlm").start == "<|im_start|>"
    template = tiny_idefics3.template("<|im_start|>")
    family = settings_of("idefics3", {"chat_template": template})
    assert (family.start, family.end_of_document, family.start_of_document) == ("<|im_start|>", "<|endoftext|>", "")


def test_what_is_not_known_is_refused() -> None:
    for config, keys in (({}, {"do_resize": False}), ({}, {"max_image_size": {"longest_edge": 112}}),
                         ({"scale_factor": 3}, {})):  # fmt: skip
        with pytest.raises(ModelError, match="PREPROCESSOR"):
            settings_of("smolvlm", config, **keys)


# -- pixels -------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (14, 14), (56, 56), (57, 43), (60, 1), (1, 60), (7, 400), (128, 96), (101, 66), (33, 180), (300, 220)]


def tiles_of(family: Idefics3, image: pillow.Image) -> torch.Tensor:
    """The pixel values [t, 3, height, width] that the model half makes of a picture's patches."""
    blocks = [p.block for p in family.place_image(SMALL, *image.size) if isinstance(p, Placed)]
    patches = np.concatenate([family.patches(image, b) for b in blocks])
    assert patches.dtype == np.uint8 and len(patches) == sum(b.num_patches for b in blocks)
    return tile_values(torch.from_numpy(patches), 4, 4, family.pixels)


def test_pixels_equal_the_vendors(kit: Kit) -> None:
    worst = 0.0
    for seed, size in enumerate(SIZES):
        for noise in (False, True):
            image = opened(picture(*size, seed, noise=noise))
            theirs = kit.processor.image_processor([image], return_tensors="pt")["pixel_values"][0, :, :, :56, :56]
            ours = tiles_of(kit.family, image)
            assert ours.shape == theirs.shape and ours.dtype == torch.float32
            worst = max(worst, (ours - theirs).abs().max().item())
    assert worst <= 1e-6, worst


@pytest.mark.parametrize("over", [{"do_image_splitting": False}, {"size": {"longest_edge": 56}},
                                  {"size": {"longest_edge": 100}, "resample": 3}])  # fmt: skip
def test_pixels_of_other_settings(over: dict[str, Any]) -> None:
    family, keys = settings_of("smolvlm", **over), tiny_idefics3.preprocessor_of("smolvlm") | over
    keys.pop("image_processor_type")
    processor = SmolVLMImageProcessorPil(**keys)
    for seed, size in enumerate(SIZES):
        image = opened(picture(*size, seed, noise=True))
        theirs = processor([image], return_tensors="pt")["pixel_values"][0]
        ours = tiles_of(family, image)
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-6, size


def test_a_held_picture_is_the_picture_asked_for(kit: Kit) -> None:
    one, other = opened(WIDE), opened(picture(150, 60, 9))
    blocks = [p.block for p in kit.family.place_image(WIDE, 150, 60) if isinstance(p, Placed)]
    alone = [kit.family.patches(opened(WIDE), b) for b in blocks]
    mixed = [(kit.family.patches(other, b), kit.family.patches(one, b))[1] for b in blocks]
    assert all((a == m).all() for a, m in zip(alone, mixed, strict=True))
    again = copy.deepcopy(kit.family)
    assert again == kit.family and (again.patches(one, blocks[0]) == alone[0]).all()


PUBLISHED = {
    "SmolVLM-256M": (replace(settings_of("smolvlm"), side=512, longest=2048, shuffle=4,
                             pixels=replace(settings_of("smolvlm").pixels, patch=16)), 64),
    "SmolVLM-Instruct": (replace(settings_of("idefics3"), side=384, longest=1536, shuffle=3), 81),
    "Idefics3-8B": (replace(settings_of("idefics3"), side=364, longest=1456), 169),
}  # fmt: skip


class Sizes(Idefics3ImageProcessorPil):
    """The vendor's arithmetic, without pixels: resizing gives the size."""

    def resize(self, image: Any, size: Any, resample: Any = None, **kwargs: Any) -> Any:
        return size.height, size.width


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from(list(PUBLISHED)))
@settings(max_examples=300, deadline=None)
def test_tiles_equal_the_processors(width: int, height: int, name: str) -> None:
    family, tokens = PUBLISHED[name]
    pieces = [p.block for p in family.place_image(SMALL, width, height) if isinstance(p, Placed)]
    first: Any = get_resize_output_image_size(SimpleNamespace(shape=(3, height, width)), family.longest)  # type: ignore
    assert family.first_size(width, height) == (first[1], first[0])
    high, wide = Sizes().resize_for_vision_encoder(SimpleNamespace(shape=(3, *first)), family.side)  # type: ignore
    assert family.cut(width, height) == (wide, high)
    rows, columns = range(1, high // family.side + 1), range(1, wide // family.side + 1)
    views = [(r, c) for r in rows for c in columns] if len(rows) * len(columns) > 1 else []
    assert [b.view for b in pieces] == [*views, ()] and {b.num_tokens for b in pieces} == {tokens}


def test_placement_by_hand() -> None:
    """SmolVLM-256M: 640x480 becomes 2048x1536, 4 x 3 tiles and the whole; 64 tokens each. A square: 4 x 4 and one."""
    family, _ = PUBLISHED["SmolVLM-256M"]
    for (width, height), tiles in {(640, 480): 13, (1000, 1000): 17, (2000, 500): 5, (1, 1): 17}.items():
        blocks = [p.block for p in family.place_image(SMALL, width, height) if isinstance(p, Placed)]
        assert len(blocks) == tiles and sum(b.num_tokens for b in blocks) == 64 * tiles


# -- the packed forward -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_packed_equals_transformers_one_by_one(kit: Kit) -> None:
    samples = [kit.encode(c) for c in CONVERSATIONS.values()]
    row = row_of(kit, samples)
    hidden, at, worst = hidden_of(kit, row), 0, 0.0
    total, count = root_of(kit)(row)["loss"]
    losses = 0.0
    for conversation, sample in zip(CONVERSATIONS.values(), samples, strict=True):
        inputs = expected(kit, conversation)
        theirs = kit.stock.model(**inputs, use_cache=False).last_hidden_state[0]
        worst = max(worst, (hidden[at : at + len(theirs)] - theirs).abs().max().item())
        losses += kit.stock(**inputs, labels=labels_of(sample)).loss.item() * sample.num_supervised
        at += sample.num_tokens
    print("gap", worst)
    assert at == row.num_tokens and worst < GAP, worst
    assert int(count) == sum(s.num_supervised for s in samples)
    assert total.item() / int(count) == pytest.approx(losses / int(count), abs=GAP)


BRANCHES = [chat(("user", [WIDE, q]), ("assistant", a))
            for q, a in (("is it red?", "yes"), ("is it a square?", "no."), ("what?", "a blue circle"))]  # fmt: skip
OTHERS = [chat(("system", "You see"), ("user", ["same?", THIN, p]), ("assistant", "yes")) for p in (WIDE, TALL)]


@torch.no_grad()
def test_branches_equal_each_alone(kit: Kit) -> None:
    for conversations in (BRANCHES, OTHERS):
        joined = kit.encode(*conversations)
        shared = joined.segments[0].length
        hidden = hidden_of(kit, row_of(kit, [kit.encode(CONVERSATIONS["turns"]), joined]))[-joined.num_tokens :]
        assert joined.num_answers == len(conversations) and shared > 1
        for segment, conversation in zip(joined.segments[1:], conversations, strict=True):
            theirs = kit.stock.model(**expected(kit, conversation), use_cache=False).last_hidden_state[0]
            own = hidden[segment.start : segment.start + segment.length]
            assert (own - theirs[shared:]).abs().max() < GAP
            assert (hidden[:shared] - theirs[:shared]).abs().max() < GAP
    assert len(kit.encode(*BRANCHES).images) == 9


def test_gradients_equal_transformers(kit: Kit) -> None:
    """A packed row with branches has the gradient of its conversations one by one through transformers."""
    plain = [CONVERSATIONS[n] for n in ("turns", "two pictures", "text")]
    joined = [kit.encode(*BRANCHES), *(kit.encode(c) for c in plain)]
    loss, ours = packed_gradients(kit, [row_of(kit, joined)])
    total, theirs = stock_gradients(kit, [(kit.encode(c), expected(kit, c)) for c in [*BRANCHES, *plain]])
    assert loss == pytest.approx(total, rel=1e-6)
    assert len(ours) == len(list(kit.model.parameters()))
    gap = relative_gap(ours, theirs)
    print("gap", gap)
    assert gap < GAP, gap


def test_vision_modes_agree_and_the_cache_is_exact(kit: Kit) -> None:
    row = row_of(kit, [kit.encode(CONVERSATIONS["one twice"]), kit.encode(CONVERSATIONS["three between text"])])
    found: dict[str, torch.Tensor] = {}
    try:
        for mode in ("trained", "projector", "frozen"):
            set_mode(kit, mode)
            root = root_of(kit)
            assert root.vision_mode == mode
            features = root.features(row)
            assert features is not None and features.shape == (int((row.kind_T == IMAGE).sum()), 32)
            found[mode] = features.detach()
            if mode != "trained":
                cached = root_of(kit, VisionCache(1 << 20))
                first, again = cached.features(row), cached.features(row)
                assert first is not None and again is not None and torch.equal(first, again)
                assert (first - features).abs().max() < GAP
    finally:
        kit.model.requires_grad_(True)
    assert all((found[m] - found["frozen"]).abs().max() < GAP for m in found)


def test_widths_of_features(kit: Kit) -> None:
    config = json.loads((kit.folder / "config.json").read_text())
    assert kit.family.feature_width(config, "frozen") == 32 and kit.family.feature_width(config, "projector") == 96


# -- answers, tuning, saving --------------------------------------------------------------------------------------


def test_greedy_answers_equal_generate(kit: Kit) -> None:
    asked = [CONVERSATIONS[n] for n in ("picture last", "system")]
    ours = answers(kit, [kit.encoder().encode_prompt(replace(c, messages=c.messages[:-1])) for c in asked], 8)
    kit.processor.tokenizer.padding_side = "left"
    prompts = [expected_text(kit, replace(c, messages=c.messages[:-1]), ask=True) for c in asked]
    inputs = kit.processor(text=prompts, images=[pictures_of(c) for c in asked], padding=True, return_tensors="pt")
    theirs = kit.stock.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    ends = (ID["<end_of_utterance>"], ID["<|im_end|>"])
    assert len(ours) == 2 and ours[0] != ours[1]
    for mine, vendor in zip(ours, theirs.tolist(), strict=True):
        assert mine == [i for i in vendor if i not in ends]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_and_adapters(tmp_path: Path, kind: str) -> None:
    """Counted by hand from the tiny config: 2 decoder layers of 7 linears, 2 tower layers of 6, a projector of 1."""
    folder = tiny_idefics3.make_model(tmp_path, kind)
    family = load_family(folder)

    def fresh() -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder)

    for part, count in (("language", 2 * 7), ("vision", 2 * 6), ("projector", 1)):
        tuned = apply(fresh(), Lora(rank=2, parts=(part,)), family)  # type: ignore[arg-type]
        names = [n for n, p in tuned.model.named_parameters() if p.requires_grad]
        assert len(names) == 2 * count and {family.part_of(n) for n in names} == {part}
    parts = {"vision": 3 + 2 * 16 + 2, "projector": 1, "language": 2 * 9 + 1, "embeddings": 1, "head": 1}
    for part, count in parts.items():
        tuned = apply(fresh(), Freeze(train=(part,)), family)  # type: ignore[arg-type]
        assert sum(p.requires_grad for p in tuned.model.parameters()) == count, part
    tuned = apply(fresh(), Full(), family)
    assert sum(p.requires_grad for p in tuned.model.parameters()) == sum(parts.values())
    disk = load_file(folder / "model.safetensors")
    assert {p: sum(family.part_of(n) == p for n in disk) for p in parts} == parts
    assert len(family.blocks(fresh(), "vision")) == len(family.blocks(fresh(), "language")) == 2


@pytest.mark.parametrize(("kind", "tune"), [("idefics3", {"kind": "full"}), ("smolvlm", {"kind": "full"}),
                                            ("smolvlm", {"kind": "lora", "rank": 2})])  # fmt: skip
def test_a_whole_run_and_stock_reload(tmp_path: Path, kind: str, tune: dict[str, Any]) -> None:
    base = tiny_idefics3.make_model(tmp_path / "base", kind)
    data = tiny.make_chat(tmp_path, 12, pictures=4)
    over: dict[str, Any] = {"tune": tune, "train": {"max_steps": 3}, "data": {"eval": str(data)}}
    over["evaluate"] = {"generate": {"max_new_tokens": 2}}
    out = runs.quiet_train(runs.located(tmp_path / "run", base, data, **over))
    held = out.summary["heldout"]
    assert out.summary["applied_steps"] == 3 and held["after"]["loss"] < held["before"]["loss"]
    if tune["kind"] == "lora":
        return
    folder = Path(out.summary["checkpoint"]) / "model"
    kit = make_kit(folder, processor_of)
    assert json.loads((folder / "config.json").read_text())["architectures"] == type(kit.stock).__name__.split()
    state = load_file(folder.parent / "state" / "training.safetensors")
    live = dict(kit.stock.named_parameters())
    assert all(torch.equal(live[n.removeprefix("param/")], t) for n, t in state.items() if n.startswith("param/"))
    with torch.no_grad():
        theirs = kit.stock(**expected(kit, CONVERSATIONS["turns"]), use_cache=False).logits[0]
        ours = kit.model.lm_head(hidden_of(kit, row_of(kit, [kit.encode(CONVERSATIONS["turns"])])))
    assert (ours - theirs).abs().max() < GAP


# -- published sizes and the golden row ---------------------------------------------------------------------------

SIZES_OF_MODELS = {
    "256M": (256_484_928, {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                           "num_attention_heads": 9, "num_key_value_heads": 3}),
    "500M": (507_482_304, {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                           "num_attention_heads": 15, "num_key_value_heads": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SIZES_OF_MODELS))
def test_published_sizes(name: str) -> None:
    """SmolVLM: SmolLM2 and SigLIP base with tiles of 512 pixels."""
    total, text = SIZES_OF_MODELS[name]
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
              "image_size": 512, "patch_size": 16}  # fmt: skip
    config = AutoConfig.for_model(
        "smolvlm",
        text_config={"model_type": "llama", "vocab_size": 49280, **text},
        vision_config=vision,
        scale_factor=4,
    )
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    family = settings_of("smolvlm")
    sizes = dict.fromkeys(("vision", "projector", "language", "embeddings", "head"), 0)
    for parameter, p in model.named_parameters():
        sizes[family.part_of(parameter)] += p.numel()
    assert sum(sizes.values()) == total, sizes
    assert sizes["projector"] == 768 * 16 * text["hidden_size"]
    assert sizes["embeddings"] == sizes["head"] == 49280 * text["hidden_size"]


GOLDEN = {
    "idefics3": ("d399520a7af9cccf", "9a0f995465f33d2a", 6.284762382507324),
    "smolvlm": ("739b6a1e8c273eb9", "c42c99912fb01cf0", 6.350312232971191),
}
"""Of the token ids, of the pixel patches, and the loss per token."""


def test_golden_row(kit: Kit) -> None:
    """Token ids, pixel patches and loss of one conversation with one picture, frozen."""
    row = row_of(kit, [kit.encode(chat(("user", [WIDE, "what is in the picture?"]), ("assistant", "a red circle")))])
    ids = hashlib.sha256(np.ascontiguousarray(row.ids_T, np.int32).tobytes()).hexdigest()[:16]
    pixels = hashlib.sha256(row.pixels_PD.tobytes()).hexdigest()[:16]
    with torch.no_grad():
        loss, count = root_of(kit)(row)["loss"]
    found = (ids, pixels, loss.item() / int(count))
    wanted = GOLDEN[kit.family.name]
    assert found[:2] == wanted[:2] and found[2] == pytest.approx(wanted[2], abs=1e-5), found
