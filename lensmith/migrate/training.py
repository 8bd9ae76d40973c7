"""Optimizer, schedule, batch, length, saving, evaluation and logs."""

from __future__ import annotations

import importlib.util
import math
import os
from typing import Any

from lensmith.migrate.data import packs
from lensmith.migrate.draft import Draft
from lensmith.migrate.given import Given
from lensmith.migrate.keys import DIFFERS, TAKEN, UNNEEDED
from lensmith.migrate.launch import Launch

ALL = 1_000_000
"""Checkpoints that are kept where the file sets no limit."""
ADAMW = ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_apex_fused",
         "adamw_anyprecision", "adamw")  # fmt: skip
PAGED = ("paged_adamw", "paged_adamw_32bit")
EIGHT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
SINKS = ("tensorboard", "wandb", "trackio", "mlflow")


def add(draft: Draft, launch: Launch, kept: int | None) -> None:
    """`kept`: samples of a step that an earlier start of this run recorded."""
    optimizer(draft)
    schedule(draft)
    batch(draft, launch, kept)
    length(draft)
    save(draft)
    evaluate(draft)
    logs(draft)


# --- optimizer and schedule -------------------------------------------------------------------------------------------


def optimizer(draft: Draft) -> None:
    given, name = draft.given, draft.given.get("optim")
    kind = "adamw"
    if given.get("use_muon"):
        kind = "muon"
    elif name in EIGHT:
        kind = "adamw_8bit"
        if name == "paged_adamw_8bit":
            draft.decide("optim", DIFFERS, "moments in 8 bits, not paged to the host")
    elif name in PAGED:
        draft.decide("optim", DIFFERS, "AdamW, not paged to the host")
    elif name == "adafactor":
        kind = "adafactor"
        draft.decide("optim", DIFFERS, "torch's Adafactor, whose updates are relative to the parameters")
    elif name not in ADAMW:
        given.refuse("optim", "lensmith has no such optimizer", f"known: {', '.join((*ADAMW, *EIGHT, 'adafactor'))}")
    draft.put("optimizer.kind", kind, "use_muon" if kind == "muon" else "optim")
    draft.put("optimizer.lr", given.get("learning_rate"), "learning_rate")
    draft.put("optimizer.weight_decay", given.get("weight_decay"), "weight_decay")
    if kind != "adafactor":
        draft.put("optimizer.betas", [given.get("adam_beta1"), given.get("adam_beta2")], "adam_beta1")
        draft.put("optimizer.eps", given.get("adam_epsilon"), "adam_epsilon")
    norm = given.get("max_grad_norm")
    draft.put("train.clip_norm", norm if norm > 0 else None, "max_grad_norm")


def schedule(draft: Draft) -> None:
    given, name = draft.given, draft.given.get("lr_scheduler_type")
    more = given.get("lr_scheduler_kwargs") or {}
    if not isinstance(more, dict):
        given.refuse("lr_scheduler_kwargs", "not a mapping", "write it as a mapping")
    made = _kind(given, name, dict(more))
    steps, ratio = given.get("warmup_steps"), given.get("warmup_ratio")
    if name == "constant":
        steps, ratio = 0, 0.0  # transformers' plain `constant` warms up not at all
    if steps >= 1:
        made["warmup_steps"] = math.ceil(steps)
    else:
        made["warmup"] = steps or ratio
    keys = {"warmup": "warmup_ratio" if not steps else "warmup_steps", "warmup_steps": "warmup_steps",
            "final": "lr_scheduler_kwargs", "decay": "lr_scheduler_kwargs"}  # fmt: skip
    draft.put("schedule", made, "lr_scheduler_type", keys)
    if name == "polynomial":
        draft.decide("lr_scheduler_type", DIFFERS, "a straight line to 0 (there to 1e-7)")


def _kind(given: Given, name: str, more: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, tuple[str, ...]] = {
        "linear": (), "cosine": ("num_cycles",), "constant": (), "constant_with_warmup": (),
        "cosine_with_restarts": ("num_cycles",), "cosine_with_min_lr": ("min_lr", "min_lr_rate", "num_cycles"),
        "polynomial": ("power", "lr_end"), "warmup_stable_decay": ("num_decay_steps", "min_lr_ratio", "decay_type"),
    }  # fmt: skip
    if name not in known:
        given.refuse("lr_scheduler_type", "lensmith has no such schedule", f"known: {', '.join(known)}")
    for key in more:
        if key not in known[name]:
            given.refuse("lr_scheduler_kwargs", f"{key} is not supported with {name}",
                         f"known with it: {', '.join(known[name]) or 'none'}")  # fmt: skip
    usual = {"cosine": 0.5, "cosine_with_min_lr": 0.5, "cosine_with_restarts": 1}
    for key, only in (("num_cycles", usual.get(name)), ("power", 1.0), ("decay_type", "linear")):
        if key in more and more[key] != only:
            given.refuse("lr_scheduler_kwargs", f"{key} {more[key]} is not supported with {name}", f"only {only} is")
    if name.startswith("constant"):
        return {"kind": "constant"}
    if name == "warmup_stable_decay":
        return _stable(given, more)
    if name in ("linear", "polynomial"):
        return {"kind": "linear"}
    rate = more.get("min_lr_rate")
    if rate is None and more.get("min_lr") is not None:
        rate = float(more["min_lr"]) / given.get("learning_rate")
    if name == "cosine_with_min_lr" and rate is None:
        given.refuse("lr_scheduler_type", "needs min_lr or min_lr_rate", "set lr_scheduler_kwargs: {min_lr: 1.0e-6}")
    return {"kind": "cosine"} | ({"final": float(rate)} if rate else {})


def _stable(given: Given, more: dict[str, Any]) -> dict[str, Any]:
    steps, decay = given.get("max_steps"), more.get("num_decay_steps")
    if steps <= 0 or not decay:
        given.refuse("lr_scheduler_type", "needs max_steps and num_decay_steps here",
                     "set both, or schedule: {kind: wsd, decay: 0.1} in a lensmith run file")  # fmt: skip
    made: dict[str, Any] = {"kind": "wsd", "decay": decay / steps}
    return made | ({"final": float(more["min_lr_ratio"])} if more.get("min_lr_ratio") else {})


# --- batch and length -------------------------------------------------------------------------------------------------


def batch(draft: Draft, launch: Launch, kept: int | None) -> None:
    given = draft.given
    each, times = given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps")
    samples = each * times * launch.ranks
    why = f"{each} a device x {times} accumulated x {launch.ranks} ranks ({launch.why})"
    if kept is not None and kept != samples:
        draft.warn(f"the run began with {kept} samples a step and keeps them on {launch.ranks} ranks")
        samples, why = kept, f"recorded at the first start of this run; now {launch.ranks} ranks ({launch.why})"
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        draft.decide(key, TAKEN, why, f"batch.samples: {samples}")
    if packs(draft):
        tokens = samples * draft.at("data.max_tokens")
        draft.put("batch.tokens", tokens, "per_device_train_batch_size")
        for key in ("packing", "per_device_train_batch_size", "gradient_accumulation_steps"):
            draft.decide(key, DIFFERS, f"a step has {tokens:,} tokens: {samples} full rows, as there; samples of a row "
                         "never see each other", "batch.tokens")  # fmt: skip
    else:
        draft.put("batch.samples", samples, "per_device_train_batch_size")
        draft.decide("packing", UNNEEDED, "rows are always packed, with attention kept apart: the same loss", "")
    if not given.get("streaming"):
        draft.put("batch.partial", "drop" if given.get("dataloader_drop_last") else "epoch_end",
                  "dataloader_drop_last")  # fmt: skip


def length(draft: Draft) -> None:
    given = draft.given
    steps, epochs = given.get("max_steps"), given.get("num_train_epochs")
    if steps > 0:
        draft.put("train.max_steps", steps, "max_steps")
        draft.put("train.epochs", None, "max_steps")
        draft.decide("num_train_epochs", UNNEEDED, "max_steps wins, as there", "")
    else:
        draft.put("train.epochs", epochs, "num_train_epochs")
        if epochs != int(epochs):
            draft.decide("num_train_epochs", DIFFERS, "a part of an epoch may be a step longer or shorter than there")
    draft.put("train.seed", given.get("seed"), "seed")
    draft.put("train.recompute", not given.get("disable_gradient_checkpointing"), "disable_gradient_checkpointing")
    if given.get("torch_compile"):
        draft.put("train.compile", True, "torch_compile")
    if given.get("use_cpu") or given.get("no_cuda"):
        draft.put("train.device", "cpu", "use_cpu")
    if given.get("neftune_noise_alpha"):
        draft.put("train.neftune_alpha", given.get("neftune_noise_alpha"), "neftune_noise_alpha")
    if (workers := given.values.get("dataloader_num_workers")) is not None:
        if workers < len(os.sched_getaffinity(0)):
            draft.put("data.workers", workers, "dataloader_num_workers")
        else:
            draft.decide("dataloader_num_workers", DIFFERS, "one less than the processors at hand, at most 4", "")


# --- saving -----------------------------------------------------------------------------------------------------------


def save(draft: Draft) -> None:
    given, strategy = draft.given, draft.given.get("save_strategy")
    if not given.has("output_dir"):
        given.refuse("output_dir", "no folder is named", "name the folder of the run")
    draft.put("output", str(given.path(given.get("output_dir"))), "output_dir")
    if strategy not in ("no", "false", "steps", "epoch", "best"):
        given.refuse("save_strategy", "there is no such strategy", "known: no, steps, epoch, best")
    if strategy == "steps":
        draft.put("save.every_steps", _steps(given, "save_steps"), "save_steps")
    elif strategy in ("no", "false"):
        draft.put("save.every_minutes", None, "save_strategy")
    elif strategy == "epoch":
        draft.decide("save_strategy", DIFFERS, "each half hour and at the end; name save_steps for more")
    limit = given.get("save_total_limit")
    draft.put("save.keep_last", limit if limit and limit > 0 else ALL, "save_total_limit")
    if given.get("load_best_model_at_end") or strategy == "best":
        metric = given.get("metric_for_best_model") or "loss"
        if metric not in ("loss", "eval_loss"):
            given.refuse("metric_for_best_model", "it is not measured", "use loss; `evaluate.generate` of a lensmith "
                         "run file measures exact_match")  # fmt: skip
        key = "load_best_model_at_end" if given.get("load_best_model_at_end") else "save_strategy"
        draft.put("save.keep_best", "loss", key)
    _resume(draft)


def _resume(draft: Draft) -> None:
    given = draft.given
    wanted = given.get("resume_from_checkpoint")
    if wanted is None or str(wanted).lower() in ("true", "false"):
        if given.has("resume_from_checkpoint") and str(wanted).lower() == "false":
            draft.decide(
                "resume_from_checkpoint", DIFFERS, "a run always goes on; name another output_dir to begin anew"
            )
    else:
        path, output = given.path(str(wanted)), given.path(given.get("output_dir"))
        if (path / "trainer_state.json").is_file():
            given.refuse("resume_from_checkpoint", "a checkpoint of transformers holds a pickled state, which is never "
                         "read", "continue from its weights: name it in adapter_name_or_path (LoRA) or in "
                         "model_name_or_path")  # fmt: skip
        if not path.is_relative_to(output):
            given.refuse(
                "resume_from_checkpoint", "a checkpoint outside output_dir", "name its run folder as output_dir"
            )
    if given.get("overwrite_output_dir") or not given.has("resume_from_checkpoint"):
        draft.warn("a run whose folder holds checkpoints goes on from the newest one by itself, also with "
                   "overwrite_output_dir; to begin anew name another output_dir")  # fmt: skip


def _steps(given: Given, key: str) -> int:
    value = given.get(key)
    if value < 1 or value != int(value):
        given.refuse(key, "a share of the steps is not supported", "write a whole number of steps")
    return int(value)


# --- evaluation and logs ----------------------------------------------------------------------------------------------


def evaluate(draft: Draft) -> None:
    given = draft.given
    key = "eval_strategy" if given.has("eval_strategy") else "evaluation_strategy"
    strategy = given.get(key)
    if strategy not in ("no", "false", "steps", "epoch"):
        given.refuse(key, "there is no such strategy", "known: no, steps, epoch")
    held = given.has("eval_dataset") or bool(given.get("val_size"))
    if not held and (strategy in ("steps", "epoch") or given.get("do_eval")):
        given.refuse(key if strategy in ("steps", "epoch") else "do_eval", "there is no held-out data",
                     "set eval_dataset or val_size")  # fmt: skip
    if strategy == "steps":
        source = "eval_steps" if given.has("eval_steps") else "logging_steps"
        draft.put("evaluate.every_steps", _steps(given, source), source)
    elif strategy == "epoch":
        draft.decide(key, DIFFERS, "before and after the run; set eval_strategy: steps and eval_steps for more")
    if given.has("early_stopping_steps"):
        patience = {"metric": "loss", "patience": given.get("early_stopping_steps")}
        draft.put("train.early_stop", patience, "early_stopping_steps")


def logs(draft: Draft) -> None:
    given, strategy = draft.given, draft.given.get("logging_strategy")
    if strategy == "steps":
        every = given.get("logging_steps")
        draft.put("log.every_steps", max(1, int(every)) if every >= 1 else 0, "logging_steps")
    wanted = given.get("report_to")
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if "all" in names:
        names = [n for n in SINKS if importlib.util.find_spec(n) is not None]
        draft.decide("report_to", TAKEN, f"installed here: {', '.join(names) or 'none'}")
    sinks = [_sink(draft, name) for name in names if name != "none"]
    if sinks:
        draft.put("log.sinks", sinks, "report_to")


def _sink(draft: Draft, name: str) -> dict[str, Any]:
    given = draft.given
    if name not in SINKS:
        given.refuse("report_to", f"{name} is not supported", f"known: none, all, {', '.join(SINKS)}")
    if name == "wandb":
        offline = given.env.get("WANDB_MODE") == "offline"
        project = given.env.get("WANDB_PROJECT", "huggingface")
        return {"kind": "wandb", "project": project} | ({"mode": "offline"} if offline else {})
    if name == "trackio":
        space = given.get("trackio_space_id")
        return {"kind": "trackio", "project": given.get("project")} | ({"space_id": space} if space else {})
    if name == "mlflow":
        return {"kind": "mlflow", "experiment": given.env.get("MLFLOW_EXPERIMENT_NAME", "Default")}
    return {"kind": name}
