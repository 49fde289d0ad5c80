"""
Estimate how much memory training a prefix will take, from the base's config alone: no weights are loaded.

Notation: b rows of s tokens in a batch, P virtual tokens, L layers, H the hidden size, F the inner size of the MLP, n
heads of size d, k key-value heads, e bytes of an element in the base's precision (4 or 2).

How this was checked, on a CPU: base and trained parameters are counted on real models, also quantized; activations
against the tensors that autograd saves, prefix and temporary tensors against the bytes of all tensors alive at the
peak of a step (tests/test_memory_estimate.py), for every generation. The reserve is a guess: nothing was measured on a
GPU.

Not counted: evaluation with generation (a cache of b * beams * (P + s) tokens), data, sharding over several GPUs.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from glm_peft.adapters.files import prefix_width
from glm_peft.adapters.label_loss import CHUNK_LOGITS
from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.models.loading import choose_dtype, choose_kept_dtype
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.lengths import each_example

RESERVE_BYTES = 600 << 20

_BYTES = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}
# nf4 with double quantization: half a byte a weight, for each block of 64 a scale of one byte, and for 256 of these
# scales one of 4 bytes.
_FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_TRAINED_BYTES = 16  # in float32: the parameter, its gradient, and AdamW's two moments

# From the cheapest in time to the dearest: flags, activation checkpointing, bits of quantization.
_CHECKPOINTING = "--activation_checkpointing true"
_WAYS: tuple[tuple[list[str], bool, int | None], ...] = (
    ([], False, None),
    ([_CHECKPOINTING], True, None),
    ([_CHECKPOINTING, "--quantization_bit 8"], True, 8),
    ([_CHECKPOINTING, "--quantization_bit 4"], True, 4),
)


@dataclass(frozen=True)
class Settings:
    """
    The sizes and flags that the memory of a run depends on.

    `dtype` is the precision here, and `gpu_dtype` that on a GPU, where auto is half precision; `kept_dtype` that of
    weights which a CPU keeps as they are stored; `mapped_element` the bytes of an element in weight files that a CPU
    maps beside the base, 0 for none; `tokens` the length of the longest row, prompt and answer together; `labels` how
    many of them carry loss.
    """

    dtype: str = "auto"
    gpu_dtype: str = "auto"
    kept_dtype: str | None = None
    mapped_element: int = 0
    quantization_bit: int | None = None
    num_virtual_tokens: int = 128
    encoder_hidden_size: int | None = None
    batch_size: int = 1
    tokens: int = 1152
    labels: int = 128
    activation_checkpointing: bool = False
    eager_attention: bool = False

    @property
    def element(self) -> int:
        """Return the bytes of an element in the base's precision."""
        return _BYTES[self.dtype]

    @property
    def element_of_weights(self) -> int:
        """Return the bytes of a weight of the base that is not quantized."""
        return _BYTES[self.kept_dtype or self.dtype]


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    base: float
    prefix_and_optimizer: float
    prefix_in_use: float
    activations: float
    work: float
    reserve: float

    @property
    def total(self) -> float:
        """Return the sum of all parts, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class BaseSize:
    """Parameters of the base: all, those that are quantized, the rows of these, and the largest matrix of these."""

    parameters: int
    quantized: int
    quantized_rows: int
    largest_quantized: int


def estimate_memory(config: PreTrainedConfig, settings: Settings, base: BaseSize | None = None) -> Memory:
    """
    Estimate the memory of training, in bytes by what it is for.

    Args:
        base: the result of `measure_base`, where the same base is estimated several times.
    """
    base = base or measure_base(config)
    prefix = prefix_width(config) * settings.num_virtual_tokens
    used = {
        "prefix_and_optimizer": _TRAINED_BYTES * count_trained(config, settings),
        "prefix_in_use": settings.element * prefix,  # one copy, which all rows share
        "activations": _activations(config, settings),
        "work": _work(config, settings, base),
    }
    # A guess at CUDA, its libraries and the fragments of its allocator.
    reserve = RESERVE_BYTES + sum(used.values()) / 10
    return Memory(base=base_bytes(base, settings), reserve=reserve, **used)


def fit_settings(config: PreTrainedConfig, settings: Settings, limit: float, base: BaseSize) -> list[str] | None:
    """
    Return the flags to add so that training takes `limit` bytes at most, the cheapest in time, or `None`.

    A quantization that `settings` has already is kept or made stronger.
    """
    bits = settings.quantization_bit or 16
    for flags, checkpointing, quantized in _WAYS:
        if checkpointing < settings.activation_checkpointing or (quantized or bits) > bits:
            continue
        tried = replace(
            settings,
            activation_checkpointing=checkpointing,
            quantization_bit=quantized or settings.quantization_bit,
        )
        if estimate_memory(config, tried, base).total <= limit:
            has = [settings.activation_checkpointing, settings.quantization_bit == quantized]
            return [flag for flag, is_given in zip(flags, has, strict=False) if not is_given]
    return None


def measure_base(config: PreTrainedConfig) -> BaseSize:
    """Count the parameters of the base that the config describes, on the meta device, without memory for them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [module for module in model.modules() if _is_quantized(module, model)]
    return BaseSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized=sum(module.weight.numel() for module in linear),
        quantized_rows=sum(module.out_features for module in linear),
        largest_quantized=max(module.weight.numel() for module in linear),
    )


def base_bytes(base: BaseSize, settings: Settings) -> float:
    """Return the bytes of the frozen base."""
    rest = settings.element_of_weights * (base.parameters - base.quantized)
    if settings.quantization_bit == 8:  # a byte a weight, and a scale of 4 for each row
        return rest + base.quantized + 4 * base.quantized_rows
    if settings.quantization_bit == 4:
        return rest + _FOUR_BITS * base.quantized
    return settings.element_of_weights * base.parameters


def count_trained(config: PreTrainedConfig, settings: Settings) -> int:
    """Count the trained parameters: the flat prefix, or the embedding and the two layers of a projection."""
    width, inner = config.num_key_value_heads * config.head_dim, settings.encoder_hidden_size
    flat = prefix_width(config)
    if inner is None:
        return settings.num_virtual_tokens * flat
    return settings.num_virtual_tokens * width + (width + 1) * inner + (inner + 1) * flat


def _is_quantized(module: nn.Module, model: PreTrainedModel) -> bool:
    # transformers leaves the head out of quantization.
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()


def _activations(config: PreTrainedConfig, settings: Settings) -> float:
    """Return the bytes that autograd keeps of all layers, or, with checkpointing, of their inputs and one layer."""
    element, tokens = settings.element, settings.batch_size * settings.tokens
    layer, states = _layer_activations(config, settings), tokens * config.hidden_size * element
    rotary = 2 * config.head_dim if config.model_type == "chatglm" else config.head_dim
    mask = settings.tokens * (element if settings.eager_attention else 1)
    labels = settings.batch_size * settings.labels * config.hidden_size * element
    # All layers share the embeddings, the mask without the prefix, and the rotary table; the head keeps its inputs.
    shared = states + tokens * (rotary * element + mask) + labels
    if not settings.activation_checkpointing:
        return config.num_hidden_layers * layer + shared
    # The inputs stay (b * s * H each), and one layer at a time is recomputed.
    return config.num_hidden_layers * states + layer + shared


def _layer_activations(config: PreTrainedConfig, settings: Settings) -> float:
    """Return the bytes that autograd keeps of one layer."""
    element, length = settings.element, settings.num_virtual_tokens + settings.tokens
    heads = config.num_attention_heads * config.head_dim
    # The base is frozen, so the inputs of its linear layers are not kept: for each token those of the norms, the query
    # (nd) and what the MLP's activation needs (F; gated 3F), for each of the P + s keys and values of all heads (2nd).
    activation = (3 if _is_gated(config) else 1) * config.intermediate_size
    a_token = _norms(config, element) + element * (heads + activation)
    if settings.eager_attention:  # the weights, n * (P + s) a token, in float32 and, where it is another, in e bytes
        a_token += config.num_attention_heads * length * (4 + element % 4)
    else:  # the output (nd), a float32 sum for each head, and the mask of P + s
        a_token += heads * element + 4 * config.num_attention_heads + length * element
    return settings.batch_size * (settings.tokens * a_token + length * 2 * heads * element)


def _norms(config: PreTrainedConfig, element: int) -> int:
    """Return the bytes of a token's inputs to the norms of a layer, with their statistics."""
    if not _is_gated(config):  # ChatGLM-6B's two layer norms keep mean and deviation
        return 2 * (config.hidden_size + 2) * element
    # RMS norms compute in float32 and keep one statistic; Glm4 has two more, behind attention and MLP.
    return {"glm": 2, "glm4": 4}[config.model_type] * (config.hidden_size + 1) * 4


def _is_gated(config: PreTrainedConfig) -> bool:
    return config.model_type != "chatglm"


def _work(config: PreTrainedConfig, settings: Settings, base: BaseSize) -> float:
    """Return the bytes of temporary tensors: a chunk of logits or an MLP's gradients, and a dequantized matrix."""
    element, tokens = settings.element, settings.batch_size * settings.tokens
    gradients = tokens * (4 if _is_gated(config) else 2) * config.intermediate_size * element
    matrix = base.largest_quantized * element if settings.quantization_bit else 0
    # With activation checkpointing the logits come when no layer is recomputed: they count as far as they are larger.
    absent = _layer_activations(config, settings) if settings.activation_checkpointing else 0
    # Logits and an MLP's gradients come one after the other, so the larger one counts.
    return matrix + max(_logits(config, settings) - absent, gradients)


def _logits(config: PreTrainedConfig, settings: Settings) -> float:
    """Return the bytes of a chunk of logits, which its gradient overwrites."""
    numbers = settings.batch_size * settings.labels * config.vocab_size
    # In half precision the gradient is formed in float32 and cast back: 2 + 4 + 2 bytes.
    return min(numbers, CHUNK_LOGITS) * {4: 4, 2: 8}[settings.element]


def measure_longest(rows: Any) -> tuple[int, int]:
    """Return the most tokens of a row, and the most that carry loss."""
    labels = list(each_example(rows))
    return max(map(len, labels)), max(sum(label != IGNORED_LABEL for label in row) for row in labels)


def describe_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    longest: tuple[int, int] | None,
    config: PreTrainedConfig,
) -> Settings:
    """
    Return the sizes and flags that the memory of the run depends on.

    Args:
        longest: tokens and labels of the longest row of the data; `None` for the most that the flags allow.
    """
    limits = data_args.max_source_length + data_args.max_target_length, data_args.max_target_length
    # Packed rows are as long as --max_length, and may carry loss at every token.
    tokens, labels = longest or ((data_args.max_length,) * 2 if data_args.packing else limits)
    inner = model_args.encoder_hidden_size or config.hidden_size
    device, stored = training_args.device, config.dtype or torch.float32
    dtype, _ = choose_dtype(model_args.dtype, device, stored)
    kept = choose_kept_dtype(model_args, device, config)
    # On a CPU a base that is used as it is stored is the mapped file itself; any other is made beside it.
    is_mapped = device.type == "cpu" and ((kept or dtype) != stored or model_args.quantization_bit is not None)
    return Settings(
        dtype=str(dtype).removeprefix("torch."),
        gpu_dtype=model_args.dtype,
        kept_dtype=str(kept).removeprefix("torch.") if kept else None,
        mapped_element=stored.itemsize if is_mapped else 0,
        quantization_bit=model_args.quantization_bit,
        num_virtual_tokens=model_args.num_virtual_tokens,
        encoder_hidden_size=inner if model_args.prefix_projection else None,
        batch_size=training_args.per_device_train_batch_size * (2 if data_args.objective == DPO else 1),
        tokens=tokens,
        labels=labels,
        activation_checkpointing=training_args.activation_checkpointing,
        eager_attention=model_args.attn_implementation == "eager",
    )
