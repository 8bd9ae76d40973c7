"""OpenAI's rows of messages, and rows whose branches share a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lensmith.core.sample import Conversation, Part, Role, Sample, ToolCall
from lensmith.data.formats.common import (
    ChatOptions,
    Place,
    Turn,
    chat_sample,
    checked_flag,
    checked_list,
    checked_object,
    checked_text,
    conversation,
    make_turn,
    required,
    system_turn,
    tool_call,
    tool_texts,
    unknown_role,
    wrong_type,
)
from lensmith.data.formats.parts import MediaQueue, block_parts, marked_parts

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}

RawTurns = list[tuple[Place, Any]]


class Messages(ChatOptions):
    """Rows of {messages: [{role, content, tool_calls?, train?}], images?, videos?, tools?}.

    Content is a string or a list of blocks. A row may hold `branches` instead of `messages`: lists of messages, each a
    conversation of its own behind the `shared` messages, each with marks for all of the row's images and videos.
    """

    kind: Literal["messages"] = "messages"
    messages_column: str = "messages"
    """Key of the list of messages."""
    branches_column: str = "branches"
    """Key of the list of branches, in rows that have no messages of their own."""
    shared_column: str = "shared"
    """Key of the messages that stand in front of every branch."""
    prompt_column: str = "prompt"
    """Key of the prompt (a text or a list of messages) of rows that have no messages."""
    completion_column: str = "completion"
    """Key of the answer to such a prompt: a text or a list of messages. Where a row has it, it alone is trained."""
    tools_column: str = "tools"
    """Key of the function signatures: a list, or JSON text of one."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, ROLE_ORDER, NO_TARGET, IMAGE_COUNT, VIDEO_COUNT, MEDIA_KIND; Drop TEXT_BYTES."""
        place = Place(origin)
        media = MediaQueue.of(row, self, place)
        tools = tool_texts(row.get(self.tools_column), place.key(self.tools_column))
        system = system_turn(row, self.system_column, place)
        conversations: list[Conversation] = []
        for here, raw in self._threads(row, place):
            queue = media.again()
            turns = [_turn(value, queue, at) for at, value in raw]
            if turns[0][1].role != "system":
                turns = system + turns
            conversations.append(conversation(queue.in_front(turns), tools, self.train))
            queue.settle(here)
        return chat_sample(conversations, row, self, place)

    def _threads(self, row: Mapping[str, Any], place: Place) -> list[tuple[Place, RawTurns]]:
        """The row's conversations: its messages, or each branch behind the shared messages."""
        if row.get(self.branches_column) is None:
            if row.get(self.messages_column) is None and row.get(self.completion_column) is not None:
                return [(place, self._completed(row, place))]
            here = place.key(self.messages_column)
            return [(here, _listed(required(row, self.messages_column, place), here))]
        if row.get(self.messages_column) is not None:
            raise place.error("SCHEMA", f"the row has both {self.messages_column!r} and {self.branches_column!r}",
                              f"put what the branches have in common under {self.shared_column!r}")  # fmt: skip
        shared = row.get(self.shared_column)
        front = [] if shared is None else _items(shared, place.key(self.shared_column))
        here = place.key(self.branches_column)
        branches = checked_list(row[self.branches_column], here)
        if not branches:
            raise here.error("SCHEMA", "holds no branches")
        return [(here.item(i), front + _listed(branch, here.item(i))) for i, branch in enumerate(branches)]

    def _completed(self, row: Mapping[str, Any], place: Place) -> RawTurns:
        """A prompt, of which nothing is trained, and its completion."""
        found: RawTurns = []
        for column, role in ((self.prompt_column, "user"), (self.completion_column, "assistant")):
            value, here = required(row, column, place), place.key(column)
            turns = [(here, {"role": role, "content": value})] if isinstance(value, str) else _listed(value, here)
            if role == "user":
                turns = [(at, {**turn, "train": False} if isinstance(turn, Mapping) else turn) for at, turn in turns]
            found += turns
        return found


def _items(value: object, place: Place) -> RawTurns:
    return [(place.item(index), item) for index, item in enumerate(checked_list(value, place))]


def _listed(value: object, place: Place) -> RawTurns:
    items = _items(value, place)
    if not items:
        raise place.error("SCHEMA", "holds no messages")
    return items


def _turn(value: object, queue: MediaQueue, place: Place) -> Turn:
    message = checked_object(value, place)
    name = required(message, "role", place)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise unknown_role(name, place.key("role"), tuple(_ROLES))
    calls = _calls(message, role, place)
    parts = _content(message, queue, place, may_be_null=bool(calls))
    return make_turn(role, parts, place.key("content"), calls=calls, train=_train(message, place))


def _content(message: Mapping[str, Any], queue: MediaQueue, place: Place, *, may_be_null: bool) -> Sequence[Part]:
    content = message.get("content") if may_be_null else required(message, "content", place)
    place = place.key("content")
    if content is None and may_be_null:
        return ()
    if isinstance(content, str):
        return marked_parts(checked_text(content, place), queue)
    if not isinstance(content, (list, tuple)):
        raise wrong_type(content, place, "a string or a list of blocks")
    return block_parts(content, queue, place)


def _calls(message: Mapping[str, Any], role: Role, place: Place) -> tuple[ToolCall, ...]:
    """The message's tool calls, also as the one `function_call` of OpenAI's older rows."""
    if message.get("function_call") is not None:
        calls = (tool_call(message["function_call"], place.key("function_call")),)
    else:
        place = place.key("tool_calls")
        items = checked_list(message.get("tool_calls") or (), place)
        calls = tuple(tool_call(item, place.item(index)) for index, item in enumerate(items))
    if calls and role != "assistant":
        raise place.error("SCHEMA", f"a {role} turn cannot call tools")
    return calls


def _train(message: Mapping[str, Any], place: Place) -> bool | None:
    """The turn's own flag: `train`, or OpenAI's `weight` of 0 or 1."""
    train, weight = checked_flag(message, "train", place), message.get("weight")
    if weight is None:
        return train
    if train is not None:
        raise place.error("SCHEMA", "has both train and weight", "keep one of the two")
    if weight not in (0, 1):
        raise place.key("weight").error("SCHEMA", f"is {weight!r}, must be 0 or 1")
    return bool(weight)
