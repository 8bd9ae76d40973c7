"""Sample -> Encoded: rendering by the family, tokens, which of them are trained, positions, shared prefixes.

`Rendering` is what this module needs of a model family; the families implement it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np

from lensmith.core.encoded import IMAGE, TEXT, Encoded, ImageBlock, Segment
from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Document, Image, Sample, Text
from lensmith.data.tokenizer import TextTokenizer

ImageSize = Callable[[Image], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Template:
    """Text of the template, in which the names of control tokens mean those tokens."""

    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """Text of the data: never a control token. Neighbouring texts are tokenised together."""

    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """The place of an image: `num_tokens` copies of the family's image token."""

    image: Image


Piece = Template | Run | Picture


class Rendering(Protocol):
    """What a family says about turning a sample into tokens. Pure; needs no weights and no torch."""

    image_token: str
    end_of_document: str

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]: ...
    def render_document(self, document: Document) -> list[Piece]: ...
    def place(self, image: Image, width: int, height: int) -> ImageBlock: ...
    def positions(self, kind_L: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray: ...


@dataclass(frozen=True)
class Encoder:
    """Encodes samples of one model family. `max_tokens` bounds a sample; `too_long` says what happens above it."""

    rendering: Rendering
    tokenizer: TextTokenizer
    image_size: ImageSize
    max_tokens: int
    too_long: Literal["drop", "cut"] = "drop"

    def encode(self, sample: Sample) -> Encoded:
        """Raises `Drop` TOO_LONG, NO_TARGETS and what opening an image header raises."""
        self._refuse_hopeless(sample)
        if isinstance(sample.content, Document):
            encoded = self._pieces(self.rendering.render_document(sample.content))
            if encoded.num_tokens > self.max_tokens:
                raise self._too_long(encoded)
        else:
            encoded = join_branches([self._branch(c) for c in sample.content])
            if encoded.num_tokens > self.max_tokens and len(sample.content) == 1:
                raise self._too_long(encoded)
            if encoded.num_tokens > self.max_tokens:
                raise Drop(
                    "TOO_LONG", f"{encoded.num_tokens} tokens in {len(sample.content)} branches > {self.max_tokens}"
                )
        if encoded.num_supervised == 0:
            raise Drop("NO_TARGETS", "no supervised token")
        return encoded

    def _refuse_hopeless(self, sample: Sample) -> None:
        """Ten million characters take a quarter of a minute to tokenise; that they are too long is known before."""
        if isinstance(sample.content, tuple) and self.too_long == "cut":
            return
        longest = max((len(p.text) for p in sample.parts() if isinstance(p, Text)), default=0)
        # composing characters (NFC) makes a text shorter, by less than four
        if longest > 64 * self.max_tokens and longest > 4 * self.max_tokens * self.tokenizer.longest_token:
            raise Drop("TOO_LONG", f"a text of {longest} characters has more than {self.max_tokens} tokens")

    def encode_prompt(self, conversation: Conversation) -> Encoded:
        """Up to where the assistant answers; for generation."""
        return self._pieces(self.rendering.render(conversation, ask=True))

    def _too_long(self, encoded: Encoded) -> Drop:
        image_tokens = int((encoded.kind_L == IMAGE).sum())
        return Drop("TOO_LONG", f"{encoded.num_tokens} tokens ({image_tokens} of images) > {self.max_tokens}")

    def _branch(self, branch: Conversation | Document) -> Encoded:
        if isinstance(branch, Document):
            return self._pieces(self.rendering.render_document(branch))
        return self._conversation(branch)

    def _conversation(self, conversation: Conversation) -> Encoded:
        encoded = self._pieces(self.rendering.render(conversation))
        if encoded.num_tokens <= self.max_tokens or self.too_long == "drop":
            return encoded
        for end in range(len(conversation.messages) - 1, 1, -1):  # whole trailing messages go, images with them
            if conversation.messages[end - 1].role != "assistant":
                continue
            shorter = self._pieces(self.rendering.render(replace(conversation, messages=conversation.messages[:end])))
            if shorter.num_tokens <= self.max_tokens:
                return shorter
        return encoded

    def _pieces(self, pieces: Sequence[Piece]) -> Encoded:
        ids: list[np.ndarray] = []
        trained: list[np.ndarray] = []
        kinds: list[np.ndarray] = []
        blocks: list[ImageBlock] = []
        run: list[Run] = []

        def add(token_ids: np.ndarray, flags: np.ndarray, kind: int) -> None:
            ids.append(token_ids)
            trained.append(flags)
            kinds.append(np.full(len(token_ids), kind, np.int8))

        def flush() -> None:
            if run:
                add(*self._tokenise(run), TEXT)
                run.clear()

        for piece in pieces:
            if isinstance(piece, Run):
                run.append(piece)
                continue
            if isinstance(piece, Template):
                for text, control in self.tokenizer.split_controls(piece.text):
                    if control is None:
                        run.append(Run(text, piece.trained))
                    else:
                        flush()
                        add(np.array([control], np.int32), np.array([piece.trained]), TEXT)
                continue
            flush()
            block = self.rendering.place(piece.image, *self.image_size(piece.image))
            blocks.append(block)
            token = self.tokenizer.control(self.rendering.image_token)
            add(np.full(block.num_tokens, token, np.int32), np.zeros(block.num_tokens, bool), IMAGE)
        flush()
        kind_L = np.concatenate(kinds)
        ids_L = np.concatenate(ids)
        return Encoded(
            ids_L=ids_L,
            trained_L=np.concatenate(trained),
            kind_L=kind_L,
            position_ids_3L=self.rendering.positions(kind_L, [b.grid_thw for b in blocks]),
            segments=(Segment(0, len(ids_L)),),
            images=tuple(blocks),
        )

    def _tokenise(self, run: list[Run]) -> tuple[np.ndarray, np.ndarray]:
        """A token is trained where its first character is: one that merges a border belongs to the template."""
        text = "".join(r.text for r in run)
        ids, starts = self.tokenizer.plain(text)
        flags = np.repeat([r.trained for r in run], [len(r.text) for r in run])
        return ids, flags[starts] if len(ids) else np.zeros(0, bool)


def join_branches(branches: Sequence[Encoded]) -> Encoded:
    """Conversations with a common beginning as one sample: the beginning once, then each branch behind it.

    The shared prefix is the longest common run of tokens that ends before any branch's first trained token less one,
    so that every target is predicted by a position of its own branch. Each branch keeps the positions it has alone.
    """
    if len(branches) == 1:
        return branches[0]
    shared = _shared_prefix(branches)
    first = branches[0]
    ids, trained, kinds = [first.ids_L[:shared]], [first.trained_L[:shared]], [first.kind_L[:shared]]
    positions = [first.position_ids_3L[:, :shared]]
    num_shared_images = _blocks_within(first, shared)
    segments = [Segment(0, shared)] if shared else []
    images = list(first.images[:num_shared_images])
    at = shared
    for branch in branches:
        own = branch.num_tokens - shared
        segments.append(Segment(at, own, 0, shared))
        ids.append(branch.ids_L[shared:])
        trained.append(branch.trained_L[shared:])
        kinds.append(branch.kind_L[shared:])
        positions.append(branch.position_ids_3L[:, shared:])
        images.extend(branch.images[num_shared_images:])
        at += own
    return Encoded(
        ids_L=np.concatenate(ids),
        trained_L=np.concatenate(trained),
        kind_L=np.concatenate(kinds),
        position_ids_3L=np.concatenate(positions, axis=1),
        segments=tuple(segments),
        images=tuple(images),
        num_answers=len(branches),
    )


def _shared_prefix(branches: Sequence[Encoded]) -> int:
    limit = min(b.num_tokens for b in branches) - 1
    for branch in branches:
        trained = np.flatnonzero(branch.trained_L)
        if len(trained):
            limit = min(limit, int(trained[0]) - 1)
    limit = max(limit, 0)
    first = branches[0]
    for other in branches[1:]:
        same = (first.ids_L[:limit] == other.ids_L[:limit]) & (first.kind_L[:limit] == other.kind_L[:limit])
        limit = limit if same.all() else int(np.argmin(same))
    while limit and not _same_images(branches, limit):
        limit = _before_last_image(first, limit)
    if 0 < limit < first.num_tokens and first.kind_L[limit] == IMAGE == first.kind_L[limit - 1]:
        limit = _before_last_image(first, limit)
    return limit


def _blocks_within(encoded: Encoded, length: int) -> int:
    """How many whole image blocks lie in the first `length` tokens."""
    covered, total = int((encoded.kind_L[:length] == IMAGE).sum()), 0
    for count, block in enumerate(encoded.images):
        total += block.num_tokens
        if total > covered:
            return count
    return len(encoded.images)


def _same_images(branches: Sequence[Encoded], length: int) -> bool:
    count = _blocks_within(branches[0], length)
    return all(b.images[:count] == branches[0].images[:count] for b in branches)


def _before_last_image(encoded: Encoded, length: int) -> int:
    """The longest prefix below `length` that ends before the last image block which begins there."""
    inside = np.flatnonzero(encoded.kind_L[:length] == IMAGE)
    if not len(inside):
        return 0
    last = int(inside[-1])
    while last > 0 and encoded.kind_L[last - 1] == IMAGE:
        last -= 1
    return last
