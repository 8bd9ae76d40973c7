"""The recipe layer: a run file and what is done with it. It alone knows every part."""

from __future__ import annotations

from lensmith.recipe.run import Located, Run, load_run
from lensmith.recipe.train import train

__all__ = ["Located", "Run", "load_run", "train"]
