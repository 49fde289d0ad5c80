"""4 and 8 bits by bitsandbytes: how a base is quantized while it loads, and which CPU kernel its 4-bit layers take."""

from typing import TYPE_CHECKING

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

if TYPE_CHECKING:
    from bitsandbytes.nn import Linear4bit

_ROWS_OF_A_TILE = 32  # `block_n` of bitsandbytes' packed layout


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """
    Return how bitsandbytes quantizes the linear layers, but for the head.

    Args:
        bits: 4 or 8.
        dtype: in which 4-bit layers compute.
    """
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales of the blocks are quantized too: 0.4 bits less a parameter
        bnb_4bit_compute_dtype=dtype,
    )


def keep_unpacked(model: PreTrainedModel) -> None:
    """
    Keep the 4-bit weights in the layout that every CPU reads and that gradients pass through.

    On CPUs with AVX512-BF16, bitsandbytes repacks them in the first evaluation for a kernel that refuses some widths,
    always computes in bfloat16 and has no backward pass: all training after it would go on without the gradients.
    """
    for layer in _four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def dequantize_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let 4-bit layers dequantize to another dtype than that which their weights were loaded in, which would round."""
    for layer in _four_bit_layers(model):
        layer.weight.quant_state.dtype = dtype


def allow_packing(model: PreTrainedModel) -> None:
    """Let 4-bit layers take the faster kernel of CPUs with AVX512-BF16, where it fits them; not for training."""
    for layer in _four_bit_layers(model):
        from bitsandbytes import functional

        fits = layer.compute_dtype == torch.bfloat16 and _fits_packed_kernel(layer)
        layer.support_avx512bf16_for_cpu = fits and bool(functional.has_avx512bf16())


def _four_bit_layers(model: PreTrainedModel) -> list["Linear4bit"]:
    if not getattr(model, "is_loaded_in_4bit", False):
        return []  # without bitsandbytes, which other bases do not need
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _fits_packed_kernel(layer: "Linear4bit") -> bool:
    # The scales are laid out by rows, so that no block of them may reach from one row into the next.
    return layer.out_features % _ROWS_OF_A_TILE == 0 and layer.in_features % layer.weight.blocksize == 0
