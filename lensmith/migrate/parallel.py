"""Several devices: DeepSpeed files, FSDP, and the ranks that LLaMA-Factory's command would start."""

from __future__ import annotations

import json
from typing import Any, cast

from lensmith.migrate.draft import Draft
from lensmith.migrate.given import Given
from lensmith.migrate.keys import DIFFERS, TAKEN
from lensmith.migrate.launch import Launch


def add(draft: Draft, launch: Launch) -> None:
    given = draft.given
    if given.has("deepspeed") and given.has("fsdp"):
        given.refuse("fsdp", "deepspeed is set too", "keep one of the two")
    if given.has("deepspeed"):
        deepspeed(draft, launch)
    elif given.has("fsdp"):
        fsdp(draft)
    if launch.here > 1:
        draft.put("parallel.ranks", launch.here, "ray_num_workers" if launch.ray else "per_device_train_batch_size")
    if launch.restarts:
        draft.put("parallel.restarts", launch.restarts, "per_device_train_batch_size")


def stage_of(given: Given) -> int:
    """The ZeRO stage of the DeepSpeed file; 0 without one."""
    if not given.has("deepspeed"):
        return 0
    zero = _file(given).get("zero_optimization") or {}
    return int(zero.get("stage", 0))


def deepspeed(draft: Draft, launch: Launch) -> None:
    given = draft.given
    stage = stage_of(given)
    if stage == 0:
        draft.decide("deepspeed", DIFFERS, "its stage is 0: data parallel, without DeepSpeed", "parallel.engine: local")
        return
    zero = _file(given)["zero_optimization"]
    offload = (zero.get("offload_optimizer") or {}).get("device") == "cpu"
    engine: dict[str, Any] = {"kind": "deepspeed", "zero": stage, "config": str(given.path(given.get("deepspeed")))}
    draft.put("parallel.engine", engine | ({"offload": True} if offload else {}), "deepspeed")
    about = "`auto` is filled by the run; the file is held against it"
    draft.decide("deepspeed", TAKEN, about, f"parallel.engine: deepspeed, ZeRO-{stage}")
    if launch.ranks == 1:
        draft.warn("deepspeed on one rank spreads nothing: the run trains without it until there are more ranks")


def _file(given: Given) -> dict[str, Any]:
    value = given.get("deepspeed")
    if not isinstance(value, str):
        given.refuse("deepspeed", "a mapping in the file is not supported", "write it to a .json file and name that")
    path = given.path(value)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        given.refuse("deepspeed", f"{path} cannot be read: {error}", "name a DeepSpeed JSON file; relative paths count "
                     "from the folder in which the command is called")  # fmt: skip
    if not isinstance(found, dict):
        given.refuse("deepspeed", f"{path} is no JSON object", "name a DeepSpeed JSON file")
    return cast("dict[str, Any]", found)


def fsdp(draft: Draft) -> None:
    given = draft.given
    words = [word for item in given.get("fsdp") for word in item.split()]
    known = ("full_shard", "shard_grad_op", "no_shard", "auto_wrap", "offload", "true")
    for word in words:
        if word not in known:
            given.refuse("fsdp", f"{word!r} is not supported", f"known: {', '.join(known)}; for hybrid_shard set "
                         "parallel.engine: {kind: fsdp2, shard: N} in a lensmith run file")  # fmt: skip
    if "no_shard" in words:
        draft.decide("fsdp", DIFFERS, "nothing is spread: data parallel", "parallel.engine: local")
        return
    config = given.get("fsdp_config")
    if isinstance(config, str):
        given.refuse("fsdp_config", "a file is not supported", "write its keys here, or take it out")
    offload = "offload" in words or bool((config or {}).get("offload_params") or (config or {}).get("cpu_offload"))
    engine: dict[str, Any] = {"kind": "fsdp2"}
    engine |= {"offload": True} if offload else {}
    engine |= {"keep_blocks": True} if "shard_grad_op" in words else {}
    draft.put("parallel.engine", engine, "fsdp")
