"""
Weights that stay in 16 bits, as their file has them, under a network that computes in float32.

Processors without AMX or AVX512-BF16 multiply bfloat16 many times slower than float32, in which a base of 6 billion
parameters takes 25 GB. Here a frozen weight is cast inside each product, tile by tile: the results are those of
float32 in nearly its time, the memory is that of 16 bits.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

SMALLEST_KEPT = 1 << 20
"""Numbers of the smallest weight that stays in 16 bits: casting smaller ones costs more than their memory is worth."""

_TILE = 1 << 20  # numbers: 4 MiB of float32, which the cache holds
_ROWS = 4096  # of a tile at most: 224 MB where it is widest, in models of 6 and 9 billion parameters


def cast_layerwise(model: PreTrainedModel) -> PreTrainedModel:
    """
    Let a base on the CPU, loaded in 16 bits and frozen, compute in float32 (in place).

    Large weights of linear layers and embeddings are kept; all other parameters, and `model.dtype`, become float32.
    Layers that are quantized stay as they are.
    """
    for module in model.modules():
        if type(module) in _CAST and module.weight.numel() >= SMALLEST_KEPT:
            module.__class__ = _CAST[type(module)]
        is_kept = type(module) in _CAST.values()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point() and not (is_kept and name == "weight"):
                parameter.data = parameter.data.float()
    own = type(model)
    # Everything that asks for the dtype means that of the activations, as masks, caches and prefixes are made in it.
    model.__class__ = type(own.__name__, (own,), {"__module__": own.__module__, "dtype": torch.float32})
    return model


def kept_dtype(model: nn.Module) -> torch.dtype | None:
    """Return the dtype in which `cast_layerwise` left the weights of a base, with an adapter or without, or `None`."""
    return next((each.weight.dtype for each in model.modules() if isinstance(each, CastEmbedding)), None)


class CastLinear(nn.Linear):
    """A frozen linear layer with its weight in 16 bits, for states in float32."""

    @torch.compiler.disable  # it would compile a loop over tiles as so many products
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Return the product in float32, [..., in_features] -> [..., out_features]."""
        flat = states.float().reshape(-1, self.in_features)
        product = _CastProduct.apply(flat, self.weight)
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*states.shape[:-1], self.out_features)


class CastEmbedding(nn.Embedding):
    """A frozen embedding with its weight in 16 bits."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings in float32, [...] -> [..., embedding_dim]."""
        return super().forward(ids).float()


_CAST = {nn.Linear: CastLinear, nn.Embedding: CastEmbedding}


class _CastProduct(torch.autograd.Function):
    """The product of states with a frozen weight, of which no float32 copy is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        product = states.new_empty(len(states), len(weight))
        for rows, tile in _tiles(weight, len(states)):
            torch.mm(states, tile.T, out=product[:, rows])
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        total = gradient.new_zeros(len(gradient), weight.shape[1])
        for rows, tile in _tiles(weight, len(gradient)):
            total.addmm_(gradient[:, rows], tile)
        return total, None


def _tiles(weight: torch.Tensor, tokens: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield places and float32 copies of some rows of a weight at a time; each copy overwrites the one before."""
    # With many tokens multiplying outweighs casting, and taller tiles multiply faster: at 4,096 tokens a forward pass
    # by tiles of 512 rows takes a fifth longer than the product in one, by tiles of 4,096 as long.
    size = max(_TILE // weight.shape[1], min(tokens, _ROWS))
    buffer = torch.empty(min(size, len(weight)), weight.shape[1])
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        part = weight[rows]
        yield rows, buffer[: len(part)].copy_(part)
