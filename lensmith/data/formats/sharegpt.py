"""ShareGPT's rows of {from, value} turns, with the tag names that LLaMA-Factory's users set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import model_validator

from lensmith.core.sample import Role, Sample
from lensmith.data.formats.common import (
    ChatOptions,
    Place,
    Turn,
    chat_sample,
    checked_list,
    checked_object,
    checked_text,
    conversation,
    make_turn,
    required,
    system_turn,
    tool_calls_from_text,
    tool_texts,
    unknown_role,
)
from lensmith.data.formats.parts import MediaQueue, marked_parts


class ShareGPT(ChatOptions):
    """Rows of {conversations: [{from: human | gpt, value}], system?, tools?, images?, videos?}."""

    kind: Literal["sharegpt"] = "sharegpt"
    messages_column: str = "conversations"
    """Key of the list of turns."""
    tools_column: str = "tools"
    """Key of the function signatures: a list, or JSON text of one."""
    role_tag: str = "from"
    """Key of a turn's role."""
    content_tag: str = "value"
    """Key of a turn's text."""
    user_tag: str = "human"
    """Role name of the user."""
    assistant_tag: str = "gpt"
    """Role name of the model."""
    observation_tag: str = "observation"
    """Role name of a tool's answer. Of this and the next tags: "" means that there is no such turn."""
    function_tag: str = "function_call"
    """Role name of a call by the model; its text is JSON {name, arguments} or a list of them."""
    system_tag: str = "system"
    """Role name of the system prompt, allowed in the first turn."""

    @model_validator(mode="after")
    def _tags_differ(self) -> Self:
        named = (self.user_tag, self.assistant_tag, self.observation_tag, self.function_tag, self.system_tag)
        if not (self.user_tag and self.assistant_tag):
            raise ValueError("user_tag and assistant_tag must be named")
        if len(self._roles()) < sum(map(bool, named)):
            raise ValueError("user_tag, assistant_tag, observation_tag, function_tag and system_tag must differ")
        return self

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, JSON, ROLE_ORDER, NO_TARGET, IMAGE_COUNT, VIDEO_COUNT, MEDIA_KIND; Drop
        TEXT_BYTES."""
        place = Place(origin)
        queue = MediaQueue.of(row, self, place)
        tools = tool_texts(row.get(self.tools_column), place.key(self.tools_column))
        here = place.key(self.messages_column)
        items = checked_list(required(row, self.messages_column, place), here)
        if not items:
            raise here.error("SCHEMA", "holds no messages")
        roles = self._roles()
        turns = [self._turn(item, roles, queue, here.item(index)) for index, item in enumerate(items)]
        if turns[0][1].role != "system":
            turns = system_turn(row, self.system_column, place) + turns
        talk = conversation(queue.in_front(turns), tools, self.train)
        queue.settle(here)
        return chat_sample([talk], row, self, place)

    def _roles(self) -> dict[str, Role]:
        roles: dict[str, Role] = {
            self.user_tag: "user",
            self.assistant_tag: "assistant",
            self.observation_tag: "tool",
            self.function_tag: "assistant",
            self.system_tag: "system",
        }
        return {tag: role for tag, role in roles.items() if tag}

    def _turn(self, value: object, roles: Mapping[str, Role], queue: MediaQueue, place: Place) -> Turn:
        message = checked_object(value, place)
        name = required(message, self.role_tag, place)
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise unknown_role(name, place.key(self.role_tag), tuple(roles))
        here = place.key(self.content_tag)
        text = checked_text(required(message, self.content_tag, place), here)
        if name == self.function_tag:
            return make_turn(role, (), here, calls=tool_calls_from_text(text, here))
        return make_turn(role, marked_parts(text, queue), here)
