"""Where a model folder is: local, or fetched from the Hub at one commit. Loads no torch."""

from __future__ import annotations

from pathlib import Path

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.options import Model

FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "*.py"]
"""What is fetched of a Hub model. Never pickled weights. Code is shown and goes along with what is saved; it is run
only where `model.remote_code` pins it."""
COMMIT_DIGITS = 40


def resolve(options: Model, run_folder: Path) -> Path:
    """The local folder of the model: as given, relative to the run file, or fetched from the Hub at one commit."""
    for folder in (Path(options.path).expanduser(), run_folder / options.path):
        if folder.is_dir():
            return folder.resolve()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    revision = _revision(options)
    try:
        found = snapshot_download(
            options.path,
            revision=revision,
            allow_patterns=FILES,
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
