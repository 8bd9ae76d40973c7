"""The lensmith run that is being made of a LLaMA-Factory file, with a decision on every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lensmith.config.yaml_file import Key as Path
from lensmith.config.yaml_file import Tree
from lensmith.migrate.given import Given, shown
from lensmith.migrate.keys import UNSUPPORTED, Verdict

MATTER = (
    "finetuning_type", "freeze_vision_tower", "freeze_multi_modal_projector", "learning_rate", "num_train_epochs",
    "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "cutoff_len",
    "image_max_pixels", "image_min_pixels", "video_max_pixels", "video_fps", "video_maxlen",
    "disable_gradient_checkpointing", "max_grad_norm", "weight_decay", "seed", "save_steps", "save_total_limit",
    "packing",
)  # fmt: skip
"""Keys whose defaults decide what is trained: they are told even where they are left out."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What became of a key. `given`: it stands in the file; else it is a default that matters."""

    key: str
    value: str
    verdict: Verdict
    to: str
    about: str
    given: bool = True


@dataclass
class Draft:
    """Values by dotted path, each with the key it came from; decisions by key; warnings in the order they came."""

    given: Given
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    origins: dict[Path, str] = field(default_factory=dict[Path, str])
    decisions: dict[str, Decision] = field(default_factory=dict[str, Decision])
    warnings: list[str] = field(default_factory=list[str])
    roots: list[str] = field(default_factory=list[str])
    """Folders outside the data that its first rows name pictures in."""
    system: str | None = None
    """System prompt of rows that have none, where the family would write another one."""

    def put(self, dotted: str, value: Any, key: str, inside: Mapping[str, str] | None = None) -> None:
        """Set an option of the run; `key` is where its value comes from, `inside` that of options in a mapping."""
        *above, last = dotted.split(".")
        node = self.values
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value
        path = tuple(dotted.split("."))
        self.origins[path] = key
        for option, own in (inside or {}).items():
            if option in value:
                self.origins[(*path, option)] = own

    def at(self, dotted: str) -> Any:
        """What is set there; None if nothing is."""
        node: Any = self.values
        for name in dotted.split("."):
            node = node.get(name) if isinstance(node, dict) else None
        return node

    def decide(self, name: str, verdict: Verdict, about: str, to: str | None = None) -> None:
        """A decision that the table of keys alone does not tell."""
        key = self.given.keys[name]
        value = shown(self.given.get(name))
        self.decisions[name] = Decision(name, value, verdict, key.to if to is None else to, about, self.given.has(name))

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)

    def settle(self) -> list[Decision]:
        """All decisions, in the order of the file, then defaults that matter. Raises `ConfigError` MIGRATE for a key
        that asks for something lensmith does not have."""
        given = self.given
        for name, value in given.values.items():
            key = given.keys[name]
            if name in self.decisions:
                continue
            if value is None:
                self.decisions[name] = Decision(name, "null", "taken", "", "left out, so the default holds")
            elif key.verdict == UNSUPPORTED and key.asks(value):
                given.refuse(name, "not supported", key.about)
            elif key.verdict == UNSUPPORTED:
                self.decide(name, "not needed", "off")
            else:
                self.decide(name, key.verdict, key.about)
        for name in MATTER:
            if not given.has(name) and name not in self.decisions:
                self.decide(name, given.keys[name].verdict, given.keys[name].about)
        defaults = [n for n in self.decisions if n not in given.values]
        return [self.decisions[n] for n in (*given.values, *defaults)]

    def tree(self) -> Tree:
        """The run's tree; a mistake in it is located at the key that it came from."""
        lines: dict[Path, int] = {}
        overrides: dict[Path, str] = {}
        for path, key in self.origins.items():
            if (key,) in self.given.tree.overrides:
                overrides[path] = self.given.tree.overrides[(key,)]
            elif (key,) in self.given.tree.lines:
                lines[path] = self.given.tree.lines[(key,)]
        return Tree(self.values, self.given.tree.file, lines, overrides)
