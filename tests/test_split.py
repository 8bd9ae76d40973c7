"""Documents in pieces: where they are cut, what is trained in each, that a piece is read again as it was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tiny
from corpus.pieces import gradient, rgb_png
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from test_index import spec_of, write

from lensmith.core.encoded import IMAGE, Encoded
from lensmith.core.errors import Drop
from lensmith.core.sample import Document, Image, Sample, Text
from lensmith.data import split
from lensmith.data.encode import DocumentRules, Encoder
from lensmith.data.formats import DocumentFormat
from lensmith.data.holdout import hold_out
from lensmith.data.index import LEDGER_SCHEMA
from lensmith.data.index_build import build_index
from lensmith.data.load import LoaderSpec
from lensmith.data.pipeline import Pipeline
from lensmith.data.placement import Limits
from lensmith.data.plan import Plan
from lensmith.data.split import Cut, Splitter, UnitSize, sentence_ends, stretches
from lensmith.data.tokenizer import TextTokenizer
from lensmith.family.registry import load_family

START, END, PAD, DONE = map(tiny.token_id, ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|endoftext|>"))
HUGE = 1 << 40
SPLIT = DocumentRules()


# --- the arithmetic alone ---------------------------------------------------------------------------------------------


@st.composite
def text_sizes(draw: st.DrawFn) -> UnitSize:
    tokens = draw(st.integers(1, 40))
    borders = sorted({0, *draw(st.lists(st.integers(0, tokens - 1), max_size=40))})
    if draw(st.booleans()):
        borders = list(range(tokens))
    sentences = sorted(set(draw(st.lists(st.sampled_from(borders), max_size=4))) - {0})
    return UnitSize(tokens, 0, borders, sentences)


pictures = st.integers(3, 30).map(lambda n: UnitSize(n, 1))
unit_lists = st.lists(st.one_of(text_sizes(), pictures), min_size=1, max_size=12).map(lambda us: [*us, UnitSize(1)])


def span(units: Sequence[UnitSize], cut: Cut) -> list[tuple[int, int]]:
    """(unit, token) of each token of a piece."""
    return [
        (u, t) for u in range(cut.first, cut.last + 1) for t in range(units[u].tokens)[cut.slice(u, units[u].tokens)]
    ]


@settings(max_examples=400, deadline=None)
@given(unit_lists, st.integers(2, 48), st.integers(1, 3), st.integers(0, 20))
def test_every_token_is_new_in_one_piece(units: list[UnitSize], most: int, images: int, overlap: int) -> None:
    overlap = min(overlap, most - 1)
    cuts = list(Splitter(units, most, images, overlap).cuts())
    assert cuts == list(Splitter(units, most, images, overlap).cuts())
    everything = [(u, t) for u in range(len(units)) for t in range(units[u].tokens)]
    done = 0
    for cut in cuts:
        tokens = span(units, cut)
        new = tokens[cut.context :]
        assert new and everything[done : done + len(new)] == new, "in order, none twice, none left out"
        assert tokens[: cut.context] == everything[done - cut.context : done]
        assert cut.context <= overlap and all(units[u].is_text for u, _ in tokens[: cut.context])
        assert sum(units[u].images for u in {u for u, t in new}) <= images
        for unit in {u for u, _ in new}:
            within = [t for u, t in new if u == unit]
            if not units[unit].is_text:
                assert within == list(range(units[unit].tokens)), "never cut inside a picture"
            assert within[0] == 0 or within[0] in (units[unit].borders or ())
        if len(tokens) > most:
            assert not cut.context and len({u for u, _ in new}) == 1, "what is too long stands alone, without context"
            borders = units[new[0][0]].borders or ()
            assert not any(new[0][1] < b <= new[-1][1] for b in borders), "and cannot be cut"
        done += len(new)
    assert done == len(everything)


@settings(max_examples=300, deadline=None)
@given(unit_lists, st.integers(6, 48))
def test_the_end_is_not_alone(units: list[UnitSize], most: int) -> None:
    """Alone it would be predicted by nothing: the piece would be dropped."""
    *_, last = Splitter(units, most, 1 << 30).cuts()
    before = units[-2]
    longest = before.tokens if before.borders is None else max(np.diff([*before.borders, before.tokens]).tolist())
    assume(longest < most)
    assert len(span(units, last)) > 1


def units_of(text: str, sentences: Sequence[int]) -> UnitSize:
    return UnitSize(len(text), 0, range(len(text)), sentences)


def test_where_it_is_cut_by_hand() -> None:
    one = UnitSize(100, 0, range(100), [30, 55, 70])
    end = UnitSize(1)

    def spans(units: list[UnitSize], most: int, overlap: int = 0) -> list[tuple[int, int, int, int, int]]:
        found = Splitter(units, most, 99, overlap).cuts()
        return [(c.first, c.start, c.last, c.stop, c.context) for c in found]

    # the last sentence in (20, 40] is at 30, in (50, 70] at 70; the remaining 30 tokens and the end fit
    assert spans([one, end], 40) == [(0, 0, 0, 30, 0), (0, 30, 0, 70, 0), (0, 70, 1, 1, 0)]
    # none in (22, 45]: 30; none in (52, 75] but 55 and 70: 70
    assert spans([one, end], 45) == [(0, 0, 0, 30, 0), (0, 30, 0, 70, 0), (0, 70, 1, 1, 0)]
    # none in (14, 28]: at the last token that fits; then (42, 56]: 55; (69, 83]: 70; (84, 98]: 98
    assert spans([one, end], 28)[:4] == [(0, 0, 0, 28, 0), (0, 28, 0, 55, 0), (0, 55, 0, 70, 0), (0, 70, 0, 98, 0)]
    # with 10 tokens of context there is room for 30: sentences in (15, 30] after 40 - 10
    assert spans([one, end], 40, 10)[:2] == [(0, 0, 0, 30, 0), (0, 20, 0, 55, 10)]
    # a text that does not fit any more but fits a piece of its own: the border, pictures before it go along
    picture, text = UnitSize(10, 1), UnitSize(30, 0, range(30))
    assert spans([text, picture, text, end], 45) == [(0, 0, 0, 30, 0), (1, 0, 3, 1, 0)]
    # the picture does not fit with it
    assert spans([text, picture, text, end], 40) == [(0, 0, 1, 10, 0), (2, 0, 3, 1, 0)]
    # 31 tokens with the end
    assert spans([text, picture, text, end], 30)[1:] == [(1, 0, 2, 20, 0), (2, 20, 3, 1, 0)]
    # a text that just fits leaves its last token to the end
    assert spans([UnitSize(40, 0, range(40)), end], 40) == [(0, 0, 0, 39, 0), (0, 39, 1, 1, 0)]
    assert spans([picture, UnitSize(50, 1), picture, end], 21) == [
        (0, 0, 0, 10, 0), (1, 0, 1, 50, 0), (2, 0, 3, 1, 0)
    ]  # fmt: skip


def test_sentences_begin_where_a_reader_says() -> None:
    text = 'One. Two! "Three?" Four... Five 3.14 e.g.x\nSix。七！End.'
    begins = sorted(sentence_ends(text))
    parts = [text[a:b] for a, b in zip([0, *begins], [*begins, len(text)], strict=True)]
    assert parts == ["One.", " Two!", ' "Three?"', " Four...", " Five 3.14 e.g.x\n", "Six。", "七！", "End."]


# --- documents --------------------------------------------------------------------------------------------------------


class Counting(TextTokenizer):
    calls = 0
    characters = 0

    def plain(self, text: str, stands: Any = "front") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.calls += 1
        self.characters += len(text)
        return super().plain(text, stands)


@pytest.fixture(scope="module")
def tokenizer() -> Counting:
    return Counting(tiny.tokenizer_json())


@pytest.fixture(scope="module")
def family(qwen25: Path) -> Any:
    return load_family(qwen25)


def encoder_of(family: Any, tokenizer: TextTokenizer, most: int, rules: DocumentRules = SPLIT) -> Encoder:
    def size(image: Image) -> tuple[int, int]:
        width, height = str(image.path).split("x")
        return int(width), int(height)

    return Encoder(family, tokenizer, size, most, "drop", rules)


words = st.sampled_from(
    ["a", "red", "circle.", "Is", "there?", " ", "  ", "\n", "\n\n", "\r\n", "中文图片。", "日本", "é", "e\u0301",
     "\u0301", "👩‍👩‍👧", "😀", "🇩🇪", "x" * 30, "3.14", "...", "!", '"', "\t", "\u00a0", "\u3000", "\x1c", "\x85",
     "don't", "<|endoftext|>", "<|image_pad|>", "क्षि", "ﷺ", "가"]
)  # fmt: skip
texts = st.one_of(
    st.lists(words, min_size=1, max_size=40).map(" ".join),
    st.lists(words, min_size=1, max_size=40).map("".join),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
)
parts = st.one_of(
    st.builds(Text, texts, st.sampled_from([None, True, False])),
    st.builds(lambda w, h: Image(path=f"{w}x{h}"), st.integers(28, 220), st.integers(28, 220)),
)
documents = st.lists(parts, min_size=1, max_size=8).map(lambda ps: Sample("t:1", Document(tuple(ps))))


def whole_of(encoder: Encoder, sample: Sample) -> Encoded:
    """Without a limit, also on targets."""
    assert isinstance(sample.content, Document)
    return replace(encoder, max_tokens=HUGE)._document(sample.content)


def again(encoder: Encoder, sample: Sample, cut: Cut | None) -> Encoded | Drop:
    try:
        return encoder.encode(sample, cut)
    except Drop as drop:
        return drop


def unchecked(encoder: Encoder, sample: Sample, cut: Cut) -> Encoded:
    """The piece even where it would be dropped."""
    units = [encoder._tokens(u) for u in encoder._units(sample.content)]  # type: ignore[arg-type]
    return encoder._cut(units, cut)


def same(one: Encoded, other: Encoded) -> bool:
    arrays = ("ids_L", "trained_L", "kind_L", "position_ids_3L")
    rest = (one.segments, one.images, one.num_answers) == (other.segments, other.images, other.num_answers)
    return rest and all(np.array_equal(getattr(one, a), getattr(other, a)) for a in arrays)


@settings(max_examples=200, deadline=None)
@given(documents, st.integers(4, 160), st.integers(0, 24), st.integers(1, 3))
@example(Sample("t:1", Document((Text("a" * 40), Image(path="60x60"), Text("b", False)))), 12, 4, 1)
def test_pieces_are_the_document(
    family: Any, tokenizer: Counting, sample: Sample, most: int, overlap: int, images: int
) -> None:
    overlap = min(overlap, most // 2)
    encoder = encoder_of(family, tokenizer, most, DocumentRules(overlap=overlap, max_images=images))
    whole = whole_of(encoder, sample)
    if whole.num_tokens <= most and len(sample.media()) <= images:
        if whole.num_supervised:
            ((cut, found),) = encoder.pieces(sample)
            assert cut is None and isinstance(found, Encoded) and same(found, whole)
            assert same(found, encoder.encode(sample))
        else:
            with pytest.raises(Drop, match="NO_TARGETS"):
                encoder.pieces(sample)
        return
    pieces = encoder.pieces(sample)
    at = 0
    for cut, measured in pieces:
        assert cut is not None
        found = unchecked(encoder, sample, cut)
        end = at + found.num_tokens - cut.context
        # (a) joined they are the document, trained as there; (f) what is repeated is the text before, untrained
        assert np.array_equal(found.ids_L, whole.ids_L[at - cut.context : end])
        assert np.array_equal(found.kind_L, whole.kind_L[at - cut.context : end])
        assert np.array_equal(found.trained_L[cut.context :], whole.trained_L[at:end])
        assert cut.context <= overlap and not found.trained_L[: cut.context].any()
        assert not np.isin(found.ids_L[: cut.context], [START, END, DONE]).any()
        assert end > at
        # (c) (d) pictures whole and never trained, with positions as in a sample of their own
        assert (found.kind_L == IMAGE).sum() == sum(b.num_tokens for b in found.images)
        starts = np.flatnonzero((found.ids_L == START) & (np.append(found.kind_L[1:], 0) == IMAGE))
        ends = [int(s) + 1 + b.num_tokens for s, b in zip(starts, found.images, strict=True)]
        assert (found.ids_L[ends] == END).all() and len(found.images) <= images
        assert not found.trained_L[np.isin(found.ids_L, [START, END, PAD])].any()
        assert np.array_equal(found.position_ids_3L, family.positions(found.kind_L, found.images))
        # (b) (e) not too long, and read again as it was measured
        if isinstance(measured, Encoded):
            assert found.num_tokens <= most and same(measured, found) and measured.num_supervised
            assert same(encoder.encode(sample, cut), measured)
        else:
            assert measured.reason == ("TOO_LONG" if found.num_tokens > most else "NO_TARGETS")
            assert found.num_tokens > most or not found.num_supervised
            reread = again(encoder, sample, cut)
            assert isinstance(reread, Drop) and str(reread) == str(measured)
        if found.num_tokens > most:
            uncut = len(found.images) == 1 or len(tokenizer.decode(found.ids_L.tolist()).strip("\ufffd")) <= 1
            assert cut.context == 0 and uncut
        at = end
    assert at == whole.num_tokens
    blocks = [b for cut, _ in pieces if cut is not None for b in unchecked(encoder, sample, cut).images]
    assert blocks == list(whole.images)
    assert (whole.ids_L == DONE).sum() == 1 and whole.ids_L[-1] == DONE
    last_text = [p for p in sample.parts() if isinstance(p, Text)][-1:]
    assert bool(whole.trained_L[-1]) == (not last_text or last_text[0].train is not False)
    repeated = encoder.pieces(sample)
    assert [c for c, _ in repeated] == [c for c, _ in pieces]


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=20, max_size=120).map(" ".join), st.integers(8, 60), st.integers(0, 6))
def test_text_is_cut_at_a_sentence_where_there_is_one(
    family: Any, tokenizer: Counting, text: str, most: int, overlap: int
) -> None:
    encoder = encoder_of(family, tokenizer, most, DocumentRules(overlap=overlap))
    _, starts, begins = tokenizer.plain(text)
    whole = np.flatnonzero(begins).tolist()
    sentences = [i for i in whole if int(starts[i]) in sentence_ends(text)]
    begin = 0
    for cut, _ in encoder.pieces(Sample("t:1", Document((Text(text),)))):
        if cut is None or cut.last:
            break
        room = most - cut.context
        near = [s for s in sentences if begin + room // 2 < s <= begin + room]
        fitting = [b for b in whole if begin < b <= begin + room]
        assert cut.stop == (near[-1] if near else fitting[-1] if fitting else cut.stop)
        begin = cut.stop


@settings(max_examples=200, deadline=None)
@given(st.lists(text_sizes(), min_size=2, max_size=6), st.integers(4, 60), st.lists(st.booleans(), min_size=6))
def test_a_sentence_in_an_earlier_stretch_counts(units: list[UnitSize], most: int, ends: list[bool]) -> None:
    """A text in stretches is cut where it would be in one."""
    units = [
        replace(u, sentences=[*u.sentences, u.tokens] if e else u.sentences) for u, e in zip(units, ends, strict=False)
    ]
    starts = np.cumsum([0, *(u.tokens for u in units)]).tolist()
    borders = [s + b for s, u in zip(starts, units, strict=False) for b in u.borders or ()]
    sentences = sorted({s + b for s, u in zip(starts, units, strict=False) for b in u.sentences} - {starts[-1]})
    assume(max(np.diff([*borders, starts[-1]]).tolist()) < most)
    whole = [UnitSize(starts[-1], 0, borders, sentences), UnitSize(1)]
    pieces = [[*units, UnitSize(1)], whole]
    ends_of = [
        [
            ([*starts, 0][c.last] if us is not whole else c.last * starts[-1]) + c.stop
            for c in Splitter(us, most, 1).cuts()
        ]
        for us in pieces
    ]
    assert ends_of[0] == ends_of[1]


@settings(max_examples=150, deadline=None)
@given(st.text("ab 中文😀é\n.", min_size=30, max_size=120), st.integers(6, 30))
def test_no_character_is_cut(family: Any, tokenizer: Counting, text: str, most: int) -> None:
    encoder = encoder_of(family, tokenizer, most)
    for cut, _ in encoder.pieces(Sample("t:1", Document((Text(text),)))):
        if cut is not None:
            found = unchecked(encoder, Sample("t:1", Document((Text(text),))), cut)
            assert "\ufffd" not in tokenizer.decode(found.ids_L.tolist())


def test_untrained_pieces_are_dropped_and_the_rest_trains(family: Any, tokenizer: Counting) -> None:
    texts = (Text("red circle. " * 30, False), Text("blue square. " * 30), Text("no. " * 30, False))
    encoder = encoder_of(family, tokenizer, 40)
    found = [e for _, e in encoder.pieces(Sample("t:1", Document(texts)))]
    assert {e.reason for e in found if isinstance(e, Drop)} == {"NO_TARGETS"}
    trained = sum(int(e.trained_L.sum()) for e in found if isinstance(e, Encoded))
    assert trained == whole_of(encoder, Sample("t:1", Document(texts))).trained_L.sum()
    assert isinstance(found[0], Drop) and isinstance(found[-1], Drop)


# --- stretches --------------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(texts, st.integers(8, 40))
def test_stretches_cover_a_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "STRETCH", size)
        found = list(stretches(text))
    assert found[0][0] == 0 and found[-1][1] == len(text)
    assert all(a[1] == b[0] for a, b in pairwise(found))
    assert all(0 < b - a <= size for a, b in found)


plain_words = st.sampled_from(
    ["a", "red", "circle.", "Is", "there?", "中文图片。", "e\u0301", "😀", "don't", "3.14", "(x)", "'s"]
)
plain_texts = st.lists(st.tuples(plain_words, st.sampled_from([" ", " ", " ", "\n"])), min_size=10, max_size=80).map(
    lambda pairs: "".join(w + s for w, s in pairs)
)


@settings(max_examples=200, deadline=None)
@given(plain_texts, st.integers(24, 60))
def test_stretches_keep_the_tokens(tokenizer: Counting, text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "STRETCH", size)
        found = list(stretches(text))
    joined = np.concatenate([tokenizer.plain(text[a:b])[0] for a, b in found])
    assert joined.tolist() == tokenizer.plain(text)[0].tolist()


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(8, 60))
def test_where_there_is_a_border_stretches_keep_the_tokens(tokenizer: Counting, text: str, size: int) -> None:
    """Whatever characters stand around: a cut that a line or a space allowed changes no token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "STRETCH", size)
        found = list(stretches(text))
    behind = [text[e - 1] == "\n" and not text[e].isspace() for _, e in found[:-1]]
    before = [text[e] == " " and not text[e - 1].isspace() and not text[e + 1 :][:1].isspace() for _, e in found[:-1]]
    if all(a or b for a, b in zip(behind, before, strict=True)):
        joined = np.concatenate([tokenizer.plain(text[a:b])[0] for a, b in found])
        assert joined.tolist() == tokenizer.plain(text)[0].tolist()


@settings(max_examples=100, deadline=None)
@given(documents, st.integers(8, 30), st.integers(6, 60), st.integers(0, 6))
def test_pieces_over_stretches(
    family: Any, tokenizer: Counting, sample: Sample, size: int, most: int, overlap: int
) -> None:
    """The whole is what its stretches are: the same properties hold wherever a text is divided."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split, "STRETCH", size)
        encoder = encoder_of(family, tokenizer, most, DocumentRules(overlap=overlap))
        whole = whole_of(encoder, sample)
        if whole.num_tokens <= most:
            return
        at = 0
        for cut, measured in encoder.pieces(sample):
            assert cut is not None
            found = unchecked(encoder, sample, cut)
            end = at + found.num_tokens - cut.context
            assert np.array_equal(found.ids_L, whole.ids_L[at - cut.context : end]) and end > at
            assert np.array_equal(found.trained_L[cut.context :], whole.trained_L[at:end])
            reread = again(encoder, sample, cut)
            if isinstance(measured, Drop):
                assert str(reread) == str(measured)
            else:
                assert isinstance(reread, Encoded) and same(reread, measured)
            at = end
        assert at == whole.num_tokens


LINE = "the red circle is there and the blue square is not. "


@pytest.mark.parametrize(
    "text", [LINE * 80_000, (LINE * 3 + "\n") * 27_000, "x" * 4_000_000], ids=["line", "lines", "x"]
)
def test_a_piece_of_a_long_document_costs_its_own_stretches(family: Any, text: str) -> None:
    """4 MB: a piece is read from the stretches that it touches, of 8 to 16 Ki characters each."""
    assert len(text) >= 4_000_000
    tokenizer = Counting(tiny.tokenizer_json())
    encoder = encoder_of(family, tokenizer, 4096)
    sample = Sample("t:1", Document((Text(text),)))
    sizes = [b - a for a, b in stretches(text)]
    assert max(sizes) <= split.STRETCH and sum(sizes) == len(text) and min(sizes[:-1]) >= split.STRETCH // 2
    middle, places = len(sizes) // 2, list(stretches(text))
    num_tokens = len(tokenizer.plain(text[slice(*places[middle])])[0])
    for cut in (Cut(0, 0, 0, 1000), Cut(middle, 800, middle, 1800), Cut(middle, num_tokens - 900, middle + 1, 100)):
        tokenizer.calls = tokenizer.characters = 0
        found = encoder.encode(sample, cut)
        assert tokenizer.calls == cut.last - cut.first + 1
        assert tokenizer.characters == sum(sizes[cut.first : cut.last + 1])
        assert found.num_tokens == 1000


# --- from file to row -------------------------------------------------------------------------------------------------


def sentence(number: int) -> str:
    return f"The {['red', 'blue', 'green'][number % 3]} circle number {number} is there. "


@pytest.fixture
def spec(tmp_path: Path, qwen25: Path) -> LoaderSpec:
    for name, side in (("a.png", 60), ("b.png", 90), ("huge.png", 500)):
        (tmp_path / name).write_bytes(rgb_png(gradient(side, side)))
    rows = [
        {"text": "a short one.", "id": "short"},
        {"text": "".join(map(sentence, range(40))), "id": "long"},
        {
            "text": "<image>" + "".join(map(sentence, range(20))) + "<image>" + sentence(3) * 9,
            "images": ["a.png", "b.png"],
        },
        {
            "parts": [
                {"type": "text", "text": sentence(1) * 9, "train": False},
                {"type": "text", "text": sentence(2) * 9},
            ]
        },
        {"text": sentence(5) * 9 + "<image>" + sentence(6) * 9, "images": ["gone.png"]},
        {"text": sentence(5) * 9 + "<image>" + sentence(6) * 9, "images": ["huge.png"]},
    ]
    spec = spec_of(qwen25, write(tmp_path / "x.jsonl", *rows), max_tokens=60)
    file = replace(spec.files[0], format=DocumentFormat(), shown="x.jsonl")
    return replace(spec, files=(file,), documents=DocumentRules(overlap=8))


def test_documents_from_file_to_row(spec: LoaderSpec, tmp_path: Path) -> None:
    index = build_index(spec, tmp_path / "cache")
    loader = spec.build()
    refs = list(spec.open(0).scan())
    read = index.table.select(["row", "piece", "pieces", "origin", "verdict", "reason"]).to_pylist()
    for row in read:
        several = f"[{row['piece'] + 1}/{row['pieces']}]" if row["pieces"] > 1 else ""
        assert row["origin"] == f"x.jsonl:{row['row'] + 1}{several}"
    assert "x.jsonl:3[2/" in " ".join(r["origin"] for r in read)
    for number in range(6):
        own = [r for r in read if r["row"] == number]
        assert [r["piece"] for r in own] == list(range(len(own))) and {r["pieces"] for r in own} == {len(own)}
    reasons = [{r["reason"] for r in read if r["row"] == n} for n in range(6)]
    assert reasons == [{None}, {None}, {None}, {None, "NO_TARGETS"}, {"IMG_MISSING"}, {None, "TOO_LONG"}]

    plan = Plan(len(index.trainable), seed=1, samples=4, partial="carry", epochs=1)
    pipeline = Pipeline(index, plan, Limits(400))
    targets: dict[int, np.ndarray] = {}
    for step in pipeline.steps():
        assert not step.dropped
        for row in step.rows:
            at = 0
            for member in row.members:
                ref = index.ref(member)
                encoded = loader.encode(0, loader.sample(0, ref.row), ref.cut)
                assert np.array_equal(row.ids_T[at : at + encoded.num_tokens], encoded.ids_L)
                targets[member] = row.target_S[row.sample_S == member]
                assert np.array_equal(targets[member], encoded.target_L[encoded.target_L != -100])
                assert len(targets[member]) == index.column("supervised")[member]
                at += encoded.num_tokens
            assert at == row.num_tokens
    assert sorted(targets) == list(range(len(index.trainable)))
    for number in (1, 2):
        sample = loader.sample(0, refs[number])
        whole = whole_of(loader.encoder(0, sample.origin), sample)
        joined: list[int] = []
        for member in np.flatnonzero(index.column("row") == number).tolist():
            cut = index.ref(member).cut
            assert cut is not None
            encoded = loader.encode(0, sample, cut)
            trained = encoded.ids_L[encoded.trained_L].tolist()
            unpredicted = int(encoded.trained_L[0])
            assert unpredicted == 0 or cut.context == 0
            assert targets[member].tolist() == trained[unpredicted:]
            joined += trained
        assert joined == whole.ids_L[whole.trained_L].tolist() and joined[-1] == DONE


def test_digests_tell_pieces_apart_and_stay(spec: LoaderSpec, tmp_path: Path) -> None:
    one, two = (build_index(spec, None).column("digest").tolist() for _ in range(2))
    assert one == two and len(set(one)) == len(one)
    path = Path(spec.files[0].path)
    lines = path.read_text(encoding="utf-8").splitlines()
    data = json.loads(lines[1]) | {"id": "copy"}
    path.write_text("\n".join([json.dumps(data), *lines]), encoding="utf-8")
    index = build_index(spec, None)
    digests = index.column("digest").tolist()
    copies = [d for d, r in zip(digests, index.column("row").tolist(), strict=True) if r == 0]
    originals = [d for d, r in zip(digests, index.column("row").tolist(), strict=True) if r == 2]
    assert copies == originals and set(one) == set(digests)


def test_the_ledger_counts_pieces(spec: LoaderSpec, tmp_path: Path) -> None:
    index = build_index(spec, None)
    counts = index.counts()
    ledger = pa.Table.from_batches(index.ledger(), LEDGER_SCHEMA)
    assert counts["rows"] == 6 < counts["read"] == ledger.num_rows == counts["train"] + counts["dropped"]
    assert counts["dropped"] == sum(counts["by_reason"].values()) and set(counts["by_reason"]) == {
        "IMG_MISSING", "NO_TARGETS", "TOO_LONG"
    }  # fmt: skip
    verdicts = ledger["verdict"].to_pylist()
    assert verdicts.count("train") == counts["train"]
    ids = index.table.filter(pa.compute.equal(index.table["row"], 1)).select(["id", "id_hash", "piece"]).to_pylist()
    assert all(r["id"] == "long" and (r["id_hash"] != 0) == (r["piece"] == 0) for r in ids)


def test_pieces_of_one_document_stay_on_one_side(spec: LoaderSpec, tmp_path: Path) -> None:
    rows = [{"text": "".join(map(sentence, range(n, n + 20)))} for n in range(60)]
    rows += [{"parts": [{"type": "text", "text": sentence(n) * 9, "train": False},
                        {"type": "text", "text": sentence(n) * 9}]} for n in range(40)]  # fmt: skip
    path = write(tmp_path / "many.jsonl", *rows)
    index = build_index(replace(spec, files=(replace(spec.files[0], path=str(path)),)), None)
    train, held = hold_out(index, 0.5, 3)
    sides = [set(side.table["row"].to_pylist()) for side in (train, held)]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(range(100))
    assert all(len([r for r in side if r < 60]) > 15 for side in sides)
    assert all(len([r for r in side if r >= 60]) > 8 for side in sides), "documents with a dropped piece are no group"
    assert hold_out(index, 0.5, 3)[1].table.equals(held.table)


def test_one_mended_picture_measures_all_pieces_again(spec: LoaderSpec, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = build_index(spec, cache)
    (tmp_path / "b.png").write_bytes(rgb_png(gradient(200, 60)))
    (tmp_path / "gone.png").write_bytes(rgb_png(gradient(60, 60)))
    mended = build_index(spec, cache)
    assert mended.table.equals(build_index(spec, None).table) and not mended.table.equals(first.table)
    assert "IMG_MISSING" not in mended.counts()["by_reason"]
    assert build_index(spec, cache).table.equals(mended.table)


def test_no_piece_begins_inside_a_character(family: Any) -> None:
    """A token may hold a space and the first byte of the letter behind it: the token after it is no border."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer: Any = Tokenizer(models.BPE({"a": 0, "Ġ": 1, "Ã": 2, "©": 3, "ĠÃ": 4}, [("Ġ", "Ã")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    ids, starts, begins = TextTokenizer(tokenizer.to_str()).plain("a é é")
    assert ids.tolist() == [0, 4, 3, 4, 3] and starts[begins].tolist() == [0, 1, 3]
    assert begins.tolist() == [True, True, False, True, False]
