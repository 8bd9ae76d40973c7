"""Rows that compare answers: a chosen and a rejected one, or one that is labelled good or bad.

The layout of the rest of the row reads them: each answer is put behind the prompt as its last turn, and the row is then
an ordinary one. What both conversations begin with is the prompt; only what is behind it is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lensmith.core.sample import Conversation, Message, Preference, Sample, Text
from lensmith.data.formats.alpaca import Alpaca
from lensmith.data.formats.common import ChatOptions, Place, checked_object, required, wrong_type
from lensmith.data.formats.messages import Messages
from lensmith.data.formats.sharegpt import ShareGPT
from lensmith.data.strict_json import parse_json

Compare = Literal["pairs", "labels"]
"""What the rows of a source hold where an objective compares: pairs of answers, or answers with labels."""


class RLHFV(ChatOptions):
    """Rows of {text: {question, chosen, rejected}, image}, `text` as an object or as JSON text (RLHF-V), or of
    {question, chosen, rejected, image} (RLAIF-V). The pictures stand in front of the question."""

    kind: Literal["rlhf_v"] = "rlhf_v"
    text_column: str = "text"
    """Key of the object that holds question and answers; rows without it hold them themselves."""
    question_column: str = "question"
    """Key of the question."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises what `Alpaca.parse` raises: of itself the row has no answer to learn."""
        return self.layout.parse(self.opened(row, Place(origin)), origin)

    @property
    def layout(self) -> Alpaca:
        shared = {name: getattr(self, name) for name in ChatOptions.model_fields}
        return Alpaca.model_validate(shared | {"instruction_column": self.question_column, "unplaced": "front"})

    def opened(self, row: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
        inner, here = row.get(self.text_column), place.key(self.text_column)
        if inner is None:
            return row
        if isinstance(inner, str):
            inner = parse_json(inner.encode(), f"{place.origin}: {here.path}")
        return {**{k: v for k, v in row.items() if k != self.text_column}, **checked_object(inner, here)}


Chat = Messages | ShareGPT | Alpaca | RLHFV


def parse_compared(layout: Any, row: Mapping[str, Any], origin: str, compare: Compare) -> Sample:
    """A sample whose answers are compared.

    Raises what the layout raises; DataError SCHEMA for a missing side or label, DPO_SAME for equal answers, DPO_PROMPT
    where the two do not answer the same prompt, UNKNOWN_FORMAT for a layout that holds no conversations.
    """
    place = Place(origin)
    if isinstance(layout, RLHFV):
        row, layout = layout.opened(row, place), layout.layout
    if not isinstance(layout, (Messages, ShareGPT, Alpaca)):
        raise place.error("UNKNOWN_FORMAT", f"rows of {layout.kind!r} hold no answers to compare",
                          "name one of messages, sharegpt, alpaca, rlhf_v as the format")  # fmt: skip
    return _pair(layout, row, place) if compare == "pairs" else _labelled(layout, row, place)


def _pair(layout: Messages | ShareGPT | Alpaca, row: Mapping[str, Any], place: Place) -> Sample:
    columns = layout.chosen_column, layout.rejected_column
    for column in columns:
        if required(row, column, place) is None:
            raise place.key(column).error("SCHEMA", "is null: the pair lacks a side", "take this row out")
    chosen, rejected = (layout.parse(_answered(layout, row, c, place), place.origin) for c in columns)
    first, second = (_compared(_conversation(sample), 0) for sample in (chosen, rejected))  # flags make no difference
    if first.messages == second.messages:
        raise place.error("DPO_SAME", "chosen and rejected are the same", "take the row out: a pair without a "
                          "difference teaches nothing")  # fmt: skip
    shared = _common(first.messages, second.messages)
    if not shared or {_role(first, shared), _role(second, shared)} != {"assistant"}:
        raise place.error("DPO_PROMPT", f"chosen and rejected differ in turn {shared + 1}, which is no answer",
                          "both must answer the same prompt")  # fmt: skip
    branches = tuple(_compared(c, shared) for c in (first, second))
    return replace(chosen, content=branches, preference=Preference(margin=_margin(row, layout, place)))


def _labelled(layout: Messages | ShareGPT | Alpaca, row: Mapping[str, Any], place: Place) -> Sample:
    here = place.key(layout.label_column)
    label = required(row, layout.label_column, place)
    if not isinstance(label, bool) and label not in (0, 1):
        raise wrong_type(label, here, "true or false")
    completed = isinstance(layout, Messages) and row.get(layout.messages_column) is None
    if completed and row.get(layout.completion_column) is not None:  # type: ignore[union-attr]
        row = _answered(layout, row, layout.completion_column, place)  # type: ignore[union-attr]
    sample = layout.parse(row, place.origin)
    conversation = _conversation(sample)
    messages = conversation.messages
    asked = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    if messages[-1].role != "assistant":
        raise place.error("NO_TARGET", "the conversation ends without an answer", "add one")
    return replace(sample, content=(_compared(conversation, asked + 1),), preference=Preference(bool(label)))


def _margin(row: Mapping[str, Any], layout: ChatOptions, place: Place) -> float:
    value = row.get(layout.margin_column)
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise wrong_type(value, place.key(layout.margin_column), "a finite number")
    return float(value)


def _answered(
    layout: Messages | ShareGPT | Alpaca, row: Mapping[str, Any], column: str, place: Place
) -> Mapping[str, Any]:
    """The row as it would be if the answer under `column` were its only one. An answer may be the whole conversation,
    beside which the prompt may stand again (or another answer to it, as UltraFeedback has it under `messages`)."""
    answer, here = row[column], place.key(column)
    if isinstance(layout, Alpaca):
        return {**row, layout.output_column: _text_of(answer, layout, here)}
    turns = list(answer) if isinstance(answer, (list, tuple)) else [answer]
    names = ("role", "content") if isinstance(layout, Messages) else (layout.role_tag, layout.content_tag)
    assistant = "assistant" if isinstance(layout, Messages) else layout.assistant_tag
    turns = [{names[0]: assistant, names[1]: t} if isinstance(t, str) else t for t in turns]
    prompt, user = _prompt(layout, row), "user" if isinstance(layout, Messages) else layout.user_tag
    whole = _first(turns, names, user) if len(turns) > 1 and _role_of(turns[0], names[0]) in (user, "system") else None
    if whole is not None:
        if prompt and _first(prompt, names, user) != whole:
            raise here.error("DPO_PROMPT", "is a conversation that begins with another prompt than the row names",
                             "both must answer the same prompt")  # fmt: skip
        prompt = []
    return {**row, layout.messages_column: [*prompt, *turns]}


def _role_of(turn: object, role: str) -> object:
    return turn.get(role) if isinstance(turn, Mapping) else None


def _first(turns: Sequence[Any], names: tuple[str, str], user: str) -> object:
    """What the user says first; None if nothing."""
    return next((t.get(names[1]) for t in turns if _role_of(t, names[0]) == user), None)


def _prompt(layout: Messages | ShareGPT, row: Mapping[str, Any]) -> Sequence[Any]:
    """The turns in front of an answer; none where the answers are whole conversations."""
    turns = row.get(layout.messages_column)
    if turns is None and isinstance(layout, Messages):
        turns = row.get(layout.prompt_column)
        turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
    return turns if isinstance(turns, (list, tuple)) else [] if turns is None else [turns]


def _text_of(answer: object, layout: Alpaca, place: Place) -> object:
    """The words of an answer that may be a turn, or a list of one."""
    if isinstance(answer, (list, tuple)) and len(answer) == 1:
        answer = answer[0]
    if isinstance(answer, Mapping):
        found = next((answer[k] for k in ("content", "value") if k in answer), None)
        return required(answer, "content", place) if found is None else found
    return answer


def _conversation(sample: Sample) -> Conversation:
    assert isinstance(sample.content, tuple) and isinstance(sample.content[0], Conversation)
    return sample.content[0]


def _common(first: Sequence[Message], second: Sequence[Message]) -> int:
    """How many messages both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _role(conversation: Conversation, number: int) -> str:
    messages = conversation.messages
    return messages[number].role if number < len(messages) else "nothing"


def _compared(conversation: Conversation, prompt: int) -> Conversation:
    """Only the assistant's turns from number `prompt` on are trained, whatever the data flags."""
    messages = [
        replace(m, parts=tuple(replace(p, train=None) if isinstance(p, Text) else p for p in m.parts),
                train=i >= prompt and m.role == "assistant")
        for i, m in enumerate(conversation.messages)
    ]  # fmt: skip
    return replace(conversation, messages=tuple(messages))


def compared_layout(row: Mapping[str, Any], compare: Compare) -> Chat | None:
    """The format with the keys of a row whose answers are compared; None if there is none."""
    keys = {key for key, value in row.items() if value is not None}
    images = "image" if "image" in keys and "images" not in keys else "images"
    for column in ("messages", "conversations", "prompt", "chosen"):
        turns = row.get(column)
        first = turns[0] if isinstance(turns, (list, tuple)) and turns else None
        if column == "chosen" and {_role_of(first, "role"), _role_of(first, "from")} & {"assistant", "gpt"}:
            continue  # an answer alone: other keys tell the layout
        of_messages = "conversations" if column == "conversations" else "messages"
        if isinstance(first, Mapping) and "from" in first and column != "prompt":
            return ShareGPT(messages_column="conversations" if column == "chosen" else column, images_column=images)
        if (isinstance(first, Mapping) and "role" in first) or (column == "prompt" and isinstance(turns, str)):
            return Messages(messages_column=of_messages, images_column=images)
    if "instruction" in keys:
        return Alpaca(images_column=images)
    if compare == "pairs" and ("question" in keys or str(row.get("text")).lstrip().startswith("{")):
        return RLHFV(images_column=images)
    return None
