"""How many floating-point operations a step of training takes."""

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from glm_peft.models.unwrapping import base_of, has_prefix


def count_operations(
    model: PreTrainedModel | PeftModel, batch: dict[str, torch.Tensor], num_labels: int | None = None
) -> int:
    """
    Additions and multiplications of the forward and the backward pass on a batch, padding included.

    A token costs 2 for each weight of a linear layer, 2 for the gradient of what goes in, and 2 for that of the weight
    where it is trained. A frozen head works at the tokens with a label alone. Attention costs 4 for each pair of
    tokens and number of a head, and twice that backward, masked pairs included. What activation checkpointing
    computes again is not counted, as is usual.

    Args:
        batch: `input_ids` [b, s], and `labels` [b, s] if there are any.
        num_labels: tokens with a label. `None`: they are counted, for which a GPU has to be waited for.
    """
    base = base_of(model)
    prompt = model.active_peft_config if isinstance(model, PeftModel) else None
    virtual = prompt.num_virtual_tokens if prompt is not None and prompt.is_prompt_learning else 0
    rows, length = batch["input_ids"].shape
    seen = length + virtual
    length = length if has_prefix(model) else seen
    head = base.get_output_embeddings()
    total = rows * length * sum(_per_token(layer) for layer in _linear_layers(base) if layer is not head)
    if head.weight.requires_grad or batch.get("labels") is None:
        total += rows * length * _per_token(head)
    else:
        total += (int(count_labels(batch)) if num_labels is None else num_labels) * _per_token(head)
    total += 12 * rows * length * seen * _attention_width(base.config) * base.config.num_hidden_layers
    encoder = getattr(model, "prompt_encoder", None)
    return total + (virtual * sum(_per_token(layer) for layer in _linear_layers(encoder)) if encoder else 0)


def count_labels(batch: dict[str, torch.Tensor]) -> torch.Tensor | int:
    """The tokens that are to be foretold, [], on the device of the batch."""
    return 0 if batch.get("labels") is None else (batch["labels"][:, 1:] != -100).sum()


def operations_of_a_label(model: PreTrainedModel | PeftModel) -> int:
    """Those of a head that works at labels alone; 0 where it works at every token."""
    head = base_of(model).get_output_embeddings()
    return 0 if head.weight.requires_grad else _per_token(head)


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _per_token(layer: nn.Linear) -> int:
    return (6 if layer.weight.requires_grad else 4) * layer.in_features * layer.out_features


def _attention_width(config: Any) -> int:
    """Numbers of a query, all heads together."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * size
