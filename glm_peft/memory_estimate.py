"""
How much memory training a prefix will take, from the base's config alone: no weights are loaded.

Notation: b rows of s tokens in a batch, P virtual tokens, L layers, H the hidden size, F the inner size of the MLP, n
heads of size d, k key-value heads, e bytes of a number in the base's precision (4 or 2).

- base: each parameter takes e bytes. Quantized, a weight of a linear layer (but not of the head) takes 1 byte and each
  of its rows 4 more (8 bits), or 1/2 + 1/64 + 4/(64 * 256) bytes (4 bits, nf4 with double quantization).
- prefix and optimizer: the trained numbers are float32 with a gradient and AdamW's two moments: 16 bytes each.
- prefix in the batch: PEFT makes b copies of the flat prefix, P * 2 * L * k * d numbers, in float32 and again in the
  base's precision, and the backward pass the gradient of the latter: b * P * 2Lkd * (4 + 2e) bytes.
- activations: what autograd keeps. The base is frozen, so the inputs of its linear layers are not kept. Of a layer
  stay, for each token, the inputs of its norms (in float32 where the norm computes so), query and attention's output
  (2nd), what the MLP's activation needs (F; gated 3F), and for each of the P + s tokens keys and values for all heads
  (2nd). Eager attention keeps the n * s * (P + s) weights too, in float32 and, where that is another, in the base's
  precision.
  With activation checkpointing only the input of each layer stays (b * s * H), and one layer at a time is whole.
- logits: made in chunks of `CHUNK_LOGITS` numbers (`label_loss`); of a chunk exist the logits and their gradient in
  the base's precision, and logits, log-probabilities and gradient in float32.
- reserve: what CUDA, its libraries and its allocator take: `RESERVE_BYTES` and a tenth of everything but the base.

Not counted: evaluation with generation (a cache of b * beams * (P + s) tokens), data, sharding over several GPUs.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from glm_peft.label_loss import CHUNK_LOGITS

RESERVE_BYTES = 600 << 20

_BYTES = {"auto": 2, "float32": 4, "bfloat16": 2, "float16": 2}
_FOUR_BITS = 1 / 2 + 1 / 64 + 4 / (64 * 256)
_TRAINED_BYTES = 16

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
    What decides the memory of a run.

    `dtype` is that of `--dtype`, where auto counts as half precision, as on a GPU; `tokens` is the length of the
    longest row, prompt and answer together; `labels` how many of them carry loss.
    """

    dtype: str = "auto"
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
        """Bytes of a number in the base's precision."""
        return _BYTES[self.dtype]


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    base: float
    prefix_and_optimizer: float
    prefix_in_batch: float
    activations: float
    logits: float
    reserve: float

    @property
    def total(self) -> float:
        """All of them together, in bytes."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class BaseSize:
    """Parameters of the base: all, those that quantization makes smaller, and the rows that these have."""

    parameters: int
    quantized: int
    quantized_rows: int


def estimate_memory(config: PreTrainedConfig, settings: Settings, base: BaseSize | None = None) -> Memory:
    """
    The memory of training, by the formula at the top of this module.

    Args:
        base: from `measure_base`, where the same base is estimated several times.
    """
    prefix = _prefix_numbers(config) * settings.num_virtual_tokens
    used = {
        "prefix_and_optimizer": _TRAINED_BYTES * count_trained(config, settings),
        "prefix_in_batch": settings.batch_size * prefix * (4 + 2 * settings.element),
        "activations": _activations(config, settings),
        "logits": _logits(config, settings),
    }
    reserve = RESERVE_BYTES + sum(used.values()) / 10
    return Memory(base=base_bytes(base or measure_base(config), settings), reserve=reserve, **used)


def fit_settings(config: PreTrainedConfig, settings: Settings, limit: float, base: BaseSize) -> list[str] | None:
    """
    The flags to add so that training takes `limit` bytes at most, the cheapest in time first; `None` if none do.

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
    """The sizes of the base that the config describes, built without memory for its numbers."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = [module for module in model.modules() if _is_quantized(module, model)]
    return BaseSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        quantized=sum(module.weight.numel() for module in linear),
        quantized_rows=sum(module.out_features for module in linear),
    )


def base_bytes(base: BaseSize, settings: Settings) -> float:
    """Bytes of the frozen base."""
    rest = settings.element * (base.parameters - base.quantized)
    if settings.quantization_bit == 8:
        return rest + base.quantized + 4 * base.quantized_rows
    if settings.quantization_bit == 4:
        return rest + _FOUR_BITS * base.quantized
    return settings.element * base.parameters


def count_trained(config: PreTrainedConfig, settings: Settings) -> int:
    """Numbers that are trained: the flat prefix, or the embedding and the two layers of a projection."""
    width, inner = config.num_key_value_heads * config.head_dim, settings.encoder_hidden_size
    flat = _prefix_numbers(config)
    if inner is None:
        return settings.num_virtual_tokens * flat
    return settings.num_virtual_tokens * width + (width + 1) * inner + (inner + 1) * flat


def _is_quantized(module: nn.Module, model: PreTrainedModel) -> bool:
    return isinstance(module, nn.Linear) and module is not model.get_output_embeddings()


def _prefix_numbers(config: PreTrainedConfig) -> int:
    """Keys and values of one virtual token in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def _activations(config: PreTrainedConfig, settings: Settings) -> float:
    layer = _layer_activations(config, settings)
    if not settings.activation_checkpointing:
        return config.num_hidden_layers * layer
    inputs = settings.batch_size * settings.tokens * config.hidden_size * settings.element
    return config.num_hidden_layers * inputs + layer


def _layer_activations(config: PreTrainedConfig, settings: Settings) -> float:
    """Bytes that the backward pass needs of one layer."""
    element, length = settings.element, settings.num_virtual_tokens + settings.tokens
    heads = config.num_attention_heads * config.head_dim
    is_gated = config.model_type != "chatglm"
    norms = {"chatglm": 2, "glm": 2, "glm4": 4}[config.model_type] * (4 if is_gated else element)
    a_token = norms * config.hidden_size + element * (2 * heads + (3 if is_gated else 1) * config.intermediate_size)
    a_row = settings.tokens * a_token + length * 2 * heads * element
    if settings.eager_attention:
        a_row += config.num_attention_heads * settings.tokens * length * (4 + element % 4)
    return settings.batch_size * a_row


def _logits(config: PreTrainedConfig, settings: Settings) -> float:
    chunk = min(CHUNK_LOGITS, settings.batch_size * settings.labels * config.vocab_size)
    return chunk * (3 * 4 + 2 * settings.element)
