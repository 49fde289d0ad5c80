"""What leaves a run: the adapter, the tokenizer if asked for, and what may be told of the run."""

import dataclasses
import json
import os
import re
from pathlib import Path, PureWindowsPath
from typing import Any

_MODEL_SETTINGS = (
    "peft_type",
    "num_virtual_tokens",
    "prefix_projection",
    "encoder_hidden_size",
    "quantization_bit",
    "chat_format",
)
_DATA_SETTINGS = ("train_file", "dataset_name", "dataset_config_name", "max_source_length", "max_target_length")
# Named only where they are not what they are by themselves.
_CHANGED_SETTINGS = (
    "dtype",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "prefix_init",
    "prefix_init_text",
    "prefix_init_std",
    "prefix_dropout",
    "prompt_column",
    "response_column",
    "history_column",
    "source_prefix",
    "max_train_samples",
    "packing",
    "max_length",
    "train_on",
    "skip_bad_rows",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "adam_beta1",
    "adam_beta2",
    "train_sampling_strategy",
    "bf16",
    "fp16",
    "activation_checkpointing",
    "full_determinism",
)
_TRAINING_SETTINGS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "label_smoothing_factor",
    "seed",
)
# They say where a run was and to whom it told of itself, and change nothing of its result.
_PRIVATE = (
    "output_dir",
    "cache_dir",
    "logging_dir",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "push_to_hub",
    "base_model_id",
    "resume_from_checkpoint",
    "disable_tqdm",
    "log_level",
    "log_level_replica",
)
_PRIVATE_KINDS = ("hub_", "trackio_")
_TEXTS = ("source_prefix", "prefix_init_text", "prompt_column", "response_column", "history_column")
_CACHED = re.compile(r"[/\\]models--(?P<name>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]{40}")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[/\\]|\\\\")
_NAMED, _NEXT_NAMED = re.compile(r"[A-Za-z]\w*="), re.compile(r",\s*(?=[A-Za-z]\w*=)")  # as --validation_file has them
_TECHNICAL = ("_runtime", "_per_second", "_flos", "_samples", "epoch")


def describe_recipe(model_args: Any, data_args: Any, training_args: Any) -> dict[str, Any]:
    """What is said of the training, by the names of the flags; of files and folders only the names."""
    groups = ((model_args, _MODEL_SETTINGS), (data_args, _DATA_SETTINGS), (training_args, _TRAINING_SETTINGS))
    values = {name: getattr(arguments, name) for arguments, names in groups for name in names}
    length = "max_steps" if training_args.max_steps > 0 else "num_train_epochs"
    values |= {length: getattr(training_args, length)}
    for arguments, _ in groups:
        values |= _changed_settings(arguments)
    if data_args.train_file:
        values["train_file"] = Path(data_args.train_file).name
    if data_args.dataset_name:
        values["dataset_name"] = public_name(data_args.dataset_name)
    return {name: getattr(value, "value", value) for name, value in values.items() if value or name == "seed"}


def describe_flags(*arguments: Any) -> dict[str, Any]:
    """What a run was given other than the defaults, by the names of the flags; of files and folders only the names."""
    given = {name: value for one in arguments for name, value in getattr(one, "given", {}).items()}
    told = [name for name in given if name not in _PRIVATE and not name.startswith(_PRIVATE_KINDS)]
    return {name: given[name] if name in _TEXTS else _public_value(given[name]) for name in told}


def _public_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _public_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_public_value(item) for item in value]
    if not isinstance(value, str):
        return getattr(value, "value", value)
    if value.startswith("{"):
        return json.dumps(_public_value(json.loads(value)), ensure_ascii=False)
    if not _NAMED.match(value):
        return public_name(value)
    parts = [part.partition("=") for part in _NEXT_NAMED.split(value)]
    return ",".join(f"{name}={public_name(part)}" for name, _, part in parts)


def select_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The results that tell how good the answers are, without times and counts."""
    return {name: value for name, value in results.items() if not name.endswith(_TECHNICAL)}


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a folder its own name only, or the id of the copy of the Hub's that it is."""
    cached = _CACHED.search(name_or_path)
    if cached:
        return cached["name"].replace("--", "/")
    if _WINDOWS_PATH.match(name_or_path):
        return PureWindowsPath(name_or_path).name
    path = Path(name_or_path)
    is_folder = path.is_absolute() or path.exists() or name_or_path[:1] in ".~"
    return Path(os.path.abspath(path)).name if is_folder else name_or_path


def _changed_settings(arguments: Any) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(arguments)}
    names = [name for name in _CHANGED_SETTINGS if name in fields]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) != fields[name]}
