"""Held-out samples as questions: the prompt up to the last answer, its reference, and the pictures it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lensmith.core.encoded import Encoded, PackedRow
from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Document, Image, Message, Part, Text
from lensmith.data.collate import Pictures
from lensmith.data.load import Loader
from lensmith.data.readers import RowRef


@dataclass(frozen=True)
class Question:
    """`prompt` ends where the assistant answers; `file` is the source its pictures are found through."""

    file: int
    origin: str
    text: str
    reference: str
    prompt: Encoded
    images: tuple[Image, ...]


def split_question(conversation: Conversation) -> tuple[Conversation, str, str] | None:
    """(messages before the last answer, text of the last user turn, the answer); None without an answer in words."""
    messages = conversation.messages
    last = max((i for i, m in enumerate(messages) if m.role == "assistant" and not m.tool_calls), default=None)
    if last is None:
        return None
    asked = [m for m in messages[:last] if m.role == "user"]
    return replace(conversation, messages=messages[:last]), _text(asked[-1]) if asked else "", _text(messages[last])


def _text(message: Message) -> str:
    return "".join(p.text for p in message.parts if isinstance(p, Text)).strip()


def load_questions(
    loader: Loader, file: int, ref: RowRef, pictures: tuple[int, list[Image]] | None = None
) -> list[Question]:
    """One question per conversation of the sample whose answer is a right one. `pictures` (source file, images)
    replaces the sample's own."""
    sample = loader.sample(file, ref)
    shown_file, shown = pictures if pictures is not None else (file, [])
    encoder = loader.encoder(shown_file, sample.origin)
    found: list[Question] = []
    for conversation in sample.good():
        parts = None if isinstance(conversation, Document) else split_question(conversation)
        if parts is None:
            continue
        prompt = _with_pictures(parts[0], shown) if shown else parts[0]
        images = tuple(p for m in prompt.messages for p in m.parts if isinstance(p, Image))
        encoded = encoder.encode_prompt(prompt)
        if encoded.num_tokens > loader.spec.max_tokens:
            raise Drop("TOO_LONG", f"{encoded.num_tokens} tokens")
        found.append(Question(shown_file, sample.origin, parts[1], parts[2], encoded, images))
    return found


def _with_pictures(conversation: Conversation, pictures: Sequence[Image]) -> Conversation:
    """The n-th picture becomes the n-th of `pictures` (from the start again where there are fewer)."""
    count = 0
    messages: list[Message] = []
    for message in conversation.messages:
        parts: list[Part] = []
        for part in message.parts:
            if isinstance(part, Image):
                part, count = pictures[count % len(pictures)], count + 1
            parts.append(part)
        messages.append(replace(message, parts=tuple(parts)))
    return replace(conversation, messages=tuple(messages))


def picture_row(loader: Loader, questions: Sequence[Question], known: dict[str, str]) -> PackedRow:
    """The pictures of `questions` in order, each distinct one once; a row without tokens."""
    pictures = Pictures(loader, known)
    order = [n for q in questions for n in pictures.add(q.file, q.prompt, q.origin)]
    none = np.zeros(0, np.int32)
    nobody, weightless = np.zeros(0, np.int64), np.zeros(0, np.float32)
    row = PackedRow(none, np.zeros(0, np.int8), np.zeros((3, 0), np.int32), (), none, none, weightless, nobody)
    pictures.fill(row, order)
    return row
