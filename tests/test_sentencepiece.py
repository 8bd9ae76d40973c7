"""`tokenizer.model` read without SentencePiece, against its algorithm as `reference_minicpm.encode` writes it.

Against sentencepiece 0.2.3 itself, on models trained with and without a space in front, fewer spaces and nmt_nfkc, 600
random texts each came out equal (typed control pieces apart); it is not needed to run these tests.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reference_minicpm as reference
import tiny
import tiny_minicpm
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_minicpm import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED

from lensmith.core.errors import ModelError
from lensmith.data.sentencepiece import message, to_json
from lensmith.data.tokenizer import TextTokenizer, tokenizer_text, with_tokens

TEXTS = st.text(
    st.sampled_from("abehilnrstuw <>\n.?描用户AI😀é\u0301\t")
    | st.characters(exclude_characters=SPACE, exclude_categories=["Cs"]),
    max_size=30,
)


def tokenizer(**rules: bool) -> TextTokenizer:
    return TextTokenizer(to_json(tiny_minicpm.tokenizer_model(**rules), {}, "here"))


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "in_front"])
def both(request: pytest.FixtureRequest) -> tuple[TextTokenizer, bool]:
    return tokenizer(in_front=request.param), request.param


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_ids_are_sentencepieces(both: tuple[TextTokenizer, bool], text: str) -> None:
    own, in_front = both
    ids = own.plain(text)[0].tolist()
    assert ids == (reference.encode(text, tiny_minicpm.pieces(), in_front=in_front) if text else [])
    assert own.decode(ids) == text


def test_texts_of_the_data(both: tuple[TextTokenizer, bool]) -> None:
    own, in_front = both
    for text in (*tiny.TEXTS[:2], "<用户> what is it?\nyes<AI> a.b..c  ", "  a", "\n\n"):
        ids, starts, whole = own.plain(text)
        assert ids.tolist() == reference.encode(text, tiny_minicpm.pieces(), in_front=in_front)
        assert own.decode(ids.tolist()) == text
        assert starts[0] == 0 and (starts[1:] >= starts[:-1]).all() and whole[0]


def test_characters_of_their_own_never_merge() -> None:
    found = (("<unk>", 0.0, UNKNOWN), (".", 0.0, USER_DEFINED), ("a", -3.0, NORMAL), ("aa", -1.0, NORMAL),
             (".a", 0.0, NORMAL), ("<x>", 0.0, USER_DEFINED), ("aaa", -2.0, NORMAL))  # fmt: skip
    own = TextTokenizer(to_json(tiny_minicpm.tokenizer_model(found), {}, "here"))
    assert own.plain("aa.aaaa")[0].tolist() == [3, 1, 3, 3]
    assert own.plain("aaa.a")[0].tolist() == [6, 1, 2]
    assert own.added == {"<unk>": 0, "<x>": 5} and "." not in own.added


def test_the_better_score_goes_first() -> None:
    """abc: by place ab would be joined first, by score bc is."""
    found = (("<unk>", 0.0, UNKNOWN), ("a", -9.0, NORMAL), ("b", -9.0, NORMAL), ("c", -9.0, NORMAL),
             ("ab", -2.0, NORMAL), ("bc", -1.0, NORMAL))  # fmt: skip
    own = TextTokenizer(to_json(tiny_minicpm.tokenizer_model(found), {}, "here"))
    assert own.plain("abc")[0].tolist() == [1, 5]


def test_fewer_spaces() -> None:
    own = tokenizer(fewer_spaces=True)
    assert own.plain("  a   red  ")[0].tolist() == tokenizer().plain("a red")[0].tolist()
    assert own.plain(" a\n \n")[0].tolist() == tokenizer().plain("a\n \n")[0].tolist()


def test_bytes_stand_for_what_has_no_piece() -> None:
    own = tokenizer()
    ids = own.plain("\u2603")[0].tolist()
    assert [tiny_minicpm.pieces()[i] for i in ids] == [(f"<0x{b:02X}>", 0.0, BYTE) for b in "\u2603".encode()]


def test_added_tokens_of_the_settings() -> None:
    added = {3: {"content": "\n", "special": False}, 900: {"content": "<more>", "special": True}}
    own = TextTokenizer(to_json(tiny_minicpm.tokenizer_model(), added, "here"))
    assert own.control("<more>") == 900 and own.num_ids == 901
    assert {"<s>", "</s>", "<image>", "</slice>"} <= own.added.keys()
    assert all(kind in (UNKNOWN, CONTROL, USER_DEFINED) for text, _, kind in tiny_minicpm.pieces() if text in own.added)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "not a SentencePiece model"),
        (b"\x0a\xff\xff\xff\x7f", "cut short"),
        (b"\x0a", "cut short"),
        (b"", "byte-pair encoding"),
        (tiny_minicpm.tokenizer_model(kind=1), "byte-pair encoding"),
    ],
    ids=["lfs", "long", "short", "empty", "unigram"],
)
def test_other_files_are_refused(data: bytes, match: str) -> None:
    with pytest.raises(ModelError, match=rf"\[TOKENIZER\] here: .*{match}"):
        to_json(data, {}, "here")


def test_messages() -> None:
    assert list(message(b"\x08\x96\x01\x12\x02ab\x1d\x00\x00\x80?")) == [(1, 150), (2, b"ab"), (3, b"\x00\x00\x80?")]


# -- which file of a folder counts --------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`tokenizer.model`, and a `tokenizer.json` beside it that puts a space in front."""
    (tmp_path / "tokenizer.model").write_bytes(tiny_minicpm.tokenizer_model())
    fast = to_json(tiny_minicpm.tokenizer_model(in_front=True), {}, "here")
    (tmp_path / "tokenizer.json").write_text(fast, encoding="utf-8")
    return tmp_path


def in_front(folder: Path) -> bool:
    ids = TextTokenizer.from_folder(folder).plain("<")[0]
    return tiny_minicpm.pieces()[ids[0]][0].startswith(SPACE)


def test_a_slow_tokenizer_reads_the_model_file(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    assert in_front(folder)
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.Slow", "a.Fast"]}}))
    assert in_front(folder)
    settings.write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.Slow", None]}}))
    assert not in_front(folder)
    fast = folder / "tokenizer.json"
    fast.write_text(with_tokens(fast.read_text(encoding="utf-8"), ["<new>"]), encoding="utf-8")
    assert in_front(folder) and tokenizer_text(folder) == fast.read_text(encoding="utf-8")
    fast.unlink()
    assert not in_front(folder)


def test_broken_settings_and_no_tokenizer(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"MODEL_FILE.*tokenizer_config\.json"):
        tokenizer_text(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"TOKENIZER.*nor tokenizer\.model"):
        tokenizer_text(tmp_path / "empty")
