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


def save_adapter(
    model: PeftModel,
    output_dir: str | Path,
    settings: dict[str, Any],
    results: dict[str, float],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """
    Write `adapter_config.json`, `adapter_model.safetensors` and `README.md`; of the base nothing.

    Args:
        settings: what the card says of the training.
        results: scores and losses, by name.
        tokenizer: saved beside the adapter where given.
    """
    folder = Path(output_dir)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_card(model, folder, settings, results)


def write_card(model: PeftModel, folder: Path, settings: dict[str, Any], results: dict[str, float]) -> None:
    """The model card of an adapter, over PEFT's template."""
    config = model.active_peft_config
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", base_model=base, tags=["p-tuning-v2", "prefix-tuning", "chatglm"])
    text = _TEXT.format(
        title=folder.resolve().name,
        num_virtual_tokens=config.num_virtual_tokens,
        base=base,
        adapter=folder.resolve().name,
        settings=_table(settings),
        results=_table(results),
    )
    # The Hub's validation of base_model is for the push; a local base is fine here.
    ModelCard(f"---\n{data.to_yaml()}\n---\n{text}", ignore_metadata_errors=True).save(folder / "README.md")


def _table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {value if isinstance(value, str) else json.dumps(value)} |" for name, value in values.items())
