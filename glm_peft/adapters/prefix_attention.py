"""
Hand a prefix to attention as an argument instead of as a cache.

PEFT hands the prefix on as `past_key_values`, which transformers drops under activation checkpointing. Here a hook on
the base takes it out of the cache, and an attention function puts it before the keys and values. The tensors travel as
arguments and are kept in no global state, so recomputation in the backward pass sees the same ones.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.glm.modeling_glm import eager_attention_forward

from glm_peft.errors import UserError

KeyAndValue = tuple[torch.Tensor, torch.Tensor]

_NAME = "prefix_{}"
_SUPPORTED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
_ON_GPU = ("flex_attention",)  # has no backward pass on CPUs


def attach_prefix_attention(model: PeftModel, dropout: float = 0.0) -> None:
    """
    Hand the prefix of a PEFT model to its attention as an argument; calls with `use_cache=True` keep the cache.

    Loss and gradients stay the same bit for bit; activation checkpointing, which drops a cache, works.

    Where the base has it already, for another prefix, only the model itself is prepared.

    Args:
        dropout: share of the prefix's parameters that each row loses while the base is in training mode.

    Raises:
        UserError: the attention implementation cannot take a prefix.
    """
    base = model.get_base_model()
    if not base.config._attn_implementation.startswith(_NAME.format("")):
        _let_carry_prefix(base, dropout)
    if "get_prompt" not in vars(model):
        model.get_prompt = partial(_prompt_of_one_row, model.get_prompt)


def _let_carry_prefix(base: PreTrainedModel, dropout: float) -> None:
    implementation = base.config._attn_implementation
    if implementation not in (*_SUPPORTED, *(_ON_GPU if torch.cuda.is_available() else ())):
        raise UserError(
            f"--attn_implementation {implementation} cannot carry a prefix in training: use sdpa or eager."
        )
    # Under a name of its own, so that other models of this process keep the ordinary function. A mask function of the
    # same name is needed too: without one transformers makes no mask at all.
    name = _NAME.format(implementation)
    AttentionInterface.register(
        name, _with_prefix(ALL_ATTENTION_FUNCTIONS.get(implementation, eager_attention_forward))
    )
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    base.set_attn_implementation(name)
    # Dropout is applied in the layers and not in PEFT's encoder, whose output is what gets saved.
    for index, layer in enumerate(decoder_layers(base)):
        layer.register_forward_pre_hook(partial(_take_own_prefix, index, dropout), with_kwargs=True)
    base.register_forward_pre_hook(_take_prefix_from_cache, with_kwargs=True)


def decoder_layers(base: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of the base in their order."""
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def _with_prefix(attend: Callable) -> Callable:
    """Wrap an attention function so that it attends to a prefix before the keys and values."""

    def attend_with_prefix(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        prefix_key_values: KeyAndValue | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """query [b, n_h, s, d], key and value [b, n_kv, s, d]; the prefix's own are [b, n_kv, P, d]."""
        if prefix_key_values is not None:
            prefix_key, prefix_value = prefix_key_values
            attention_mask = _widen(attention_mask, query, prefix_key.shape[2])
            key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        return attend(module, query, key, value, attention_mask, **kwargs)

    return attend_with_prefix


def _widen(
    attention_mask: torch.Tensor | BlockMask | None, query: torch.Tensor, num_virtual_tokens: int
) -> torch.Tensor | BlockMask:
    """Add columns for the prefix, which every token sees, to a mask."""
    if isinstance(attention_mask, BlockMask):
        return _widen_blocks(attention_mask, num_virtual_tokens)
    if attention_mask is None:  # sdpa's sign for a plain causal mask, which no longer is square with a prefix
        length = query.shape[2]
        columns = length + num_virtual_tokens
        mask = torch.ones(length, columns, dtype=torch.bool, device=query.device)
        return mask.tril(num_virtual_tokens)[None, None]
    visible = 0.0 if attention_mask.is_floating_point() else 1  # added to the scores, or true
    return nn.functional.pad(attention_mask, (num_virtual_tokens, 0), value=visible)


def _widen_blocks(mask: BlockMask, num_virtual_tokens: int) -> BlockMask:
    """Add columns for the prefix to a mask of flex attention."""
    # Kept at the mask, which all layers share: making one takes longer than a layer.
    if not hasattr(mask, "with_prefix"):
        mask.with_prefix = create_block_mask(
            partial(_sees, mask.mask_mod, num_virtual_tokens),
            B=mask.kv_num_blocks.shape[0],
            H=None,
            Q_LEN=mask.seq_lengths[0],
            KV_LEN=mask.seq_lengths[1] + num_virtual_tokens,
            device=mask.kv_num_blocks.device,
        )
    return mask.with_prefix


def _sees(
    mask_mod: Callable, num_virtual_tokens: int, row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: Any
) -> torch.Tensor:
    own = (key - num_virtual_tokens).clamp(min=0)  # mask_mod may look the key up, so it needs an index that exists
    return (key < num_virtual_tokens) | mask_mod(row, head, query, own)


def _prompt_of_one_row(get_prompt: Callable, batch_size: int, *args: Any, **kwargs: Any) -> Any:
    """Compute the prefix for one row, where PEFT computes the same for every row; the layers' hooks share it."""
    return get_prompt(1, *args, **kwargs)


def _take_prefix_from_cache(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Turn PEFT's call of the base with a cache into one without, with the cache's content as an argument."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, Cache) or not cache.get_seq_length():
        return None
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    rows, length = inputs.shape[:2]
    if kwargs.get("use_cache"):  # generation, which writes into the cache
        _repeat(cache, rows)
        return None
    num_virtual_tokens = cache.get_seq_length()
    prefix = tuple((layer.keys, layer.values) for layer in cache.layers)
    kwargs = kwargs | {"past_key_values": None, "use_cache": False, "prefix_key_values": prefix}
    # PEFT widened the mask for its cache; the model makes its masks from one as wide as the text.
    if kwargs.get("attention_mask") is not None:
        kwargs["attention_mask"] = kwargs["attention_mask"][:, num_virtual_tokens:]
    if kwargs.get("position_ids") is None:  # counted from P, as behind a cache of P
        kwargs["position_ids"] = torch.arange(length, device=inputs.device)[None] + num_virtual_tokens
    return args, kwargs


def _take_own_prefix(
    index: int, dropout: float, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the prefixes of all layers by this layer's own, shared by every row."""
    prefix = kwargs.get("prefix_key_values")
    if prefix is None:
        return None
    # Picked by a hook, as a layer that knew its index could not be compiled once for all. Shared here and not before
    # the first layer: the backward pass then adds up a layer's rows when it leaves the layer, and keeps no others.
    rows, dropout = len(args[0] if args else kwargs["hidden_states"]), dropout if layer.training else 0.0
    own = tuple(_share(values, rows, dropout) for values in prefix[index])
    return args, kwargs | {"prefix_key_values": own}


def _repeat(cache: Cache, rows: int) -> None:
    """Give each row a copy of the cached prefix, as in generation each row's cache grows by itself."""
    if len(cache.layers[0].keys) == 1 < rows:
        cache.batch_repeat_interleave(rows)


def _share(values: torch.Tensor, rows: int, dropout: float) -> torch.Tensor:
    """Expand keys or values of the prefix, [1 or b, n_kv, P, d], to the rows of the batch without a copy."""
    shared = _SharedByRows.apply(values, rows) if len(values) == 1 else values
    return nn.functional.dropout(shared, dropout) if dropout else shared


class _SharedByRows(torch.autograd.Function):
    """Expand one row to many; the backward pass adds their gradients one after the other."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, rows: int) -> torch.Tensor:
        return values.expand(rows, *values.shape[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None]:
        # In the order in which PEFT's embedding adds up its rows, so that gradients are equal to the bit.
        total = grad_output[:1].clone()
        for row in grad_output[1:]:
            total += row
        return total, None
