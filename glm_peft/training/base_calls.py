"""Ask the base, which is the model that is trained with its adapter switched off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from glm_peft.models.unwrapping import base_of


@contextmanager
def without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[torch.nn.Module]:
    """Give the base within this context: the bare model, or the whole with the layers of its adapter switched off."""
    if isinstance(model, PeftModel) and not model.active_peft_config.is_prompt_learning:
        with model.disable_adapter():
            yield model
    else:
        yield base_of(model)


@contextmanager
def calls_of_base(model: PeftModel) -> Iterator[None]:
    """Let calls of a model, which a backend may have sharded since, be calls of its base within this context."""
    if not model.active_peft_config.is_prompt_learning:
        with model.disable_adapter():
            yield
        return
    # Calls of the whole still, whose hooks put a sharded model together; PEFT would leave out those of the base.
    before = vars(model).get("forward")
    model.forward = model.get_base_model().__call__
    try:
        yield
    finally:
        del model.forward
        if before:
            model.forward = before
