"""Make, load and continue the adapter: a stock `PrefixTuningConfig` on the base."""

import logging
from typing import Any

import torch
from peft import (
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import PreTrainedModel

from glm_peft.adapters.base_checks import (
    check_config,
    check_generation,
    check_model_type,
    check_weights,
    read_origin,
    settle_chat_format,
)
from glm_peft.adapters.files import (
    _kind_of,
    _read_sizes,
    check_adapter_kind,
    check_sizes,
    check_width,
    read_adapter_config,
    read_flat_prefix,
)
from glm_peft.adapters.other_methods import create_tuner, load_tuner
from glm_peft.adapters.published_checkpoints import (
    is_published_checkpoint,
    read_published_prefix,
    rotate_prefix_keys,
)
from glm_peft.arguments.fields import require
from glm_peft.arguments.methods import PREFIX_TUNING, settle_kind
from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.hub.download import fetch_adapter
from glm_peft.models.loading import find_generation, load_config

logger = logging.getLogger(__name__)


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
