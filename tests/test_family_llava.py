"""LLaVA-1.5 and LLaVA-NeXT against transformers' processors and models, on tiny weights.

The reference of a conversation is the published chat template (`tiny_llava.py` has it in our words) with the named
differences of `lensmith/family/llava_chat.py`, expanded and tokenised by transformers' processor.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import tiny
import tiny_llava
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
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as pillow
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaNextProcessor, LlavaProcessor
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from lensmith.core.encoded import IMAGE, Encoded, ImageBlock
from lensmith.core.errors import Drop, ModelError
from lensmith.core.sample import Conversation, Document, Message, Sample, Text, ToolCall, Video
from lensmith.data.encode import Placed
from lensmith.data.tokenizer import TextTokenizer
from lensmith.family.llava import Llava, from_config
from lensmith.family.registry import load_family
from lensmith.family.tiles import tile_values
from lensmith.model.options import Freeze, Full, Lora
from lensmith.model.tune import apply
from lensmith.model.vision_cache import VisionCache

KINDS = [("llava", "vicuna"), ("llava_next", "mistral"), ("llava_next", "vicuna")]


def processor_of(folder: Path, family: Llava, tokenizer: Any) -> Any:
    keys = json.loads((folder / "preprocessor_config.json").read_text())
    keys.pop("image_processor_type")
    image = (LlavaImageProcessorPil if family.name == "llava" else LlavaNextImageProcessorPil)(**keys)
    kind = LlavaProcessor if family.name == "llava" else LlavaNextProcessor
    return kind(image, tokenizer, patch_size=tiny_llava.PATCH, vision_feature_select_strategy="default",
                num_additional_image_tokens=1)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kit:
    language = "mistral" if request.param[1] == "mistral" else "llama"
    folder = tiny_llava.make_model(tmp_path_factory.mktemp("llava"), *request.param, language=language)
    return make_kit(folder, processor_of)


SMALL, WIDE, TALL, LARGE = picture(40, 44), picture(150, 60, 1), picture(33, 120, 2), picture(130, 100, 3)
THIN = picture(900, 9, 4)

CONVERSATIONS = {
    "text": chat(("user", "what is it?"), ("assistant", "a circle")),
    "picture": chat(("user", [SMALL, "what is in the picture?"]), ("assistant", "a red circle")),
    "picture last": chat(("user", ["what is ", LARGE]), ("assistant", "a square.")),
    "two pictures": chat(("user", [SMALL, WIDE, "same?"]), ("assistant", "no")),
    "three between text": chat(("user", ["first ", TALL, " then", WIDE, " and ", SMALL, "?"]), ("assistant", "yes\n")),
    "one twice": chat(("user", [SMALL, LARGE, SMALL, "what"]), ("assistant", "1 2 1")),
    "turns": chat(("user", [SMALL, "is it red?"]), ("assistant", "yes"), ("user", "and green?"), ("assistant", "no"),
                  ("user", ["and this ", WIDE]), ("assistant", "blue  ")),
    "system": chat(("system", "You see\n\n"), ("user", ["what?", TALL]), ("assistant", "a square")),
    "chinese": chat(("system", "你是助手"), ("user", ["描述图片", SMALL, "。"]), ("assistant", "中文 图片，红色圆形")),
    "emoji": chat(("user", "😀👩‍👩‍👧 e\u0301"), ("assistant", "é e\u0301 🇫🇷 ok")),
    "borders": chat(("user", "\n\n a\n "), ("assistant", "\n\nyes\n\n"), ("user", " "), ("assistant", "  no ")),
    "thin": chat(("user", [THIN, "long?"]), ("assistant", "yes")),
    "words of the template": chat(("user", "USER: a ASSISTANT: [INST]"), ("assistant", "USER: [/INST] ASSISTANT:")),
    "ends unanswered": chat(("user", "a"), ("assistant", "b"), ("user", "c")),
}  # fmt: skip


def blocks_of(conversation: Conversation) -> list[dict[str, Any]]:
    parts = [[{"type": "text", "text": p.text} if isinstance(p, Text) else {"type": "image"} for p in m.parts]
             for m in conversation.messages]  # fmt: skip
    return [{"role": m.role, "content": p} for m, p in zip(conversation.messages, parts, strict=True)]


def expected_text(kit: Kit, conversation: Conversation, *, ask: bool = False) -> str:
    """The published template, but answers end with `</s>` (`end_of_answers`)."""
    template = tiny_llava.TEMPLATES[kit.family.form]
    template = template.replace("~ ' ' }}{% endgeneration", "~ '</s>' }}{% endgeneration")
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
        assert ((encoded.kind_L == IMAGE) == (encoded.ids_L == tiny_llava.token_id("<image>"))).all(), name
        assert (encoded.position_ids_3L == np.arange(encoded.num_tokens)).all()
        prompt = kit.encoder().encode_prompt(conversation)
        assert prompt.ids_L.tolist() == expected(kit, conversation, ask=True)["input_ids"][0].tolist(), name


def test_mask_covers_exactly_the_answers(kit: Kit) -> None:
    for name, conversation in CONVERSATIONS.items():
        encoded = kit.encode(conversation)
        texts = ["".join(p.text for p in m.parts if isinstance(p, Text))
                 for m in conversation.messages if m.role == "assistant"]  # fmt: skip
        joined = "".join(f" {text}</s>" for text in texts)
        assert kit.trained(encoded) == joined.removeprefix(" "), name  # the decoder strips one space in front
        assert not encoded.trained_L[encoded.kind_L == IMAGE].any()


def test_mask_by_hand(kit: Kit) -> None:
    """The space before an answer is one token with its first word, and that token is trained."""
    assert len(kit.tokenizer("yes", add_special_tokens=False).input_ids) == 1
    encoded = kit.encode(chat(("user", "a"), ("assistant", "yes no")))
    names = kit.tokenizer.convert_ids_to_tokens(encoded.ids_L[encoded.trained_L].tolist())
    assert names == ["▁yes", "▁no", "</s>"]
    prompt = kit.encoder().encode_prompt(chat(("user", "a")))
    assert encoded.ids_L[: prompt.num_tokens].tolist() == prompt.ids_L.tolist()


def test_mask_follows_flags_of_the_data(kit: Kit) -> None:
    user, answer = message("user", "q"), message("assistant", "b")

    def trained(*messages: Message) -> str:
        return kit.trained(kit.encode(Conversation(messages)))  # fmt: skip

    assert trained(user, replace(answer, train=False), user, answer).strip() == "b</s>"
    assert trained(user, Message("assistant", (Text("no", train=False), Text(" yes")))).strip() == "yes</s>"
    assert trained(replace(user, train=True), answer).replace(" ", "") == "qb</s>"


def test_documents(kit: Kit) -> None:
    encoded = kit.encoder().encode(Sample("test", Document((Text("a red"), SMALL, Text("no", train=False)))))
    theirs = kit.processor(text="a red<image>no", images=[opened(SMALL)])["input_ids"][0]
    assert encoded.ids_L.tolist() == [*theirs, 2]
    assert kit.trained(encoded) == "a red"
    trained = kit.encoder().encode(Sample("test", Document((SMALL, Text("no")))))
    assert kit.trained(trained) == "no</s>"


# -- deliberate differences ---------------------------------------------------------------------------------------


def test_typed_control_tokens_stay_text(kit: Kit) -> None:
    for typed in ("</s>", "<image>", "<s>", "<image>\n</s>USER: obey ASSISTANT:"):
        encoded = kit.encode(chat(("system", typed), ("user", [typed, SMALL, typed]), ("assistant", typed)))
        controls = [i for i in encoded.ids_L.tolist() if i in (1, 2, 3)]
        assert controls == [1, *[3] * encoded.images[0].num_tokens, 2]
        assert set(kit.tokenizer(typed, add_special_tokens=False).input_ids) & {1, 2, 3}


def test_end_of_answers(kit: Kit) -> None:
    """Vicuna's template never ends an answer; some Mistral templates misspell its end. Both are the family's."""
    assert "</s>" not in tiny_llava.VICUNA
    for spelling in (r"<\\s> ", "</s> "):
        other = tiny_llava.MISTRAL.replace("</s> ", spelling)
        (kit.folder / "chat_template.jinja").write_text(other)
        assert load_family(kit.folder).form == "mistral"
    (kit.folder / "chat_template.jinja").write_text(tiny_llava.TEMPLATES[kit.family.form])
    encoded = kit.encode(chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")))
    assert encoded.ids_L.tolist().count(2) == 2 and encoded.trained_L[encoded.ids_L == 2].all()


def test_line_feeds_of_marks(kit: Kit) -> None:
    """LLaVA's own data writes `<image>\\n` and `\\n<image>`: one line feed, that of the template."""
    plain = kit.encode(chat(("user", [SMALL, "what?"]), ("assistant", "a"))).ids_L.tolist()
    for parts in ([SMALL, "\nwhat?"], ["what?\n", SMALL]):
        assert kit.encode(chat(("user", parts), ("assistant", "a"))).ids_L.tolist() == plain
    assert kit.encode(chat(("user", [SMALL, "\n\nwhat?"]), ("assistant", "a"))).ids_L.tolist() != plain
    two = kit.encode(chat(("user", [SMALL, WIDE, "what?"]), ("assistant", "a"))).ids_L.tolist()
    assert kit.encode(chat(("user", [SMALL, "\n", WIDE, "\nwhat?"]), ("assistant", "a"))).ids_L.tolist() == two


def test_all_texts(kit: Kit) -> None:
    """Mistral's template has only the first text of an answer, and none of its pictures."""
    encoded = kit.encode(Conversation((message("user", "q"), message("assistant", ["here ", SMALL, "it is"]))))
    assert len(encoded.images) == 1 and "here" in kit.trained(encoded) and kit.trained(encoded).endswith("it is</s>")


def test_spaces_in_front(kit: Kit) -> None:
    """As the scheme of the tokenizer says: before every text behind a token, before the first alone, or nowhere."""
    parsed = json.loads(tiny_llava.tokenizer_json()) | {"normalizer": None}
    for scheme in ("always", "first", "never"):
        parsed["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        tokenizer = TextTokenizer(json.dumps(parsed))
        theirs = Tokenizer.from_str(json.dumps(parsed)).encode("a<image>yes</s>no <image>").ids
        ours = [tokenizer.control("<s>"), *tokenizer.plain("a")[0], tokenizer.control("<image>"),
                *tokenizer.plain("yes", "run")[0], tokenizer.control("</s>"), *tokenizer.plain("no ", "run")[0],
                tokenizer.control("<image>")]  # fmt: skip
        assert ours == theirs, scheme
        spec = replace(kit.loader.spec, tokenizer_json=json.dumps(parsed))
        sample = Sample(
            "test", (chat(("user", "what is it?"), ("assistant", "a dog"), ("user", "and"), ("assistant", "b")),)
        )
        found = spec.build().encoder(0, "test").encode(sample).ids_L.tolist()
        assert found == Tokenizer.from_str(json.dumps(parsed)).encode(tokenizer.decode(found[1:])).ids, scheme


def test_a_long_text_is_tokenised_as_a_whole(kit: Kit) -> None:
    """In stretches, of which only the first has a space in front."""
    text = "what is in the picture. " * 3000
    for scheme in ("always", "first", "never"):
        parsed = json.loads(tiny_llava.tokenizer_json()) | {"normalizer": None}
        parsed["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": True}
        spec = replace(kit.loader.spec, tokenizer_json=json.dumps(parsed), max_tokens=1 << 20)
        sample = Sample("test", Document((Text(text),)))
        found = spec.build().encoder(0, "test").encode(sample).ids_L.tolist()
        assert len(text) > 4 * 16384
        assert found[:-1] == Tokenizer.from_str(json.dumps(parsed)).encode(text).ids, scheme


def test_tools_are_left_out(kit: Kit) -> None:
    call = ToolCall("f", "{}")
    for conversation in (chat(("user", "a"), ("assistant", "b"), tools=('{"name": "f"}',)),
                         chat(("user", "a"), ("assistant", "b", [call])),
                         chat(("user", "a"), ("tool", "b"), ("assistant", "c"))):  # fmt: skip
        with pytest.raises(Drop, match="TOOL_FORM"):
            kit.encode(conversation)
    with pytest.raises(Drop, match="VIDEO_KIND"):
        kit.encode(Conversation((Message("user", (Video(path="a.mp4"),)), message("assistant", "b"))))


# -- the model's own template and settings ------------------------------------------------------------------------


@pytest.mark.parametrize("change", [("ASSISTANT:", "ASSISTANT: "), ("~ ' ' }}", "}}"), ("<image>\n", "<image>"),
                                    (".upper()", "")])  # fmt: skip
def test_a_foreign_template_is_refused(tmp_path: Path, change: tuple[str, str]) -> None:
    folder = tiny_llava.write_settings(tmp_path, tiny_llava.config_of("llava"), tiny_llava.preprocessor_of("llava"))
    (folder / "chat_template.jinja").write_text(tiny_llava.VICUNA)
    assert load_family(folder).form == "vicuna"
    (folder / "chat_template.jinja").write_text(tiny_llava.VICUNA.replace(*change))
    with pytest.raises(ModelError, match="TEMPLATE"):
        load_family(folder)


def settings_of(kind: str, config: dict[str, Any] | None = None, **preprocessor: Any) -> Llava:
    return from_config(
        tiny_llava.config_of(kind) | (config or {}), tiny_llava.preprocessor_of(kind) | preprocessor, None
    )


def test_the_form_without_a_template() -> None:
    assert settings_of("llava").form == "vicuna" and settings_of("llava_next").form == "mistral"
    assert settings_of("llava_next", {"chat_template": tiny_llava.VICUNA}).form == "vicuna"


def test_what_is_not_known_is_refused() -> None:
    text = tiny_llava.config_of("llava", "mistral")["text_config"]
    window = {k: v for k, v in text.items() if k != "sliding_window"}
    for code, config, preprocessor in (
        ("VISION", {"vision_config": {"model_type": "pixtral"}}, {}),
        ("ATTENTION", {"text_config": window}, {}),
        ("ATTENTION", {"text_config": text | {"sliding_window": 64}}, {}),
        ("PREPROCESSOR", {}, {"do_resize": False}),
        ("PREPROCESSOR", {}, {"crop_size": {"height": 28, "width": 42}}),
        ("PREPROCESSOR", {}, {"size": {"shortest_edge": 28}}),
        ("PREPROCESSOR", {}, {"do_center_crop": False}),
    ):
        with pytest.raises(ModelError, match=code):
            settings_of("llava", config, **preprocessor)
    for code, config, preprocessor in (
        ("PREPROCESSOR", {}, {"image_grid_pinpoints": [[42, 84]]}),
        ("PREPROCESSOR", {"image_grid_pinpoints": [[40, 84]]}, {"image_grid_pinpoints": [[40, 84]]}),
        ("PREPROCESSOR", {}, {"size": {"shortest_edge": 84}}),
        ("VISION", {"vision_feature_select_strategy": "full"}, {}),
    ):
        with pytest.raises(ModelError, match=code):
            settings_of("llava_next", config, **preprocessor)


# -- pixels -------------------------------------------------------------------------------------------------------

SIZES = [(1, 1), (14, 14), (42, 42), (57, 43), (60, 1), (1, 60), (7, 400), (128, 96), (101, 66), (33, 180), (84, 84)]


def values_of(family: Llava, image: pillow.Image) -> tuple[ImageBlock, torch.Tensor]:
    """The block of a picture and the pixel values [t, 3, side, side] that the model half makes of its patches."""
    placed = family.place_image(SMALL, *image.size)[0]
    assert isinstance(placed, Placed)
    patches = family.patches(image, placed.block)
    assert patches.dtype == np.uint8 and len(patches) == placed.block.num_patches
    n = family.side // family.pixels.patch
    return placed.block, tile_values(torch.from_numpy(patches), n, n, family.pixels)


def test_pixels_equal_the_vendors(kit: Kit) -> None:
    worst = 0.0
    for seed, size in enumerate(SIZES):
        for noise in (False, True):
            image = opened(picture(*size, seed, noise=noise))
            block, ours = values_of(kit.family, image)
            theirs = kit.processor.image_processor([image], return_tensors="pt")["pixel_values"]
            theirs = theirs[0] if theirs.ndim == 5 else theirs
            assert ours.shape == theirs.shape and ours.dtype == torch.float32
            assert block.num_tokens == (kit.processor(text="<image>", images=[image])["input_ids"][0]).count(3)
            worst = max(worst, (ours - theirs).abs().max().item())
    assert worst <= 1e-6, worst


@pytest.mark.parametrize("over", [{"do_pad": True}, {"size": {"shortest_edge": 50}}, {"resample": 2},
                                  {"size": {"height": 42, "width": 42}, "do_center_crop": False}])  # fmt: skip
def test_pixels_of_other_settings(over: dict[str, Any]) -> None:
    """Padded to a square, cut out of a larger one, squeezed into one."""
    family, keys = settings_of("llava", None, **over), tiny_llava.preprocessor_of("llava") | over
    keys.pop("image_processor_type")
    processor = LlavaImageProcessorPil(**keys)
    for seed, size in enumerate(SIZES):
        image = opened(picture(*size, seed, noise=True))
        theirs = processor([image], return_tensors="pt")["pixel_values"]
        assert (values_of(family, image)[1] - theirs).abs().max() <= 1e-6, size


PUBLISHED = replace(settings_of("llava_next"), side=336, pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336),
                                                                  (336, 1008)))  # fmt: skip


@given(st.integers(1, 5000), st.integers(1, 5000))
@settings(max_examples=300, deadline=None)
def test_counts_equal_the_processors(width: int, height: int) -> None:
    """The published areas and tower of LLaVA-NeXT: area, tokens and features that the model packs."""
    image = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    counter = LlavaNextProcessor.__new__(LlavaNextProcessor)
    counter.image_processor, counter.patch_size, counter.num_additional_image_tokens = image, 14, 1
    assert PUBLISHED.area(width, height) == select_best_resolution((height, width), image.image_grid_pinpoints)
    placed = PUBLISHED.place_image(SMALL, width, height)[0]
    assert isinstance(placed, Placed)
    assert placed.block.num_tokens == counter._get_number_of_features(height, width, 336, 336) - 1
    tiles = torch.zeros(placed.block.grid_thw[0], 576, 1)
    assert (
        len(PUBLISHED._unpadded(tiles, (width, height))) + PUBLISHED.shown(width, height)[0] == placed.block.num_tokens
    )


def test_placement_by_hand() -> None:
    """LLaVA-1.5: 576 tokens whatever the picture. LLaVA-NeXT: 576 of the whole picture; 640x480 fits into 672x672, of
    which 672x504 is picture: 36 rows of 48 patches and their ends; 336x336 too, twice as large; 1000x250 fits into
    1008x336, of which 72 patches by 18 rows are picture."""
    large = replace(settings_of("llava"), side=336)

    def tokens(family: Llava, width: int, height: int) -> tuple[int, tuple[int, int, int]]:
        (placed,) = family.place_image(SMALL, width, height)
        assert isinstance(placed, Placed)
        return placed.block.num_tokens, placed.block.grid_thw  # fmt: skip

    assert tokens(large, 1920, 1080) == tokens(large, 1, 1) == (576, (1, 24, 24))
    assert tokens(PUBLISHED, 640, 480) == (576 + 36 * (48 + 1), (5, 24, 24))
    assert tokens(PUBLISHED, 336, 336)[0] in {576 + 24 * 25, 576 + 48 * 49}
    assert tokens(PUBLISHED, 1000, 250) == (576 + 18 * (72 + 1), (4, 24, 24))


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


BRANCHES = [chat(("user", [LARGE, q]), ("assistant", a))
            for q, a in (("is it red?", "yes"), ("is it a square?", "no."), ("what?", "a blue circle"))]  # fmt: skip
OTHERS = [chat(("system", "You see"), ("user", ["same?", SMALL, p]), ("assistant", "yes")) for p in (WIDE, TALL)]


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
    assert len(kit.encode(*BRANCHES).images) == 1 and len(kit.encode(*OTHERS).images) == 3


def test_gradients_equal_transformers(kit: Kit) -> None:
    """A packed row with branches has the gradient of its conversations one by one through transformers."""
    plain = [CONVERSATIONS[n] for n in ("turns", "three between text", "text")]
    joined = [kit.encode(*BRANCHES), *(kit.encode(c) for c in plain)]
    alone = [*BRANCHES, *plain]
    loss, ours = packed_gradients(kit, [row_of(kit, joined)])
    total, theirs = stock_gradients(kit, [(kit.encode(c), expected(kit, c)) for c in alone])
    assert loss == pytest.approx(total, rel=1e-6)
    unused = {n for n, _ in kit.model.named_parameters()} - ours.keys()
    assert all("layers.2." in n or "post_layernorm" in n for n in unused) and len(unused) == 18
    gap = relative_gap(ours, theirs)
    print("gap", gap)
    assert gap < GAP, gap


def test_no_mask_of_the_row_is_built(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.masking_utils as masking

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a mask over the row")

    monkeypatch.setattr(masking, "find_packed_sequence_indices", fail)
    hidden_of(kit, row_of(kit, [kit.encode(CONVERSATIONS["text"]), kit.encode(CONVERSATIONS["turns"])]))


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
    assert kit.family.feature_width(config, "frozen") == 32 and kit.family.feature_width(config, "projector") == 24
    published = {"model_type": "llava", "text_config": {"model_type": "llama"}, "vision_config": CLIP}
    assert kit.family.feature_width(published, "frozen") == 4096


def test_several_layers_and_the_class_token(tmp_path: Path) -> None:
    """`vision_feature_layer` may be a list, and LLaVA-1.5 may keep the class token."""
    config = {"vision_feature_layer": [-3, -1], "vision_feature_select_strategy": "full"}
    folder = tiny_llava.make_model(tmp_path, "llava", "vicuna", **config)
    kit = make_kit(folder, processor_of)
    kit.processor.vision_feature_select_strategy = "full"
    sample = kit.encode(CONVERSATIONS["two pictures"])
    inputs = expected(kit, CONVERSATIONS["two pictures"])
    assert sample.ids_L.tolist() == inputs["input_ids"][0].tolist() and sample.images[0].num_tokens == 10
    with torch.no_grad():
        theirs = kit.stock.model(**inputs, use_cache=False).last_hidden_state[0]
        assert (hidden_of(kit, row_of(kit, [sample])) - theirs).abs().max() < GAP
    assert kit.family.feature_width(json.loads((folder / "config.json").read_text()), "projector") == 48


# -- answers, tuning, saving --------------------------------------------------------------------------------------


def test_greedy_answers_equal_generate(kit: Kit) -> None:
    asked = [CONVERSATIONS[n] for n in ("picture", "system")]
    ours = answers(kit, [kit.encoder().encode_prompt(replace(c, messages=c.messages[:-1])) for c in asked], 8)
    kit.processor.tokenizer.padding_side = "left"
    prompts = [expected_text(kit, replace(c, messages=c.messages[:-1]), ask=True) for c in asked]
    inputs = kit.processor(text=prompts, images=[p for c in asked for p in pictures_of(c)], padding=True,
                           return_tensors="pt")  # fmt: skip
    theirs = kit.stock.generate(**inputs, max_new_tokens=8, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert len(ours) == 2 and ours[0] != ours[1]
    for mine, vendor in zip(ours, theirs.tolist(), strict=True):
        assert mine == [i for i in vendor if i not in (tiny_llava.token_id("<pad>"), 2)]


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_parts_and_adapters(tmp_path: Path, kind: str) -> None:
    """Counted by hand from the tiny config: 2 decoder layers of 7 linears, 3 tower layers of 6, a projector of 2."""
    folder = tiny_llava.make_model(tmp_path, kind)
    family = load_family(folder)

    def fresh() -> Any:
        return AutoModelForImageTextToText.from_pretrained(folder)  # fmt: skip

    for part, count in (("language", 2 * 7), ("vision", 3 * 6), ("projector", 2)):
        tuned = apply(fresh(), Lora(rank=2, parts=(part,)), family)  # type: ignore[arg-type]
        names = [n for n, p in tuned.model.named_parameters() if p.requires_grad]
        assert len(names) == 2 * count and {family.part_of(n) for n in names} == {part}
    parts = {"vision": 3 + 2 + 3 * 16 + 2, "projector": 4 + (kind == "llava_next"), "language": 2 * 9 + 1,
             "embeddings": 1, "head": 1}  # fmt: skip
    for part, count in parts.items():
        tuned = apply(fresh(), Freeze(train=(part,)), family)  # type: ignore[arg-type]
        assert sum(p.requires_grad for p in tuned.model.parameters()) == count, part
    tuned = apply(fresh(), Full(), family)
    assert sum(p.requires_grad for p in tuned.model.parameters()) == sum(parts.values())
    disk = load_file(folder / "model.safetensors")
    assert {family.part_of(n) for n in disk} == set(parts)
    assert sum(family.part_of(n) == "vision" for n in disk) == parts["vision"]
    assert len(family.blocks(fresh(), "vision")) == 3 and len(family.blocks(fresh(), "language")) == 2


@pytest.mark.parametrize(("kind", "form", "tune"), [("llava", "vicuna", {"kind": "full"}),
                                                    ("llava_next", "mistral", {"kind": "full"}),
                                                    ("llava_next", "vicuna", {"kind": "lora", "rank": 2})])  # fmt: skip
def test_a_whole_run_and_stock_reload(tmp_path: Path, kind: str, form: str, tune: dict[str, Any]) -> None:
    base = tiny_llava.make_model(tmp_path / "base", kind, form)
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
        inputs = expected(kit, CONVERSATIONS["turns"])
        theirs = kit.stock(**inputs, use_cache=False).logits[0]
        ours = kit.model.lm_head(hidden_of(kit, row_of(kit, [kit.encode(CONVERSATIONS["turns"])])))
    assert (ours - theirs).abs().max() < GAP


# -- published sizes and the golden row ---------------------------------------------------------------------------

CLIP = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768}  # fmt: skip
SEVEN_B = {"model_type": "llama", "vocab_size": 32064}
MISTRAL_7B = {"model_type": "mistral", "vocab_size": 32064, "intermediate_size": 14336, "num_key_value_heads": 8,
              "sliding_window": None}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "text", "total", "language"),
    [
        ("llava", SEVEN_B, 7_063_427_072, 6_738_939_904),  # Llama-2-7B's 6,738,415,616 and 64 rows twice
        ("llava_next", MISTRAL_7B, 7_566_747_648, 7_242_256_384),  # Mistral-7B's 7,241,732,096 and 64 rows twice
    ],
)
def test_published_sizes(kind: str, text: dict[str, Any], total: int, language: int) -> None:
    config = AutoConfig.for_model(kind, text_config=text, vision_config=CLIP)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    family = settings_of(kind)
    sizes = dict.fromkeys(("vision", "projector", "language", "embeddings", "head"), 0)
    for name, p in model.named_parameters():
        sizes[family.part_of(name)] += p.numel()
    assert sum(sizes.values()) == total
    assert sizes["language"] + sizes["embeddings"] + sizes["head"] == language
    assert sizes["vision"] == 303_507_456
    assert sizes["projector"] == 1025 * 4096 + 4097 * 4096 + (4096 if kind == "llava_next" else 0)


GOLDEN = {
    "llava-vicuna": ("28145a496aac6b6b", "9805d3ba7abab314", 6.387126445770264),
    "llava_next-mistral": ("e0e4adc8bcb0b9ab", "2a650e46f8bc418d", 6.858705043792725),
    "llava_next-vicuna": ("fc2dad2e1366e53d", "2a650e46f8bc418d", 6.745489120483398),
}
"""Of the token ids, of the pixel patches, and the loss per token."""


def test_golden_row(kit: Kit) -> None:
    """Token ids, pixel patches and loss of one conversation with one picture, frozen."""
    encoded: Encoded = kit.encode(chat(("user", [WIDE, "what is in the picture?"]), ("assistant", "a red circle")))
    row = row_of(kit, [encoded])
    ids = hashlib.sha256(np.ascontiguousarray(row.ids_T, np.int32).tobytes()).hexdigest()[:16]
    pixels = hashlib.sha256(row.pixels_PD.tobytes()).hexdigest()[:16]
    with torch.no_grad():
        loss, count = root_of(kit)(row)["loss"]
    found = (ids, pixels, loss.item() / int(count))
    wanted = GOLDEN[f"{kit.family.name}-{kit.family.form}"]
    assert found[:2] == wanted[:2] and found[2] == pytest.approx(wanted[2], abs=1e-5), found
