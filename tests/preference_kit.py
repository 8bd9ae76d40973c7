"""Rows of pairs and of labelled answers for tests, some about pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from lensmith.core.encoded import Compared, PackedRow


def make_pairs(folder: Path, count: int, *, seed: int = 0, name: str = "pairs.jsonl") -> Path:
    """`count` pairs as JSONL: messages, chosen and rejected; two thirds show one or two pictures."""
    rng = np.random.default_rng(seed)
    names = tiny.make_pictures(folder, 4, seed)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        images = [] if rng.random() < 1 / 3 else [str(i) for i in rng.choice(names, rng.integers(1, 3))]
        messages = [{"role": "user", "content": "<image>" * len(images) + words(rng, 2, 9)}]
        if rng.random() < 0.3:
            messages += [
                {"role": "assistant", "content": words(rng, 1, 4)},
                {"role": "user", "content": words(rng, 1, 4)},
            ]
        row = {"messages": messages, "chosen": words(rng, 1, 8) + " a", "rejected": words(rng, 1, 8) + " b"}
        rows.append(row | ({"images": images} if images else {}) | ({"margin": 0.5} if n % 3 == 0 else {}))
    return _write(folder / name, rows)


def make_labelled(folder: Path, count: int, *, seed: int = 0, name: str = "labels.jsonl") -> Path:
    """`count` labelled answers as JSONL in the form of TRL: prompt, completion, label."""
    rng = np.random.default_rng(seed)
    names = tiny.make_pictures(folder, 4, seed)
    rows: list[dict[str, Any]] = []
    for n in range(count):
        images = [] if rng.random() < 1 / 3 else [str(rng.choice(names))]
        prompt = [{"role": "user", "content": "<image>" * len(images) + words(rng, 2, 9)}]
        answer = [{"role": "assistant", "content": words(rng, 1, 8)}]
        row: dict[str, Any] = {"prompt": prompt, "completion": answer, "label": n % 3 != 0}
        rows.append(row | ({"images": images} if images else {}))
    return _write(folder / name, rows)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(rng.choice(tiny.WORDS, rng.integers(low, high)))


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# -- rows of given log-probabilities ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """Log-probabilities of an answer's tokens, and under the reference that of the whole."""

    role: int
    logps: tuple[float, ...]
    reference: float = 0.0
    weight: float = 1.0
    source: int = 0
    margin: float = 0.0


def compared_row(answers: Sequence[Answer], statistic: float = 0.0, *, reference: bool = True) -> PackedRow:
    """A row in which nothing but answers is said; the two of a pair stand behind each other."""
    lengths = np.array([len(a.logps) for a in answers], np.int32)
    total, none = int(lengths.sum()), np.zeros(0, np.int32)
    sequence_S = np.arange(len(answers), dtype=np.int32).repeat(lengths)
    weight_B, source_B = _of(answers, "weight", np.float32), _of(answers, "source", np.int32)
    row = PackedRow(
        ids_T=none, kind_T=np.zeros(0, np.int8), position_ids_3T=np.zeros((3, 0), np.int32), segments=(),
        supervised_S=np.arange(total, dtype=np.int32), target_S=np.zeros(total, np.int32),
        weight_S=weight_B[sequence_S], sample_S=sequence_S.astype(np.int64), source_S=source_B[sequence_S],
    )  # fmt: skip
    row.compared = Compared(
        sequence_S=sequence_S, role_B=_of(answers, "role", np.int8), length_B=lengths,
        last_B=np.cumsum(lengths, dtype=np.int32) - 1, margin_B=_of(answers, "margin", np.float32),
        sample_B=np.arange(len(answers), dtype=np.int64), source_B=source_B, weight_B=weight_B,
        other_B=np.full(len(answers), -1, np.int64),
        reference_B=_of(answers, "reference", np.float32) if reference else None, statistic=statistic,
    )  # fmt: skip
    return row


def _of(answers: Sequence[Answer], name: str, kind: Any) -> Any:
    return np.array([getattr(a, name) for a in answers], kind)


def nll_of(answers: Sequence[Answer]) -> torch.Tensor:
    """-log-probabilities of all tokens [S, 1], with gradient."""
    return torch.tensor([[-x] for a in answers for x in a.logps], requires_grad=True)
