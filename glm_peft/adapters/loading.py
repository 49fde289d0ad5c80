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

from glm_peft.adapters.base_checks import check_config, check_model_type, check_weights
from glm_peft.adapters.files import check_sizes, check_width, read_flat_prefix
from glm_peft.adapters.other_methods import create_tuner, load_tuner
from glm_peft.adapters.published_checkpoints import read_published_prefix, rotate_prefix_keys
from glm_peft.adapters.saved_adapter import SavedAdapter, check_continuable, read_saved_adapter
from glm_peft.arguments.methods import PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.head_input import copy_head_input

logger = logging.getLogger(__name__)


def create_adapter(
    model: PreTrainedModel, model_args: ModelArguments, saved: SavedAdapter | None = None
) -> PreTrainedModel | PeftModel:
    """
    Put a trainable adapter on the base: a new one, or a saved one that training goes on from.

    Args:
        model_args: the method and its flags, resolved; for the method none the base itself is made trainable.
        saved: the adapter that `adapter_name_or_path` names, where its config was read before.

    Raises:
        UserError: the adapter to go on from does not fit the base, or the base has none of the layers to adapt.
    """
    if model_args.adapter_name_or_path:
        source = saved or model_args.adapter_name_or_path
        return load_adapter(model, source, is_trainable=True, allow_other_base=model_args.allow_other_base)
    if model_args.peft_type != PREFIX_TUNING:
        return create_tuner(model, model_args)
    return _new_adapter(
        model,
        num_virtual_tokens=model_args.num_virtual_tokens,
        prefix_projection=model_args.prefix_projection,
        encoder_hidden_size=model_args.encoder_hidden_size,
    )


def load_adapter(
    model: PreTrainedModel,
    adapter: str | SavedAdapter,
    is_trainable: bool = False,
    allow_other_base: bool = False,
) -> PeftModel:
    """
    Put a saved adapter on the base: PEFT's, from a folder or the Hub, or a published P-Tuning v2 checkpoint folder.

    Args:
        adapter: its folder or Hub id, or its config as `read_saved_adapter` read it.
        is_trainable: whether it is to be trained on.
        allow_other_base: warn of a base with other weights than the one it was trained on, instead of refusing it.

    Raises:
        UserError: there is no adapter, it cannot be read, its method cannot go on, or the base has another
            architecture, other sizes or other weights than its own; of other values in the config there is a warning.
    """
    saved = read_saved_adapter(adapter) if isinstance(adapter, str) else adapter
    copy_head_input(model)  # stock loading has not done so
    if saved.config is None:
        return _load_published(model, saved, is_trainable)
    if is_trainable:
        check_continuable(saved)
    is_prefix = saved.config.peft_type == PeftType.PREFIX_TUNING
    if is_prefix:
        check_sizes(saved.config, model.config, saved.source)
    check_base(model, saved, allow_other_base)
    if not is_prefix:
        return load_tuner(model, saved.source, saved.config, is_trainable)
    # Read also where PEFT loads it itself, which takes missing and infinite values without a word.
    weight = read_flat_prefix(saved.source, saved.config)
    if not is_trainable:
        return PeftModel.from_pretrained(model, saved.source)
    # PEFT refuses to train a loaded prefix, so the trained one starts as its copy.
    return put_prefix_on(model, weight, is_trainable)


def check_base(model: PreTrainedModel, saved: SavedAdapter, allow_other_base: bool = False) -> None:
    """Raise a `UserError` where a base without adapters is not the one that the adapter was trained on."""
    check_model_type(saved.origin, model.config)  # before the config, of which it would only warn
    check_config(saved.origin, model.config)
    check_weights(saved.origin, model, allow_other_base)


def _load_published(model: PreTrainedModel, saved: SavedAdapter, is_trainable: bool) -> PeftModel:
    folder = saved.source
    prefix = read_published_prefix(folder)
    check_width(prefix.weight.shape[1], model.config, folder)
    check_config(saved.origin, model.config)
    logger.info("Read a published P-Tuning v2 prefix of %d virtual tokens from %s", len(prefix.weight), folder)
    # ChatGLM2's and ChatGLM3's projection has not PEFT's form: there training goes on from its result, the prefix.
    if is_trainable and prefix.encoder and "transform.0.weight" in prefix.encoder:
        return _with_encoder(model, prefix.encoder)
    return put_prefix_on(model, rotate_prefix_keys(prefix.weight, model.config), is_trainable)


def _with_encoder(model: PreTrainedModel, encoder: dict[str, torch.Tensor]) -> PeftModel:
    """Make a trainable prefix with the projection of a published ChatGLM-6B checkpoint, which has PEFT's form."""
    # Its keys need no rotation: ChatGLM-6B does not rotate those of a prefix.
    num_virtual_tokens, size = len(encoder["embedding.weight"]), len(encoder["transform.0.bias"])
    adapted = _new_adapter(
        model, num_virtual_tokens=num_virtual_tokens, prefix_projection=True, encoder_hidden_size=size
    )
    adapted.prompt_encoder["default"].load_state_dict(encoder)
    return adapted


def put_prefix_on(model: PreTrainedModel, weight: torch.Tensor, is_trainable: bool = False) -> PeftModel:
    """Put a prefix of given keys and values, [P, layers * 2 * kv], on the base."""
    adapted = _new_adapter(model, num_virtual_tokens=len(weight), inference_mode=not is_trainable)
    adapted.prompt_encoder["default"].load_prompt_embeddings(weight)
    return adapted


def _new_adapter(model: PreTrainedModel, **settings: Any) -> PeftModel:
    config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, **settings)
    # PEFT's own default is the width of the keys, a sixteenth of the hidden size in ChatGLM2: not the published one.
    if config.prefix_projection and config.encoder_hidden_size is None:
        config.encoder_hidden_size = model.config.hidden_size
    adapted = get_peft_model(model, config)  # freezes the base, too
    # The prefix trains in float32 whatever the base's precision; PEFT casts it where it meets the base.
    adapted.prompt_encoder.float()
    return adapted
