"""Where a model folder is: local, or fetched from the Hub at one commit. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.options import Model

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
"""What is fetched of a Hub model. Never pickled weights; code only where `model.remote_code` pins it."""
CODE = ["*.py"]
COMMIT_DIGITS = 40


def resolve(options: Model, run_folder: Path) -> Path:
    """The local folder of the model: as given, relative to the run file, or fetched from the Hub at one commit."""
    for folder in (Path(options.path).expanduser(), run_folder / options.path):
        if folder.is_dir():
            return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = FILES if options.remote_code is None else [*FILES, *CODE]
    revision = _revision(options)
    try:
        found = snapshot_download(
            options.path,
            revision=revision,
            allow_patterns=patterns,
            local_files_only=options.local_files_only,
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


def _revision(options: Model) -> str | None:
    """The revision to fetch: the commit that `model.remote_code` pins, where it is one."""
    pin = options.remote_code
    if pin is None or len(pin) != COMMIT_DIGITS:
        return options.revision
    if options.revision not in (None, pin):
        raise ConfigError("REMOTE_CODE", f"model.revision is {options.revision}, model.remote_code {pin}",
                          remedy="leave model.revision out: weights and code are of one commit")  # fmt: skip
    return pin


def fetch_code(options: Model, commit: str) -> None:
    """The code of a Hub model into its folder in the cache, to be looked at; nothing where it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(options.path, revision=commit, allow_patterns=CODE, local_files_only=options.local_files_only)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return
