"""Compile the layers of a base with a prefix (`--torch_compile`), for every shape of batch."""

import torch
from torch import nn

from glm_peft.adapters.prefix_attention import decoder_layers


def compile_layers(base: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """
    Compile the layers of the base for training, in place of the Trainer, which would compile the model as one.

    Args:
        backend, mode: of `torch.compile`; `None` for its defaults.
    """
    # The model breaks into many graphs, each compiled anew for the second shape, and once more for generation. A layer
    # is one graph that all layers share, with dynamic sizes; generation stays eager.
    options = {"mode": mode} | ({"backend": backend} if backend else {})
    for layer in decoder_layers(base):
        _compile_in_training(layer, **options)


def _compile_in_training(layer: nn.Module, **options: str | None) -> None:
    eager, compiled = layer.forward, torch.compile(layer.forward, dynamic=True, **options)
    layer.forward = lambda *args, **kwargs: (compiled if layer.training else eager)(*args, **kwargs)
