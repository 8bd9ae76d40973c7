"""Code that a model folder brings: never run, unless the run file pins it by commit or digest.

A model of transformers or of lensmith needs none, whatever its config says. For the others the pin is the commit of the
Hub repository, or a SHA-256 over all *.py files of the folder, which `check` computes and every refusal prints. Loading
happens from the folder that was checked, so nothing can come from another commit; a config that points to code in
another repository is refused. What the pinned files import from installed packages is not covered.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lensmith.core.errors import ConfigError, ModelError
from lensmith.model.options import Model
from lensmith.model.source import COMMIT_DIGITS

AUTO_CLASSES = ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel")
"""Keys of a config's `auto_map` by which the model class is looked for, in this order."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteCode:
    """The code of a model folder, as pinned by the run file."""

    pinned: str
    commit: str | None
    """Of the Hub repository; None for a folder of one's own."""
    digest: str
    """SHA-256 over names and contents of the files."""
    files: dict[str, str]
    """Path in the folder -> SHA-256, of every *.py file."""
    auto_class: str
    """Name of the transformers class to load the model by."""

    @property
    def arguments(self) -> dict[str, Any]:
        """For `from_pretrained` of config and model. There is no `code_revision`: the folder is one commit already."""
        return {"trust_remote_code": True}

    @property
    def record(self) -> dict[str, Any]:
        """What is kept with the run."""
        return {"commit": self.commit, "digest": self.digest, "files": self.files}


def check(folder: Path, options: Model, *, native: bool = False) -> RemoteCode | None:
    """The code that loading the model in `folder` runs; None for none.

    Args:
        native: lensmith has a class of its own for this model.

    Raises:
        ModelError: REMOTE_CODE. The model needs its code and no pin is given, or the pin is of other code; the files
            are listed with their SHA-256, and the line for the run file. Or the code is in another repository.
        ConfigError: REMOTE_CODE. A pin is given for a model without code, or one that lensmith builds itself.
    """
    config = _config(folder)
    auto_map = {k: v for k, v in (config.get("auto_map") or {}).items() if isinstance(v, str)}
    names = [name for name in AUTO_CLASSES if name in auto_map]
    if options.remote_code is None:
        known = native or not names or _in_transformers(config.get("model_type"))
        return None if known else _refuse(folder, options, auto_map)
    if native or not names:
        why = "lensmith builds this model itself" if native else "this model brings no code for a model class"
        raise ConfigError("REMOTE_CODE", f"model.remote_code is given, and {why}", remedy="take it out of the run file")
    if foreign := [v for v in auto_map.values() if "--" in v]:
        raise ModelError("REMOTE_CODE", f"its code is in another repository: {foreign[0]}",
                         where=str(folder / "config.json"),
                         remedy="put config, weights and code into one folder, and read the code")  # fmt: skip
    files, commit = code_files(folder), commit_of(folder)
    if lost := [name for name in _named(auto_map) if name not in files]:
        raise ModelError("REMOTE_CODE", f"config.json names {lost[0]}, which is not there", where=str(folder),
                         remedy="copy the whole folder")  # fmt: skip
    digest = digest_of(files)
    if options.remote_code not in (commit, digest):
        return _refuse(folder, options, auto_map)
    return RemoteCode(options.remote_code, commit, digest, files, names[0])


def code_files(folder: Path) -> dict[str, str]:
    """Path in the folder -> SHA-256 of every *.py file in it."""
    paths = sorted(p for p in folder.rglob("*.py") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def digest_of(files: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in sorted(files.items())).encode()).hexdigest()


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the Hub's cache."""
    return folder.name if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name) else None


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ModelError("MODEL_FILE", f"not JSON: {error}", where=str(path)) from None
    return found if isinstance(found, dict) else {}


def _in_transformers(model_type: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def _refuse(folder: Path, options: Model, auto_map: dict[str, str]) -> None:
    """Raises the error that names the files, what is pinned, and the line to write."""
    commit = commit_of(folder)
    files, given = code_files(folder), options.remote_code
    digest = digest_of(files)
    pin = commit if commit is not None and (given is None or len(given) == COMMIT_DIGITS) else digest
    if given is None:
        problem = "this model needs code that it brings, and none is run unless the run file pins it"
    else:
        problem = f"model.remote_code is {given}, the code here is {pin}"
    listed = _listed(files) or f"  {', '.join(_named(auto_map))}"
    raise ModelError("REMOTE_CODE", f"{problem}; these files would be run:\n{listed}", where=str(folder),
                     remedy=f"read them; to run them, the run file says model: {{remote_code: {pin}}}")  # fmt: skip


def _named(auto_map: dict[str, str]) -> list[str]:
    """The files that a config's `auto_map` names: `modeling_x.TheClass` is in modeling_x.py."""
    return sorted({f"{value.rpartition('.')[0]}.py" for value in auto_map.values()})


def _listed(files: dict[str, str]) -> str:
    return "\n".join(f"  {sha}  {name}" for name, sha in files.items())
