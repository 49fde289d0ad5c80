"""Make, load and continue the adapter: a stock `PrefixTuningConfig` on the base."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftType, PrefixTuningConfig, TaskType, get_peft_model, load_peft_weights
from transformers import PreTrainedConfig, PreTrainedModel

from glm_peft.errors import UserError
from glm_peft.legacy import is_published_checkpoint, read_published_prefix, rotate_prefix_keys

logger = logging.getLogger(__name__)


def create_adapter(model: PreTrainedModel, model_args: Any) -> PeftModel:
    """
    A fresh prefix on the base, or one that continues from `adapter_name_or_path`.

    Args:
        model_args: `num_virtual_tokens`, `prefix_projection`, `encoder_hidden_size`, `adapter_name_or_path`.

    Raises:
        UserError: the adapter to continue from does not fit the base.
    """
    if model_args.adapter_name_or_path:
        return load_adapter(model, model_args.adapter_name_or_path, is_trainable=True)
    return _new_adapter(
        model,
        num_virtual_tokens=model_args.num_virtual_tokens,
        prefix_projection=model_args.prefix_projection,
        encoder_hidden_size=model_args.encoder_hidden_size,
    )


def check_adapter(adapter_name_or_path: str) -> None:
    """Raise a `UserError` where there is no adapter of this name; to be called before anything that takes long."""
    if not is_published_checkpoint(adapter_name_or_path):
        read_adapter_config(adapter_name_or_path)


def load_adapter(model: PreTrainedModel, adapter_name_or_path: str, is_trainable: bool = False) -> PeftModel:
    """
    The base with an adapter: PEFT's, from a folder or the Hub, or a published P-Tuning v2 checkpoint folder.

    Raises:
        UserError: there is no adapter, it is of another kind, or its sizes are not those of the base.
    """
    if is_published_checkpoint(adapter_name_or_path):
        return _load_published(model, adapter_name_or_path, is_trainable)
    config = read_adapter_config(adapter_name_or_path)
    if config.peft_type != PeftType.PREFIX_TUNING:
        if is_trainable:
            raise UserError(f"{adapter_name_or_path} is a {config.peft_type.value} adapter: continue from a prefix.")
        return PeftModel.from_pretrained(model, adapter_name_or_path)
    check_sizes(config, model.config, adapter_name_or_path)
    if not is_trainable:
        with _without_peft_warnings():
            return PeftModel.from_pretrained(model, adapter_name_or_path)
    # PEFT refuses to train a loaded prefix, so the trained one starts as its copy.
    return _with_weights(
        model, load_peft_weights(adapter_name_or_path, device="cpu")["prompt_embeddings"], is_trainable
    )


def _load_published(model: PreTrainedModel, folder: str, is_trainable: bool) -> PeftModel:
    prefix = read_published_prefix(folder)
    check_width(prefix.weight.shape[1], model.config, folder)
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
    with _without_peft_warnings():
        adapted = get_peft_model(model, config)
    # The prefix trains in float32 whatever the base's precision; PEFT casts it where it meets the base.
    adapted.prompt_encoder.float()
    return adapted


@contextmanager
def _without_peft_warnings() -> Iterator[None]:
    """PEFT asks the base by a name that transformers has deprecated, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def read_adapter_config(adapter_name_or_path: str) -> PeftConfig:
    """The config of a PEFT adapter; a `UserError` where there is none."""
    try:
        return PeftConfig.from_pretrained(adapter_name_or_path)
    except (ValueError, OSError) as error:
        where = "folder" if Path(adapter_name_or_path).is_dir() else "folder or Hub id"
        raise UserError(
            f"--adapter_name_or_path {adapter_name_or_path} is no {where} with an adapter_config.json or a published "
            "P-Tuning v2 checkpoint: give the output folder of a training run, or a Hub id."
        ) from error


def check_width(width: int, config: PreTrainedConfig, source: str) -> None:
    """Raise a `UserError` where a published prefix of `width` numbers a virtual token is not this base's."""
    wanted = _prefix_width(config)
    if width != wanted:
        raise UserError(
            f"The prefix in {source} has {width} numbers a virtual token, but {config.name_or_path} needs {wanted} "
            "(layers x 2 x key-value heads x head size): it was trained on another base; give that one."
        )


def check_sizes(adapter_config: PrefixTuningConfig, config: PreTrainedConfig, adapter: str) -> None:
    """Raise a `UserError` where an adapter's layers and widths are not those of the base's config."""
    layers, width = adapter_config.num_layers, adapter_config.token_dim
    wanted = _prefix_width(config) // (2 * config.num_hidden_layers)
    if (layers, width) == (config.num_hidden_layers, wanted):
        return
    raise UserError(
        f"The prefix in {adapter} is for {layers} layers of {width} numbers "
        f"({adapter_config.base_model_name_or_path}), but {config.name_or_path} has {config.num_hidden_layers} layers "
        f"of {wanted}: load it on the base that it was trained on."
    )


def _prefix_width(config: PreTrainedConfig) -> int:
    """Numbers of one virtual token: layers x (key and value) x key-value heads x head size."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
