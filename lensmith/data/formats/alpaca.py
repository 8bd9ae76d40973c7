"""Alpaca's rows of instruction, input and output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lensmith.core.sample import Sample
from lensmith.data.formats.common import (
    ChatOptions,
    Place,
    Turn,
    chat_sample,
    checked_list,
    checked_text,
    conversation,
    make_turn,
    required,
    system_turn,
    wrong_type,
)
from lensmith.data.formats.parts import MediaQueue, marked_parts


class Alpaca(ChatOptions):
    """Rows of {instruction, input?, output, system?, history?: [[question, answer]], images?, videos?}.

    Instruction and input are joined by a line feed. Answers of the history are trained too.
    """

    kind: Literal["alpaca"] = "alpaca"
    instruction_column: str = "instruction"
    """Key of the question."""
    input_column: str = "input"
    """Key of what the question is about; may be missing or empty."""
    output_column: str = "output"
    """Key of the answer."""
    history_column: str = "history"
    """Key of the earlier [question, answer] pairs."""

    def parse(self, row: Mapping[str, Any], origin: str) -> Sample:
        """Raises DataError SCHEMA, NO_TARGET, IMAGE_COUNT, VIDEO_COUNT, MEDIA_KIND; Drop TEXT_BYTES."""
        place = Place(origin)
        queue = MediaQueue.of(row, self, place)
        turns = system_turn(row, self.system_column, place) + self._history(row, queue, place)
        here = place.key(self.instruction_column)
        turns.append(make_turn("user", marked_parts(self._prompt(row, place), queue), here))
        here = place.key(self.output_column)
        if row.get(self.output_column) is None:
            raise here.error("NO_TARGET", "there is no answer to train", "add one, or set output_column")
        answer = checked_text(row[self.output_column], here)
        turns.append(make_turn("assistant", marked_parts(answer, queue), here))
        talk = conversation(queue.in_front(turns), (), self.train)
        queue.settle(place)
        return chat_sample([talk], row, self, place)

    def _prompt(self, row: Mapping[str, Any], place: Place) -> str:
        required(row, self.instruction_column, place)
        columns = (self.instruction_column, self.input_column)
        texts = [checked_text(row[c], place.key(c)) for c in columns if row.get(c) is not None]
        return "\n".join(text for text in texts if text)

    def _history(self, row: Mapping[str, Any], queue: MediaQueue, place: Place) -> list[Turn]:
        turns: list[Turn] = []
        place = place.key(self.history_column)
        for index, item in enumerate(checked_list(row.get(self.history_column) or (), place)):
            here = place.item(index)
            pair = checked_list(item, here)
            if len(pair) != 2:
                raise wrong_type(pair, here, "[question, answer]")
            for side, role in enumerate(("user", "assistant")):
                text = checked_text(pair[side], here.item(side))
                turns.append(make_turn(role, marked_parts(text, queue), here.item(side)))
        return turns
