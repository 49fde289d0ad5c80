"""Read an adapter's config and weights from its folder, and check them against the base."""

from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    load_peft_weights,
)
from transformers import PreTrainedConfig

from glm_peft.adapters.published_checkpoints import (
    is_published_checkpoint,
    read_published_sizes,
)
from glm_peft.arguments.methods import CONTINUED, FULL, METHODS, PREFIX_TUNING
from glm_peft.errors import UserError

_LONGEST = 200


def read_flat_prefix(adapter_name_or_path: str, config: PrefixTuningConfig) -> torch.Tensor:
    """
    The prefix of a PEFT adapter [P, layers * 2 * kv].

    Raises:
        UserError: its weights are missing, broken, not finite, or not of the sizes that its config says.
    """
    try:
        weights = load_peft_weights(adapter_name_or_path, device="cpu")
    except Exception as error:  # a broken file can fail in any way
        reason = " ".join(str(error).split())[:_LONGEST]
        raise UserError(
            f"The weights of the adapter {adapter_name_or_path} cannot be read ({type(error).__name__}: {reason}): "
            "copy it again, or take an earlier checkpoint."
        ) from error
    weight = weights.get("prompt_embeddings")
    wanted = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
    found = None if weight is None else tuple(weight.shape)
    if found != wanted or not bool(weight.isfinite().all()):
        what = f"has the sizes {found}" if found != wanted else "holds numbers that are not finite"
        raise UserError(
            f"prompt_embeddings of the adapter {adapter_name_or_path} {what}, where its adapter_config.json asks for "
            f"{wanted} finite ones: copy it again, or take an earlier checkpoint."
        )
    return weight


def check_adapter_kind(adapter: str, is_trainable: bool) -> None:
    """Raise a `UserError` where there is no adapter of this name, or of no method that can do what is asked."""
    if is_published_checkpoint(adapter):
        return
    kind = _kind_of(adapter)
    if kind not in METHODS:
        raise UserError(
            f"{adapter} is of the method {kind}, which glm_peft does not have: load it with PEFT itself, or give an "
            f"adapter of {', '.join(name for name in METHODS if name != FULL)}."
        )
    if is_trainable and kind not in CONTINUED:
        raise UserError(
            f"{adapter} is of the method {kind}, from which training cannot go on, as its files do not hold all of "
            f"it: give one of {', '.join(CONTINUED)}, or start anew."
        )


def _kind_of(adapter: str) -> str:
    if is_published_checkpoint(adapter):
        return PREFIX_TUNING
    return read_adapter_config(adapter).peft_type.value.lower()


def _read_sizes(adapter: str, config: PreTrainedConfig, is_trainable: bool) -> dict[str, Any]:
    """What a prefix for this base goes on with, by the names of the arguments; nothing for adapters of other kinds."""
    if is_published_checkpoint(adapter):
        num_virtual_tokens, width, encoder_hidden_size = read_published_sizes(adapter)
        check_width(width, config, adapter)
    else:
        adapter_config, encoder_hidden_size = read_adapter_config(adapter), None
        if adapter_config.peft_type == PeftType.PROMPT_TUNING and is_trainable:
            return {"num_virtual_tokens": adapter_config.num_virtual_tokens}
        if adapter_config.peft_type != PeftType.PREFIX_TUNING:
            return {}
        check_sizes(adapter_config, config, adapter)
        num_virtual_tokens = adapter_config.num_virtual_tokens
    sizes = {"num_virtual_tokens": num_virtual_tokens}
    if is_trainable:
        sizes |= {"prefix_projection": encoder_hidden_size is not None, "encoder_hidden_size": encoder_hidden_size}
    return sizes


def read_adapter_config(adapter_name_or_path: str) -> PeftConfig:
    """The config of a PEFT adapter; a `UserError` where there is none."""
    path = Path(adapter_name_or_path)
    if path.is_file():
        raise UserError(f"--adapter_name_or_path {path} is a file: give the folder that it is in.")
    try:
        config = PeftConfig.from_pretrained(adapter_name_or_path)
        if config.peft_type is None:
            raise ValueError("There is no peft_type in it.")
        return config
    except Exception as error:  # PEFT's own depend on what is wrong with the file
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"{path / 'adapter_config.json'} cannot be read ({type(error).__name__}): copy the adapter again."
            ) from error
        if not isinstance(error, ValueError | OSError):
            raise
        where = "folder" if path.is_dir() else "folder or Hub id"
        raise UserError(
            f"--adapter_name_or_path {adapter_name_or_path} is no {where} with an adapter_config.json or a published "
            "P-Tuning v2 checkpoint: give the output folder of a training run, or a Hub id."
        ) from error


def check_width(width: int, config: PreTrainedConfig, source: str) -> None:
    """Raise a `UserError` where a published prefix of `width` numbers a virtual token is not this base's."""
    wanted = prefix_width(config)
    if width != wanted:
        raise UserError(
            f"The prefix in {source} has {width} numbers a virtual token, but {config.name_or_path} needs {wanted} "
            "(layers x 2 x key-value heads x head size): it was trained on another base; give that one."
        )


def check_sizes(adapter_config: PrefixTuningConfig, config: PreTrainedConfig, adapter: str) -> None:
    """Raise a `UserError` where an adapter's layers and widths are not those of the base's config."""
    layers, width = adapter_config.num_layers, adapter_config.token_dim
    wanted = prefix_width(config) // (2 * config.num_hidden_layers)
    if (layers, width) == (config.num_hidden_layers, wanted):
        return
    raise UserError(
        f"The prefix in {adapter} is for {layers} layers of {width} numbers "
        f"({adapter_config.base_model_name_or_path}), but {config.name_or_path} has {config.num_hidden_layers} layers "
        f"of {wanted}: load it on the base that it was trained on."
    )


def prefix_width(config: PreTrainedConfig) -> int:
    """Numbers of one virtual token: layers x (key and value) x key-value heads x head size."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
