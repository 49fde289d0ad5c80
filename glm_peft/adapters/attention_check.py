"""Refuse an attention implementation that cannot carry a prefix."""

from copy import deepcopy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

_SMALLEST_PREFIX = ModelArguments("any", num_virtual_tokens=1)


def check_attention(config: PreTrainedConfig, implementation: str | None) -> None:
    """Raise a `UserError` where the base lacks this `--attn_implementation`, or it cannot carry a prefix."""
    if implementation is None:
        return
    try:
        # On the meta device, where weights take no memory, and with a copy of the config, which the model writes into.
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=implementation)
            attach_prefix_attention(create_adapter(base, _SMALLEST_PREFIX))
    except UserError:
        raise
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"--attn_implementation {implementation} is not available here ({reason}): give sdpa or eager, or leave "
            "it out."
        ) from error
