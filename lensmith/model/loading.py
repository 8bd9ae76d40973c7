"""What is special about building the model of a family. Loads no torch until the classes are asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import ModelError
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


def refuse_quantised(settings: Any, folder: Path) -> None:
    """Raises `ModelError` QUANTISED where the config has `settings`, a `quantization_config`."""
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise ModelError("QUANTISED", "config.json has a quantization_config"
                         f"{f' (quant_method {method})' if method else ''}: its weights are not plain numbers",
                         where=str(folder / "config.json"), remedy=FROM_PLAIN)  # fmt: skip


FROM_PLAIN = "take the model as it was before; tune.quantize keeps it in 4 bits while an adapter trains"
PLAIN = Loading()
"""As transformers builds it."""
