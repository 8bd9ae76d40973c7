"""The options of held-out evaluation."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from lensmith.config.part import Part


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression: {error}") from None
    return text


class Generate(Part):
    """Answers generated greedily for held-out questions and compared with the reference, exact match."""

    max_new_tokens: int = Field(default=32, ge=1)
    """Longest answer in tokens."""
    groups: dict[str, Annotated[str, AfterValidator(_pattern)]] = Field(default_factory=dict)
    """Name -> regular expression over the whole reference answer; each group is also scored by itself."""
    baseline: bool = True
    """Also score the commonest training answer to the same question text: what is right without looking."""
    swapped: bool = False
    """Also score with each question shown another sample's pictures: what is right without this picture."""
    during: int | None = Field(default=200, ge=1)
    """Held-out samples used while training goes on, always the same ones; before and after it all are. null: all."""
    max_samples: int | None = Field(default=None, ge=1)
    """Most held-out samples ever used."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Prompt tokens that are generated from at once, padding included."""
    show: int = Field(default=12, ge=0)
    """Held-out samples shown in the report with picture and answers before and after."""


class Evaluate(Part):
    """What is measured on held-out data, and when."""

    every_steps: int | None = Field(default=None, ge=1)
    """Evaluate after so many steps. Left out: only before and after."""
    before: bool = True
    """Evaluate once before the first step."""
    loss: bool = True
    """Mean loss per supervised token."""
    generate: Generate | None = None
    """Left out: no answers are generated."""
