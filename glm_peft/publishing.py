"""What leaves a run: the adapter, its card, and the tokenizer if asked for."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

_TEXT = """
# {title}

A P-Tuning v2 prefix of {num_virtual_tokens} virtual tokens for `{base}`, trained with
[glm_peft](https://pypi.org/project/glm-peft/) and saved as a PEFT adapter.

## Use

```python
import glm_peft  # teaches transformers the published ChatGLM folders
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{adapter}")
```

or `python -m glm_peft.predict --model_name_or_path {base} --adapter_name_or_path {adapter} --prompt "..."`

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
    model.save_pretrained(output_dir)
    if tokenizer is not None:
        tokenizer.save_pretrained(output_dir)


def describe_recipe(data_args: Any, training_args: Any) -> dict[str, Any]:
    """What the card says of the training, by the names of the flags."""
    data = ("train_file", "dataset_name", "max_source_length", "max_target_length")
    training = (
        "learning_rate",
        "lr_scheduler_type",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "seed",
    )
    values = {name: getattr(data_args, name) for name in data} | {
        name: getattr(training_args, name) for name in training
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def write_card(model: PeftModel, output_dir: str | Path, recipe: dict[str, Any], results: dict[str, float]) -> None:
    """The model card of an adapter, in the place of PEFT's template."""
    folder, config = Path(output_dir), model.active_peft_config
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", base_model=base, tags=["p-tuning-v2", "prefix-tuning", "chatglm"])
    text = _TEXT.format(
        title=folder.resolve().name,
        num_virtual_tokens=config.num_virtual_tokens,
        base=base,
        adapter=folder.resolve().name,
        settings=_table(recipe),
        results=_table(results),
    )
    # The Hub's validation of base_model is for the push; a local base is fine here.
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(folder / "README.md")


def _table(values: dict[str, Any]) -> str:
    return "\n".join(
        f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in values.items()
    )
