"""A training step of a base with a fresh adapter, for bases in different precisions."""

import torch
from torch import nn
from transformers import PreTrainedModel

from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model
from glm_peft.models.unwrapping import base_of


def trained(model_args: ModelArguments, checkpointing: bool = False) -> tuple[PreTrainedModel, list[torch.Tensor]]:
    """The base, and of a training step the loss and the gradients of the adapter."""
    torch.manual_seed(0)
    model = create_adapter(load_base_model(model_args, "cpu"), model_args).train()
    base = base_of(model)
    if model_args.peft_type == "prefix_tuning":
        attach_prefix_attention(model)
    attach_label_loss(base)
    for each in model.parameters():
        if each.requires_grad:  # LoRA begins with zeros, and rounds the rest to the dtype of the weight
            nn.init.normal_(each, std=0.05)
    if checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.tensor([[5, 60, getattr(base.config, "gmask_token_id", 8), base.config.bos_token_id or 9, 7, 77]])
    loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
    loss.backward()
    return base, [loss.detach(), *(each.grad for each in model.parameters() if each.requires_grad)]
