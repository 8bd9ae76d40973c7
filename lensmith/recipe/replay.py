"""`lensmith replay`: an incident computed again from its folder, without the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lensmith.core.errors import ConfigError, ModelError
from lensmith.data.index import Index
from lensmith.data.load import LoaderSpec
from lensmith.data.tokenizer import with_tokens
from lensmith.family.registry import load_family
from lensmith.objective.options import Cached, reference_of
from lensmith.recipe.prepare import Prepared, tokenizer_text
from lensmith.recipe.run import Located, load_run
from lensmith.report.terminal import Terminal

OK, OTHERWISE = 0, 1
SAME = "as they were"
SCHEMA = 1
NEEDED = ("kind", "stage", "precision", "model_folder", "has_added_tokens", "samples", "cause", "module", "checkpoint",
          "tensors")  # fmt: skip
"""Keys of incident.json without which nothing can be computed."""


def replay(folder: Path, terminal: Terminal, *, device: str | None = None, base: Path | None = None) -> int:
    """0 when the same cause shows in the same module with the same samples, else 1. `base`: the model folder, where it
    is not where the run had it. Raises ConfigError REPLAY for a folder that cannot be computed again."""
    about = _read(folder)
    if about["kind"] == "state":
        return _replay_state(folder, about, terminal)
    if about.get("batch") is None:
        raise ConfigError("REPLAY", f"this incident ({about['cause']}) has no batch", where=str(folder),
                          remedy="raise guard.dump_mb if it was too large; a transient one has none")  # fmt: skip
    overrides = [f"train.device={device}"] if device else []
    located = load_run(folder / "run.yaml", overrides)  # of the stage alone
    run = located.run
    if run.precision.preset == "auto":  # it was resolved for the device that the run had
        resolved = run.precision.model_copy(update={"preset": about["precision"]})
        located.run = run.model_copy(update={"precision": resolved})
    prepared = _without_data(located, Path(base or about["model_folder"]), about["has_added_tokens"])
    from lensmith.recipe.build import build, set_threads
    from lensmith.recipe.reference import in_each_step

    set_threads(located.run)
    built = build(prepared)
    asked = reference_of(located.run.objective)
    if asked is not None and not isinstance(asked, Cached):
        built.root.reference = in_each_step(prepared, built, asked)
    weights = _restore(folder, about, built, prepared.model_folder)
    found = _examine(folder, about, built)
    samples = [s["origin"] for s in about["samples"] if s["number"] in found.samples]
    wanted = about["cause"], about["module"], sorted(s["number"] for s in about["samples"])
    cause = about["cause"] if about["cause"] == "overflow" and found.cause != "transient" else found.cause
    reproduced = (cause, found.module, sorted(found.samples)) == wanted
    fields: dict[str, Any] = {
        "reproduced": reproduced, "cause": cause, "module": found.module, "part": found.part,
        "largest_input": found.largest_input, "input_dtype": found.input_dtype, "samples": samples,
        "weights": weights,
    }  # fmt: skip
    where = f" in {found.module} (part {found.part})" if found.module else ""
    at_fault = ", ".join(samples) or ("every sample" if found.every_sample else "no sample")
    largest = (
        "" if found.largest_input is None else f"; largest finite input {found.largest_input:.6g} {found.input_dtype}"
    )
    terminal.event("replay", f"{cause}{where}; at fault: {at_fault}{largest}; weights: {weights}", **fields)
    said = "reproduced" if reproduced else f"not reproduced: the run found {wanted[0]} in {wanted[1]}"
    said += "" if weights.startswith(SAME) else f", but {weights}"
    terminal.event("verdict", said, reproduced=reproduced)
    return OK if reproduced else OTHERWISE


def _read(folder: Path) -> dict[str, Any]:
    path = folder / "incident.json"
    if not path.is_file():
        raise ConfigError("REPLAY", "not an incident", where=str(folder),
                          remedy="name a folder such as runs/NAME/incidents/step-000012")  # fmt: skip
    about: dict[str, Any] = _json(path)
    schema = about.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ConfigError("REPLAY", f"schema {schema} is of a later lensmith", where=str(path),
                          remedy="update lensmith")  # fmt: skip
    missing = [key for key in NEEDED if key not in about]
    if schema != SCHEMA or missing:
        found = f"schema {schema} is unknown" if schema != SCHEMA else f"holds no {missing[0]!r}"
        raise ConfigError("REPLAY", found, where=str(path), remedy="name a folder that a run has written")
    return about


def _json(path: Path) -> dict[str, Any]:
    try:
        found: Any = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(found, dict):
        raise _unreadable(path, "not a mapping")
    return cast("dict[str, Any]", found)


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, why: object) -> ConfigError:
    return ConfigError("REPLAY", f"this file of the incident cannot be read: {why}", where=str(path),
                       remedy="copy the whole folder from where the run wrote it")  # fmt: skip


def _without_data(located: Located, model_folder: Path, has_added_tokens: bool) -> Prepared:
    """What building a model needs, with an empty index."""
    if not (model_folder / "config.json").is_file():
        raise ModelError("NO_MODEL", "the model of this incident is not here", where=str(model_folder),
                         remedy="name its folder with --base")  # fmt: skip
    run = located.run
    family = load_family(model_folder, min_pixels=run.data.min_pixels, max_pixels=run.data.max_pixels, check=False,
                         video=run.data.video)  # fmt: skip
    tokenizer_json = with_tokens(tokenizer_text(model_folder), run.model.add_tokens)
    d = run.data
    spec = LoaderSpec((), family, tokenizer_json, (), d.image, d.max_tokens, d.too_long, d.max_row_bytes)
    nothing = Index((), spec)
    return Prepared(located, model_folder, family, nothing, nothing, None, (), has_added_tokens=has_added_tokens)


def _restore(folder: Path, about: dict[str, Any], built: Any, model_folder: Path) -> str:
    """Weights as they were: those of the incident, over those of the checkpoint where not all of them are in it. Says
    whether the model is that of the incident by its hashes."""
    import torch

    from lensmith.engine.state import read_state
    from lensmith.recipe.incident import tensor_hashes

    kept, then = _tensors(folder / "tensors.safetensors"), _json(folder / "hashes.json")["tensors"]
    checkpoint, note = about["checkpoint"], ""
    if not about["tensors"]["trained"] and checkpoint is not None:
        if Path(checkpoint).is_dir():
            read_state(Path(checkpoint) / "state", built.optimizer)
        else:
            note = f"; {Path(checkpoint).name} is gone, so what trained is as in the base model"
    named = dict(built.root.named.named_parameters())
    with torch.no_grad():
        for key, value in kept.items():
            name = key.removeprefix("model/")
            if name not in named or named[name].shape != value.shape:
                problem = f"the model has no {name} of shape {list(value.shape)}, as the incident has"
                raise ConfigError("REPLAY", problem, where=str(model_folder),
                                  remedy="name with --base the model that the run began with")  # fmt: skip
            named[name].copy_(value)
    now = tensor_hashes((f"model/{n}", p) for n, p in named.items())["tensors"]
    other = [name for name, value in now.items() if name in then and then[name] != value]
    unknown = sum(name not in then for name in now)
    some = f", except {unknown} of {len(now)} tensors that ranks had shares of" if unknown else ""
    return f"{SAME}{some}" if not other else f"{len(other)} of {len(now)} tensors differ, first {other[0]}{note}"


def _examine(folder: Path, about: dict[str, Any], built: Any) -> Any:
    from lensmith.engine.determinism import Snapshot, restore
    from lensmith.engine.forensics import Scene, examine
    from lensmith.engine.scale import LossScale
    from lensmith.model.vision_cache import VisionCache
    from lensmith.recipe.incident import load_row

    batch, root = about["batch"], built.root
    tensors, random = _tensors(folder / "row.safetensors"), _tensors(folder / "random.safetensors")

    def row(prefix: str, rest: dict[str, Any]) -> Any:
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        return load_row(own, rest)

    features = {k.removeprefix("feature/"): v for k, v in tensors.items() if k.startswith("feature/")}
    if features and root.cache is not None:
        root.cache = VisionCache(1 << 62)
        for key, value in features.items():
            root.cache.put(key, value)
    alone = {int(number): row(f"alone/{number}/", rest) for number, rest in batch["alone"].items()}
    whole = row("row/", batch["row"])
    others = [r for number, r in alone.items() if number not in whole.members]
    restore(random, json.dumps(batch["random"]))
    scale = None if about["loss_scale"] is None else LossScale(about["loss_scale"])
    empty = replace(whole, members=())
    return examine(Scene(
        root, root.named, [whole, *others], lambda r: r, lambda sample: alone.get(sample, empty), batch["counts"],
        built.optimizer, built.part_of, Snapshot(), scale,
    ))  # fmt: skip


def _replay_state(folder: Path, about: dict[str, Any], terminal: Terminal) -> int:
    """Nothing is to be computed: the tensors that were found are not finite, or they are."""
    tensors = _tensors(folder / "tensors.safetensors")
    kept = {k.removeprefix("state/"): v for k, v in tensors.items() if k.startswith("state/")}
    bad = [name for name, value in kept.items() if not bool(value.isfinite().all())]
    reproduced = bool(bad) and set(bad) == set(kept)
    terminal.event(
        "replay", f"{about['cause']}: {', '.join(bad)}", cause=about["cause"], bad=bad, reproduced=reproduced
    )
    return OK if reproduced else OTHERWISE
