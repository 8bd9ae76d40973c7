"""`lensmith export`: a checkpoint as a model folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lensmith.checkpoint.export import QUANTIZED, SavedTypes, carry, write_model
from lensmith.checkpoint.headers import read_contents
from lensmith.checkpoint.inspect import inspect
from lensmith.checkpoint.remote import Remote
from lensmith.checkpoint.store import Damaged, Store, sync_folder, verify
from lensmith.core.errors import ConfigError, ModelError
from lensmith.data.tokenizer import TextTokenizer
from lensmith.family.registry import load_family, loading_of, read_json
from lensmith.model.load import base_dtype, load_model
from lensmith.model.lora import merged
from lensmith.model.options import Model, Quantize
from lensmith.model.quantize import check_installed, quantise, quantised_layers, restore
from lensmith.model.source import resolve
from lensmith.model.value_head import FILE as VALUE_HEAD
from lensmith.report.terminal import Terminal

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(
    checkpoint: Path | str,
    output: Path,
    *,
    base: str | None,
    merge: bool,
    dtype: str | None,
    shard_gb: float,
    terminal: Terminal,
) -> Path:
    """Write `output` whole or not at all. Raises `UserError`s; never overwrites a folder. `checkpoint`: a folder, or a
    checkpoint in a store by its URL."""
    if output.exists():
        raise ConfigError("OUTPUT", f"{output} exists", remedy="name a new folder")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError("DTYPE", f"--dtype {dtype!r}", remedy=f"one of {', '.join(DTYPES)}")
    if shard_gb <= 0:
        raise ConfigError("OUTPUT", f"--shard-gb {shard_gb} is not a size", remedy="e.g. --shard-gb 5")
    with here(checkpoint, terminal) as path:
        _export(model_folder(path, terminal), output, base, merge, dtype, shard_gb, terminal)
    terminal.event("exported", f"model written to {output}", path=str(output))
    return output


def _export(
    found: Path, output: Path, base: str | None, merge: bool, dtype: str | None, shard_gb: float, terminal: Terminal
) -> None:
    staging = output.with_name(f".{output.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    adapter = (found / "adapter_config.json").is_file()
    if adapter and not merge and dtype is not None:
        raise ConfigError("DTYPE", "--no-merge copies the adapter as it is, so --dtype means nothing",
                          remedy="leave one of them out; a run saves it in precision.parts.adapter.saved")  # fmt: skip
    try:
        with terminal.progress(f"Writing {output}", None, counted=False):
            if adapter and not merge:
                shutil.copytree(found, staging)
            else:
                _write(found, staging, adapter=adapter, base=base, dtype=DTYPES.get(dtype or ""), shard_gb=shard_gb)
                if (found / VALUE_HEAD).is_file():
                    shutil.copyfile(found / VALUE_HEAD, staging / VALUE_HEAD)
            sync_folder(staging)
        staging.rename(output)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


@contextmanager
def here(path: Path | str, terminal: Terminal) -> Iterator[Path]:
    """A folder as it is; of a checkpoint in a store (`s3://bucket/run/step-00000012`, or the newest of
    `s3://bucket/run`) its `model` folder in a temporary one, verified. Raises `ModelError` CHECKPOINT."""
    if not is_url(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="lensmith-fetched-") as folder:
        yield _fetched(str(path).rstrip("/"), Path(folder), terminal)


def is_url(path: Path | str) -> bool:
    return isinstance(path, str) and "://" in path


def _fetched(url: str, folder: Path, terminal: Terminal) -> Path:
    parent, _, name = url.rpartition("/")
    named = re.fullmatch(r"step-(\d{8})", name)
    remote = Remote(parent if named else url)
    for step in [int(named[1])] if named else reversed(remote.steps()):
        into = folder / str(step)
        into.mkdir()
        try:
            with terminal.progress(f"Fetching checkpoint {step}", None, counted=False):
                remote.fetch(step, into, "model/")
        except Damaged as error:
            terminal.warning(f"checkpoint is damaged and not used: {error}")
            shutil.rmtree(into)
            continue
        return into / "model"
    raise ModelError("CHECKPOINT", "no checkpoint there that verifies", where=remote.shown,
                     remedy="name the prefix of save.remote, or one step-NNNNNNNN below it")  # fmt: skip


def model_folder(path: Path, terminal: Terminal) -> Path:
    """The `model` folder of a verified checkpoint, of a run's newest one, or the folder itself."""
    if (path / "checkpoints").is_dir():
        found = Store(path / "checkpoints").newest(terminal.warning)
        if found is None:
            raise ModelError("CHECKPOINT", "this run has no checkpoint yet", where=str(path))
        return found.folder / "model"
    if (path / "MANIFEST.json").is_file():
        try:
            return verify(path).folder / "model"
        except Damaged as error:
            raise ModelError("CHECKPOINT", str(error), remedy="name another checkpoint of this run") from None
    if (path / "adapter_config.json").is_file() or (path / "config.json").is_file():
        return path
    raise ModelError("CHECKPOINT", "neither a run folder, a checkpoint nor a model folder", where=str(path))


def _write(
    folder: Path, staging: Path, *, adapter: bool, base: str | None, dtype: torch.dtype | None, shard_gb: float
) -> None:
    cpu = torch.device("cpu")
    if not adapter:
        target = dtype or _meant(folder)
        model = load_model(folder, target, cpu, loading_of(folder))
        write_model(staging, model, folder, SavedTypes.all(target), shard_gb=shard_gb)
        return
    base_folder = resolve(Model(path=base or _base_of(folder)), Path.cwd())
    target = dtype or _meant(base_folder)
    # float32 while merging: adding a small update to bfloat16 weights rounds twice
    model: Any = load_model(base_folder, torch.float32, cpu, loading_of(base_folder))
    num_ids = TextTokenizer.from_folder(folder if (folder / "tokenizer.json").is_file() else base_folder).num_ids
    if num_ids > model.get_input_embeddings().weight.shape[0]:  # the run added tokens
        model.resize_token_embeddings(num_ids, mean_resizing=False)
    if (folder / QUANTIZED).is_file():  # what it was trained on are the weights as they came back from 4 bits
        _as_quantised(model, base_folder, Quantize.model_validate(read_json(folder / QUANTIZED)))
    write_model(staging, merged(model, folder), base_folder, SavedTypes.all(target), shard_gb=shard_gb)
    carry(staging, folder, None)


def _base_of(adapter: Path) -> str:
    contents = read_contents(adapter)
    if contents.config_error:
        raise ModelError("CONFIG", f"adapter_config.json {contents.config_error}", where=str(adapter),
                         remedy="copy it from where the adapter was made")  # fmt: skip
    said = contents.config.get("base_model_name_or_path")
    if not isinstance(said, str) or not said:
        raise ModelError("BASE", f"adapter_config.json names no base model: base_model_name_or_path is {said!r}",
                         where=str(adapter), remedy="name it with --base")  # fmt: skip
    return said


def _as_quantised(model: Any, base: Path, options: Quantize) -> None:
    check_installed("merging an adapter of a base in 4 bits", "qlora")
    names = quantised_layers(model, load_family(base, check=False), options)
    quantise(model, names, options, torch.float32, torch.device("cpu"))
    restore(model)


def _meant(folder: Path) -> torch.dtype:
    """The type of a model; where its tensors are of several, the one its config names."""
    if error := read_contents(folder).config_error:
        raise ModelError("CONFIG", f"config.json {error}", where=str(folder), remedy="copy it from the base model")
    return inspect(folder).natural_dtype or base_dtype(folder)
