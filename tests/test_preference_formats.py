"""Layouts of rows that compare answers: every one of them reads as the same tokens, rows that are wrong are refused
where they stand, and what stands behind a shared prompt is what stands there alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_kit
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import runs
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lensmith.core.encoded import BAD, CHOSEN, GOOD, IMAGE, REJECTED, Encoded
from lensmith.core.errors import DataError
from lensmith.core.sample import Conversation, Preference, Sample
from lensmith.data.collate import Member, load_row
from lensmith.data.formats import RLHFV, Alpaca, Compare, DocumentFormat, Messages, ShareGPT, detect
from lensmith.data.index_build import build_index
from lensmith.data.load import Loader, LoaderSpec, SampleRef, SourceFile
from lensmith.data.media import ImageLimits
from lensmith.family.registry import load_family

QUESTION, BETTER, WORSE = "What is\nthere?", "a red circle", "a blue square"


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def asked(text: str = "<image>" + QUESTION) -> dict[str, Any]:
    return {"role": "user", "content": text}


def gpt(text: str) -> dict[str, Any]:
    return {"from": "gpt", "value": text}


def human(text: str = "<image>" + QUESTION) -> dict[str, Any]:
    return {"from": "human", "value": text}


def blocks(text: str, *, picture: bool = False) -> list[dict[str, Any]]:
    """As TRL's data sets have them, whose keys are all there."""
    return [{"type": "image", "text": None}] * picture + [{"type": "text", "text": text}]


SHOWN = {"images": ["images/0.png"]}
TRIPLE = {"question": QUESTION, "chosen": BETTER, "rejected": WORSE}
PAIRS: dict[str, tuple[dict[str, Any], Any]] = {
    # one pair in every layout, and the layout that its keys are taken for
    "messages, texts": ({"messages": [asked()], "chosen": BETTER, "rejected": WORSE, **SHOWN}, Messages()),
    "messages, turns": ({"messages": [asked()], "chosen": said(BETTER), "rejected": said(WORSE), **SHOWN}, Messages()),
    "messages, lists": (
        {"messages": [asked()], "chosen": [said(BETTER)], "rejected": [said(WORSE)], "image": "images/0.png"},
        Messages(images_column="image"),
    ),
    "prompt, texts": ({"prompt": "<image>" + QUESTION, "chosen": BETTER, "rejected": WORSE, **SHOWN}, Messages()),
    "prompt with blocks": (
        {
            "prompt": [{"role": "user", "content": blocks(QUESTION, picture=True)}],
            "chosen": [{"role": "assistant", "content": blocks(BETTER)}],
            "rejected": [{"role": "assistant", "content": blocks(WORSE)}],
            **SHOWN,
        },
        Messages(),
    ),
    "whole conversations": (
        {"chosen": [asked(), said(BETTER)], "rejected": [asked(), said(WORSE)], **SHOWN}, Messages(),
    ),
    "sharegpt, turns": (
        {"conversations": [human()], "chosen": gpt(BETTER), "rejected": gpt(WORSE), **SHOWN}, ShareGPT(),
    ),
    "sharegpt, texts": ({"conversations": [human()], "chosen": BETTER, "rejected": WORSE, **SHOWN}, ShareGPT()),
    "sharegpt, whole conversations": (
        {"chosen": [human(), gpt(BETTER)], "rejected": [human(), gpt(WORSE)], **SHOWN}, ShareGPT(),
    ),
    "alpaca": (
        {"instruction": "<image>What is", "input": "there?", "chosen": BETTER, "rejected": WORSE, **SHOWN}, Alpaca(),
    ),
    "alpaca, turns": (
        {"instruction": "<image>" + QUESTION, "chosen": said(BETTER), "rejected": gpt(WORSE), **SHOWN}, Alpaca(),
    ),
    "rlhf-v, text": ({"text": json.dumps(TRIPLE), "image": "images/0.png"}, RLHFV(images_column="image")),
    "rlhf-v, object": ({"text": TRIPLE, "image": "images/0.png"}, RLHFV(images_column="image")),
    "rlaif-v": ({**TRIPLE, "image": "images/0.png", "ds_name": "x"}, RLHFV(images_column="image")),
}  # fmt: skip
LABELS: dict[str, tuple[dict[str, Any], Any]] = {
    "messages": ({"messages": [asked(), said(BETTER)], **SHOWN}, Messages()),
    "prompt, texts": ({"prompt": "<image>" + QUESTION, "completion": BETTER, **SHOWN}, Messages()),
    "prompt, turns": ({"prompt": [asked()], "completion": [said(BETTER)], **SHOWN}, Messages()),
    "prompt with blocks": (
        {
            "prompt": [{"role": "user", "content": blocks(QUESTION, picture=True)}],
            "completion": [{"role": "assistant", "content": blocks(BETTER)}], **SHOWN,
        },
        Messages(),
    ),
    "sharegpt": ({"conversations": [human(), gpt(BETTER)], **SHOWN}, ShareGPT()),
    "alpaca": ({"instruction": "<image>What is", "input": "there?", "output": BETTER, **SHOWN}, Alpaca()),
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    tiny.make_pictures(folder, 2)
    return folder


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
        return path
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def spec_of(model: Path, file: Path, base: Path, compare: Compare | None, **over: Any) -> LoaderSpec:
    spec = LoaderSpec(
        files=(SourceFile("rows", str(file), over.pop("format", None), str(base)),), family=load_family(model),
        tokenizer_json=(model / "tokenizer.json").read_text(encoding="utf-8"), roots=(), limits=ImageLimits(),
        max_tokens=512, too_long="drop", max_row_bytes=1 << 20, compare=compare,
    )  # fmt: skip
    return replace(spec, **over)


def read(spec: LoaderSpec) -> tuple[Loader, Sample, Encoded]:
    """The first row of a file."""
    loader = spec.build()
    sample = loader.sample(0, next(iter(loader.rows(0).scan())))
    return loader, sample, loader.encode(0, sample)


def text_of(loader: Loader, ids: Any) -> str:
    """Tokens as text, those of a picture as one."""
    return re.sub(r"(<\|image_pad\|>)+", "<|image_pad|>", loader.tokenizer.decode(np.asarray(ids).tolist()))


def side(encoded: Encoded, number: int) -> np.ndarray:
    """Which tokens an answer with its prompt is [L]."""
    at = encoded.branches[number]
    return np.r_[at.prefix_start : at.prefix_start + at.prefix_length, at.start : at.start + at.length]


def expected(answer: str) -> str:
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|><|image_pad|><|vision_end|>{QUESTION}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def check_pair(loader: Loader, encoded: Encoded) -> None:
    """The one pair, whatever row it was read from."""
    assert encoded.preference == Preference() and encoded.num_answers == 2
    assert [text_of(loader, encoded.ids_L[side(encoded, n)]) for n in (0, 1)] == [expected(BETTER), expected(WORSE)]
    for n, answer in enumerate((BETTER, WORSE)):
        at = side(encoded, n)
        assert text_of(loader, encoded.ids_L[at][encoded.trained_L[at]]) == f"{answer}<|im_end|>"
    prefix, first, second = encoded.segments
    assert text_of(loader, encoded.ids_L[: prefix.length]).endswith("<|im_start|>assistant")
    assert prefix.length + first.length + second.length == encoded.num_tokens
    assert len(encoded.images) == 1 and int((encoded.kind_L == IMAGE).sum()) == encoded.images[0].num_tokens
    assert not encoded.trained_L[: prefix.length].any()


# -- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_pairs(tmp_path: Path, qwen25: Path, pictures: Path, kind: str, name: str) -> None:
    """Without a format named, from text and from Parquet: the same tokens, prompt and picture once."""
    row, layout = PAIRS[name]
    assert detect(row, "x:1", "pairs") == layout
    loader, _, encoded = read(spec_of(qwen25, write(tmp_path / f"rows.{kind}", row), pictures, "pairs"))
    check_pair(loader, encoded)


IN_PARQUET = ("messages, texts", "prompt with blocks", "sharegpt, turns", "rlhf-v, text", "rlaif-v")


@pytest.mark.parametrize("name", IN_PARQUET)
def test_pictures_as_bytes_in_parquet(tmp_path: Path, qwen25: Path, pictures: Path, name: str) -> None:
    row, _ = PAIRS[name]
    inside = {"bytes": (pictures / "images/0.png").read_bytes(), "path": "not/there.png"}
    row = {**row, "image": inside} if "image" in row else {**row, "images": [inside]}
    loader, sample, encoded = read(spec_of(qwen25, write(tmp_path / "rows.parquet", row), tmp_path, "pairs"))
    check_pair(loader, encoded)
    assert sample.images()[0].data == inside["bytes"]


@pytest.mark.parametrize("label", [True, False, 1, 0])
@pytest.mark.parametrize("name", LABELS)
def test_labels(tmp_path: Path, qwen25: Path, pictures: Path, name: str, label: Any) -> None:
    row, layout = LABELS[name]
    row = {**row, "label": label}
    assert detect(row, "x:1", "labels") == layout
    loader, _, encoded = read(spec_of(qwen25, write(tmp_path / "rows.jsonl", row), pictures, "labels"))
    assert encoded.preference == Preference(bool(label)) and encoded.num_answers == 1
    assert text_of(loader, encoded.ids_L) == expected(BETTER) and len(encoded.images) == 1
    assert text_of(loader, encoded.ids_L[encoded.trained_L]) == f"{BETTER}<|im_end|>"


def test_a_row_of_pairs_and_one_of_labels(tmp_path: Path, qwen25: Path, pictures: Path) -> None:
    """What objectives are told of a packed row: roles, lengths, whose positions, the end of each answer."""
    pair, _ = PAIRS["messages, texts"]
    rows = [{**pair, "margin": 0.5}, {**pair, "chosen": "yes", "margin": None}]
    labelled = [{**LABELS["messages"][0], "label": n == 0} for n in (0, 1)]
    for compare, found, roles in (
        ("pairs", rows, [CHOSEN, REJECTED] * 2),
        ("labels", labelled, [GOOD, BAD]),
    ):
        loader = spec_of(qwen25, write(tmp_path / f"{compare}.jsonl", *found), pictures, compare).build()  # type: ignore[arg-type]
        members = [Member(n, SampleRef(0, ref), 0.5 + n, source=n) for n, ref in enumerate(loader.rows(0).scan())]
        row = load_row(loader, members, {})
        of = row.compared
        assert of is not None and of.role_B.tolist() == roles
        each = 2 if compare == "pairs" else 1
        assert of.sample_B.tolist() == of.source_B.tolist() == [0] * each + [1] * each
        assert of.weight_B.tolist() == [0.5] * each + [1.5] * each
        assert of.margin_B.tolist() == ([0.5, 0.5, 0, 0] if each == 2 else [0, 0])
        answers = [text_of(loader, row.target_S[of.sequence_S == b]) for b in range(len(roles))]
        texts = [BETTER, WORSE, "yes", WORSE] if each == 2 else [BETTER, BETTER]
        assert answers == [f"{text}<|im_end|>" for text in texts]
        assert of.length_B.tolist() == [int((of.sequence_S == b).sum()) for b in range(len(roles))]
        assert [text_of(loader, row.ids_T[[at]]) for at in of.last_B] == ["<|im_end|>"] * len(roles)
        assert len(row.image_keys) == 1 and len(row.image_of_block) == 2, "one picture, in each of two samples once"
        assert of.other_B.tolist() == [-1] * len(roles) and of.reference_B is None


# -- what is trained --------------------------------------------------------------------------------------------------


def trained_of(spec: LoaderSpec) -> list[str]:
    loader, _, encoded = read(spec)
    sides = [side(encoded, n) for n in range(encoded.num_answers)]
    return [text_of(loader, encoded.ids_L[at][encoded.trained_L[at]]) for at in sides]


@pytest.mark.parametrize("train", ["assistant", "last", "all"])
@pytest.mark.parametrize("flag", [None, True])
def test_only_the_answer_is_trained(tmp_path: Path, qwen25: Path, flag: bool | None, train: Any) -> None:
    """Earlier answers are part of the prompt, whatever the row or the run file flags."""
    before = [{**asked("Hi"), "train": flag}, {**said("Hello"), "train": flag}, asked("And?")]
    row = {"messages": before, "chosen": "yes", "rejected": "no"}
    spec = spec_of(qwen25, write(tmp_path / "p.jsonl", row), tmp_path, "pairs", format=None)
    spec = replace(spec, files=(replace(spec.files[0], format=Messages(train=train)),))
    assert trained_of(spec) == ["yes<|im_end|>", "no<|im_end|>"]
    row = {"messages": [*before, said("yes")], "label": False}
    spec = replace(spec, compare="labels", files=(replace(spec.files[0], path=str(write(tmp_path / "l.jsonl", row))),))
    assert trained_of(spec) == ["yes<|im_end|>"]
    history = {"instruction": "And?", "history": [["Hi", "Hello"]], "chosen": "yes", "rejected": "no"}
    spec = spec_of(qwen25, write(tmp_path / "a.jsonl", history), tmp_path, "pairs", format=Alpaca(train=train))
    assert trained_of(spec) == ["yes<|im_end|>", "no<|im_end|>"]


def test_answers_of_several_turns(tmp_path: Path, qwen25: Path) -> None:
    """Of an answer that calls a tool every turn of the assistant is compared, and no other; a beginning that both have
    is of the prompt."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "zoom", "arguments": "{}"}]}
    tool = {"role": "tool", "content": "big"}
    row = {"messages": [asked("How big?")], "chosen": [call, tool, said("yes")], "rejected": said("no")}
    first, second = trained_of(spec_of(qwen25, write(tmp_path / "t.jsonl", row), tmp_path, "pairs"))
    assert first.count("<|im_end|>") == 2 and "zoom" in first and "big" not in first and first.endswith("yes<|im_end|>")
    assert second == "no<|im_end|>"
    row = {**row, "chosen": [said("a"), asked("b"), said("yes")], "rejected": [said("a"), asked("b"), said("no")]}
    spec = spec_of(qwen25, write(tmp_path / "u.jsonl", row), tmp_path, "pairs")
    assert trained_of(spec) == ["yes<|im_end|>", "no<|im_end|>"]


def test_columns_can_be_named(tmp_path: Path, qwen25: Path) -> None:
    layout = Messages(chosen_column="good", rejected_column="bad", margin_column="by", prompt_column="ask")
    row = {"ask": "Who?", "good": "yes", "bad": "no", "by": 2, "system": "Be brief."}
    loader, sample, encoded = read(spec_of(qwen25, write(tmp_path / "c.jsonl", row), tmp_path, "pairs", format=layout))
    assert sample.preference == Preference(margin=2.0)
    assert text_of(loader, encoded.ids_L[side(encoded, 1)]).startswith("<|im_start|>system\nBe brief.<|im_end|>")
    tagged = {"conversations": [human("Who?"), gpt("me")], "kto_tag": False}
    file = write(tmp_path / "k.jsonl", tagged)
    spec = spec_of(qwen25, file, tmp_path, "labels", format=ShareGPT(label_column="kto_tag"))
    assert read(spec)[1].preference == Preference(False)


def test_pictures_without_marks_stand_in_front_in_rlaif_v_alone(tmp_path: Path, qwen25: Path, pictures: Path) -> None:
    marked = {**TRIPLE, "question": "What is<image>\nthere?", "image": "images/0.png"}
    loader, _, encoded = read(spec_of(qwen25, write(tmp_path / "m.jsonl", marked), pictures, "pairs"))
    assert "What is<|vision_start|><|image_pad|><|vision_end|>\nthere?" in text_of(loader, encoded.ids_L)
    row = {"messages": [asked(QUESTION)], "chosen": BETTER, "rejected": WORSE, **SHOWN}
    with pytest.raises(DataError, match=r"\[IMAGE_COUNT\]"):
        read(spec_of(qwen25, write(tmp_path / "f.jsonl", row), pictures, "pairs"))
    front = Messages(unplaced="front")
    loader, _, encoded = read(spec_of(qwen25, tmp_path / "f.jsonl", pictures, "pairs", format=front))
    check_pair(loader, encoded)


# -- verdicts ---------------------------------------------------------------------------------------------------------

GOOD_PAIR = {"messages": [asked("Who?")], "chosen": "yes", "rejected": "no"}
GOOD_LABEL = {"messages": [asked("Who?"), said("me")], "label": True}


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k != key}


WRONG_PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    # B59 and its kin: what stands on line 2 behind a good row
    "the same": ({**GOOD_PAIR, "rejected": "yes"}, r"DPO_SAME"),
    "the same in other words": ({**GOOD_PAIR, "chosen": [said("yes")], "rejected": "yes"}, r"DPO_SAME"),
    "the same but for a flag": (
        {**GOOD_PAIR, "chosen": {**said("yes"), "train": True}, "rejected": "yes"}, r"DPO_SAME",
    ),
    "another prompt": ({"chosen": [asked("Who?"), said("a")], "rejected": [asked("What?"), said("b")]}, r"DPO_PROMPT"),
    "one goes on": ({**GOOD_PAIR, "chosen": [said("a"), asked("b"), said("c")], "rejected": "a"}, r"DPO_PROMPT"),
    "prompts differ later": (
        {"chosen": [asked("a"), said("b"), asked("c"), said("d")],
         "rejected": [asked("a"), said("b"), asked("x"), said("e")]},
        r"DPO_PROMPT",
    ),
    "no rejected": (without(GOOD_PAIR, "rejected"), r"SCHEMA.*rejected: is missing \(found: messages, chosen"),
    "no chosen": (without(GOOD_PAIR, "chosen"), r"SCHEMA.*chosen: is missing \(found: messages, rejected"),
    "rejected is null": ({**GOOD_PAIR, "rejected": None}, r"SCHEMA.*rejected: is null"),
    "chosen is null": ({**GOOD_PAIR, "chosen": None}, r"SCHEMA.*chosen: is null"),
    "chosen is empty": ({**GOOD_PAIR, "chosen": ""}, r"SCHEMA.*empty assistant turn"),
    "chosen is a number": ({**GOOD_PAIR, "chosen": 3}, r"SCHEMA.*is int"),
    "chosen is no turn": ({**GOOD_PAIR, "chosen": []}, r"NO_TARGET"),
    "chosen is of the user": ({**GOOD_PAIR, "chosen": asked("b")}, r"ROLE_ORDER"),
    "one whole, one not": ({"chosen": [asked("Who?"), said("a")], "rejected": "b"}, r"ROLE_ORDER"),
    "the prompt is answered": ({**GOOD_PAIR, "messages": [asked("Who?"), said("me")]}, r"ROLE_ORDER"),
    "margin": ({**GOOD_PAIR, "margin": "large"}, r"SCHEMA.*margin: is str, must be a finite number"),
    "picture too few": ({**GOOD_PAIR, "rejected": "<image>no"}, r"IMAGE_COUNT.*1 image marks, 0 pictures"),
    "picture too many": ({**GOOD_PAIR, "images": ["images/0.png"]}, r"IMAGE_COUNT.*0 image marks, 1 pictures"),
    "picture of one side": (
        {**GOOD_PAIR, "messages": [asked("<image>Who?")], "chosen": "<image>yes", "images": ["images/0.png"]},
        r"IMAGE_COUNT.*2 image marks, 1 pictures",
    ),
    "an ordinary row": (without(GOOD_LABEL, "label"), r"SCHEMA.*chosen: is missing \(found: messages\)"),
    "a document": ({"text": "Once upon a time."}, r"SCHEMA.*chosen: is missing \(found: text\)"),
    "outside": ({**GOOD_PAIR, "messages": [asked("<image>Who?")], "images": ["../../x.png"]}, r"PATH_ESCAPE"),
}  # fmt: skip
WRONG_LABELS: dict[str, tuple[dict[str, Any], str]] = {
    "no label": (without(GOOD_LABEL, "label"), r"SCHEMA.*label: is missing"),
    "label is null": ({**GOOD_LABEL, "label": None}, r"SCHEMA.*label: is null, must be true or false"),
    "label is a word": ({**GOOD_LABEL, "label": "true"}, r"SCHEMA.*label: is str, must be true or false"),
    "label is another number": ({**GOOD_LABEL, "label": 2}, r"SCHEMA.*label: is int, must be true or false"),
    "label is a list": ({**GOOD_LABEL, "label": [True]}, r"SCHEMA.*label: is list, must be true or false"),
    "no answer": ({**GOOD_LABEL, "messages": [asked("Who?")]}, r"NO_TARGET"),
    "ends without an answer": (
        {**GOOD_LABEL, "messages": [asked("a"), said("b"), asked("c")]},
        r"NO_TARGET.*ends without an answer",
    ),
    "completion is null": ({"prompt": "Who?", "completion": None, "label": True}, r"SCHEMA.*is missing"),
    "a pair": (GOOD_PAIR, r"SCHEMA.*label: is missing \(found: messages, chosen, rejected"),
    "picture": ({**GOOD_LABEL, "messages": [asked("<image>?"), said("b")]}, r"IMAGE_COUNT"),
}


def refused(model: Path, file: Path, compare: Compare | None) -> str:
    with pytest.raises(DataError) as caught:
        build_index(spec_of(model, file, file.parent, compare), None)
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_wrong_pairs(tmp_path: Path, qwen25: Path, name: str) -> None:
    row, code = WRONG_PAIRS[name]
    found = refused(qwen25, write(tmp_path / "pairs.jsonl", GOOD_PAIR, row, GOOD_PAIR), "pairs")
    assert re.search(rf"\[{code.partition('.')[0]}\]", found) and re.search(code, found, re.DOTALL), found
    assert "pairs.jsonl:2" in found and "pairs.jsonl:1:" not in found and "pairs.jsonl:3:" not in found


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_wrong_labels(tmp_path: Path, qwen25: Path, name: str) -> None:
    row, code = WRONG_LABELS[name]
    found = refused(qwen25, write(tmp_path / "labels.jsonl", GOOD_LABEL, row, GOOD_LABEL), "labels")
    assert re.search(rf"\[{code.partition('.')[0]}\]", found) and re.search(code, found, re.DOTALL), found
    assert "labels.jsonl:2" in found


def test_wrong_rows_of_rlhf_v(tmp_path: Path, qwen25: Path, pictures: Path) -> None:
    good, _ = PAIRS["rlhf-v, text"]
    for text, code in (
        (json.dumps(without(TRIPLE, "rejected")), "[SCHEMA] {}: rejected: is missing"),
        (json.dumps(TRIPLE)[:-1], "[JSON] {}: text: not JSON"),
        ("[1]", "[SCHEMA] {}: text: is list, must be an object"),
        (json.dumps({**TRIPLE, "rejected": BETTER}), "[DPO_SAME] {}: "),
        (json.dumps(without(TRIPLE, "question")), "[SCHEMA] {}: question: is missing"),
    ):
        file = write(tmp_path / "rows.jsonl", good, {**good, "text": text})
        with pytest.raises(DataError) as caught:
            build_index(spec_of(qwen25, file, pictures, "pairs"), None)
        assert code.format(f"{file}:2") in str(caught.value)


def test_wrong_pairs_can_be_dropped(tmp_path: Path, qwen25: Path) -> None:
    rows = [GOOD_PAIR, {**GOOD_PAIR, "rejected": "yes"}, without(GOOD_PAIR, "rejected"), GOOD_PAIR]
    spec = spec_of(qwen25, write(tmp_path / "p.jsonl", *rows), tmp_path, "pairs", drop_wrong=True)
    counts = build_index(spec, None).counts()
    assert counts["train"] == 2 and counts["by_reason"] == {"DPO_SAME": 1, "SCHEMA": 1}


def test_the_limit_is_one_of_each_answer(tmp_path: Path, qwen25: Path) -> None:
    """Prompt and answer have to fit, prompt and both answers need not. Nothing is cut, whatever is asked for others."""
    words = "circle square triangle " * 20
    rows = [
        {**GOOD_PAIR, "chosen": words + "yes", "rejected": words + "no"},
        {**GOOD_PAIR, "chosen": words * 4},
        {**GOOD_PAIR, "rejected": words * 4},
    ]
    file = write(tmp_path / "p.jsonl", *rows)
    _, _, both = read(spec_of(qwen25, file, tmp_path, "pairs"))
    limit = both.longest
    assert max(len(side(both, n)) for n in (0, 1)) == limit < both.num_tokens
    for too_long in ("drop", "cut"):
        for at, trains in ((limit, 1), (limit - 1, 0)):
            table = build_index(
                spec_of(qwen25, file, tmp_path, "pairs", max_tokens=at, too_long=too_long), None
            ).table.to_pylist()
            assert [r["verdict"] for r in table] == ["train"] * trains + ["drop"] * (3 - trains)
            dropped = table[trains:]
            assert {r["reason"] for r in dropped} == {"TOO_LONG"}
            assert all(re.fullmatch(rf"\d+ tokens in its longest answer > {at}", r["detail"]) for r in dropped)
            assert [r["origin"] for r in dropped] == [f"{file}:{n}" for n in range(trains + 1, 4)]
    (first, *_) = build_index(spec_of(qwen25, file, tmp_path, "pairs", max_tokens=limit), None).table.to_pylist()
    assert first["answers"] == 2 and first["tokens"] == both.num_tokens and first["supervised"] == both.num_supervised
    assert first["chosen"] == both.supervised_of_branches[0]


# -- rows of another kind ---------------------------------------------------------------------------------------------


UNKNOWN: tuple[dict[str, Any], ...] = (
    {"text": "Once."},
    {"a": 1},
    {"chosen": "\n\nHuman: a", "rejected": "b"},
    {"branches": [[said("b")]]},
)


@pytest.mark.parametrize("row", UNKNOWN)
@pytest.mark.parametrize("compare", ["pairs", "labels"])
def test_what_has_no_layout(tmp_path: Path, qwen25: Path, compare: Compare, row: dict[str, Any]) -> None:
    found = refused(qwen25, write(tmp_path / "rows.jsonl", row), compare)
    noun = {"pairs": "answers in pairs", "labels": "labelled answers"}[compare]
    assert f"[UNKNOWN_FORMAT] {tmp_path}/rows.jsonl:1: no layout of {noun} has the keys {', '.join(row)}" in found
    assert "-> name the format" in found


def test_ordinary_rows_first(tmp_path: Path, qwen25: Path) -> None:
    """The layout is told by a row that compares nothing; the row itself is refused."""
    file = write(tmp_path / "rows.jsonl", without(GOOD_LABEL, "label"), GOOD_PAIR)
    assert f"[SCHEMA] {file}:1: chosen: is missing (found: messages)" in refused(qwen25, file, "pairs")
    with pytest.raises(DataError, match=r"\[UNKNOWN_FORMAT\].*rows of 'document' hold no answers to compare"):
        build_index(spec_of(qwen25, file, tmp_path, "pairs", format=DocumentFormat()), None)


@pytest.mark.parametrize("name", [n for n in PAIRS if not n.startswith("rlhf-v")])
def test_pairs_where_answers_are_learnt(tmp_path: Path, qwen25: Path, pictures: Path, name: str) -> None:
    """Are not taken for something else, and the remedy names the objective."""
    file = write(tmp_path / "rows.jsonl", PAIRS[name][0])
    found = refused(qwen25, file, None)
    assert f"[UNKNOWN_FORMAT] {file}:1: the row holds preferences (chosen, rejected)" in found
    assert "objective: dpo" in found and "name the format" in found


def test_pairs_are_learnt_where_the_format_is_named(tmp_path: Path, qwen25: Path) -> None:
    """The answer among the messages, that is; the two others are not looked at."""
    rows = [{**GOOD_PAIR, "messages": [asked("Who?"), said(answer)]} for answer in ("me", "you", "we")]
    file = write(tmp_path / "rows.jsonl", *rows)
    spec = spec_of(qwen25, file, tmp_path, None, format=Messages())
    assert trained_of(spec) == ["me<|im_end|>"]
    run: Callable[[Any], Any] = lambda source: runs.located(  # noqa: E731
        tmp_path / "run", qwen25, file, data={"train": source, "workers": 0}, batch={"samples": 2},
        train={"max_steps": 2},
    )  # fmt: skip
    with pytest.raises(DataError, match=r"\[UNKNOWN_FORMAT\] .*rows.jsonl:1: the row holds preferences"):
        runs.quiet_train(run(str(file)))
    losses = runs.quiet_train(run([{"path": str(file), "format": "messages"}])).summary["losses"]
    assert len(losses) == 2 and losses[1] < losses[0]


# -- prompts in common ------------------------------------------------------------------------------------------------

SHAPES = {n: family_kit.picture(*size, seed=n) for n, size in enumerate([(60, 60), (120, 40), (28, 84)])}
words = st.lists(st.sampled_from([*tiny.WORDS, "\n", "  ", "é"]), min_size=1, max_size=4).map(" ".join)
contents = st.lists(words | st.sampled_from(sorted(SHAPES)), min_size=1, max_size=3).map(
    lambda items: [SHAPES[i] if isinstance(i, int) else i for i in items]
)
exchanges = st.lists(st.tuples(contents, words), max_size=2)


@pytest.fixture(scope="module")
def kit(qwen25: Path) -> family_kit.Kit:
    return family_kit.make_kit(qwen25, lambda *_: None)


def talk(earlier: Any, question: Any, answer: str) -> Conversation:
    turns = [t for q, a in earlier for t in (("user", q), ("assistant", a))]
    whole = family_kit.chat(*turns, ("user", question), ("assistant", answer))
    flags = [False] * (len(whole.messages) - 1) + [True]
    return replace(whole, messages=tuple(replace(m, train=f) for m, f in zip(whole.messages, flags, strict=True)))


def nll_of(kit: family_kit.Kit, encoded: Encoded) -> tuple[list[float], list[float]]:
    """Of each answer the sum over its tokens, and of each supervised position."""
    row = family_kit.row_of(kit, [encoded])
    with torch.no_grad():
        at_S = family_kit.root_of(kit)(row, figures_only=True)["at"][0][:, 0]
    of = row.compared
    owner = np.zeros(len(at_S), int) if of is None else of.sequence_S
    return [float(at_S[torch.from_numpy(owner == b)].sum()) for b in range(owner.max() + 1)], at_S.tolist()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(exchanges, contents, contents, words, words, st.integers(0, 2))
def test_an_answer_is_worth_what_it_is_alone(
    kit: family_kit.Kit, earlier: Any, question: Any, other: Any, first: str, second: str, apart: int
) -> None:
    """Behind one prompt (`apart` 0), behind prompts that differ in their last turn (1) or from the start (2)."""
    sides = [talk(earlier, question, first), talk(earlier, other if apart else question, second)]
    if apart == 2:
        sides[1] = replace(sides[1], messages=(family_kit.message("system", "中文"), *sides[1].messages))
    pair = kit.encoder().encode(Sample("test", tuple(sides), preference=Preference()))
    alone = [kit.encode(side) for side in sides]
    sums, each = nll_of(kit, pair)
    expected = [nll_of(kit, side) for side in alone]
    assert sums == pytest.approx([s[0] for s, _ in expected], abs=1e-5, rel=1e-6)
    assert each == pytest.approx([x for _, e in expected for x in e], abs=1e-5)
    for n, whole in enumerate(alone):
        at = side(pair, n)
        assert pair.ids_L[at].tolist() == whole.ids_L.tolist()
        assert pair.trained_L[at].tolist() == whole.trained_L.tolist()
        assert pair.position_ids_3L[:, at].tolist() == whole.position_ids_3L.tolist()
    shared = pair.branches[0].prefix_length
    if not apart:  # all of the prompt but the token that predicts the answer, so that each picture is there once
        assert shared == int(np.flatnonzero(alone[0].trained_L)[0]) - 1 and pair.images == alone[0].images
    assert pair.num_tokens == sum(w.num_tokens for w in alone) - shared


BOTH = {"chosen": [asked(QUESTION), said("a")], "rejected": [asked(QUESTION), said("b")]}
WHOLE: dict[str, dict[str, Any]] = {
    # conversations beside their prompt
    "prompt as a text": {"prompt": QUESTION, **BOTH},
    "prompt as a turn": {"prompt": [asked(QUESTION)], **BOTH},
    "ultrafeedback": {"prompt": QUESTION, "messages": [asked(QUESTION), said("a")], **BOTH},
    "sharegpt": {"conversations": [human(QUESTION)], "chosen": [human(QUESTION), gpt("a")],
                 "rejected": [human(QUESTION), gpt("b")]},
    "alpaca": {"instruction": QUESTION, "chosen": [said("a")], "rejected": [said("b")]},
    "rlaif": {"question": QUESTION, "chosen": [said("a")], "rejected": [said("b")]},
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_a_prompt_is_there_once(tmp_path: Path, qwen25: Path, name: str) -> None:
    loader, _, encoded = read(spec_of(qwen25, write(tmp_path / "w.jsonl", WHOLE[name]), tmp_path, "pairs"))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = [expected(answer).replace(picture, "") for answer in ("a", "b")]
    assert [text_of(loader, encoded.ids_L[side(encoded, n)]) for n in (0, 1)] == texts


def test_a_conversation_with_another_prompt_than_the_row_names(tmp_path: Path, qwen25: Path) -> None:
    row = {"prompt": "Where?", "chosen": [asked("Who?"), said("a")], "rejected": [asked("Who?"), said("b")]}
    found = refused(qwen25, write(tmp_path / "w.jsonl", row), "pairs")
    assert f"[DPO_PROMPT] {tmp_path}/w.jsonl:1: chosen: is a conversation" in found
