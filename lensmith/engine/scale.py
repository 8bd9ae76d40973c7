"""The loss scale of half precision with a narrow range (float16): gradients are computed larger and divided again."""

from __future__ import annotations

from dataclasses import dataclass

FIRST, SMALLEST, LARGEST = 2.0**16, 2.0**-5, 2.0**24
GROW_AFTER = 2000
"""Updates without an overflow before the scale is doubled."""
MAX_IN_A_ROW = 20


@dataclass
class LossScale:
    """A power of two, so that scaling is exact. A part of the training state."""

    value: float = FIRST
    clean: int = 0
    """Updates since the scale last changed."""
    in_a_row: int = 0
    """Overflows since the last update."""
    overflows: int = 0

    def applied(self) -> None:
        """An update was applied."""
        self.clean, self.in_a_row = self.clean + 1, 0
        if self.clean >= GROW_AFTER:
            self.value, self.clean = min(LARGEST, 2 * self.value), 0

    def overflowed(self) -> None:
        """A gradient was not finite at this scale: half of it from now on."""
        self.value, self.clean = max(SMALLEST, self.value / 2), 0
        self.in_a_row += 1
        self.overflows += 1

    @property
    def is_exhausted(self) -> bool:
        """Whether another halving would not help."""
        return self.in_a_row >= MAX_IN_A_ROW or (self.in_a_row > 0 and self.value <= SMALLEST)
