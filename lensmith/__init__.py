"""Lensmith fine-tunes vision-language models so that you can trust the result.

`import lensmith` loads nothing heavy; `lensmith.train("run.yaml")` and `lensmith.load_run` import what they need.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lensmith.core.version import VERSION as __version__

__all__ = ["Run", "__version__", "load_run", "train"]

if TYPE_CHECKING:
    from lensmith.recipe import Run, load_run, train


def __getattr__(name: str) -> Any:
    if name in ("Run", "load_run", "train"):
        from lensmith import recipe

        return getattr(recipe, name)
    raise AttributeError(f"module 'lensmith' has no attribute {name!r}")
