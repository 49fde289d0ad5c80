"""Find the base model under an adapter, and say which method the adapter is of."""

from peft import (
    PeftModel,
    PeftType,
)
from torch import nn
from transformers import PreTrainedModel

from glm_peft.arguments.methods import IN_EMBEDDINGS


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the base of an adapter, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def method_of(model: PeftModel) -> str:
    """Return the adapter's method as `--peft_type` names it."""
    return model.active_peft_config.peft_type.value.lower()


def has_prefix(model: PreTrainedModel | PeftModel) -> bool:
    """Whether the model's active adapter is a prefix."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == PeftType.PREFIX_TUNING


def starts_with_embeddings(model: nn.Module) -> bool:
    """Whether `generate` begins with embeddings instead of ids."""
    # These methods put virtual tokens before the prompt, which have embeddings but no ids.
    return isinstance(model, PeftModel) and method_of(model) in IN_EMBEDDINGS
