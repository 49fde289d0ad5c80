"""What an adapter's numbers say without the base: sizes, norms, and how far two prefixes are from each other."""

from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftType
from transformers import PreTrainedConfig

from glm_peft.adapters.base_checks import check_config, check_generation, check_model_type, read_origin
from glm_peft.adapters.files import check_sizes, check_width, read_adapter_config, read_flat_prefix
from glm_peft.adapters.published_checkpoints import is_published_checkpoint, read_published_prefix, rotate_prefix_keys
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import find_generation, load_config

KINDS = ("keys", "values")


@dataclass(frozen=True)
class Prefix:
    """
    A prefix as PEFT's attention sees it, read from an adapter or a published checkpoint.

    `weight` is [P, layers * 2 * kv], in float32, in the order layer, key or value, head, number.
    """

    source: str
    weight: torch.Tensor
    num_layers: int
    base: str | None
    is_published: bool

    @property
    def num_virtual_tokens(self) -> int:
        """P."""
        return len(self.weight)

    @property
    def width(self) -> int:
        """Numbers of one virtual token's key, or value, in one layer: key-value heads * head size."""
        return self.weight.shape[1] // (2 * self.num_layers)

    @property
    def states(self) -> torch.Tensor:
        """[layers, 2, P, kv]: the keys and the values of each layer."""
        return self.weight.reshape(len(self.weight), self.num_layers, 2, self.width).permute(1, 2, 0, 3)


def read_prefix(adapter: str, base: str | None = None, chat_format: str | None = None) -> Prefix:
    """
    Read a prefix without loading a base.

    Args:
        adapter: PEFT's, in a folder or on the Hub, or a published P-Tuning v2 checkpoint folder.
        base: folder or Hub id of the base, with whose config the sizes are compared where it is given.
        chat_format: the generation of the base, where its files do not say it.

    Raises:
        UserError: there is no prefix, it cannot be read, it is another base's, or a published one needs the base.
    """
    config = _read_base_config(adapter, base, chat_format) if base else None
    if is_published_checkpoint(adapter):
        return _read_published(adapter, config, chat_format)
    adapter_config = read_adapter_config(adapter)
    if adapter_config.peft_type != PeftType.PREFIX_TUNING:
        raise UserError(f"{adapter} is a {adapter_config.peft_type.value} adapter: only a prefix can be looked into.")
    if config is not None:
        check_sizes(adapter_config, config, adapter)
    weight = read_flat_prefix(adapter, adapter_config).float()
    return Prefix(adapter, weight, adapter_config.num_layers, adapter_config.base_model_name_or_path, False)


def _read_base_config(adapter: str, base: str, chat_format: str | None) -> PreTrainedConfig:
    """The base's config, once it was compared with what is known of the adapter's."""
    origin = read_origin(adapter)
    model_args = ModelArguments(base, chat_format=chat_format or origin.chat_format)
    config = load_config(model_args)
    check_generation(origin, base, find_generation(model_args))
    check_model_type(origin, config)
    check_config(origin, config)
    return config


def _read_published(checkpoint: str, config: PreTrainedConfig | None, chat_format: str | None) -> Prefix:
    weight, origin = read_published_prefix(checkpoint).weight, read_origin(checkpoint)
    if config is None:
        generation = chat_format or origin.generation
        try:
            config = load_config(ModelArguments(checkpoint, chat_format=generation))
        except UserError as error:
            raise UserError(
                f"{checkpoint} does not say of itself how many layers its prefix is for and how their positions are "
                "counted: give --base."
            ) from error
    check_width(weight.shape[1], config, checkpoint)
    # As PEFT would have it, so that it can be compared with what PEFT trained.
    weight = rotate_prefix_keys(weight, config)
    return Prefix(checkpoint, weight, config.num_hidden_layers, origin.base, True)


def measure_norms(prefix: Prefix) -> list[dict[str, float]]:
    """
    For each layer the length of a virtual token's key and value: mean, lowest and highest, and key against value.

    The length is the Euclidean norm of the `width` numbers that a token has there, all heads together.
    """
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
    For each layer, of keys and of values: the cosine of the two prefixes, and their distance.

    Both are of all the numbers of a layer's keys (or values) as one vector: token i is compared with token i. The
    distance is given as it is and as a share of the first one's length. The cosine with zeros is not a number.

    Raises:
        UserError: the prefixes have other sizes.
    """
    sizes = [(one.num_virtual_tokens, one.num_layers, one.width) for one in (prefix, other)]
    if sizes[0] != sizes[1]:
        described = [f"{tokens} virtual tokens, {layers} layers of {width} numbers" for tokens, layers, width in sizes]
        raise UserError(
            f"{prefix.source} ({described[0]}) and {other.source} ({described[1]}) have not the same sizes, so their "
            "numbers cannot be compared one by one: give two adapters of one base and one length."
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
    return value / whole if whole else float("nan")
