"""What leaves a run: the adapter, its card, and the tokenizer if asked for."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

_MODEL_SETTINGS = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "quantization_bit", "chat_format")
_DATA_SETTINGS = ("train_file", "dataset_name", "dataset_config_name", "max_source_length", "max_target_length")
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
_TECHNICAL = ("_runtime", "_per_second", "_flos", "_samples", "epoch")

_TEXT = """
# {title}

A P-Tuning v2 prefix of {num_virtual_tokens} virtual tokens for `{base}`, trained with
`glm_peft` and saved as a PEFT adapter.

## Use

```python
import glm_peft  # teaches transformers the published ChatGLM folders
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}")
```

or

```
python -m glm_peft.predict --model_name_or_path {base} --adapter_name_or_path {adapter}{chat_format} --prompt "..."
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


def save_adapter(model: PeftModel, output_dir: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Write `adapter_config.json`, `adapter_model.safetensors` and `README.md`; of the base nothing."""
    if not PartialState().is_main_process:
        return
    model.save_pretrained(output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def describe_recipe(model_args: Any, data_args: Any, training_args: Any) -> dict[str, Any]:
    """What the card says of the training, by the names of the flags; of files only the names."""
    groups = ((model_args, _MODEL_SETTINGS), (data_args, _DATA_SETTINGS), (training_args, _TRAINING_SETTINGS))
    values = {name: getattr(arguments, name) for arguments, names in groups for name in names}
    length = "max_steps" if training_args.max_steps > 0 else "num_train_epochs"
    values |= {length: getattr(training_args, length)}
    if data_args.train_file:
        values["train_file"] = Path(data_args.train_file).name
    return {name: getattr(value, "value", value) for name, value in values.items() if value or name == "seed"}


def write_card(model: PeftModel, output_dir: str | Path, recipe: dict[str, Any], results: dict[str, float]) -> None:
    """The model card of an adapter, in the place of PEFT's template."""
    if not PartialState().is_main_process:
        return
    folder, config = Path(output_dir), model.active_peft_config
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", base_model=base, tags=["p-tuning-v2", "prefix-tuning", "chatglm"])
    chat_format = recipe.get("chat_format")
    text = _TEXT.format(
        title=folder.resolve().name,
        num_virtual_tokens=config.num_virtual_tokens,
        base=base,
        adapter=folder.resolve().name,
        chat_format=f" --chat_format {chat_format}" if chat_format else "",
        settings=_table(recipe),
        results=_table({name: value for name, value in results.items() if not name.endswith(_TECHNICAL)}),
    )
    # The Hub's validation of base_model is for the push; a local base is fine here.
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(folder / "README.md")


def _table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items())


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
