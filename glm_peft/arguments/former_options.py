"""Map arguments of the published scripts and of older transformers releases to what became of each."""

_TOKEN_ADVICE = "set the environment variable HF_TOKEN or run `hf auth login`"
_TOKEN = f"is refused, as it would be saved in clear in training_args.bin: {_TOKEN_ADVICE}"
_DETECTED = "leave it out, the device is found by itself"
_AMP = "leave it out, --fp16 and --bf16 use torch's own mixed precision"
_WRAPPING = "use --fsdp_config or an accelerate configuration"

# transformers 5 removed these: argparse would only say that it does not know them.
_REMOVED = {
    "adafactor": "use --optim adafactor",
    "dispatch_batches": "use --accelerator_config '{\"dispatch_batches\": true}'",
    "evaluation_strategy": "use --eval_strategy",
    "fp16_backend": _AMP,
    "fp16_opt_level": _AMP,
    "fsdp_min_num_params": _WRAPPING,
    "fsdp_transformer_layer_cls_to_wrap": _WRAPPING,
    "group_by_length": "use --train_sampling_strategy group_by_length",
    "half_precision_backend": _AMP,
    "include_inputs_for_metrics": "use --include_for_metrics inputs",
    "include_tokens_per_second": "use --include_num_input_tokens_seen",
    "jit_mode_eval": "use --torch_compile",
    "logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "mp_parameters": "leave it out",
    "no_cuda": "use --use_cpu",
    "overwrite_output_dir": "leave it out, as an existing --output_dir is written to in any case, and give "
    "--resume_from_checkpoint to go on with a stopped run",
    "past_index": "leave it out",
    "per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "push_to_hub_model_id": "use --hub_model_id",
    "push_to_hub_organization": "use --hub_model_id ORGANIZATION/NAME",
    "ray_scope": "leave it out",
    "save_safetensors": "leave it out, as safetensors is the only format that is saved",
    "sharded_ddp": "use --fsdp or an accelerate configuration",
    "split_batches": "use --accelerator_config '{\"split_batches\": true}'",
    "torchdynamo": "use --torch_compile_backend",
    "tpu_metrics_debug": "use --debug tpu_metrics_debug",
    "tpu_num_cores": _DETECTED,
    "use_ipex": _DETECTED,
    "use_legacy_prediction_loop": "leave it out",
    "use_mps_device": _DETECTED,
    "warmup_ratio": "use --warmup_steps, where a number below 1 is the share of all steps",
    "xpu_backend": "use --ddp_backend",
}

_TABLE = "docs/migrating.md has every key of such a file"

# The nearest names here would mislead.
_OF_FINETUNE_DEMO = {
    "combine": "use --train_on, last for true and all for false",
    "data_config": "write what is in it without this group, as --train_file, --validation_file for val_file, "
    "--test_file and --preprocessing_num_workers for num_proc",
    "freezeV": "leave it out, as no image is read here",
    "max_input_length": "use --max_source_length",
    "max_output_length": "use --max_target_length",
    "num_proc": "use --preprocessing_num_workers",
    "peft_config": "write what is in it without this group, as --peft_type in small letters, --num_virtual_tokens, "
    "--lora_rank for r, --lora_alpha, --lora_dropout and --target_modules",
    "r": "use --lora_rank",
    "swanlab": "use --report_to",
    "task_type": "leave it out",
    "training_args": "write what is in it without this group, and add --do_train, --eval_strategy for "
    "evaluation_strategy and --max_new_tokens for generation_config",
    "val_file": "use --validation_file",
}

REFUSED: dict[str, str] = {
    **{
        name: f"is of the fine-tuning scripts of ChatGLM3 and GLM-4: {advice}; {_TABLE}"
        for name, advice in _OF_FINETUNE_DEMO.items()
    },
    **{name: f"was removed from transformers 5: {advice}" for name, advice in _REMOVED.items()},
    **dict.fromkeys(("hub_token", "push_to_hub_token", "token"), _TOKEN),
    "generation_config": "does not reach the model inside an adapter: use --num_beams, --do_sample, --top_p, "
    "--temperature and --max_new_tokens",
    "generation_max_length": "would count the prompt too: use --max_new_tokens",
    "load_in_4bit": "is spelt --quantization_bit 4 here: use that",
    "load_in_8bit": "is spelt --quantization_bit 8 here: use that",
    "torch_dtype": "is spelt --dtype here: use that",
    "trust_remote_code": "is never needed, as no model's own code is run here: leave it out",
}
"""Arguments that are refused, each with what the error says after its name."""

_NEVER_READ = "has no effect, here or in the published script, which never read it"

IGNORED: dict[str, str] = {
    **dict.fromkeys(
        ("forced_bos_token", "lang", "pad_to_max_length", "resize_position_embeddings", "use_fast_tokenizer"),
        _NEVER_READ,
    ),
    "config_name": f"{_NEVER_READ}; the configuration is that of --model_name_or_path",
    "tokenizer_name": f"{_NEVER_READ}; the tokenizer is that of --model_name_or_path",
    "use_auth_token": f"has no effect: for a private repository {_TOKEN_ADVICE}",
}
"""Arguments that are accepted with a warning, each with what the warning says after its name."""

RENAMED: dict[str, str] = {
    "generation_num_beams": "num_beams",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Arguments that transformers still has, by the name that they have here."""
