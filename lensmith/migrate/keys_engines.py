"""Keys of engines and commands that lensmith does not have. Each is passed over with a message unless its switch is
on."""

from __future__ import annotations

from lensmith.migrate.keys import UNNEEDED, UNSUPPORTED, Kind, Row, rows

_GENERATION = "of generation by LLaMA-Factory; `evaluate.generate` of a lensmith run file answers greedily"
_SCORES = "of LLaMA-Factory's benchmark command"
_EXPORT = "of LLaMA-Factory's export command; `lensmith export` writes models"
_MEGATRON = "of Megatron, which lensmith does not use; see docs/parallel.md"


def _of(engine: str, *found: tuple[str, Kind, object]) -> tuple[Row, ...]:
    return tuple((name, kind, default, UNNEEDED, "", engine) for name, kind, default in found)


def _switch(name: str, remedy: str) -> tuple[Row, ...]:
    return ((name, "bool", False, UNSUPPORTED, "", remedy),)


KEYS = (
    *rows("GaloreArguments", (
        *_switch("use_galore", "use finetuning_type: lora, or `optim: adamw_8bit`, to save memory"),
        *_of("of GaLore, which lensmith does not have", ("galore_target", "list", "all"), ("galore_rank", "int", 16),
             ("galore_update_interval", "int", 200), ("galore_scale", "float", 2.0),
             ("galore_proj_type", "text", "std"), ("galore_layerwise", "bool", False)),
    )),
    *rows("ApolloArguments", (
        *_switch("use_apollo", "use finetuning_type: lora, or `optim: adamw_8bit`, to save memory"),
        *_of("of APOLLO, which lensmith does not have", ("apollo_target", "list", "all"), ("apollo_rank", "int", 16),
             ("apollo_update_interval", "int", 200), ("apollo_scale", "float", 32.0), ("apollo_proj", "text", "random"),
             ("apollo_proj_type", "text", "std"), ("apollo_scale_type", "text", "channel"),
             ("apollo_layerwise", "bool", False), ("apollo_scale_front", "bool", False)),
    )),
    *rows("BAdamArgument", (
        *_switch("use_badam", "use finetuning_type: freeze with freeze_trainable_layers"),
        *_of("of BAdam, which lensmith does not have", ("badam_mode", "text", "layer"),
             ("badam_start_block", "int", None), ("badam_switch_mode", "text", "ascending"),
             ("badam_switch_interval", "int", 50), ("badam_update_ratio", "float", 0.05),
             ("badam_mask_mode", "text", "adjacent"), ("badam_verbose", "int", 0)),
    )),
    *rows("SwanLabArguments", (
        *_switch("use_swanlab", "use `report_to: wandb`, tensorboard, trackio or mlflow"),
        *_of("of SwanLab, which lensmith does not report to", ("swanlab_project", "text", "llamafactory"),
             ("swanlab_workspace", "text", None), ("swanlab_run_name", "text", None),
             ("swanlab_mode", "text", "cloud"), ("swanlab_api_key", "text", None), ("swanlab_logdir", "text", None),
             ("swanlab_lark_webhook_url", "text", None), ("swanlab_lark_secret", "text", None)),
    )),
    *rows("KTransformersArguments", (
        *_switch("use_kt", "set use_kt: false; see docs/parallel.md for memory over several devices"),
        *_of("of KTransformers, which lensmith does not use", ("kt_cpu_activation", "text", None),
             ("kt_weight_path", "text", None), ("kt_non_expert_weight_path", "text", None),
             ("kt_expert_checkpoint_path", "text", None), ("kt_use_lora_experts", "bool", None),
             ("kt_lora_expert_num", "int", None), ("kt_lora_expert_intermediate_size", "int", None)),
        ("_kt_inference_config", "any", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either"),
        ("_kt_config_handle", "any", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either"),
        ("_kt_adapter_artifact_path", "any", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either"),
    )),
    *rows("VllmArguments", _of(
        "of vLLM, which serves what `lensmith export` writes", ("vllm_maxlen", "int", 4096),
        ("vllm_gpu_util", "float", 0.7), ("vllm_enforce_eager", "bool", False), ("vllm_max_lora_rank", "int", 32),
        ("vllm_config", "mapping", None),
    )),
    *rows("SGLangArguments", _of(
        "of SGLang, which serves what `lensmith export` writes", ("sglang_maxlen", "int", 4096),
        ("sglang_mem_fraction", "float", 0.7), ("sglang_tp_size", "int", -1), ("sglang_config", "mapping", None),
        ("sglang_lora_backend", "text", "triton"),
    )),
    *rows("ExportArguments", _of(
        _EXPORT, ("export_dir", "text", None), ("export_size", "int", 5), ("export_device", "text", "cpu"),
        ("export_quantization_bit", "int", None), ("export_quantization_dataset", "text", None),
        ("export_quantization_nsamples", "int", 128), ("export_quantization_maxlen", "int", 1024),
        ("export_legacy_format", "bool", False), ("export_hub_model_id", "text", None),
    )),
    *rows("GeneratingArguments", _of(
        _GENERATION, ("do_sample", "bool", True), ("temperature", "float", 0.95), ("top_p", "float", 0.7),
        ("top_k", "int", 50), ("num_beams", "int", 1), ("max_length", "int", 1024), ("max_new_tokens", "int", 1024),
        ("repetition_penalty", "float", 1.0), ("length_penalty", "float", 1.0), ("skip_special_tokens", "bool", True),
    )),
    *rows("EvaluationArguments", _of(
        _SCORES, ("task", "text", None), ("task_dir", "text", "evaluation"), ("batch_size", "int", 4),
        ("lang", "text", "en"), ("n_shot", "int", 5), ("save_dir", "text", None),
        ("download_mode", "text", "reuse_dataset_if_exists"),
    )),
    *rows("MegatronBridgeArguments", tuple(
        (name, "any", None, UNSUPPORTED, "", _MEGATRON) for name in (
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size",
            "context_parallel_size", "virtual_pipeline_model_parallel_size", "sequence_parallel",
            "recompute_granularity", "recompute_method", "recompute_num_layers",
            "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split", "bias_activation_fusion",
            "apply_rope_fusion", "masked_softmax_fusion", "cross_entropy_loss_fusion", "moe_grouped_gemm",
            "moe_token_dispatcher_type", "calculate_per_token_loss", "use_distributed_optimizer",
            "overlap_param_gather", "overlap_grad_reduce", "use_packed_sequences", "mixed_precision",
            "megatron_pretrained_checkpoint", "export_hf_on_finish", "extra_config",
        )
    )),
    *rows("older releases", (
        ("visual_inputs", "bool", None, UNNEEDED, "", "pictures are trained wherever the data has them"),
        ("image_resolution", "int", None, UNSUPPORTED, "", "write image_max_pixels; its value was a number of pixels"),
        ("video_resolution", "int", None, UNSUPPORTED, "", "write video_max_pixels; its value was a number of pixels"),
        ("train_mm_proj_only", "bool", False, UNSUPPORTED, "", "write finetuning_type: full, freeze_vision_tower: "
         "true, freeze_language_model: true, freeze_multi_modal_projector: false"),
    )),
)  # fmt: skip
