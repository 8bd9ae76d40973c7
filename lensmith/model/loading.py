"""What is special about building the model of a family. Loads no torch until the classes are asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from lensmith.model.remote_code import RemoteCode


@dataclass(frozen=True)
class Loading:
    """What is special about building the model of a family."""

    native: str | None = None
    """`module:class` of a model class of our own, a `PreTrainedModel` with its `config_class`; None: transformers'."""
    layer_kinds: frozenset[str] = frozenset({"full_attention"})
    """Kinds of layers (`layer_types` of the config) that the family keeps exact in packed rows."""
    code: RemoteCode | None = None
    """Code of the folder's own that the run file pins; None: none is run."""

    def classes(self) -> tuple[Any, Any]:
        """(config class, model class), each with `from_pretrained`."""
        if self.native is None:
            import transformers

            auto = "AutoModelForImageTextToText" if self.code is None else self.code.auto_class
            return transformers.AutoConfig, getattr(transformers, auto)
        module, _, name = self.native.partition(":")
        model = getattr(importlib.import_module(module), name)
        return model.config_class, model


PLAIN = Loading()
"""As transformers builds it."""
