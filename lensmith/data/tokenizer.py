"""Text to ids, with a hard border between text and control tokens.

The vendor's tokenizer turns `<|im_end|>` typed by a user into the control token of that name (measured; also with
`add_special_tokens=False`). Here text runs through a copy of the tokenizer that knows no added token at all, and
control tokens are placed only by the family's rendering. Between control tokens, neighbouring texts form one run, so
tokens merge across the border of template and content exactly as they do in the vendor's chat template.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer

from lensmith.core.errors import ModelError
from lensmith.data import sentencepiece

SHORT, SHORT_TEXTS = 48, 4096
"""Texts up to so many characters are remembered: most runs between control tokens are the template's own."""


Stands = Literal["front", "run", "inside"]
"""Where a text stands: at the very beginning, behind a control token or a picture, or as the rest of a text that is
tokenised in stretches. Tokenizers of SentencePiece's kind put a space in front of the first, or of the first two."""


def _without_space_in_front(parsed: dict[str, Any]) -> tuple[Literal["never", "first", "always"], dict[str, Any]]:
    """Where a tokenizer puts a space in front of text, and the same tokenizer without it.

    `tokenizer.json` has it as a `Prepend` normalizer, or as `prepend_scheme` or `add_prefix_space` of a pre-tokenizer.
    """
    bare = copy.deepcopy(parsed)
    found: Literal["never", "first", "always"] = "never"
    for key, inside in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = bare.get(key) or {}
        listed = step.get(inside, [step]) if step.get("type") == "Sequence" else [step]
        for part in listed:
            if part.get("type") == "Metaspace":
                found = part.get("prepend_scheme") or ("always" if part.get("add_prefix_space", True) else "never")
                part["prepend_scheme"] = "never"
                part.pop("add_prefix_space", None)
            elif part.get("type") == "ByteLevel" and part.get("add_prefix_space"):
                found, part["add_prefix_space"] = "always", False
        if any(part.get("type") == "Prepend" for part in listed):
            found = "always"
            kept = [part for part in listed if part.get("type") != "Prepend"]
            bare[key] = {"type": "Sequence", inside: kept} if kept else None
    return found, bare


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def with_tokens(file_json: str, tokens: Sequence[str]) -> str:
    """`tokenizer.json` text with `tokens` added behind its last id. Tokens it has already are kept."""
    tokenizer = Tokenizer.from_str(file_json)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
    return tokenizer.to_str()


def tokenizer_text(folder: Path) -> str:
    """The tokenizer of a model folder as `tokenizer.json` text. Raises `ModelError` when there is none.

    Where the vendor's class is a slow one only (`auto_map` says so), it reads `tokenizer.model`, and so it is done
    here: a `tokenizer.json` beside it may have other rules for spaces. If that has more tokens, some were added and
    saved, and it is the one.
    """
    file, model = folder / "tokenizer.json", folder / "tokenizer.model"
    text = file.read_text(encoding="utf-8") if file.is_file() else None
    settings = _settings(folder / "tokenizer_config.json") if model.is_file() else {}
    named = (settings.get("auto_map") or {}).get("AutoTokenizer")
    slow_only = isinstance(named, list) and named[1:] == [None]
    if model.is_file() and (text is None or slow_only):
        added = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
        own = sentencepiece.to_json(model.read_bytes(), added, str(model))
        if text is None or TextTokenizer(text).num_ids <= TextTokenizer(own).num_ids:
            return own
    if text is not None:
        return text
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False).backend_tokenizer.to_str()
    raise ModelError("TOKENIZER", "no tokenizer.json (nor tokenizer.model, nor vocab.json and merges.txt)",
                     where=str(folder))  # fmt: skip


def _settings(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ModelError("MODEL_FILE", f"not JSON: {error}", where=str(file)) from None


class TextTokenizer:
    """Wraps `tokenizer.json`. Not shared between processes: each worker loads its own."""

    def __init__(self, file_json: str, text_tokens: Sequence[str] = ()):
        """`text_tokens` are added tokens that data may contain as tokens (`model.add_tokens`, and those of the family);
        names that this tokenizer lacks are passed over.

        Raises `ModelError` when this is no `tokenizer.json` that the tokenizers library can read.
        """
        try:
            parsed = json.loads(file_json)
            self._full = Tokenizer.from_str(file_json)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            raise ModelError("TOKENIZER", f"not a tokenizer.json: {error}") from None
        self.added: dict[str, int] = {t["content"]: t["id"] for t in parsed.get("added_tokens", [])}
        self.text_tokens = frozenset(text_tokens) & self.added.keys()
        self._border = _any_of(self.added.keys() - self.text_tokens)
        self._text_border = _any_of(self.text_tokens)
        parsed["added_tokens"] = []
        parsed["truncation"] = parsed["padding"] = parsed["post_processor"] = None
        self._plain = Tokenizer.from_str(json.dumps(parsed))
        self._spaces, bare = _without_space_in_front(parsed)
        self._bare = self._plain if self._spaces == "never" else Tokenizer.from_str(json.dumps(bare))
        self._short: dict[tuple[str, bool], tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self.num_ids = max([self._plain.get_vocab_size(with_added_tokens=False), *(i + 1 for i in self.added.values())])

    @staticmethod
    def from_folder(folder: Path) -> TextTokenizer:
        return TextTokenizer(tokenizer_text(folder))

    @cached_property
    def longest_token(self) -> int:
        """Characters that one token can stand for at most (a byte-level token of n bytes has n characters here)."""
        return max(map(len, self._full.get_vocab()))

    def control(self, token: str) -> int:
        """The id of a control token. Raises `ModelError` when this tokenizer has none of that name."""
        try:
            return self.added[token]
        except KeyError:
            raise ModelError("TOKENIZER", f"the tokenizer has no control token {token!r}") from None

    def split_controls(self, text: str) -> list[tuple[str, int | None]]:
        """Template text in order: (text, None) for plain stretches, (name, id) for control tokens."""
        found = [t for t in self._border.split(text) if t] if self._border else [text]
        return [(t, None if t in self.text_tokens else self.added.get(t)) for t in found]

    def plain(self, text: str, stands: Stands = "front") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids [n], where each token begins in characters of `text` [n], and whether it begins with a whole character
        (bool [n]; byte-level tokens may begin inside one). No text becomes a control token."""
        space = self._space_in_front(stands)
        if len(text) > SHORT:
            return self._plain_ids(text, space)
        if (text, space) not in self._short:
            if len(self._short) >= SHORT_TEXTS:
                self._short.clear()
            self._short[text, space] = self._plain_ids(text, space)
        return self._short[text, space]

    def _space_in_front(self, stands: Stands) -> bool:
        return stands == "front" if self._spaces == "first" else self._spaces == "always" and stands != "inside"

    def _plain_ids(self, text: str, space: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids: list[int] = []
        starts: list[int] = []
        ends: list[int] = []
        at = 0
        for stretch in self._text_border.split(text) if self._text_border else (text,):
            if stretch in self.text_tokens:
                ids.append(self.added[stretch])
                starts.append(at)
                ends.append(at + len(stretch))
            elif stretch:
                tokenizer = self._plain if space else self._bare
                encoding = tokenizer.encode(stretch, add_special_tokens=False)
                ids += encoding.ids
                starts += [at + offset[0] for offset in encoding.offsets]
                ends += [at + offset[1] for offset in encoding.offsets]
            at += len(stretch)
            space = self._space_in_front("run") if stretch else space
        begins = np.array(starts, np.int32)
        return np.array(ids, np.int32), begins, begins >= np.array([0, *ends[:-1]][: len(ends)], np.int32)

    def mentions_control(self, text: str) -> bool:
        """Whether the text holds the name of a token that it does not get."""
        return self._border is not None and self._border.search(text) is not None

    def full_json(self) -> str:
        """The tokenizer as `tokenizer.json` text."""
        return self._full.to_str()

    def decode(self, ids: list[int], *, control: bool = True) -> str:
        return self._full.decode(ids, skip_special_tokens=not control)
