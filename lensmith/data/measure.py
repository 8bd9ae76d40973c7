"""A row of a source measured: its rows of the index, one for each piece of a document that is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

from lensmith.core.encoded import IMAGE, Encoded
from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import Image, Sample, Text
from lensmith.data.collate import Pictures
from lensmith.data.index import cut_columns
from lensmith.data.index_store import stamp
from lensmith.data.load import Loader, Seen, digest_of, id_hash, look_of, portable, said_by
from lensmith.data.readers import RowRef
from lensmith.data.split import Cut


def measure(loader: Loader, number: int, ref: RowRef) -> list[dict[str, Any]]:
    """The index rows of one row: verdict `train`, `drop` (reason, detail) or `fail` (a wrong row)."""
    rows = loader.rows(number)
    notes: dict[str, None] = dict.fromkeys(rows.notes if ref.number == 0 else ())
    return _measured(loader, number, ref, rows.origin(ref), notes, lambda: loader.sample(number, ref))


def measure_row(
    loader: Loader, number: int, ref: RowRef, origin: str, row: dict[str, Any], notes: dict[str, None]
) -> list[dict[str, Any]]:
    """As `measure`, for a row that is at hand."""
    return _measured(loader, number, ref, origin, notes, lambda: loader.parse(number, row, origin))


def wrong_row(origin: str, error: DataError) -> dict[str, Any]:
    """The index row of a row that could not even be read."""
    return {"row": -1, "piece": 0, "pieces": 1, "origin": origin, "notes": [], "verdict": "fail",
            "reason": error.code, "detail": error.render(), **cut_columns(None)}  # fmt: skip


def _measured(
    loader: Loader, number: int, ref: RowRef, origin: str, notes: dict[str, None], sample_of: Callable[[], Sample]
) -> list[dict[str, Any]]:
    row: dict[str, Any] = {"row": ref.number, "line": ref.line, "offset": ref.offset, "length": ref.length}
    row |= {"piece": 0, "pieces": 1, "origin": origin, "notes": list(notes), **cut_columns(None)}
    try:
        sample = sample_of()
    except Drop as drop:
        return [row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail}]
    except DataError as error:
        return [row | {"verdict": "fail", "reason": error.code, "detail": error.render()}]
    row |= {"id": sample.id, "id_hash": id_hash(sample.id)}
    return measure_sample(loader, number, sample, row, notes)


def measure_sample(
    loader: Loader, number: int, sample: Sample, row: dict[str, Any], notes: dict[str, None]
) -> list[dict[str, Any]]:
    """The index rows of one sample on top of `row`, one for each piece of a document that is cut."""
    seen = Seen(notes | dict.fromkeys(sample.notes))
    row |= {"images": len(sample.images()), "videos": len(sample.videos())}
    try:
        pieces = loader.pieces(number, sample, seen)
    except Drop as drop:
        return [row | {"verdict": "drop", "reason": drop.reason, "detail": drop.detail, "notes": list(seen.notes)}]
    except DataError as error:
        return [row | {"verdict": "fail", "reason": error.code, "detail": error.render()}]
    if any(loader.tokenizer.mentions_control(p.text) for p in sample.parts() if isinstance(p, Text)):
        seen.notes["special_in_text"] = None
    found: list[dict[str, Any]] = []
    whole = _Whole(loader, number, sample, seen)
    for count, (cut, encoded) in enumerate(pieces):
        own = row | {
            "piece": count,
            "pieces": len(pieces),
            **cut_columns(cut),
            "notes": [] if count else list(seen.notes),
        }
        if len(pieces) > 1:
            own["origin"] = f"{row['origin']}[{count + 1}/{len(pieces)}]"
            own["id_hash"] = 0 if count else own["id_hash"]
        if isinstance(encoded, Drop):
            own |= {"verdict": "drop", "reason": encoded.reason, "detail": encoded.detail}
        else:
            own |= whole.measured(cut, encoded)
            if loader.spec.decode and encoded.images:
                own |= _decoded(loader, number, encoded, sample.origin)
        found.append(own)
    return found


def _decoded(loader: Loader, number: int, encoded: Encoded, origin: str) -> dict[str, Any]:
    """What becomes of a sample whose pictures are decoded."""
    try:
        Pictures(loader, {}).add(number, encoded, origin)
    except Drop as drop:
        return {"decoded": True, "verdict": "drop", "reason": drop.reason, "detail": drop.detail}
    return {"decoded": True}


class _Whole:
    """A sample whose pieces are measured."""

    def __init__(self, loader: Loader, number: int, sample: Sample, seen: Seen):
        self.loader, self.number, self.sample, self.seen = loader, number, sample, seen
        self._said = said_by(sample)
        self._short = hashlib.blake2b(self._said, digest_size=16).digest()

    def measured(self, cut: Cut | None, encoded: Encoded) -> dict[str, Any]:
        shown = [block.image for block in encoded.images] if cut is not None else self.sample.media()
        origin = self.sample.origin
        handles = [h for image in shown for h in self.loader.handles(self.number, image, origin)]
        each = tuple(dict.fromkeys(handles))
        images = (
            len({id(b.image) for b in encoded.images if not b.frames}) if cut is not None else len(self.sample.images())
        )
        return {
            "verdict": "train",
            "tokens": encoded.num_tokens,
            "supervised": encoded.num_supervised,
            "media_tokens": int((encoded.kind_L == IMAGE).sum()),
            "patches": encoded.num_patches,
            "chosen": encoded.supervised_of_branches[0] if encoded.preference is not None else 0,
            "images": images,
            "videos": len({id(b.image) for b in encoded.images if b.frames}),
            "answers": encoded.num_answers,
            "handles": list(each),
            "look": look_of(each),
            "digest": self._digest(handles, cut),
            "stamp": stamp(each, {}),
            "sizes": [side for image in shown if isinstance(image, Image) for side in self.seen.sizes[image]],
        }

    def _digest(self, handles: Sequence[str], cut: Cut | None) -> int:
        base = self.loader.spec.files[self.number].base
        return digest_of(self._said if cut is None else self._short, [portable(h, [base]) for h in handles], cut)
