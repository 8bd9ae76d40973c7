"""The model's own jinja chat template, rendered in a sandbox: to learn its default system prompt and to check ours."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lensmith.core.errors import ModelError
from lensmith.core.sample import Conversation, Message, Part, Text, Video

MAX_TEMPLATE = 1 << 18


class Generation(Extension):
    """`{% generation %}`, with which transformers' templates mark what the assistant says; it writes nothing itself."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render_vendor(
    template: str, conversation: Conversation, *, add_generation_prompt: bool = False, blocks: bool = False
) -> str:
    """A conversation as the model's template writes it. Raises `ModelError` TEMPLATE when it does not render.

    `blocks`: contents without pictures are lists of blocks too, not one text. Some templates drop what is a text.
    """
    if len(template) > MAX_TEMPLATE:
        raise ModelError(
            "TEMPLATE", f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE} are read"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = _raise
    try:
        return environment.from_string(template).render(
            messages=[_plain(m, blocks) for m in conversation.messages],
            tools=[json.loads(t) for t in conversation.tools] or None,
            add_generation_prompt=add_generation_prompt,
        )
    except (
        TemplateError,
        TypeError,
        ValueError,
        ArithmeticError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ModelError("TEMPLATE", f"the model's chat template does not render: {type(error).__name__}: {error}",
                         remedy="set model.template: force to train on the family's form") from None  # fmt: skip


def _raise(message: str) -> None:
    raise TemplateError(message)


def _plain(message: Message, blocks: bool) -> dict[str, Any]:
    if not blocks and all(isinstance(p, Text) for p in message.parts):
        content: Any = "".join(p.text for p in message.parts if isinstance(p, Text))
    else:
        content = [_block(p) for p in message.parts]
    out: dict[str, Any] = {"role": message.role, "content": content}
    if message.tool_calls:
        out["tool_calls"] = [{"function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls]
    return out


def _block(part: Part) -> dict[str, str]:
    if isinstance(part, Text):
        return {"type": "text", "text": part.text}
    return {"type": "video" if isinstance(part, Video) else "image"}


def default_system(template: str) -> str | None:
    """What the template puts in front when a conversation has no system message; None for nothing."""
    text = render_vendor(template, Conversation((Message("user", (Text("q"),)),)))
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    return found.group(1) if found else None
