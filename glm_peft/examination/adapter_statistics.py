"""Measure a prefix without its base: sizes, norms, and the distance between two prefixes."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from transformers import PreTrainedConfig

from glm_peft.adapters.base_checks import check_config, check_generation, check_model_type, read_origin
from glm_peft.adapters.files import check_sizes, check_width, read_adapter_config, read_flat_prefix
from glm_peft.adapters.published_checkpoints import read_published_prefix, rotate_prefix_keys
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.folder_kind import A_BASE, A_CHECKPOINT, AN_ADAPTER, check_source
from glm_peft.models.loading import find_generation, load_config, read_config

KINDS = ("keys", "values")


@dataclass(frozen=True)
class Prefix:
    """
    A prefix as PEFT's attention sees it, read from an adapter or a published checkpoint.

    `weight` is [P, layers * 2 * kv], in float32, in the order layer, key or value, head, dimension.
    """

    source: str
    weight: torch.Tensor
    num_layers: int
    base: str | None
    is_published: bool

    @property
    def num_virtual_tokens(self) -> int:
        """Return the length of the prefix, P."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """Return the dimensions of one virtual token's key, or value, in one layer: key-value heads * head size."""
        return self.weight.shape[1] // (2 * self.num_layers)

    @property
    def states(self) -> torch.Tensor:
        """Return the keys and the values of each layer, [layers, 2, P, kv]."""
        return self.weight.reshape(len(self.weight), self.num_layers, 2, self.width).permute(1, 2, 0, 3)


def read_prefix(adapter: str, base: str | None = None, chat_format: str | None = None) -> Prefix:
    """
    Read a prefix without loading a base.

    Args:
        adapter: PEFT's, in a folder or on the Hub, or a published P-Tuning v2 checkpoint folder.
        base: folder or Hub id of the base, whose config is compared with the prefix; `None` for no comparison.
        chat_format: the generation of the base, where its files do not say it.

    Raises:
        UserError: there is no prefix, it cannot be read, it is another base's, or a published one needs the base.
    """
    kind = check_source(adapter, "ADAPTER", AN_ADAPTER).kind
    config = _read_base_config(adapter, base, chat_format) if base else None
    if kind in A_CHECKPOINT:
        return _read_published(adapter, config, chat_format)
    adapter_config = read_adapter_config(adapter)
    if adapter_config.peft_type != PeftType.PREFIX_TUNING:
        raise UserError(f"{adapter} is a {adapter_config.peft_type.value} adapter: only a prefix can be inspected.")
    if config is not None:
        check_sizes(adapter_config, config, adapter)
    weight = read_flat_prefix(adapter, adapter_config).float()  # PEFT may have saved half precision
    return Prefix(adapter, weight, adapter_config.num_layers, adapter_config.base_model_name_or_path, False)


def _read_base_config(adapter: str, base: str, chat_format: str | None) -> PreTrainedConfig:
    """Read the base's config, and compare it with what is recorded of the adapter's base."""
    check_source(base, "--base", A_BASE)
    origin = read_origin(adapter)
    model_args = ModelArguments(base, chat_format=chat_format or origin.chat_format)
    config = load_config(model_args)
    # Another generation or architecture is refused, of other values there is a warning: the sizes may still fit.
    check_generation(origin, base, find_generation(model_args))
    check_model_type(origin, config)
    check_config(origin, config)
    return config


def _read_published(checkpoint: str, config: PreTrainedConfig | None, chat_format: str | None) -> Prefix:
    weight, origin = read_published_prefix(checkpoint).weight, read_origin(checkpoint)
    if config is None:
        # The published scripts write the base's config.json beside the prefix, so the folder can serve as its base.
        generation = chat_format or origin.generation
        try:
            config = read_config(ModelArguments(checkpoint, chat_format=generation))
        except UserError as error:
            raise UserError(
                f"{checkpoint} does not say of itself how many layers its prefix is for and how their positions are "
                "counted: give --base."
            ) from error
    check_width(weight.shape[1], config, checkpoint)
    # Keys as PEFT would have them, so that they can be compared with those that PEFT trained.
    weight = rotate_prefix_keys(weight, config)
    return Prefix(checkpoint, weight, config.num_hidden_layers, origin.base, True)


def measure_norms(prefix: Prefix) -> list[dict[str, float]]:
    """
    Measure the Euclidean norms of the virtual tokens' keys and values in each layer, over all heads together.

    Returns:
        For each layer mean, lowest and highest of the keys and of the values, and the ratio of the means.
    """
    # Sums of many squares, so in double precision.
    norms = prefix.states.double().norm(dim=-1)  # [layers, 2, P]
    return [_describe_norms(layer) for layer in norms]


def _describe_norms(norms: torch.Tensor) -> dict[str, float]:
    described: dict[str, float] = {}
    for kind, values in zip(KINDS, norms, strict=True):
        measures = {"mean": values.mean(), "lowest": values.min(), "highest": values.max()}
        described |= {f"{kind}_{name}": float(value) for name, value in measures.items()}
    return described | {"keys_to_values": _ratio(described["keys_mean"], described["values_mean"])}


def compare_prefixes(prefix: Prefix, other: Prefix) -> list[dict[str, float]]:
    """
    Measure the cosine and the Euclidean distance of two prefixes in each layer, of keys and of values.

    All keys (or values) of a layer are one vector: token i is compared with token i. The distance is given as it is
    and as a share of the first one's norm. The cosine with zeros is NaN.

    Raises:
        UserError: the prefixes differ in size.
    """
    sizes = [(one.num_virtual_tokens, one.num_layers, one.width) for one in (prefix, other)]
    if sizes[0] != sizes[1]:
        described = [f"{tokens} virtual tokens, {layers} layers of width {width}" for tokens, layers, width in sizes]
        raise UserError(
            f"{prefix.source} ({described[0]}) and {other.source} ({described[1]}) differ in size, so they cannot be "
            "compared parameter by parameter: give two adapters of one base and one length."
        )
    pairs = zip(prefix.states.double(), other.states.double(), strict=True)
    return [_compare_layers(*pair) for pair in pairs]


def _compare_layers(layer: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    described: dict[str, Any] = {}
    for kind, one, two in zip(KINDS, layer, other, strict=True):
        length, distance = float(one.norm()), float((one - two).norm())
        described[f"{kind}_cosine"] = _ratio(float((one * two).sum()), length * float(two.norm()))
        described[f"{kind}_distance"] = distance
        described[f"{kind}_relative_distance"] = _ratio(distance, length)
    return described


def _ratio(value: float, whole: float) -> float:
    return value / whole if whole else float("nan")  # a prefix that starts at zero has no direction
