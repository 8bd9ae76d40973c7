"""Keys of the training loop: transformers' Seq2SeqTrainingArguments and what LLaMA-Factory adds to it."""

from __future__ import annotations

from lensmith.migrate.keys import DIFFERS, TAKEN, UNNEEDED, UNSUPPORTED, rows

_GENERATE = "held-out answers are asked for by `evaluate.generate` of a lensmith run file"
_BY_RANK = "every rank of a step is synchronised by lensmith itself"
_HUB = "nothing is published by itself: upload what `lensmith export` writes"
_PROFILE = "of torch's profiler; the report has the time of every phase"

KEYS = (
    *rows("TrainingArguments", (
        ("output_dir", "text", None, TAKEN, "output", "the run folder; what is trained is in "
         "`checkpoints/step-N/model`"),
        ("overwrite_output_dir", "bool", False, DIFFERS, "", "checkpoints are never deleted: a run that was "
         "interrupted goes on from its newest one; to begin anew name another output_dir"),
        ("do_train", "bool", False, TAKEN, "", "`lensmith train` trains"),
        ("do_eval", "bool", False, TAKEN, "data.eval, data.holdout", "held-out data is evaluated before and after"),
        ("do_predict", "bool", False, UNSUPPORTED, "", _GENERATE),
        ("resume_from_checkpoint", "any", None, DIFFERS, "", "a run goes on from its newest checkpoint by itself; "
         "another checkpoint, or one of transformers, is an error"),
        ("per_device_train_batch_size", "int", 8, TAKEN, "batch.samples", "x accumulation x ranks: samples of a step; "
         "how many a device takes at once follows from their tokens"),
        ("gradient_accumulation_steps", "int", 1, TAKEN, "batch.samples", "see per_device_train_batch_size"),
        ("per_device_eval_batch_size", "int", 8, UNNEEDED, "", "held-out rows are packed like training rows"),
        ("num_train_epochs", "float", 3.0, TAKEN, "train.epochs", "the last step of an epoch may be smaller "
         "(`batch.partial: epoch_end`), so the steps are as many as there"),
        ("max_steps", "int", -1, TAKEN, "train.max_steps", "wins over num_train_epochs"),
        ("learning_rate", "float", 5e-5, TAKEN, "optimizer.lr", ""),
        ("lr_scheduler_type", "text", "linear", TAKEN, "schedule", "linear, cosine, constant, "
         "constant_with_warmup, cosine_with_min_lr, warmup_stable_decay; cosine_with_restarts of one cycle; others "
         "are errors"),
        ("lr_scheduler_kwargs", "mapping", None, TAKEN, "schedule.final", "min_lr, min_lr_rate, num_cycles, "
         "num_decay_steps"),
        ("warmup_ratio", "float", 0.0, DIFFERS, "schedule.warmup", "the first update has the rate of warm-up step 1, "
         "not 0"),
        ("warmup_steps", "float", 0, DIFFERS, "schedule.warmup_steps", "the first update has the rate of warm-up "
         "step 1, not 0; below 1 it is a share"),
        ("optim", "text", "adamw_torch", TAKEN, "optimizer", "the AdamW of torch by any of its names, 8-bit "
         "AdamW, Adafactor; others are errors"),
        ("optim_args", "text", None, UNSUPPORTED, "", "take optim_args out; betas, eps and weight_decay have keys"),
        ("optim_target_modules", "any", None, UNSUPPORTED, "", "of GaLore and its kind: take it out"),
        ("weight_decay", "float", 0.0, TAKEN, "optimizer.weight_decay", "never on vectors, as there"),
        ("adam_beta1", "float", 0.9, TAKEN, "optimizer.betas", ""),
        ("adam_beta2", "float", 0.999, TAKEN, "optimizer.betas", ""),
        ("adam_epsilon", "float", 1e-8, TAKEN, "optimizer.eps", ""),
        ("max_grad_norm", "float", 1.0, TAKEN, "train.clip_norm", "0: never"),
        ("label_smoothing_factor", "float", 0.0, TAKEN, "objective.label_smoothing", ""),
        ("average_tokens_across_devices", "bool", True, TAKEN, "", "the loss of a step is the mean over its tokens; "
         "LLaMA-Factory averages micro-batches of vision-language models, whose long answers count less"),
        ("bf16", "bool", False, TAKEN, "precision.preset", "bf16: float32 trained parameters, bfloat16 compute"),
        ("fp16", "bool", False, TAKEN, "precision.preset", "fp16, with a loss scale"),
        ("bf16_full_eval", "bool", False, UNNEEDED, "", "evaluation computes as training does"),
        ("fp16_full_eval", "bool", False, UNNEEDED, "", "evaluation computes as training does"),
        ("tf32", "bool", None, UNNEEDED, "", "the precision preset decides"),
        ("gradient_checkpointing", "bool", False, UNNEEDED, "", "LLaMA-Factory passes over it; "
         "disable_gradient_checkpointing decides"),
        ("gradient_checkpointing_kwargs", "mapping", None, UNNEEDED, "", "the result is the same"),
        ("torch_compile", "bool", False, TAKEN, "train.compile", ""),
        ("torch_compile_backend", "text", None, UNSUPPORTED, "", "take it out: torch's default is used"),
        ("torch_compile_mode", "text", None, UNSUPPORTED, "", "take it out: torch's default is used"),
        ("use_liger_kernel", "bool", False, UNNEEDED, "", "it changes speed and memory alone"),
        ("liger_kernel_config", "mapping", None, UNNEEDED, "", "it changes speed and memory alone"),
        ("use_cache", "bool", False, UNNEEDED, "", "training keeps no cache of keys and values"),
        ("neftune_noise_alpha", "float", None, TAKEN, "train.neftune_alpha", ""),
        ("torch_empty_cache_steps", "int", None, UNNEEDED, "", "rows have even sizes"),
        ("auto_find_batch_size", "bool", False, UNNEEDED, "", "`batch.device_tokens` bounds memory; the batch of a "
         "step never changes by itself"),
        ("logging_strategy", "text", "steps", TAKEN, "log.every_steps", "every step is in metrics.jsonl"),
        ("logging_steps", "float", 500, TAKEN, "log.every_steps", "every step is in metrics.jsonl"),
        ("logging_first_step", "bool", False, UNNEEDED, "", "every step is in metrics.jsonl"),
        ("logging_dir", "text", None, DIFFERS, "", "logs are in the run folder"),
        ("log_on_each_node", "bool", True, UNNEEDED, "", "the first rank speaks"),
        ("logging_nan_inf_filter", "bool", True, DIFFERS, "guard.on_nonfinite", "a step that is not finite is left "
         "out and reported, never shown as 0"),
        ("include_num_input_tokens_seen", "any", "no", UNNEEDED, "", "tokens are always counted"),
        ("log_level", "text", "passive", UNNEEDED, "", "`lensmith train --quiet` says less"),
        ("log_level_replica", "text", "warning", UNNEEDED, "", "the first rank speaks"),
        ("disable_tqdm", "bool", None, UNNEEDED, "", "`lensmith train --quiet` shows no bar"),
        ("report_to", "list", "none", TAKEN, "log.sinks", "none, all, tensorboard, wandb, trackio, mlflow"),
        ("run_name", "text", None, DIFFERS, "", "runs have the name of their file"),
        ("project", "text", "huggingface", TAKEN, "log.sinks[].project", "of Trackio"),
        ("trackio_space_id", "text", None, TAKEN, "log.sinks[].space_id", ""),
        ("trackio_bucket_id", "text", None, UNSUPPORTED, "", "take trackio_bucket_id out"),
        ("trackio_static_space_id", "text", None, UNSUPPORTED, "", "take trackio_static_space_id out"),
        ("eval_strategy", "text", "no", TAKEN, "evaluate.every_steps", "with `epoch` held-out data is evaluated "
         "before and after the run"),
        ("evaluation_strategy", "text", "no", TAKEN, "evaluate.every_steps", "the old name of eval_strategy"),
        ("eval_steps", "float", None, TAKEN, "evaluate.every_steps", "left out, logging_steps"),
        ("eval_delay", "float", 0, UNSUPPORTED, "", "take eval_delay out"),
        ("eval_on_start", "bool", False, TAKEN, "evaluate.before", "always, where there is held-out data"),
        ("eval_do_concat_batches", "bool", True, UNNEEDED, "", "figures are sums over tokens"),
        ("eval_use_gather_object", "bool", False, UNNEEDED, "", "figures are sums over tokens"),
        ("eval_accumulation_steps", "int", None, UNNEEDED, "", "no logits are kept"),
        ("prediction_loss_only", "bool", False, UNNEEDED, "", "no logits are kept"),
        ("include_for_metrics", "any", None, UNNEEDED, "", "no logits are kept"),
        ("batch_eval_metrics", "bool", False, UNNEEDED, "", "no logits are kept"),
        ("save_strategy", "text", "steps", TAKEN, "save.every_steps", "`no`: at the end alone; `epoch`: each half "
         "hour and at the end; `best`: as keep_best"),
        ("save_steps", "float", 500, TAKEN, "save.every_steps", "besides, each half hour"),
        ("save_total_limit", "int", None, TAKEN, "save.keep_last", "left out, all are kept, as there"),
        ("save_only_model", "bool", False, DIFFERS, "", "checkpoints always have the state that a resume needs"),
        ("save_on_each_node", "bool", False, UNNEEDED, "", "ranks write into one folder, which all nodes see"),
        ("save_safetensors", "bool", True, UNNEEDED, "", "always"),
        ("enable_jit_checkpoint", "bool", False, UNNEEDED, "", "SIGTERM always saves"),
        ("push_to_hub", "bool", False, UNSUPPORTED, "", _HUB),
        ("hub_token", "text", None, UNSUPPORTED, "", _HUB),
        ("hub_private_repo", "bool", None, UNNEEDED, "", _HUB),
        ("hub_model_id", "text", None, UNNEEDED, "", _HUB),
        ("hub_strategy", "text", "every_save", UNNEEDED, "", _HUB),
        ("hub_always_push", "bool", False, UNNEEDED, "", _HUB),
        ("hub_revision", "text", None, UNNEEDED, "", _HUB),
        ("load_best_model_at_end", "bool", False, DIFFERS, "save.keep_best", "the best checkpoint is kept beside the "
         "last, which is the one published; `lensmith export` takes any"),
        ("metric_for_best_model", "text", None, TAKEN, "save.keep_best", "loss or eval_loss; others are errors"),
        ("greater_is_better", "bool", None, UNNEEDED, "", "known for every metric"),
        ("ignore_data_skip", "bool", False, UNNEEDED, "", "a resume finds its place at once"),
        ("restore_callback_states_from_checkpoint", "bool", False, UNNEEDED, "", "a resume restores everything"),
        ("full_determinism", "bool", False, UNNEEDED, "", "always deterministic where torch can be"),
        ("seed", "int", 42, TAKEN, "train.seed", "the order of samples and the start of adapters differ all the same"),
        ("data_seed", "int", None, DIFFERS, "", "`seed` decides the order of samples too"),
        ("use_cpu", "bool", False, TAKEN, "train.device: cpu", ""),
        ("no_cuda", "bool", False, TAKEN, "train.device: cpu", "the old name of use_cpu"),
        ("accelerator_config", "mapping", None, UNSUPPORTED, "", "accelerate is not used: take it out"),
        ("parallelism_config", "any", None, UNSUPPORTED, "", "accelerate is not used; see docs/parallel.md"),
        ("dataloader_drop_last", "bool", False, TAKEN, "batch.partial: drop", ""),
        ("dataloader_num_workers", "int", 0, TAKEN, "data.workers", "bounded by the processors at hand"),
        ("dataloader_pin_memory", "bool", True, UNNEEDED, "", "where there is a GPU"),
        ("dataloader_persistent_workers", "bool", False, UNNEEDED, "", "data workers live as long as the run"),
        ("dataloader_prefetch_factor", "int", None, UNNEEDED, "", "data workers read ahead by themselves"),
        ("remove_unused_columns", "bool", True, UNNEEDED, "", "LLaMA-Factory forces it to false"),
        ("label_names", "any", None, UNNEEDED, "", "set by LLaMA-Factory itself"),
        ("train_sampling_strategy", "text", "random", UNNEEDED, "", "rows are packed, so nothing is won by length"),
        ("group_by_length", "bool", False, UNNEEDED, "", "rows are packed without padding, so nothing is won by it"),
        ("length_column_name", "text", "length", UNNEEDED, "", "lengths are in the index"),
        ("ddp_find_unused_parameters", "bool", None, UNNEEDED, "", _BY_RANK),
        ("ddp_bucket_cap_mb", "int", None, UNNEEDED, "", _BY_RANK),
        ("ddp_broadcast_buffers", "bool", None, UNNEEDED, "", _BY_RANK),
        ("ddp_static_graph", "bool", None, UNNEEDED, "", _BY_RANK),
        ("ddp_backend", "text", None, UNNEEDED, "", "nccl on GPUs, gloo on CPUs"),
        ("ddp_timeout", "int", 1800, UNNEEDED, "", "`parallel.timeout` ends a run whose ranks give no sign of life; "
         "reading the data does not count"),
        ("fsdp", "list", "", DIFFERS, "parallel.engine: fsdp2", "full_shard, hybrid_shard, auto_wrap and offload, by "
         "PyTorch's fully_shard"),
        ("fsdp_config", "mapping", None, DIFFERS, "parallel.engine", "every block is a unit, whatever it says of "
         "wrapping"),
        ("deepspeed", "any", None, TAKEN, "parallel.engine: deepspeed", "its `auto` values are filled by the run; a "
         "value that contradicts the run is an error"),
        ("debug", "any", None, UNSUPPORTED, "", "take debug out; steps that are not finite are always found"),
        ("skip_memory_metrics", "bool", True, UNNEEDED, "", "peak memory is always reported"),
        ("local_rank", "int", -1, UNNEEDED, "", "the launcher's variables say it"),
        ("sortish_sampler", "bool", False, UNNEEDED, "", "rows are packed, so nothing is won by length"),
        ("predict_with_generate", "bool", False, UNSUPPORTED, "", _GENERATE),
        ("generation_max_length", "int", None, UNNEEDED, "", _GENERATE),
        ("generation_num_beams", "int", None, UNNEEDED, "", _GENERATE),
        ("generation_config", "any", None, UNNEEDED, "", _GENERATE),
    )),
    *rows("RayArguments", (
        ("ray_num_workers", "int", 1, TAKEN, "parallel.ranks", "ranks on a Ray cluster: `lensmith train FILE --ray "
         "auto`"),
        ("ray_init_kwargs", "mapping", None, UNSUPPORTED, "", "give the address: `lensmith train FILE --ray ADDRESS`"),
        ("ray_run_name", "text", None, UNNEEDED, "", "runs have the name of their file"),
        ("ray_storage_path", "text", None, UNNEEDED, "", "`lensmith train FILE --ray-storage PATH`"),
        ("master_addr", "text", None, UNNEEDED, "", "the launcher says it"),
        ("master_port", "text", None, UNNEEDED, "", "the launcher says it"),
    )),
    *rows("ProfilerArguments", (
        ("enable_torch_profiler", "bool", False, UNSUPPORTED, "", _PROFILE),
        ("profiler_output_dir", "text", None, UNNEEDED, "", _PROFILE),
        ("profiler_wait_steps", "int", 1, UNNEEDED, "", _PROFILE),
        ("profiler_warmup_steps", "int", 1, UNNEEDED, "", _PROFILE),
        ("profiler_active_steps", "int", 1, UNNEEDED, "", _PROFILE),
        ("profiler_repeat", "int", 1, UNNEEDED, "", _PROFILE),
        ("profiler_record_shapes", "bool", True, UNNEEDED, "", _PROFILE),
        ("profiler_profile_memory", "bool", True, UNNEEDED, "", _PROFILE),
        ("profiler_with_stack", "bool", True, UNNEEDED, "", _PROFILE),
        ("profile_modules", "text", None, UNNEEDED, "", _PROFILE),
    )),
    *rows("Fp8Arguments", (
        ("fp8", "bool", False, UNSUPPORTED, "", "set bf16: true instead"),
        ("fp8_backend", "text", "auto", UNNEEDED, "", "of FP8, which lensmith does not have"),
        ("fp8_enable_fsdp_float8_all_gather", "bool", False, UNSUPPORTED, "", "take it out: there is no FP8 here"),
    )),
)  # fmt: skip
