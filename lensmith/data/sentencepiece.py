"""`tokenizer.model` of SentencePiece (byte-pair encoding, as Llama's) as `tokenizer.json`, without SentencePiece.

The file is a protobuf; `message` reads as much of it as is needed. The rules are SentencePiece's own and are read from
the file: whether a space is put in front of a text, how characters are composed and spaces taken out, and that only
normal pieces merge, by score. Single characters named by the user (a line feed, a full stop) are pieces that never
merge. Longer ones, and those that stand for control, are control tokens here: no text becomes one.

Vendor source: sentencepiece_model.proto and normalizer.cc, bpe_model.cc of google/sentencepiece.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from lensmith.core.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = 2
SPACE = "\u2581"


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    score: float
    kind: int


def message(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message in order; values are integers or bytes. Raises `ValueError`."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data):
                raise ValueError("cut short")
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(kind)
        if size is None:
            if kind != 2:
                raise ValueError(f"wire type {kind}")
            size = varint()
        if at + size > len(data):
            raise ValueError("cut short")
        yield key >> 3, data[at : at + size]
        at += size


def _last(data: bytes) -> dict[int, Any]:
    return dict(message(data))


def _piece(data: bytes) -> Piece:
    found = _last(data)
    score: float = struct.unpack("<f", found[2])[0] if 2 in found else 0.0
    return Piece(found[1].decode("utf-8"), score, found.get(3, NORMAL))


def to_json(data: bytes, added: Mapping[int, Mapping[str, Any]], where: str) -> str:
    """`tokenizer.json` text of a `tokenizer.model`. `added`: id -> token, from `added_tokens_decoder` of
    tokenizer_config.json. Raises `ModelError` TOKENIZER."""
    try:
        fields = list(message(data))
        pieces = [_piece(value) for number, value in fields if number == 1 and isinstance(value, bytes)]
        parts = {number: _last(value) for number, value in fields if number in (2, 3) and isinstance(value, bytes)}
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError("TOKENIZER", f"not a SentencePiece model: {error}", where=where) from None
    trainer, normalizer = parts.get(2, {}), parts.get(3, {})
    if not pieces or trainer.get(3, 1) != BPE:
        raise ModelError("TOKENIZER", "only SentencePiece models of byte-pair encoding are read", where=where,
                         remedy="save the tokenizer as tokenizer.json")  # fmt: skip
    unknown = next((p.text for p in pieces if p.kind == UNKNOWN), None)
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=bool(trainer.get(35, 0)))
    )
    in_front = bool(normalizer.get(3, 1))
    alone = [p.text for p in pieces if p.kind == USER_DEFINED and len(p.text) == 1]
    steps = _normalizers(normalizer, in_front, alone)
    tokenizer.normalizer = normalizers.Sequence(steps)  # type: ignore[assignment]
    decoder: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
        [*decoder, decoders.Strip(" ", 1, 0)] if in_front else decoder
    )
    return _with_added(tokenizer.to_str(), _controls(pieces) | {i: str(token["content"]) for i, token in added.items()})


def merges(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Pairs that become a normal piece, the highest score first: SentencePiece merges by the score of the result."""
    parts = {p.text for p in pieces if p.kind == NORMAL}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for number, piece in enumerate(pieces):
        if piece.kind == NORMAL:
            splits = ((piece.text[:i], piece.text[i:]) for i in range(1, len(piece.text)))
            ranked += [(-piece.score, number, len(s[0]), s) for s in splits if s[0] in parts and s[1] in parts]
    return [split for *_, split in sorted(ranked)]


def _normalizers(spec: Mapping[int, Any], in_front: bool, alone: Sequence[str]) -> list[Any]:
    """What happens to a text before it is cut into pieces: composed, spaces taken out, one put in front, marked.

    `alone`: characters that are pieces named by the user. Composing passes them over, so while it runs those that it
    would change are written as characters that Unicode promises never to use.
    """
    found: list[Any] = []
    shields: list[tuple[str, str]] = []
    if charsmap := spec.get(2):
        compose = normalizers.Precompiled(charsmap)
        changed = [c for c in alone if compose.normalize_str(c) != c]
        shields = list(zip(changed, map(chr, range(0xFDD0, 0xFDF0)), strict=False))
        assert len(shields) == len(changed), "more characters named by the user than there are shields"
        found = [*(normalizers.Replace(c, shield) for c, shield in shields), compose]
    if spec.get(4, 1):
        found += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    found += [normalizers.Replace(shield, c) for c, shield in shields]
    found += [normalizers.Prepend(SPACE)] if in_front else []
    return [*found, normalizers.Replace(" ", SPACE)]


def _controls(pieces: Sequence[Piece]) -> dict[int, str]:
    return {
        i: p.text
        for i, p in enumerate(pieces)
        if p.kind in (UNKNOWN, CONTROL) or (p.kind == USER_DEFINED and len(p.text) > 1)
    }


def _with_added(file_json: str, tokens: Mapping[int, str]) -> str:
    parsed = json.loads(file_json)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    parsed["added_tokens"] = [{"id": i, "content": text, **flags} for i, text in sorted(tokens.items())]
    return json.dumps(parsed, ensure_ascii=False)
