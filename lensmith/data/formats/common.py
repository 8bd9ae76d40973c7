"""What the row formats share: values with their place in the row, tool calls, turn order, documents."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lensmith.config.part import Part as Options
from lensmith.core.errors import DataError, Drop
from lensmith.core.sample import ROLES, Conversation, Document, Message, Part, Role, Sample, Text, ToolCall
from lensmith.data.strict_json import key_list, parse_json, printable

MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A value's place: the origin of its row and the path to it inside the row (`messages[2].content`)."""

    origin: str
    path: str = ""

    def key(self, name: str) -> Place:
        return Place(self.origin, f"{self.path}.{name}" if self.path else name)

    def item(self, index: int) -> Place:
        return Place(self.origin, f"{self.path}[{index}]")

    def error(self, code: str, message: str, remedy: str = "") -> DataError:
        text = f"{self.path}: {message}" if self.path else message
        return DataError(code, printable(text), where=self.origin, remedy=remedy)


class RowOptions(Options):
    """Options that every row format has."""

    images_column: str = "images"
    """Key of the row's pictures: a list of paths, `data:` URLs, bytes or {bytes, path}, or one of these. `images` and
    `image` stand for each other in rows that have only one of them. Of this and of other columns: "" means that rows
    have none."""
    videos_column: str = "videos"
    """Key of the row's videos: a list of paths, bytes or {bytes, path}, or one of these; a list of pictures in that
    list is a video by its frames. `videos` and `video` stand for each other."""
    id_column: str = "id"
    """Key of the row's id (text or a whole number). Rows without it have no id."""


class ChatOptions(RowOptions):
    """Options that every format of conversations has."""

    system_column: str = "system"
    """Key of the row's system prompt. A system turn among the messages goes before it."""
    default_system: str | None = None
    """System prompt of rows that have none. Left out: as the model's family writes it."""
    train: Literal["assistant", "last", "all"] = "assistant"
    """Turns that are trained where the data does not say: every assistant turn, the last one only, or every turn."""
    unanswered: Literal["keep", "error"] = "keep"
    """A conversation that ends before its last answer: trained up to there, or a wrong row."""
    objects_column: str = "objects"
    """Key of a row's objects, as ms-swift has them: {ref: [names], bbox: [[x1, y1, x2, y2]]}, placed by <ref-object>
    and <bbox> in the texts."""
    boxes: Literal["shown", "thousandths"] | None = None
    """Coordinates that boxes are written in: pixels of the picture as it is shown, or thousandths of its sides. Left
    out: a row with boxes is an error."""
    unplaced: Literal["error", "front"] = "error"
    """Pictures and videos of a row whose texts have no marks at all: an error, or put in front of the first user
    turn."""
    chosen_column: str = "chosen"
    """Key of the better answer, where an objective compares pairs: a text, a turn, or a list of turns."""
    rejected_column: str = "rejected"
    """Key of the worse answer."""
    label_column: str = "label"
    """Key of true (a good answer) or false, where an objective learns from labels."""
    margin_column: str = "margin"
    """Key of how much better the chosen answer is, for reward models; rows may lack it."""


# --- values -----------------------------------------------------------------------------------------------------------


def checked_text(value: object, place: Place, *, limit: int | None = MAX_TEXT_BYTES) -> str:
    """`value` as text. Raises DataError SCHEMA; Drop TEXT_BYTES above `limit` bytes."""
    if not isinstance(value, str):
        raise wrong_type(value, place, "a string")
    # a character has 1 to 4 bytes: most texts need no encoding to be known as short
    if limit is not None and len(value) * 4 > limit and (size := len(value.encode())) > limit:
        raise Drop("TEXT_BYTES", f"{place.path} has {size:,} of at most {limit:,} bytes")
    return value


def required(row: Mapping[str, Any], key: str, place: Place) -> Any:
    """The value of `key`. Raises DataError SCHEMA if it is missing."""
    if key not in row:
        raise place.key(key).error("SCHEMA", f"is missing (found: {key_list(row)})")
    return row[key]


def checked_list(value: object, place: Place) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise wrong_type(value, place, "a list")
    return value


def checked_object(value: object, place: Place) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise wrong_type(value, place, "an object")
    return value


def wrong_type(value: object, place: Place, wanted: str) -> DataError:
    found = "null" if value is None else type(value).__name__
    return place.error("SCHEMA", f"is {found}, must be {wanted}")


def json_text(value: object, place: Place) -> str:
    """JSON text of what a row holds as objects. Raises DataError SCHEMA for Parquet's bytes and dates."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:
        raise place.error("SCHEMA", str(error)) from None


def row_id(row: Mapping[str, Any], column: str, place: Place) -> str | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise wrong_type(value, place.key(column), "text or a whole number")
    return str(value)


def checked_flag(row: Mapping[str, Any], key: str, place: Place) -> bool | None:
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise wrong_type(value, place.key(key), "true or false")
    return value


# --- tools ------------------------------------------------------------------------------------------------------------


def tool_texts(value: object, place: Place) -> tuple[str, ...]:
    """Function signatures from a list of objects or JSON texts, or from JSON text of such a list."""
    if isinstance(value, str):
        value = _parsed(value, place) if value.strip() else None
    if value is None:
        return ()
    if isinstance(value, Mapping):
        value = [value]
    tools = checked_list(value, place)
    return tuple(_tool_text(tool, place.item(index)) for index, tool in enumerate(tools))


def _tool_text(value: object, place: Place) -> str:
    if isinstance(value, str):
        checked_object(_parsed(value, place), place)
        return value
    return json_text(checked_object(value, place), place)


def tool_call(value: object, place: Place) -> ToolCall:
    """{name, arguments}, bare or as OpenAI's {type: function, function: {...}}."""
    call = checked_object(value, place)
    if call.get("function") is not None:
        place = place.key("function")
        call = checked_object(call["function"], place)
    name = checked_text(required(call, "name", place), place.key("name"))
    arguments = call.get("arguments")
    if arguments is None:
        return ToolCall(name, "{}")
    place = place.key("arguments")
    if isinstance(arguments, str):
        return ToolCall(name, checked_text(arguments, place))
    return ToolCall(name, json_text(checked_object(arguments, place), place))


def tool_calls_from_text(text: str, place: Place) -> tuple[ToolCall, ...]:
    """The calls in JSON text of {name, arguments} or of a list of them."""
    value = _parsed(text, place)
    calls = value if isinstance(value, list) else [value]
    return tuple(tool_call(call, place.item(index)) for index, call in enumerate(calls))


def _parsed(text: str, place: Place) -> object:
    return parse_json(text.encode(), f"{place.origin}: {place.path}")


# --- turns ------------------------------------------------------------------------------------------------------------

Turn = tuple[Place, Message]

_MAY_FOLLOW: dict[Role, tuple[Role | None, ...]] = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def make_turn(role: Role, parts: Sequence[Part], place: Place, *, calls: tuple[ToolCall, ...] = (),
              train: bool | None = None) -> Turn:  # fmt: skip
    """A message with its place. Raises DataError SCHEMA if it holds nothing (a tool may answer with nothing)."""
    filled = calls or any(not isinstance(p, Text) or p.text.strip() for p in parts)
    if not filled and role != "tool":
        raise place.error("SCHEMA", f"empty {role} turn")
    return place, Message(role, tuple(parts), calls, train)


def system_turn(row: Mapping[str, Any], column: str, place: Place) -> list[Turn]:
    """The row's system prompt as a turn; none if it is missing or empty. Marks in it are plain text."""
    value, place = row.get(column), place.key(column)
    text = "" if value is None else checked_text(value, place)
    return [make_turn("system", [Text(text)], place)] if text.strip() else []


def unknown_role(found: object, place: Place, known: Sequence[str] = ROLES) -> DataError:
    if not isinstance(found, str):
        return wrong_type(found, place, "a string")
    return place.error("ROLE_ORDER", f"unknown role {found[:40]!r}", f"known here are {', '.join(known)}")


def conversation(
    turns: Sequence[Turn], tools: tuple[str, ...], train: Literal["assistant", "last", "all"]
) -> Conversation:
    """Turns in order as one conversation. Raises DataError ROLE_ORDER, NO_TARGET."""
    before: Role | None = None
    for place, message in turns:
        if before not in _MAY_FOLLOW[message.role]:
            follow = "open the conversation" if before is None else f"follow {before}"
            raise place.error("ROLE_ORDER", f"a {message.role} turn cannot {follow}",
                              "the order is system (once, first), user, assistant, user, ...; tool turns stand "
                              "between two assistant turns")  # fmt: skip
        before = message.role
    messages = _supervised([message for _, message in turns], train)
    if not any(_has_target(message) for message in messages):
        raise turns[-1][0].error("NO_TARGET", "no turn of this conversation is trained", "add an assistant turn")
    return Conversation(tuple(messages), tools)


def _supervised(messages: list[Message], train: str) -> list[Message]:
    """Flags of the data stay; `train` decides the rest."""
    if train == "all":
        return [replace(m, train=True) if m.train is None else m for m in messages]
    if train == "last":
        last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
        return [
            replace(m, train=False) if m.role == "assistant" and m.train is None and i != last else m
            for i, m in enumerate(messages)
        ]
    return messages


def _has_target(message: Message) -> bool:
    flags = [part.train for part in message.parts if isinstance(part, Text)]
    if not message.trained:
        return any(flags)
    return bool(message.tool_calls) or any(flag is not False for flag in flags)


def chat_sample(
    conversations: Sequence[Conversation], row: Mapping[str, Any], options: ChatOptions, place: Place
) -> Sample:
    """The sample of a row, with a note when a conversation ends before its last answer."""
    if options.default_system:
        conversations = [_with_system(c, options.default_system) for c in conversations]
    last = [c.messages[-1] for c in conversations]
    notes = ("unanswered",) if any(m.role in ("user", "tool") and not _has_target(m) for m in last) else ()
    if notes and options.unanswered == "error":
        raise place.error("ROLE_ORDER", "the conversation ends without an answer", "add one")
    return Sample(place.origin, tuple(conversations), id=row_id(row, options.id_column, place), notes=notes)


def _with_system(conversation: Conversation, prompt: str) -> Conversation:
    if conversation.messages[0].role == "system":
        return conversation
    return replace(conversation, messages=(Message("system", (Text(prompt),)), *conversation.messages))


# --- documents --------------------------------------------------------------------------------------------------------


def document(parts: Sequence[Part], place: Place) -> Document:
    """Parts as a document. Raises DataError NO_TARGET; Drop EMPTY."""
    texts = [part for part in parts if isinstance(part, Text) and part.text.strip()]
    if not texts:
        raise Drop("EMPTY", "the document has no text")
    if all(text.train is False for text in texts):
        raise place.error("NO_TARGET", "no text of this document is trained", "mark what is to be trained")
    return Document(tuple(parts))


def joined(parts: Sequence[Part]) -> list[Part]:
    """Texts that touch and are trained alike as one text."""
    result: list[Part] = []
    for part in parts:
        last = result[-1] if result else None
        if isinstance(part, Text) and isinstance(last, Text) and part.train == last.train:
            result[-1] = Text(last.text + part.text, last.train)
        else:
            result.append(part)
    return result
