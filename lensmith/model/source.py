"""Where a model folder is: local, or fetched from the Hub at one commit. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from lensmith.core.errors import ModelError
from lensmith.model.options import Model

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What is fetched of a Hub model. Never pickled weights, never code."""


def resolve(options: Model, run_folder: Path) -> Path:
    """The local folder of the model: as given, relative to the run file, or fetched from the Hub at one commit."""
    for folder in (Path(options.path).expanduser(), run_folder / options.path):
        if folder.is_dir():
            return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            options.path, revision=options.revision, allow_patterns=FILES, local_files_only=options.local_files_only
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            "MODEL_PATH",
            f"{options.path!r} is no local folder and cannot be had from the Hub: {first}",
            where="model.path",
            remedy="name a folder with config.json, or log in with `hf auth login`",
        ) from None
    return Path(found)
