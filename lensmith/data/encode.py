"""Sample -> Encoded: rendering by the family, tokens, which of them are trained, positions, shared prefixes.

`Rendering` is what this module needs of a model family; the families implement it.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from lensmith.core.encoded import IMAGE, TEXT, Encoded, ImageBlock, Segment, VideoInfo
from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Document, Image, Part, Preference, Sample, Text, Video
from lensmith.data.branches import join_branches
from lensmith.data.formats.boxes import Form, with_boxes
from lensmith.data.split import SENTENCE_ENDS, Cut, Splitter, UnitSize, sentence_ends, stretches
from lensmith.data.tokenizer import Stands, TextTokenizer
from lensmith.data.turns import blocks_left, kept, mask_of, shortened, turns_of

ImageSize = Callable[[Image], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Template:
    """Text of the template, in which the names of control tokens mean those tokens."""

    text: str
    trained: bool = False
    vendor: str | None = None
    """What the model's own chat template writes in its place, where the family differs on purpose."""


@dataclass(frozen=True, slots=True)
class Run:
    """Text of the data: never a control token. Neighbouring texts are tokenised together."""

    text: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class Picture:
    """The place of an image; the family says what stands there once its size is known (`place_image`)."""

    image: Image


@dataclass(frozen=True, slots=True)
class Film:
    """The place of a video; the family says what stands there once its length is known (`place_video`)."""

    video: Video


@dataclass(frozen=True, slots=True)
class Placed:
    """A block of an image or a video: copies of the family's image or video token."""

    block: ImageBlock


Piece = Template | Run | Picture | Film | Placed


class Rendering(Protocol):
    """What a family says about turning a sample into tokens. Pure; needs no weights and no torch."""

    image_token: str
    video_token: str | None
    """None: the family takes no videos."""
    start_of_document: str
    end_of_document: str

    def render(self, conversation: Conversation, *, ask: bool = False) -> list[Piece]: ...
    def render_media(self, part: Image | Video) -> list[Piece]: ...
    def place_image(self, image: Image, width: int, height: int) -> list[Piece]: ...
    def place_video(self, video: Video, info: VideoInfo) -> list[Piece]: ...
    def positions(self, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray: ...


@runtime_checkable
class ByToken(Protocol):
    """A family whose positions depend on the tokens around its pictures too; then `positions` is not asked."""

    def token_positions(self, ids_L: np.ndarray, kind_L: np.ndarray, blocks: Sequence[ImageBlock]) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class DocumentRules:
    """How a document becomes samples. `max_images` bounds the pictures and videos of one piece."""

    too_long: Literal["split", "drop"] = "split"
    overlap: int = 0
    max_images: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Tokens:
    """A run of tokens before it has positions. `starts`: of a stretch of text, the character at which each token
    begins; -1 where it begins inside one."""

    ids: np.ndarray
    trained: np.ndarray
    kinds: np.ndarray
    blocks: tuple[ImageBlock, ...] = ()
    starts: np.ndarray | None = None

    def __getitem__(self, part: slice) -> Tokens:
        """Blocks are kept: only text is ever cut."""
        return Tokens(self.ids[part], self.trained[part], self.kinds[part], self.blocks)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Encoder:
    """Encodes samples of one model family. `max_tokens` bounds a sample; `too_long` says what happens to a conversation
    above it, `documents` what to a document."""

    rendering: Rendering
    tokenizer: TextTokenizer
    image_size: ImageSize
    max_tokens: int
    too_long: Literal["drop", "cut", "llamafactory"] = "drop"
    documents: DocumentRules = DocumentRules()
    video_info: Callable[[Video], VideoInfo] | None = None
    train_line_feed: bool = False
    """The line feed behind a trained end of turn is trained too."""

    def encode(self, sample: Sample, cut: Cut | None = None) -> Encoded:
        """A sample, or one piece of a document. Raises `Drop` TOO_LONG, NO_TARGETS and what opening media raises."""
        self._refuse_hopeless(sample)
        if not isinstance(sample.content, Document):
            return self._checked(self._joined(sample.content, sample.preference))
        units = self._units(sample.content)
        if cut is None:
            return self._checked(self._encoded(self._all(units)))
        return self._checked(self._cut({n: self._unit(units, n) for n in range(cut.first, cut.last + 1)}, cut))

    def _joined(self, branches: Sequence[Conversation | Document], preference: Preference | None) -> Encoded:
        if preference is None:
            return join_branches([self._branch(c) for c in branches])
        if self.too_long == "llamafactory":
            return replace(join_branches(self._answers_in_proportion(branches)), preference=preference)
        whole = replace(self, too_long="drop")  # an answer that ends early is another answer
        return replace(join_branches([whole._branch(c) for c in branches]), preference=preference)

    def pieces(self, sample: Sample) -> list[tuple[Cut | None, Encoded | Drop]]:
        """(None, sample) for one that stays whole, else every piece of a document in order.

        Raises `Drop` when the whole sample cannot be trained.
        """
        if not isinstance(sample.content, Document) or self.documents.too_long == "drop":
            return [(None, self.encode(sample))]
        parts = self._units(sample.content)
        units = self._all(parts)
        if sum(map(len, units)) <= self.max_tokens and len(sample.media()) <= self.documents.max_images:
            return [(None, self._checked(self._encoded(units)))]
        sizes = [_unit_size(unit, _text_of(part)) for unit, part in zip(units, parts, strict=True)]
        found: list[tuple[Cut | None, Encoded | Drop]] = []
        for cut in Splitter(sizes, self.max_tokens, self.documents.max_images, self.documents.overlap).cuts():
            try:
                found.append((cut, self._checked(self._cut(units, cut))))
            except Drop as drop:
                found.append((cut, drop))
        return found

    def _checked(self, encoded: Encoded) -> Encoded:
        if (encoded.num_tokens if encoded.preference is None else encoded.longest) > self.max_tokens:
            raise self._too_long(encoded)
        if encoded.num_supervised == 0:
            raise Drop("NO_TARGETS", "no supervised token")
        if encoded.preference is not None and min(encoded.supervised_of_branches) == 0:
            raise Drop("NO_TARGETS", "one of the answers has no supervised token")
        return encoded

    def _refuse_hopeless(self, sample: Sample) -> None:
        """Ten million characters take a quarter of a minute to tokenise; that they are too long is known before."""
        whole = isinstance(sample.content, Document)
        if (self.documents.too_long == "split") if whole else (self.too_long != "drop"):
            return
        longest = max((len(p.text) for p in sample.parts() if isinstance(p, Text)), default=0)
        # composing characters (NFC) makes a text shorter, by less than four
        if longest > 64 * self.max_tokens and longest > 4 * self.max_tokens * self.tokenizer.longest_token:
            raise Drop("TOO_LONG", f"a text of {longest} characters has more than {self.max_tokens} tokens")

    def encode_prompt(self, conversation: Conversation) -> Encoded:
        """Up to where the assistant answers; for generation."""
        return self._pieces(self.rendering.render(with_boxes(conversation, self._sizes), ask=True))

    def _too_long(self, encoded: Encoded) -> Drop:
        if encoded.preference is not None:
            return Drop("TOO_LONG", f"{encoded.longest} tokens in its longest answer > {self.max_tokens}")
        if encoded.num_answers > 1:
            return Drop(
                "TOO_LONG", f"{encoded.num_tokens} tokens in {encoded.num_answers} branches > {self.max_tokens}"
            )
        image_tokens = int((encoded.kind_L == IMAGE).sum())
        return Drop("TOO_LONG", f"{encoded.num_tokens} tokens ({image_tokens} of images) > {self.max_tokens}")

    def _branch(self, branch: Conversation | Document) -> Encoded:
        return self._document(branch) if isinstance(branch, Document) else self._conversation(branch)

    def _conversation(self, conversation: Conversation) -> Encoded:
        if self.too_long == "llamafactory":
            return self._in_proportion(conversation)
        encoded = self._pieces(self._rendered(conversation))
        if encoded.num_tokens <= self.max_tokens or self.too_long == "drop":
            return encoded
        for end in range(len(conversation.messages) - 1, 1, -1):  # whole trailing messages go, images with them
            if conversation.messages[end - 1].role != "assistant":
                continue
            shorter = self._pieces(self._rendered(replace(conversation, messages=conversation.messages[:end])))
            if shorter.num_tokens <= self.max_tokens:
                return shorter
        return encoded

    def _sizes(self, image: Image, form: Form) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of a picture as it came, and as boxes count. Raises `Drop` BOXES where the model sees only parts of it."""
        size = self.image_size(image)
        if form == "thousandths":
            return size, (1000, 1000)
        blocks = [p.block for p in self.rendering.place_image(image, *size) if isinstance(p, Placed)]
        if len(blocks) != 1 or blocks[0].view:
            raise Drop("BOXES", "this family shows a picture in parts; write boxes in thousandths")
        return size, (blocks[0].width, blocks[0].height)

    def _rendered(self, conversation: Conversation) -> list[Piece]:
        pieces = self.rendering.render(with_boxes(conversation, self._sizes))
        if self.train_line_feed:
            for n, (before, piece) in enumerate(itertools.pairwise(pieces), 1):
                ends = isinstance(before, Template) and before.trained and before.text != ""
                if ends and isinstance(piece, Template) and piece.text == "\n":
                    pieces[n] = replace(piece, trained=True)
        return pieces

    def _in_proportion(self, conversation: Conversation) -> Encoded:
        """The ends of questions and answers are cut, as LLaMA-Factory does. Raises `Drop` TOO_LONG where that would cut
        a picture."""
        tokens = self._tokens(self._rendered(conversation))
        if len(tokens) < self.max_tokens:
            return self._encoded([tokens])
        answers = self._tokens(self._rendered(_answers_trained(conversation))).trained
        trained = [m.trained for m in conversation.messages if m.role == "assistant"]
        turns = turns_of(answers)
        keep = kept(turns, self.max_tokens, newest_first=not any(trained[:-1]) and len(trained) > 1)
        return self._masked(tokens, mask_of(turns, keep, len(tokens)))

    def _answers_in_proportion(self, branches: Sequence[Conversation | Document]) -> list[Encoded]:
        """Compared answers cut alike: one turn with all before the answer as its question, as long as the longest
        answer asks for."""
        found = [self._tokens(self._rendered(c)) for c in branches if isinstance(c, Conversation)]
        asked = [int(np.argmax(t.trained)) if t.trained.any() else len(t) for t in found]
        answer = max(len(t) - n for t, n in zip(found, asked, strict=True))
        if max(asked) + answer < self.max_tokens:
            return [self._encoded([t]) for t in found]
        some, most = shortened(max(asked), answer, self.max_tokens)
        turns = [(n, len(t) - n) for t, n in zip(found, asked, strict=True)]
        return [
            self._masked(t, mask_of([turn], [(some, min(most, turn[1]))], len(t)))
            for t, turn in zip(found, turns, strict=True)
        ]

    def _masked(self, tokens: Tokens, mask: np.ndarray) -> Encoded:
        blocks = blocks_left(mask, tokens.kinds == IMAGE, tokens.blocks)
        return self._encoded([Tokens(tokens.ids[mask], tokens.trained[mask], tokens.kinds[mask], blocks)])

    # -- documents ----------------------------------------------------------------------------------------------

    def _document(self, document: Document) -> Encoded:
        return self._encoded(self._all(self._units(document)))

    def _all(self, units: Sequence[list[Piece]]) -> list[Tokens]:
        return [self._unit(units, n) for n in range(len(units))]

    def _unit(self, units: Sequence[list[Piece]], n: int) -> Tokens:
        """A unit where it stands: a text behind a text is the rest of it; the token that begins a document is put in
        front by the tokenizer itself, elsewhere."""
        stands: Stands = "front" if n == 0 else "inside" if isinstance(units[n - 1][0], Run) else "run"
        if n == 1 and self.rendering.start_of_document:
            stands = "front"
        return self._tokens(units[n], stands)

    def _cut(self, units: Mapping[int, Tokens] | Sequence[Tokens], cut: Cut) -> Encoded:
        encoded = self._encoded([units[n][cut.slice(n, len(units[n]))] for n in range(cut.first, cut.last + 1)])
        encoded.trained_L[: cut.context] = False
        return encoded

    def _units(self, document: Document) -> list[list[Piece]]:
        """The parts of a document in order, its texts in stretches; text between two pictures is one text."""
        units: list[list[Piece]] = []
        start, end = self.rendering.start_of_document, self.rendering.end_of_document
        if start:
            units.append([Template(start)])
        for part in _joined(document.parts):
            units += [self.rendering.render_media(part)] if not isinstance(part, list) else _text_units(part)
        texts = [p for p in document.parts if isinstance(p, Text)]
        return [*units, [Template(end, trained=not texts or texts[-1].train is not False)]]

    # -- tokens -------------------------------------------------------------------------------------------------

    def _pieces(self, pieces: Sequence[Piece]) -> Encoded:
        return self._encoded([self._tokens(pieces)])

    def _encoded(self, tokens: Sequence[Tokens]) -> Encoded:
        ids_L, kind_L = np.concatenate([t.ids for t in tokens]), np.concatenate([t.kinds for t in tokens])
        blocks = tuple(b for t in tokens for b in t.blocks)
        if isinstance(self.rendering, ByToken):
            positions_3L = self.rendering.token_positions(ids_L, kind_L, blocks)
        else:
            positions_3L = self.rendering.positions(kind_L, blocks)
        return Encoded(
            ids_L=ids_L,
            trained_L=np.concatenate([t.trained for t in tokens]),
            kind_L=kind_L,
            position_ids_3L=positions_3L,
            segments=(Segment(0, len(kind_L)),),
            images=blocks,
        )

    def _tokens(self, pieces: Sequence[Piece], stands: Stands = "front") -> Tokens:
        """`stands`: the first text of these pieces, unless a token stands before it."""
        found: list[Tokens] = []
        run: list[Run] = []

        def flush() -> None:
            nonlocal stands
            if run:
                found.append(self._tokenise(run, stands))
                run.clear()
                stands = "run"

        for piece in self._resolved(pieces):
            if isinstance(piece, Run):
                run.append(piece)
            elif isinstance(piece, Template):
                for text, control in self.tokenizer.split_controls(piece.text):
                    if control is None:
                        run.append(Run(text, piece.trained))
                        continue
                    flush()
                    found.append(Tokens(np.array([control], np.int32), np.array([piece.trained]), _kinds(1, TEXT)))
                    stands = stands if piece.vendor == "" else "run"
            else:
                flush()
                found.append(self._block(piece))
                stands = "run"
        flush()
        if len(found) == 1:
            return found[0]
        return Tokens(
            np.concatenate([t.ids for t in found]),
            np.concatenate([t.trained for t in found]),
            np.concatenate([t.kinds for t in found]),
            tuple(b for t in found for b in t.blocks),
        )

    def _resolved(self, pieces: Sequence[Piece]) -> Iterator[Template | Run | Placed]:
        for piece in pieces:
            if isinstance(piece, Picture):
                yield from self._resolved(self.rendering.place_image(piece.image, *self.image_size(piece.image)))
                continue
            if not isinstance(piece, Film):
                yield piece
                continue
            if self.rendering.video_token is None or self.video_info is None:
                raise Drop("VIDEO_KIND", "this model family takes no videos")
            yield from self._resolved(self.rendering.place_video(piece.video, self.video_info(piece.video)))

    def _block(self, piece: Placed) -> Tokens:
        block = piece.block
        name = self.rendering.video_token if isinstance(block.image, Video) else self.rendering.image_token
        assert name is not None
        n = block.num_tokens
        ids = np.full(n, self.tokenizer.control(name), np.int32)
        return Tokens(ids, np.zeros(n, bool), _kinds(n, IMAGE), (block,))

    def _tokenise(self, run: list[Run], stands: Stands) -> Tokens:
        """A token is trained where its first character is: one that merges a border belongs to the template."""
        text = "".join(r.text for r in run)
        ids, starts, whole = self.tokenizer.plain(text, stands)
        if len({r.trained for r in run}) == 1:
            trained = np.full(len(ids), run[0].trained)
        else:
            trained = np.repeat([r.trained for r in run], [len(r.text) for r in run])[starts]
        return Tokens(ids, trained, _kinds(len(ids), TEXT), (), np.where(whole, starts, -1))


def _answers_trained(conversation: Conversation) -> Conversation:
    """With every answer trained and nothing else, so that the flags tell where answers are."""
    messages = [
        replace(
            m,
            train=m.role == "assistant",
            parts=tuple(replace(p, train=None) if isinstance(p, Text) else p for p in m.parts),
        )
        for m in conversation.messages
    ]
    return replace(conversation, messages=tuple(messages))


def _text_of(unit: Sequence[Piece]) -> str | None:
    """Of a unit; None for what is never cut."""
    return "".join(p.text for p in unit if isinstance(p, Run)) if isinstance(unit[0], Run) else None


def _kinds(count: int, kind: int) -> np.ndarray:
    return np.full(count, kind, np.int8)


def _joined(parts: Sequence[Part]) -> Iterator[Image | Video | list[Text]]:
    """Parts in order, neighbouring texts together."""
    texts: list[Text] = []
    for part in parts:
        if isinstance(part, Text):
            texts.append(part)
            continue
        if texts:
            yield texts
            texts = []
        yield part
    if texts:
        yield texts


def _text_units(texts: Sequence[Text]) -> list[list[Piece]]:
    """A text as runs of trained and other text, one list for each of its stretches."""
    whole = "".join(t.text for t in texts)
    units: list[list[Piece]] = []
    at, begins = 0, 0
    for begin, end in stretches(whole):
        unit: list[Piece] = []
        while at < len(texts) and begins < end:
            text, stop = texts[at], begins + len(texts[at].text)
            if own := text.text[max(begin - begins, 0) : end - begins]:
                unit.append(Run(own, text.train is not False))
            if stop > end:
                break
            at, begins = at + 1, stop
        if unit:
            units.append(unit)
    return units


def _unit_size(unit: Tokens, text: str | None) -> UnitSize:
    if text is None or unit.starts is None:
        return UnitSize(len(unit), images=min(len(unit.blocks), 1))
    starts = unit.starts
    whole = np.flatnonzero(starts >= 0)
    sentences = whole[np.isin(starts[whole], list(sentence_ends(text)))]
    ends = [len(unit)] if text[-1] in SENTENCE_ENDS else []
    return UnitSize(len(unit), 0, array("i", whole.tolist()), [*sentences.tolist(), *ends])
