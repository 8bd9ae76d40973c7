"""How LLaMA-Factory shortens a conversation to `cutoff_len`: every turn gives up a share of its question and answer.

Turn by turn, each within what the turns before left: an answer below half of that stays whole and the question gives,
a question below half stays whole and the answer gives, else both give in proportion. Ends are cut off.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lensmith.core.encoded import ImageBlock
from lensmith.core.errors import Drop

Turn = tuple[int, int]
"""Tokens of a question with the answer's header, and of the answer with what ends it."""


def shortened(question: int, answer: int, room: int) -> Turn:
    """How many tokens of each are kept in `room`, from the front."""
    if answer * 2 < room:
        most = room
    elif question * 2 < room:
        most = room - question
    else:
        most = int(room * (answer / (question + answer)))
    answer = min(most, answer)
    return min(max(room - answer, 0), question), answer


def kept(turns: Sequence[Turn], room: int, *, newest_first: bool = False) -> list[Turn]:
    """What is kept of every turn. `newest_first`: later turns take their room before earlier ones, as where only the
    last answer trains."""
    found: list[Turn] = [(0, 0)] * len(turns)
    order = range(len(turns) - 1, -1, -1) if newest_first else range(len(turns))
    for n in order:
        if room <= 0:
            break
        found[n] = shortened(*turns[n], room)
        room -= sum(found[n])
    return found


def turns_of(answers_L: np.ndarray) -> list[Turn]:
    """The turns of a conversation by which of its tokens are of answers. What follows the last answer is no turn."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answers_L.astype(np.int8), [0]])))
    starts, ends = edges[::2].tolist(), edges[1::2].tolist()
    return [(start - before, end - start) for before, start, end in zip([0, *ends], starts, ends, strict=False)]


def mask_of(turns: Sequence[Turn], keep: Sequence[Turn], length: int) -> np.ndarray:
    """bool [length]: the tokens that stay."""
    mask, at = np.zeros(length, bool), 0
    for (question, answer), (some, most) in zip(turns, keep, strict=True):
        mask[at : at + some] = True
        mask[at + question : at + question + most] = True
        at += question + answer
    return mask


def blocks_left(mask: np.ndarray, image_L: np.ndarray, blocks: Sequence[ImageBlock]) -> tuple[ImageBlock, ...]:
    """The pictures that stay. Raises `Drop` TOO_LONG where a picture would be cut in two."""
    places = np.flatnonzero(image_L)
    left: list[ImageBlock] = []
    at = 0
    for block in blocks:
        stays = mask[places[at : at + block.num_tokens]]
        at += block.num_tokens
        if stays.any() and not stays.all():
            raise Drop("TOO_LONG", f"the end would be cut inside a picture of {block.num_tokens} tokens")
        if stays.any():
            left.append(block)
    return tuple(left)
