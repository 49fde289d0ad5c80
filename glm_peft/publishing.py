"""What leaves a run: the adapter, its card, and the tokenizer if asked for."""

import dataclasses
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.methods import METHODS
from glm_peft.tuners import has_prefix, method_of

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
_CACHED = re.compile(r"[/\\]models--(?P<name>[^/\\]+)[/\\]snapshots[/\\][0-9a-f]{40}")
_CONFIGS = ("adapter_config.json", "config.json")
_TECHNICAL = ("_runtime", "_per_second", "_flos", "_samples", "epoch")

_TEXT = """
# {title}

{what}

## Use

```python
import glm_peft  # teaches transformers the published ChatGLM folders
{loading}
```

or

```
python -m glm_peft.predict {named}{chat_format} --prompt "..."
```

## Training

| setting | value |
|---|---|
{settings}

## Results

| score | value |
|---|---|
{results}
"""

_LOADING_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}")"""
_LOADING_MODEL = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{adapter}")"""


def save_adapter(
    model: PreTrainedModel | PeftModel, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """
    Write `adapter_config.json` and `adapter_model.safetensors`; of the base nothing.

    A model that was trained as a whole is written as a model's folder.
    """
    if not PartialState().is_main_process:
        return
    model.save_pretrained(output_dir)
    tidy_weights(Path(output_dir))
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def tidy_weights(folder: Path) -> None:
    """Take away PEFT's card, a template that says nothing, and let others read the weights as they may the config."""
    card = folder / "README.md"
    if card.is_file() and "[More Information Needed]" in card.read_text(encoding="utf-8"):
        card.unlink()
    config = next((path for path in map(folder.joinpath, _CONFIGS) if path.is_file()), None)
    for file in folder.glob("*.safetensors") if config else []:  # safetensors lets nobody but the owner read them
        with suppress(OSError):
            file.chmod(stat.S_IMODE(config.stat().st_mode))


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


def write_card(
    model: PreTrainedModel | PeftModel, output_dir: str | Path, recipe: dict[str, Any], results: dict[str, float]
) -> None:
    """The model card of an adapter, in the place of PEFT's template."""
    if not PartialState().is_main_process:
        return
    folder, is_adapter = Path(output_dir), isinstance(model, PeftModel)
    base = model.active_peft_config.base_model_name_or_path if is_adapter else model.config.name_or_path
    library = "peft" if is_adapter else "transformers"
    data = ModelCardData(library_name=library, base_model=base, tags=_tags(model))
    chat_format = recipe.get("chat_format")
    # As it was typed, which works from where it was typed; where that tells the machine, a place to fill in.
    name = f"path/to/{'adapter' if is_adapter else 'model'}" if folder.is_absolute() else folder.as_posix()
    text = _TEXT.format(
        title=f"{METHODS[method_of(model)].title if is_adapter else 'Fully fine-tuned model'}: {public_name(base)}",
        what=_describe(model, base),
        loading=(_LOADING_ADAPTER if is_adapter else _LOADING_MODEL).format(base=base, adapter=name),
        named=f"--model_name_or_path {base} --adapter_name_or_path {name}"
        if is_adapter
        else f"--model_name_or_path {name}",
        chat_format=f" --chat_format {chat_format}" if chat_format else "",
        settings=_table(recipe),
        results=_table(select_scores(results)),
    )
    # The Hub's validation of base_model is for the push; a local base is fine here.
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(folder / "README.md")


def _tags(model: PreTrainedModel | PeftModel) -> list[str]:
    if has_prefix(model):
        return ["p-tuning-v2", "prefix-tuning", "chatglm"]
    return [method_of(model).replace("_", "-"), "chatglm"] if isinstance(model, PeftModel) else ["chatglm"]


def _describe(model: PreTrainedModel | PeftModel, base: str) -> str:
    if not isinstance(model, PeftModel):
        return f"`{base}`, all of it trained with `glm_peft`."
    title, size = METHODS[method_of(model)].title, getattr(model.active_peft_config, "num_virtual_tokens", None)
    tokens = f" of {size} virtual tokens" if size else ""
    article = "An" if title.strip("(")[0] in "AEIO" else "A"
    return f"{article} {title}{tokens} for `{base}`, trained with\n`glm_peft` and saved as a PEFT adapter."


def select_scores(results: dict[str, Any]) -> dict[str, Any]:
    """The results that tell how good the answers are, without times and counts."""
    return {name: value for name, value in results.items() if not name.endswith(_TECHNICAL)}


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a folder its own name only, or the id of the copy of the Hub's that it is."""
    cached = _CACHED.search(name_or_path)
    if cached:
        return cached["name"].replace("--", "/")
    path = Path(name_or_path)
    is_folder = path.is_absolute() or path.exists() or name_or_path[:1] in ".~"
    return Path(os.path.abspath(path)).name if is_folder else name_or_path


def _changed_settings(arguments: Any) -> dict[str, Any]:
    fields = {field.name: field.default for field in dataclasses.fields(arguments)}
    names = [name for name in _CHANGED_SETTINGS if name in fields]
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) != fields[name]}


def _table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
