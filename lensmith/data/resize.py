"""A resize in front of the model's own, as LLaMA-Factory does it: the model's processor then sizes what came of it.

Token counts equal LLaMA-Factory's only so: it rounds both sides down here, and the processor to its grid after that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Rule = Literal["area", "sides", "none"]
"""By the area alone; then a short or narrow picture made usable too, as for Qwen's families; or no such resize."""

SHORTEST, LONGEST_RATIO, RATIO = 28, 200, 180


@dataclass(frozen=True, slots=True)
class FirstResize:
    """Both limits are of an area in pixels."""

    min_pixels: int
    max_pixels: int
    rule: Rule = "area"

    def __call__(self, width: int, height: int) -> tuple[int, int]:
        """The size that a picture of this size is brought to, its aspect nearly kept."""
        if self.rule == "none":
            return width, height
        if width * height > self.max_pixels:
            width, height = _scaled(width, height, self.max_pixels)
        if width * height < self.min_pixels:
            width, height = _scaled(width, height, self.min_pixels)
        if self.rule == "sides":
            width, height = max(width, SHORTEST), max(height, SHORTEST)
            if width / height > LONGEST_RATIO:
                width = height * RATIO
            if height / width > LONGEST_RATIO:
                height = width * RATIO
        return max(width, 1), max(height, 1)


def _scaled(width: int, height: int, pixels: int) -> tuple[int, int]:
    factor = math.sqrt(pixels / (width * height))
    return int(width * factor), int(height * factor)
