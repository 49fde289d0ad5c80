"""`--torch_compile` for a base with a prefix: its layers are compiled for training, for every shape of batch."""

import torch
from torch import nn

from glm_peft.adapters.prefix_attention import decoder_layers


def compile_layers(base: nn.Module, backend: str | None = None, mode: str | None = None) -> None:
    """
    Compile the layers of the base for training, in the place of the Trainer, which would compile the whole model.

    Args:
        backend, mode: of `torch.compile`; `None` for its own.
    """
    # The whole model breaks into many graphs, each compiled anew for the second shape, and once more for generation. A
    # layer is one graph that all layers share, with sizes left open; generation stays as it is.
    options = {"mode": mode} | ({"backend": backend} if backend else {})
    for layer in decoder_layers(base):
        _compile_in_training(layer, **options)


def _compile_in_training(layer: nn.Module, **options: str | None) -> None:
    eager, compiled = layer.forward, torch.compile(layer.forward, dynamic=True, **options)
    layer.forward = lambda *args, **kwargs: (compiled if layer.training else eager)(*args, **kwargs)
