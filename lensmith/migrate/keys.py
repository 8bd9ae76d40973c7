"""Every key of LLaMA-Factory's YAML, as data: its type and default there, and what becomes of it here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["taken", "taken with a difference", "not needed", "not supported"]
TAKEN, DIFFERS, UNNEEDED, UNSUPPORTED = (
    "taken",
    "taken with a difference",
    "not needed",
    "not supported",
)
Kind = Literal["text", "int", "float", "bool", "list", "mapping", "any"]
"""`list`: one text with commas between, or a list. `mapping`: a mapping, JSON text of one, or the name of a file."""

Row = tuple[str, Kind, Any, Verdict, str, str]
"""Name, type, default, verdict, where it goes in a lensmith run file, and a word on it. Of a key that is not supported
the word is the remedy, and its default is the value that asks for nothing."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key. `group` is the class that declares it in LLaMA-Factory (`TrainingArguments`: transformers')."""

    group: str
    name: str
    kind: Kind
    default: Any
    verdict: Verdict
    to: str
    about: str

    def asks(self, value: Any) -> bool:
        """Whether a value asks for anything: it is neither the default nor one of nothing."""
        return value not in (self.default, None, False, "", []) and value != {}


def rows(group: str, found: tuple[Row, ...]) -> tuple[Key, ...]:
    return tuple(Key(group, *row) for row in found)


def all_keys() -> dict[str, Key]:
    """Name -> key, in the order of LLaMA-Factory's classes. A name that two classes declare stands once."""
    from lensmith.migrate import keys_engines, keys_model, keys_training, keys_tuning

    found: dict[str, Key] = {}
    for key in (*keys_model.KEYS, *keys_tuning.KEYS, *keys_training.KEYS, *keys_engines.KEYS):
        found.setdefault(key.name, key)
    return found
