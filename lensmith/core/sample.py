"""The nouns of training data, before any model is known. No I/O here.

A *sample* is one row of a source. It holds a document (text and images in reading order), a conversation, or several
of them. Several in one sample are *branches*: independent of each other, each trained as if it stood alone; what they
have in common at the front (the picture, the system prompt) is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Text:
    """A piece of text, exactly as in the data. `train` None means: as the message or document says."""

    text: str
    train: bool | None = None


@dataclass(frozen=True, slots=True)
class Image:
    """A picture by path (as written in the data) or by encoded bytes (Parquet, `data:` URL). Exactly one is set."""

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class Video:
    """A video by path, by encoded bytes, or as its pictures in order (`frames`, taken `fps` a second).

    Exactly one of `path`, `data` and `frames` is set.
    """

    path: str | None = None
    data: bytes | None = field(default=None, repr=False)
    frames: tuple[Image, ...] = ()
    fps: float | None = None


Part = Text | Image | Video


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the assistant makes. `arguments` is JSON text, kept as written where it was text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `train` None means: assistant turns are trained, all others are not."""

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    train: bool | None = None

    @property
    def trained(self) -> bool:
        return self.role == "assistant" if self.train is None else self.train


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages in order. `tools` are JSON texts of function signatures, one each."""

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """Text, images and videos in reading order; by default all text is trained (continued pretraining)."""

    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """What a sample says of its answers. Of two branches the first has the chosen answer and the second the rejected
    one (`label` None); of one, `label` says whether its answer is a good one.

    `margin`: by how much the chosen answer is better, where the data says so.
    """

    label: bool | None = None
    margin: float = 0.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a source. `origin` ("train.jsonl:17") is repeated by every later error, drop and incident."""

    origin: str
    content: Document | tuple[Conversation | Document, ...]
    id: str | None = None
    notes: tuple[str, ...] = ()
    preference: Preference | None = None
    """None: every branch is to be learnt."""

    def good(self) -> tuple[Conversation | Document, ...]:
        """The branches that say what is to be said: not the rejected answer of a pair, nor one that is labelled bad."""
        branches = (self.content,) if isinstance(self.content, Document) else self.content
        if self.preference is None:
            return branches
        return branches[:1] if self.preference.label is not False else ()

    def images(self) -> list[Image]:
        """Every image in reading order, branch by branch, with repeats. Frames of videos are not among them."""
        return [p for p in self.parts() if isinstance(p, Image)]

    def videos(self) -> list[Video]:
        return [p for p in self.parts() if isinstance(p, Video)]

    def media(self) -> list[Image | Video]:
        """Images and videos in reading order, branch by branch, with repeats."""
        return [p for p in self.parts() if not isinstance(p, Text)]

    def most_images(self) -> int:
        """Images of the branch that has most."""
        return max(sum(isinstance(p, Image) for p in branch) for branch in self._branches())

    def parts(self) -> list[Part]:
        """Every part in reading order, branch by branch."""
        return [part for branch in self._branches() for part in branch]

    def _branches(self) -> list[list[Part]]:
        branches = (self.content,) if isinstance(self.content, Document) else self.content
        return [
            list(b.parts) if isinstance(b, Document) else [p for m in b.messages for p in m.parts] for b in branches
        ]
