"""MiniCPM-V 4.6 and 4.7: what a message says, its reasoning apart, tools and calls. See `minicpm_v4.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Text, ToolCall, Video
from lensmith.data.encode import Picture, Piece, Run, Template

TOOLS_HEAD = "# Tools\n\nYou have access to the following functions:\n\n<tools>"
TOOLS_TAIL = (
    "\n</tools>\n\nIf you choose to call a function ONLY reply in the following format with NO suffix:\n\n"
    "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>\nvalue_1\n</parameter>\n"
    "<parameter=example_parameter_2>\nThis is the value for the second parameter\nthat can span\nmultiple lines\n"
    "</parameter>\n</function>\n</tool_call>\n\n<IMPORTANT>\nReminder:\n"
    "- Function calls MUST follow the specified format: an inner <function=...></function> block must be nested within "
    "<tool_call></tool_call> XML tags\n- Required parameters MUST be specified\n"
    "- You may provide optional reasoning for your function call in natural language BEFORE the function call, but NOT "
    "after\n- If there is no function call available, answer the question like normal with your current knowledge and "
    "do not tell the user about function calls\n</IMPORTANT>"
)
"""Part of the model's prompt format: any other wording would be another prompt."""


def contents_of(conversation: Conversation, numbered: bool) -> list[list[Piece]]:
    """What each message says, its blocks joined by line feeds, stripped; pictures counted over the conversation."""
    contents: list[list[Piece]] = []
    number = 0
    for message in conversation.messages:
        pieces: list[Piece] = []
        before = None
        for part in message.parts:
            if before is not None and not (isinstance(before, Text) and isinstance(part, Text)):
                pieces.append(Template("\n", message.trained))
            before = part
            if isinstance(part, Text):
                pieces.append(Run(part.text, message.trained if part.train is None else part.train))
            elif isinstance(part, Video):
                raise Drop("VIDEO_KIND", "this model family takes no videos")
            else:
                if numbered:
                    pieces.append(Template(f"<image_id>{number}</image_id>", vendor=""))
                pieces.append(Picture(part))
                number += 1
        contents.append(_cut(pieces, *_stripped(_text(pieces))))
    return contents


def _shown(piece: Piece) -> str:
    """As the template sees it. A picture, of whatever length, is no space and no tag."""
    if isinstance(piece, Picture):
        return "\ufffc"
    return piece.text if isinstance(piece, Run) or piece.vendor is None else piece.vendor  # type: ignore[union-attr]


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(map(_shown, pieces))


def _stripped(text: str, begin: int = 0, end: int | None = None) -> tuple[int, int]:
    """Where the text between two places begins and ends without the space around it."""
    inner = text[begin:end]
    begin += len(inner) - len(inner.lstrip())
    return begin, begin + len(inner.strip())


def _cut(pieces: Sequence[Piece], begin: int, end: int) -> list[Piece]:
    """The pieces between two places of `_text`, the borders cut."""
    kept: list[Piece] = []
    at = 0
    for piece in pieces:
        text = _shown(piece)
        first, last = max(begin - at, 0), min(end - at, len(text))
        if text == "" and begin <= at < end:
            kept.append(piece)
        elif first < last:
            kept.append(piece if isinstance(piece, Picture) else replace(piece, text=text[first:last]))  # type: ignore[call-arg]
        at += len(text)
    return kept


def is_tool_response(content: Sequence[Piece]) -> bool:
    text = _text(content)
    return text.startswith("<tool_response>") and text.endswith("</tool_response>")


def split_reasoning(content: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Reasoning and answer, at the tags in the text; all is answer where there are none."""
    text, close = _text(content), "</think>"
    if close not in text:
        return [], content
    first = text.index(close)
    opened = text.rfind("<think>", 0, first)
    begin = 0 if opened < 0 else opened + len("<think>")
    rest = text.rindex(close) + len(close)
    rest += len(text[rest:]) - len(text[rest:].lstrip("\n"))
    return _cut(content, *_stripped(text, begin, first)), _cut(content, rest, len(text))


# -- tools ------------------------------------------------------------------------------------------------------------


def system_with_tools(tools: Sequence[str], system: list[Piece]) -> list[Piece]:
    pieces: list[Piece] = [Template("<|im_start|>system\n" + TOOLS_HEAD)]
    for tool in tools:
        pieces += [Template("\n"), Run(json.dumps(json.loads(tool), ensure_ascii=False))]
    between = [Template("\n\n")] if system else []
    return [*pieces, Template(TOOLS_TAIL), *between, *system, Template("<|im_end|>\n")]


def tool_call(call: ToolCall, trained: bool) -> list[Piece]:
    try:
        arguments = json.loads(call.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise Drop("TOOL_FORM", f"the arguments of a call of {call.name!r} are no JSON object")
    pieces: list[Piece] = [Template("<function=", trained), Run(call.name, trained), Template(">\n", trained)]
    for name, value in arguments.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
        pieces += [Template("<parameter=", trained), Run(name, trained), Template(">\n", trained), Run(text, trained)]
        pieces.append(Template("\n</parameter>\n", trained))
    return [*pieces, Template("</function>\n</tool_call>", trained)]
