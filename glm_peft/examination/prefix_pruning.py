"""Write a smaller adapter of some of a prefix's virtual tokens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from glm_peft.adapters.files import make_prefix_config, read_adapter_config
from glm_peft.examination.adapter_statistics import Prefix
from glm_peft.provenance.record import describe_weights, read_provenance, write_provenance

_OF_TRAINING = ("metric_protocol", "recipe", "data", "scores")


def write_pruned_adapter(
    folder: Path,
    prefix: Prefix,
    weight: torch.Tensor,
    config: PreTrainedConfig,
    record: Mapping[str, Any],
    scores: Mapping[str, float],
) -> None:
    """
    Write `adapter_config.json`, `adapter_model.safetensors` and `provenance.json`, which stock PEFT reads.

    Args:
        prefix: the prefix that was pruned.
        weight: the virtual tokens that are kept, [N, layers * 2 * kv].
        config: the config of the base.
        record: what `provenance.json` says besides where the adapter comes from.
        scores: the losses of the smaller adapter.
    """
    # `contiguous`, as safetensors refuses views.
    save_file({"prompt_embeddings": weight.contiguous()}, folder / "adapter_model.safetensors")
    _describe_adapter(prefix, len(weight), config).save_pretrained(folder)
    write_provenance(folder, record | {"pruned_from": describe_pruned(prefix)}, scores)


def describe_pruned(prefix: Prefix) -> dict[str, Any]:
    """Return name, digests and length of the prefix that is pruned, and what is recorded of its training."""
    origin = read_provenance(prefix.source)
    known = {name: origin[name] for name in _OF_TRAINING if name in origin}
    return describe_weights(prefix.source) | {"num_virtual_tokens": prefix.num_virtual_tokens} | known


def _describe_adapter(prefix: Prefix, num_virtual_tokens: int, config: PreTrainedConfig) -> PeftConfig:
    if prefix.is_published:
        return make_prefix_config(num_virtual_tokens, config, config.name_or_path)
    adapter = read_adapter_config(prefix.source)  # with whatever else its training put there
    adapter.num_virtual_tokens, adapter.inference_mode = num_virtual_tokens, True
    return adapter
