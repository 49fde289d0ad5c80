"""Compares loss and gradients of a tiny model on a GPU with those on the CPU, in every way that training has."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from make_tiny_model import make_tiny_model
from peft import PeftModel

from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model, load_tokenizer
from glm_peft.models.unwrapping import base_of
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.packing import BatchPackingCollator

# A way of training, and how far loss and gradients may be, relatively, from the CPU's: in float32 and bfloat16 from
# sdpa's in float32, in 4 bits from those in 4 bits.
WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "sdpa": ({}, 1e-4),
    "eager": ({"attn_implementation": "eager"}, 1e-4),
    "checkpointed": ({}, 1e-4),
    "packed": ({}, 1e-4),
    "bfloat16": ({"dtype": "bfloat16"}, 0.1),
}
QUANTIZED = {"4 bits": ({"quantization_bit": 4}, 0.03)}
ON_GPU = {"flex": ({"attn_implementation": "flex_attention"}, 5e-3)}


def compare_with_cpu(generation: str, folder: Path, has_gpu: bool) -> dict[str, str]:
    """
    Compare every way with the CPU's.

    Raises:
        AssertionError: one is further away than it may be.
    """
    base = make_tiny_model(folder / "tiny", generation, num_layers=2)
    plain = ModelArguments(str(base), dtype="float32", num_virtual_tokens=4)
    ways = WAYS | (ON_GPU if has_gpu else {}) | (QUANTIZED if find_spec("bitsandbytes") else {})
    all_bits = {changes.get("quantization_bit") for changes, _ in ways.values()}
    exact = {bits: differentiate(replace(plain, quantization_bit=bits), "sdpa", "cpu") for bits in all_bits}
    found, far = {}, []
    for way, (changes, most) in ways.items():
        model_args = replace(plain, **changes)
        values = differentiate(model_args, way, "cuda" if has_gpu else "cpu")
        pairs = zip(values, exact[model_args.quantization_bit], strict=True)
        found[way] = max(float((own - other).norm() / other.norm()) for own, other in pairs)
        far += [way] if not found[way] <= most else []
    told = ", ".join(f"{way} {deviation:.1g}" for way, deviation in found.items())
    if far:
        raise AssertionError(f"{', '.join(far)} too far from the CPU: {told}")
    return {"remark": f"off by {told}"}


def differentiate(model_args: ModelArguments, way: str, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of some rows and the gradient of the prefix, in float32 on the CPU."""
    torch.manual_seed(0)
    model = create_adapter(load_base_model(model_args, device), model_args).train()
    attach_prefix_attention(model)
    attach_label_loss(base_of(model))
    if way == "checkpointed":
        base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    (prefix,) = (value for value in model.parameters() if value.requires_grad)
    with torch.no_grad():  # drawn on the CPU, as a GPU draws other numbers
        prefix.copy_(torch.randn(prefix.shape, generator=torch.Generator().manual_seed(0)))
    loss = model(**make_batch(model_args, model, packed=way == "packed")).loss
    loss.backward()
    return loss.detach().float().cpu(), prefix.grad.float().cpu()


def make_batch(model_args: ModelArguments, model: PeftModel, packed: bool) -> dict[str, torch.Tensor]:
    """Rows of different lengths, padded, or all in few rows."""
    config, generator = base_of(model).config, torch.Generator().manual_seed(0)
    frame = [config.gmask_token_id, config.bos_token_id] if config.model_type == "chatglm" else []
    rows = []
    for length in (24, 9, 17, 5):
        prompt, answer = torch.randint(5, 60, (2, length), generator=generator).tolist()
        rows.append({"input_ids": prompt + frame + answer, "labels": [-100] * len(prompt + frame) + answer})
    tokenizer = load_tokenizer(model_args)
    collate = TrainingCollator(tokenizer)
    if packed:
        collate = BatchPackingCollator(tokenizer, collate, config, lambda number, length: number * length)
    return {name: value.to(model.device) for name, value in collate(rows).items()}
