"""Copy the hidden states that the head takes, where torch would copy the head instead."""

import torch
from torch import nn
from transformers import PreTrainedModel


def copy_head_input(model: PreTrainedModel) -> None:
    """
    Let the head of a base take a copy of its hidden states, in whatever layout they come (in place, and only once).

    An answer begins with the logits of the prompt's last position, a view [b, 1, h] into [b, s, h]. On CPUs `matmul`
    takes such a view for a batch of products and, in 16 bits, copies the head for each row of it: 0.5 GB a row, and
    2 to 3 s, with a vocabulary of 65,024. Of the copy of the view it makes one product.
    """
    head = model.get_output_embeddings()
    if _copied not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(_copied)


def _copied(head: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    # Not `contiguous`, which leaves a view of a single row as it is.
    return (args[0].clone(memory_format=torch.contiguous_format),)
