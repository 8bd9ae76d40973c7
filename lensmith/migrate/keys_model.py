"""Keys of the model, its processor and the data."""

from __future__ import annotations

from lensmith.migrate.keys import DIFFERS, TAKEN, UNNEEDED, UNSUPPORTED, rows

_PLAIN = "the word of a tokenizer or processor that lensmith does not call"
_HUB = "models are read from a folder or from the Hugging Face Hub"
_INFERENCE = "of inference; lensmith trains, vLLM and transformers serve what `lensmith export` writes"

KEYS = (
    *rows("DataArguments", (
        ("template", "text", None, TAKEN, "data.train[].format.default_system", "the family of the model decides the "
         "chat format; a template of another family is warned of, a default system prompt that differs is written out"),
        ("dataset", "list", None, TAKEN, "data.train", "one source for each name; rows that are dropped with a "
         "warning there are dropped with a reason in the ledger, up to `data.max_dropped`"),
        ("eval_dataset", "list", None, TAKEN, "data.eval", "one source for each name, by dataset_info.json"),
        ("dataset_dir", "text", "data", TAKEN, "data.train[].path", "a folder, `ONLINE`, or `REMOTE:repository`"),
        ("media_dir", "text", None, TAKEN, "data.train[].media_dir, data.media_roots", "left out, `dataset_dir`"),
        ("cutoff_len", "int", 2048, TAKEN, "data.max_tokens", "cut as there (`data.too_long: llamafactory`)"),
        ("train_on_prompt", "bool", False, DIFFERS, "data.train[].format.train: all", "texts of all turns are "
         "trained; role headers and the places of pictures, which LLaMA-Factory trains too, are not"),
        ("mask_history", "bool", False, TAKEN, "data.train[].format.train: last", ""),
        ("streaming", "bool", False, DIFFERS, "data.stream", "rows are trained as they are read; windows of "
         "`buffer_size` rows are shuffled, and a resume goes on where it was"),
        ("buffer_size", "int", 16384, TAKEN, "data.stream.window", "means something with `streaming` only"),
        ("mix_strategy", "text", "concat", DIFFERS, "data.mixture", "same proportions, another random order"),
        ("interleave_probs", "list", None, TAKEN, "data.train[].share", ""),
        ("overwrite_cache", "bool", False, UNNEEDED, "", "the index is made anew whenever data or settings change"),
        ("preprocessing_batch_size", "int", 1000, UNNEEDED, "", "rows are measured one by one"),
        ("preprocessing_num_workers", "int", None, UNNEEDED, "", "the index uses all processors by itself"),
        ("max_samples", "int", None, TAKEN, "data.train[].max_samples", "after `num_samples`, the first so many"),
        ("eval_num_beams", "int", None, UNSUPPORTED, "", "answers are generated greedily: take it out"),
        ("ignore_pad_token_for_loss", "bool", True, UNNEEDED, "", "there is no padding"),
        ("val_size", "float", 0.0, DIFFERS, "data.holdout", "held out by picture, never by row, so that no picture "
         "is on both sides; the share is met only about"),
        ("eval_on_each_dataset", "bool", False, UNNEEDED, "", "held-out figures are given for every source"),
        ("packing", "bool", None, DIFFERS, "batch.tokens", "samples of a row never see each other; a step has the "
         "tokens of as many full rows as it has there"),
        ("neat_packing", "bool", False, TAKEN, "batch.packing", "rows are always packed with attention kept apart"),
        ("tool_format", "text", None, UNSUPPORTED, "", "tools are written as the family writes them: take it out"),
        ("default_system", "text", None, TAKEN, "data.train[].format.default_system", ""),
        ("enable_thinking", "bool", True, DIFFERS, "", "no empty thought is put in front of answers"),
        ("preserve_thinking", "bool", False, DIFFERS, "", "thoughts in the data always stay as they are"),
        ("tokenized_path", "text", None, UNNEEDED, "", "what is measured is kept in the index cache; a folder that "
         "LLaMA-Factory has tokenised is refused"),
        ("data_shared_file_system", "bool", False, UNNEEDED, "", "every rank reads the data by itself"),
    )),
    *rows("BaseModelArguments", (
        ("model_name_or_path", "text", None, TAKEN, "model.path", ""),
        ("adapter_name_or_path", "list", None, TAKEN, "tune.adapter, tune.merge", "all but the last are merged; the "
         "last is trained on, or merged too with `create_new_adapter`"),
        ("adapter_folder", "text", None, TAKEN, "tune.adapter", "the folder that the adapters' names count from"),
        ("cache_dir", "text", None, UNSUPPORTED, "", "set HF_HUB_CACHE to this folder instead"),
        ("use_fast_tokenizer", "bool", True, UNNEEDED, "", "the tokenizers library is always used"),
        ("resize_vocab", "bool", False, TAKEN, "model.add_tokens", "the embedding grows where new tokens need it"),
        ("split_special_tokens", "bool", False, TAKEN, "", "control tokens that stand in texts are always text"),
        ("add_tokens", "list", None, DIFFERS, "model.add_tokens", "with LoRA only the rows of the new tokens train"),
        ("add_special_tokens", "list", None, DIFFERS, "model.add_tokens", "with LoRA only their rows train"),
        ("new_special_tokens_config", "text", None, UNSUPPORTED, "", "name the tokens in `add_special_tokens`; their "
         "rows begin as the mean row"),
        ("init_special_tokens", "text", "noise_init", DIFFERS, "", "rows of new tokens begin as the mean row"),
        ("model_revision", "text", "main", TAKEN, "model.revision", ""),
        ("low_cpu_mem_usage", "bool", True, UNNEEDED, "", "weights are always read one tensor at a time"),
        ("rope_scaling", "text", None, UNSUPPORTED, "", "write rope_scaling into config.json of the model folder"),
        ("flash_attn", "text", "auto", UNNEEDED, "", "the attention of packed rows is chosen by device"),
        ("shift_attn", "bool", False, UNSUPPORTED, "", "take shift_attn out: attention is exact here"),
        ("mixture_of_depths", "text", None, UNSUPPORTED, "", "take mixture_of_depths out"),
        ("use_unsloth", "bool", False, UNSUPPORTED, "", "set use_unsloth: false; the training is the same without it"),
        ("use_unsloth_gc", "bool", False, UNNEEDED, "", "blocks are computed again without it"),
        ("enable_liger_kernel", "bool", False, UNNEEDED, "", "it changes speed and memory alone; logits are computed "
         "at supervised positions only"),
        ("moe_aux_loss_coef", "float", None, UNSUPPORTED, "", "take moe_aux_loss_coef out: no family here has experts"),
        ("disable_gradient_checkpointing", "bool", False, TAKEN, "train.recompute", "blocks are computed again in the "
         "backward pass unless this is true, as there"),
        ("use_reentrant_gc", "bool", True, UNNEEDED, "", "the result is the same"),
        ("upcast_layernorm", "bool", False, UNSUPPORTED, "", "frozen norms stay as they are: take it out"),
        ("upcast_lmhead_output", "bool", False, UNNEEDED, "", "the loss is computed in float32"),
        ("train_from_scratch", "bool", False, UNSUPPORTED, "", "make a model folder with random weights and name it"),
        ("infer_backend", "text", "huggingface", UNSUPPORTED, "", _INFERENCE),
        ("offload_folder", "text", "offload", UNNEEDED, "", _INFERENCE),
        ("use_kv_cache", "bool", True, UNNEEDED, "", _INFERENCE),
        ("use_v1_kernels", "bool", False, UNNEEDED, "", "it changes speed alone"),
        ("infer_dtype", "text", "auto", UNNEEDED, "", _INFERENCE),
        ("hf_hub_token", "text", None, UNSUPPORTED, "", "set HF_TOKEN in the environment; run files are kept"),
        ("ms_hub_token", "text", None, UNSUPPORTED, "", _HUB),
        ("om_hub_token", "text", None, UNSUPPORTED, "", _HUB),
        ("print_param_status", "bool", False, UNNEEDED, "", "what trains is always printed"),
        ("trust_remote_code", "bool", False, DIFFERS, "", "no code of a model runs unless `model.remote_code` pins "
         "it by its hash; none of the families with a template here needs it"),
    )),
    *rows("QuantizationArguments", (
        ("quantization_method", "text", "bnb", TAKEN, "tune.quantize", "bitsandbytes alone"),
        ("quantization_bit", "int", None, TAKEN, "tune.quantize.bits", ""),
        ("quantization_type", "text", "nf4", TAKEN, "tune.quantize.type", ""),
        ("double_quantization", "bool", True, TAKEN, "tune.quantize.double", ""),
        ("quantization_device_map", "text", None, UNSUPPORTED, "", "take quantization_device_map out"),
    )),
    *rows("ProcessorArguments", (
        ("image_max_pixels", "int", 768 * 768, TAKEN, "data.max_pixels", "with LLaMA-Factory's own resize in front of "
         "the model's (`data.resize: llamafactory`)"),
        ("image_min_pixels", "int", 32 * 32, TAKEN, "data.min_pixels", "with `data.resize: llamafactory`"),
        ("image_do_pan_and_scan", "bool", False, UNSUPPORTED, "", "set do_pan_and_scan in the model's own "
         "preprocessor_config.json"),
        ("crop_to_patches", "bool", False, UNSUPPORTED, "", "set crop_to_patches in the model's own "
         "preprocessor_config.json"),
        ("video_max_pixels", "int", 256 * 256, TAKEN, "data.video.max_pixels", "of one frame, with `data.resize: "
         "llamafactory`"),
        ("video_min_pixels", "int", 16 * 16, TAKEN, "data.video.min_pixels", "of one frame, with `data.resize: "
         "llamafactory`"),
        ("video_fps", "float", 2.0, TAKEN, "data.video.fps", "frames are chosen as there"),
        ("video_maxlen", "int", 128, TAKEN, "data.video.max_frames", ""),
        ("use_audio_in_video", "bool", False, UNSUPPORTED, "", "sound is not trained: set it to false"),
        ("audio_sampling_rate", "int", 16000, UNNEEDED, "", "sound is not trained"),
    )),
    *rows("ModelArguments", (
        ("compute_dtype", "text", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either: take it out"),
        ("device_map", "any", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either: take it out"),
        ("model_max_length", "int", None, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either: use cutoff_len"),
        ("block_diag_attn", "bool", False, UNSUPPORTED, "", "it cannot be set in LLaMA-Factory either: take it out"),
    )),
)  # fmt: skip
