"""Make, load and continue the adapter: a stock `PrefixTuningConfig` on the base."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
    load_peft_weights,
)
from transformers import PreTrainedConfig, PreTrainedModel

from glm_peft.base_model import load_config
from glm_peft.errors import UserError
from glm_peft.fingerprints import find_generation
from glm_peft.hub.adapters import fetch_adapter
from glm_peft.hub.connection import set_up_connection
from glm_peft.legacy import (
    is_published_checkpoint,
    read_published_prefix,
    read_published_sizes,
    rotate_prefix_keys,
)
from glm_peft.methods import CONTINUED, PREFIX_TUNING, settle_kind
from glm_peft.origins import (
    check_config,
    check_generation,
    check_model_type,
    check_weights,
    read_origin,
    settle_chat_format,
)
from glm_peft.shared_arguments import require
from glm_peft.tuners import create_tuner, load_tuner

logger = logging.getLogger(__name__)

_LONGEST = 200


def create_adapter(model: PreTrainedModel, model_args: Any) -> PreTrainedModel | PeftModel:
    """
    A fresh adapter on the base, or one that continues from `adapter_name_or_path`; for the method none the base.

    Args:
        model_args: `peft_type` (a prefix where it is missing) and the flags of the method, `adapter_name_or_path`.

    Raises:
        UserError: the adapter to continue from does not fit the base, or the base has none of the layers to adapt.
    """
    if model_args.adapter_name_or_path:
        is_allowed = getattr(model_args, "allow_other_base", False)
        return load_adapter(model, model_args.adapter_name_or_path, is_trainable=True, allow_other_base=is_allowed)
    if getattr(model_args, "peft_type", None) not in (None, PREFIX_TUNING):
        return create_tuner(model, model_args)
    return _new_adapter(
        model,
        num_virtual_tokens=model_args.num_virtual_tokens,
        prefix_projection=model_args.prefix_projection,
        encoder_hidden_size=model_args.encoder_hidden_size,
    )


def settle_adapter(model_args: Any, is_trainable: bool) -> None:
    """
    Let the adapter to load, if there is one, say what is not given: prefix length, projection, chat format.

    To be called before anything that takes long.

    Args:
        model_args: `ModelArguments`, filled in here.
        is_trainable: whether training goes on from the adapter; otherwise a projection has no meaning.

    Raises:
        UserError: there is no such adapter, what is given contradicts it, or the base is of another generation.
    """
    set_up_connection()
    adapter, revision = model_args.adapter_name_or_path, getattr(model_args, "adapter_revision", None)
    if not adapter:
        require(not revision, "--adapter_revision is for --adapter_name_or_path", revision)
        return
    adapter = fetch_adapter(adapter, revision, getattr(model_args, "cache_dir", None))
    model_args.adapter_name_or_path = adapter
    check_adapter_kind(adapter, is_trainable)
    if is_trainable:
        settle_kind(adapter, _kind_of(adapter), model_args)
    origin = read_origin(adapter)
    check_generation(adapter, origin, model_args.model_name_or_path, find_generation(model_args))
    settle_chat_format(adapter, origin, model_args)
    config = load_config(model_args)
    check_model_type(adapter, origin, config)
    for name, found in _read_sizes(adapter, config, is_trainable).items():
        given = getattr(model_args, name)
        if given not in (None, found):
            projected = "" if name == "num_virtual_tokens" else " (of a projection PEFT keeps only the result)"
            raise UserError(
                f"--{name} {_as_typed(given)} contradicts --adapter_name_or_path {adapter}, whose prefix goes on with "
                f"{name} {_as_typed(found)}{projected}: leave one of the two out."
            )
        setattr(model_args, name, found)


def load_adapter(
    model: PreTrainedModel, adapter_name_or_path: str, is_trainable: bool = False, allow_other_base: bool = False
) -> PeftModel:
    """
    The base with an adapter: PEFT's, from a folder or the Hub, or a published P-Tuning v2 checkpoint folder.

    Args:
        allow_other_base: warn of a base with other weights than the one it was trained on, instead of refusing it.

    Raises:
        UserError: there is no adapter, it cannot be read, it is of another kind, or the base is of another
            architecture, other sizes or other weights than its own; of other numbers in the config there is a warning.
    """
    adapter_name_or_path = fetch_adapter(adapter_name_or_path)
    check_adapter_kind(adapter_name_or_path, is_trainable)
    if is_published_checkpoint(adapter_name_or_path):
        return _load_published(model, adapter_name_or_path, is_trainable)
    config, origin = read_adapter_config(adapter_name_or_path), read_origin(adapter_name_or_path)
    is_prefix = config.peft_type == PeftType.PREFIX_TUNING
    if is_prefix:
        check_sizes(config, model.config, adapter_name_or_path)
    check_model_type(adapter_name_or_path, origin, model.config)
    check_config(adapter_name_or_path, origin, model.config)
    check_weights(adapter_name_or_path, origin, model, allow_other_base)
    weight = read_flat_prefix(adapter_name_or_path, config) if is_prefix else None
    if not is_prefix:
        return load_tuner(model, adapter_name_or_path, config, is_trainable)
    if not is_trainable:
        return PeftModel.from_pretrained(model, adapter_name_or_path)
    # PEFT refuses to train a loaded prefix, so the trained one starts as its copy.
    return _with_weights(model, weight, is_trainable)


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
    """Raise a `UserError` where there is no adapter of this name, or none that can be trained where it is to be."""
    if is_published_checkpoint(adapter):
        return
    kind = _kind_of(adapter)
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


def _as_typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _load_published(model: PreTrainedModel, folder: str, is_trainable: bool) -> PeftModel:
    prefix = read_published_prefix(folder)
    check_width(prefix.weight.shape[1], model.config, folder)
    check_config(folder, read_origin(folder), model.config)
    logger.info("Read a published P-Tuning v2 prefix of %d virtual tokens from %s", len(prefix.weight), folder)
    if is_trainable and prefix.encoder and "transform.0.weight" in prefix.encoder:
        return _with_encoder(model, prefix.encoder)
    return _with_weights(model, rotate_prefix_keys(prefix.weight, model.config), is_trainable)


def _with_encoder(model: PreTrainedModel, encoder: dict[str, torch.Tensor]) -> PeftModel:
    """A trainable prefix with the projection of a published ChatGLM-6B checkpoint, which has PEFT's form."""
    num_virtual_tokens, size = len(encoder["embedding.weight"]), len(encoder["transform.0.bias"])
    adapted = _new_adapter(
        model, num_virtual_tokens=num_virtual_tokens, prefix_projection=True, encoder_hidden_size=size
    )
    adapted.prompt_encoder["default"].load_state_dict(encoder)
    return adapted


def _with_weights(model: PreTrainedModel, weight: torch.Tensor, is_trainable: bool) -> PeftModel:
    adapted = _new_adapter(model, num_virtual_tokens=len(weight), inference_mode=not is_trainable)
    adapted.prompt_encoder["default"].load_prompt_embeddings(weight)
    return adapted


def _new_adapter(model: PreTrainedModel, **settings: Any) -> PeftModel:
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, **settings)
    if config.prefix_projection and config.encoder_hidden_size is None:
        config.encoder_hidden_size = model.config.hidden_size
    adapted = get_peft_model(model, config)
    # The prefix trains in float32 whatever the base's precision; PEFT casts it where it meets the base.
    adapted.prompt_encoder.float()
    return adapted


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
