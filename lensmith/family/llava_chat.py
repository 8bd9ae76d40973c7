"""The chat forms of LLaVA-1.5 and LLaVA-NeXT: Vicuna's and Mistral's.

Checked against the chat templates published for llava-1.5, llava-v1.6-vicuna and llava-v1.6-mistral, which stand in the
tests in our words.

The form (`vicuna` or `mistral`) is that of the model's own template; without one LLaVA-1.5 has Vicuna's and LLaVA-NeXT
Mistral's. In both the pictures of a turn stand before its text, each with a line feed behind it.

Deliberate differences from the vendor's template, by name:
- `typed_control_tokens`: `<image>`, `</s>`, ... inside data stay text;
- `end_of_answers`: Vicuna's template writes a space behind an answer and never `</s>`; here it is `</s>`, as in the
  training of the published weights, or a model would not learn to stop. Some Mistral templates write it `<\\s>`;
- `line_feeds_of_marks`: one line feed of the data right beside the place of a picture is not written again;
- `all_texts`: Mistral's template keeps the first text of system and assistant turns only and drops their pictures; here
  all of them are kept;
- tools: neither form has any, so such samples are left out (`Drop` TOOL_FORM).

Training: assistant text, the space before it and its `</s>` are targets. The space is: tokenizers of this kind join it
to the first word, and what a model is asked to go on from ends with `ASSISTANT:` or `[/INST]`.
"""

from __future__ import annotations

from typing import Literal

from lensmith.core.errors import Drop
from lensmith.core.sample import Conversation, Image, Message, Text, Video
from lensmith.data.encode import Film, Picture, Piece, Run, Template

END = "</s>"
Form = Literal["vicuna", "mistral"]


def render(conversation: Conversation, form: Form, vendor_end: str, *, ask: bool = False) -> list[Piece]:
    """Pieces of a conversation; `ask` ends where the assistant begins. `vendor_end` is how the model's own Mistral
    template spells `</s>`. Raises `Drop` TOOL_FORM."""
    if conversation.tools or any(m.role == "tool" or m.tool_calls for m in conversation.messages):
        raise Drop("TOOL_FORM", "tools have no place in this model's chat form")
    pieces: list[Piece] = [Template("<s>", vendor="")]  # the vendor's tokenizer puts it in front
    for message in conversation.messages:
        pieces += _vicuna(message) if form == "vicuna" else _mistral(message, vendor_end)
    return [*pieces, Template("ASSISTANT:")] if ask and form == "vicuna" else pieces


def media(part: Image | Video) -> list[Piece]:
    return [Film(part)] if isinstance(part, Video) else [Picture(part)]


def _vicuna(message: Message) -> list[Piece]:
    if message.role == "system":
        return _content(message, " ")
    if message.role == "user":
        return [Template("USER: "), *_content(message, " ")]
    written = " " if any(isinstance(p, Text) for p in message.parts) else ""
    return [Template("ASSISTANT:"), _lead(message), *_content(message, " ", Template(END, message.trained, written))]


def _mistral(message: Message, vendor_end: str) -> list[Piece]:
    if message.role == "system":
        return [Template("<<SYS>>\n"), *_content(message), Template("\n<</SYS>>\n\n")]
    if message.role == "user":
        return [Template("[INST] "), *_content(message), Template(" [/INST]")]
    end = Template(END, message.trained, vendor_end)
    return [_lead(message), *_content(message, "", end), Template(" ")]


def _content(message: Message, behind: str = "", end: Template | None = None) -> list[Piece]:
    """Pictures, each with a line feed, then texts, each with `behind`; `end` stands instead of the last of these."""
    pieces: list[Piece] = []
    for part in message.parts:
        if not isinstance(part, Text):
            pieces += [*media(part), Template("\n")]
    texts = _texts(message)
    for number, (before, text, after) in enumerate(texts, 1):
        trained = message.trained if text.train is None else text.train
        pieces += [Template("", vendor=before), Run(text.text, trained), Template("", vendor=after)]
        if end is None or number < len(texts):
            gone = (before or after) and not text.text
            pieces.append(Template("" if gone else behind, trained and end is not None, behind))
    return pieces if end is None else [*pieces, end]


def _texts(message: Message) -> list[tuple[str, Text, str]]:
    """The texts of a turn, each without one line feed right beside a picture, which is given before and behind it."""
    found: list[tuple[str, Text, str]] = []
    parts = message.parts
    for i, part in enumerate(parts):
        if not isinstance(part, Text):
            continue
        text, before, after = part.text, "", ""
        if i and not isinstance(parts[i - 1], Text) and text.startswith("\n"):
            text, before = text[1:], "\n"
        if i + 1 < len(parts) and not isinstance(parts[i + 1], Text) and text.endswith("\n"):
            text, after = text[:-1], "\n"
        found.append((before, Text(text, part.train), after))
    return found


def _lead(message: Message) -> Template:
    """The space before an answer, trained as its first word is."""
    first = message.parts[0] if message.parts else None
    if isinstance(first, Text) and first.train is not None:
        return Template(" ", first.train)
    return Template(" ", message.trained)
