"""Keys of what trains and on which loss."""

from __future__ import annotations

from lensmith.migrate.keys import DIFFERS, TAKEN, UNNEEDED, UNSUPPORTED, rows

_PPO = "of PPO, which lensmith does not have"
_OFT = "of OFT, which lensmith does not have"

KEYS = (
    *rows("FinetuningArguments", (
        ("stage", "text", "sft", TAKEN, "objective", "pt, sft, rm, dpo, kto; ppo is an error. `pt` trains on the "
         "pictures of documents too, which LLaMA-Factory leaves out"),
        ("finetuning_type", "text", "lora", TAKEN, "tune", "lora, freeze, full; oft is an error"),
        ("pure_bf16", "bool", False, DIFFERS, "precision.preset: bf16-params", "the optimizer keeps float32 masters, "
         "without which small updates are lost"),
        ("use_llama_pro", "bool", False, UNSUPPORTED, "", "take use_llama_pro out"),
        ("use_adam_mini", "bool", False, UNSUPPORTED, "", "use `optim: adamw_8bit` to save memory"),
        ("use_mca", "bool", False, UNSUPPORTED, "", "Megatron is not used here: take it out; see docs/parallel.md"),
        ("use_megatron_bridge", "bool", False, UNSUPPORTED, "", "Megatron is not used here; see docs/parallel.md"),
        ("megatron_bridge_args", "any", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either"),
        ("use_hyper_parallel", "bool", False, UNSUPPORTED, "", "use `fsdp` or `deepspeed`"),
        ("hyper_parallel_args", "text", None, UNNEEDED, "", "of hyper_parallel, which lensmith does not have"),
        ("hyper_parallel_cp_size", "int", 1, UNNEEDED, "", "of hyper_parallel, which lensmith does not have"),
        ("use_muon", "bool", False, DIFFERS, "optimizer: muon", "torch's own Muon; the rest of the parameters "
         "trains by AdamW"),
        ("use_dft_loss", "bool", False, UNSUPPORTED, "", "take use_dft_loss out: the loss is cross entropy"),
        ("use_asft_loss", "bool", False, UNSUPPORTED, "", "take use_asft_loss out: the loss is cross entropy"),
        ("asft_alpha", "float", 0.1, UNNEEDED, "", "of ASFT, which lensmith does not have"),
        ("use_eaft_loss", "bool", False, UNSUPPORTED, "", "take use_eaft_loss out: the loss is cross entropy"),
        ("eaft_alpha", "float", 1.0, UNNEEDED, "", "of EAFT, which lensmith does not have"),
        ("freeze_vision_tower", "bool", True, TAKEN, "tune.train, tune.parts", "Qwen3-VL's deepstack mergers count as "
         "vision, as there"),
        ("freeze_multi_modal_projector", "bool", True, TAKEN, "tune.train, tune.parts", ""),
        ("freeze_language_model", "bool", False, TAKEN, "tune.train, tune.parts", ""),
        ("compute_accuracy", "bool", False, UNSUPPORTED, "", "use `evaluate.generate` of a lensmith run file: exact "
         "match of generated answers"),
        ("disable_shuffling", "bool", False, UNSUPPORTED, "", "samples are always shuffled: take it out"),
        ("early_stopping_steps", "int", None, TAKEN, "train.early_stop.patience", "evaluations without a better loss"),
        ("plot_loss", "bool", False, UNNEEDED, "", "loss.png and report.html are always made"),
        ("include_effective_tokens_per_second", "bool", False, UNNEEDED, "", "tokens a second are always logged"),
    )),
    *rows("FreezeArguments", (
        ("freeze_trainable_layers", "int", 2, TAKEN, "tune.last_layers, tune.first_layers", "below 0: the first ones"),
        ("freeze_trainable_modules", "list", "all", TAKEN, "tune.train", "`all` alone; single modules of a layer are "
         "an error"),
        ("freeze_extra_modules", "list", None, UNSUPPORTED, "", "write the run with `tune: {kind: freeze, train: "
         "[...]}`, which names whole parts"),
    )),
    *rows("LoraArguments", (
        ("additional_target", "list", None, TAKEN, "tune.full", "the embedding, the head or the projector"),
        ("lora_alpha", "int", None, TAKEN, "tune.alpha", "left out, twice the rank, as there"),
        ("lora_dropout", "float", 0.0, TAKEN, "tune.dropout", ""),
        ("lora_rank", "int", 8, TAKEN, "tune.rank", ""),
        ("lora_target", "list", "all", TAKEN, "tune.parts, tune.pattern", "`all`: every linear layer of what is not "
         "frozen; names: such layers there"),
        ("loraplus_lr_ratio", "float", None, TAKEN, "optimizer.lora_b_ratio", ""),
        ("loraplus_lr_embedding", "float", 1e-6, UNNEEDED, "", "the rate of embeddings is that of `optimizer.parts`"),
        ("use_rslora", "bool", False, TAKEN, "tune.rslora", ""),
        ("use_dora", "bool", False, TAKEN, "tune.dora", ""),
        ("pissa_init", "bool", False, TAKEN, "tune.init", "pissa, or pissa_niter_N by `pissa_iter`"),
        ("pissa_iter", "int", 16, TAKEN, "tune.init", ""),
        ("pissa_convert", "bool", False, TAKEN, "", "published adapters always work on the original model"),
        ("create_new_adapter", "bool", False, TAKEN, "tune.merge", "all given adapters are merged, and a new one "
         "trains"),
    )),
    *rows("OFTArguments", (
        ("module_dropout", "float", 0.0, UNNEEDED, "", _OFT),
        ("oft_rank", "int", 0, UNNEEDED, "", _OFT),
        ("oft_block_size", "int", 32, UNNEEDED, "", _OFT),
        ("oft_target", "list", "all", UNNEEDED, "", _OFT),
    )),
    *rows("RLHFArguments", (
        ("pref_beta", "float", 0.1, TAKEN, "objective.beta", ""),
        ("pref_ftx", "float", 0.0, TAKEN, "objective.sft_weight", "weight of the loss on the chosen answers"),
        ("pref_bco_weight", "float", 0.0, UNSUPPORTED, "", "take pref_bco_weight out"),
        ("pref_loss", "text", "sigmoid", TAKEN, "objective, objective.loss", "sigmoid, hinge, ipo, orpo, simpo; "
         "kto_pair is an error"),
        ("dpo_label_smoothing", "float", 0.0, TAKEN, "objective.label_smoothing", ""),
        ("kto_chosen_weight", "float", 1.0, TAKEN, "objective.desirable_weight", ""),
        ("kto_rejected_weight", "float", 1.0, TAKEN, "objective.undesirable_weight", ""),
        ("simpo_gamma", "float", 0.5, TAKEN, "objective.gamma", ""),
        ("ppo_buffer_size", "int", 1, UNNEEDED, "", _PPO),
        ("ppo_epochs", "int", 4, UNNEEDED, "", _PPO),
        ("ppo_score_norm", "bool", False, UNNEEDED, "", _PPO),
        ("ppo_target", "float", 6.0, UNNEEDED, "", _PPO),
        ("ppo_whiten_rewards", "bool", False, UNNEEDED, "", _PPO),
        ("ref_model", "text", None, TAKEN, "objective.reference.model", ""),
        ("ref_model_adapters", "list", None, UNSUPPORTED, "", "merge them with `lensmith export` and name the folder "
         "in ref_model"),
        ("ref_model_quantization_bit", "int", None, UNSUPPORTED, "", "the reference is computed once and kept, so it "
         "needs no room: take it out"),
        ("reward_model", "text", None, UNNEEDED, "", _PPO),
        ("reward_model_adapters", "list", None, UNNEEDED, "", _PPO),
        ("reward_model_quantization_bit", "int", None, UNNEEDED, "", _PPO),
        ("reward_model_type", "text", "lora", UNNEEDED, "", _PPO),
        ("ld_alpha", "float", None, UNSUPPORTED, "", "take ld_alpha out; `objective.length_normalised` of a lensmith "
         "run file is the nearest"),
    )),
)  # fmt: skip
