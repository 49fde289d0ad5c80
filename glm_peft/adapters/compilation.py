"""`--torch_compile` for a base with a prefix: its layers are compiled for training, for every shape of batch."""

import os

import torch
from torch import nn
from transformers import TrainingArguments

from glm_peft.adapters.prefix_attention import decoder_layers


def compile_layers(base: nn.Module, training_args: TrainingArguments) -> None:
    """
    Compile the layers of the base where `torch_compile` is set, in the place of the Trainer, which is told not to.

    The Trainer compiles the whole model: that breaks into many graphs, each compiled anew for the second shape, and
    once more for generation. A layer is one graph that all layers share, with sizes left open; generation stays as
    it is.

    Args:
        training_args: `torch_compile`, `torch_compile_backend` and `torch_compile_mode`.
    """
    if not training_args.torch_compile:
        return
    options = {"backend": training_args.torch_compile_backend, "mode": training_args.torch_compile_mode}
    for layer in decoder_layers(base):
        _compile_in_training(layer, **options)
    training_args.torch_compile, training_args.torch_compile_backend = False, None
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"


def _compile_in_training(layer: nn.Module, **options: str | None) -> None:
    eager, compiled = layer.forward, torch.compile(layer.forward, dynamic=True, **options)
    layer.forward = lambda *args, **kwargs: (compiled if layer.training else eager)(*args, **kwargs)
