"""Scores of generated answers. Pure functions over strings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence


def exact_match(answers: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Equal after removing white space at both ends."""
    return [a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]


def by_group(right: Sequence[bool], references: Sequence[str], groups: Mapping[str, str]) -> dict[str, float]:
    """Shares {exact_match, exact_match/GROUP...}; a group is a full-match pattern over the reference."""
    out = {"exact_match": sum(right) / len(right)} if right else {}
    for name, pattern in groups.items():
        inside = [ok for ok, ref in zip(right, references, strict=True) if re.fullmatch(pattern, ref.strip())]
        if inside:
            out[f"exact_match/{name}"] = sum(inside) / len(inside)
    return out


def commonest_answers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Question text -> its commonest answer; ties go to the answer that was seen first."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in pairs:
        counts[question][answer.strip()] += 1
    return {q: c.most_common(1)[0][0] for q, c in counts.items()}
