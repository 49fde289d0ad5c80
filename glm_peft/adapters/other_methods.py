"""Put methods other than prefix tuning on a base: PEFT's own configs, with target modules for each generation."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from glm_peft.adapters.files import describe_fault
from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.arguments.methods import FULL, IA3, IN_EMBEDDINGS, P_TUNING, check_generation_of_method
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

_FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
_SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]
TARGETS = {"chatglm": _FUSED, "glm": _SEPARATE, "glm4": _SEPARATE}
"""Every linear layer between embeddings and head, by the model type of the base."""

_IA3_TARGETS = {
    "chatglm": ["query_key_value", "dense_4h_to_h"],
    "glm": ["k_proj", "v_proj", "down_proj"],
    "glm4": ["k_proj", "v_proj", "down_proj"],
}
_FEEDFORWARD = ("dense_4h_to_h", "down_proj")  # (IA)³ scales the inputs of these, and the outputs of the others
_ALL_LINEAR = "all-linear"  # PEFT's own word
_DEFAULT_RANK = 8


def create_tuner(base: PreTrainedModel, model_args: ModelArguments) -> PreTrainedModel | PeftModel:
    """
    Return the base with a new adapter that is no prefix, or the trainable base itself (`full`).

    Args:
        model_args: `peft_type` and the flags of that method.

    Raises:
        UserError: one of `target_modules` is no linear layer of the base.
    """
    if model_args.peft_type == FULL:
        return base.requires_grad_(True)
    config = build_config(base, model_args)
    model = get_peft_model(base, config)
    if config.is_prompt_learning:
        model.prompt_encoder.float()  # in half precision small updates would be rounded away
        place_virtual_tokens(model)
    return model


def load_tuner(model: PreTrainedModel, adapter: str, config: PeftConfig, is_trainable: bool) -> PeftModel:
    """
    Return the base with a saved adapter that is no prefix.

    Raises:
        UserError: the method cannot tune this base, or the adapter is broken or of another base's sizes.
    """
    check_generation_of_method(config.peft_type.value.lower(), model.config.model_type)
    with _loading_whole(model, adapter, config):
        if is_trainable and config.is_prompt_learning:
            # A copy, as PEFT refuses to train loaded virtual tokens; the saved ones are the result of any encoder.
            fresh = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=config.num_virtual_tokens)
            adapted = get_peft_model(model, fresh)
            adapted.prompt_encoder.float()
            set_peft_model_state_dict(adapted, load_peft_weights(adapter, device="cpu"))
        else:
            adapted = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable)
    if config.is_prompt_learning:
        place_virtual_tokens(adapted)
    return adapted


def load_beside(tuner: PeftModel, adapter: str, config: PeftConfig, name: str) -> None:
    """
    Put a saved adapter into the layers of a base beside those that are there; it is not active then.

    Args:
        name: that PEFT has for it, without a dot.

    Raises:
        UserError: it is of another method than those, or broken or of another base's sizes; they stay as they were.
    """
    kind, there = config.peft_type.value.lower(), tuner.peft_type.value.lower()
    if kind != there:
        raise UserError(
            f"The {kind} adapter {adapter} cannot be in the layers beside one of {there}: use each in its own process."
        )
    try:
        with _loading_whole(tuner, adapter, config):
            missing = tuner.load_adapter(adapter, name).missing_keys  # unlike above PEFT says nothing of them
            if missing:
                raise ValueError(f"{len(missing)} tensors are missing, such as {missing[0]}")
    except UserError:
        if name in tuner.peft_config:
            tuner.delete_adapter(name)
        raise


@contextmanager
def _loading_whole(model: PreTrainedModel | PeftModel, adapter: str, config: PeftConfig) -> Iterator[None]:
    """Raise a `UserError` where an adapter is not loaded to its last tensor; a bare base is left as it was."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would keep what PEFT drew for them
            yield
    except Exception as error:  # a broken file can fail in any way
        if not isinstance(model, PeftModel):
            _take_out_layers(model)
        raise UserError(
            f"The {config.peft_type.value.lower()} adapter {adapter} cannot be put on {model.config.name_or_path} "
            f"({describe_fault(error)}): copy it again, or load it on the base that it was trained on."
        ) from error


def _take_out_layers(base: PreTrainedModel) -> None:
    """Put back the layers of a base that PEFT had wrapped before it failed."""
    for name, layer in list(base.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            base.set_submodule(name, layer.get_base_layer())


def build_config(base: PreTrainedModel, model_args: ModelArguments) -> PeftConfig:
    """Return PEFT's config of the method, with defaults for flags that are not given."""
    peft_type, task = model_args.peft_type, {"task_type": TaskType.CAUSAL_LM}
    if peft_type in IN_EMBEDDINGS:
        task["num_virtual_tokens"] = model_args.num_virtual_tokens
        if peft_type == P_TUNING:
            return PromptEncoderConfig(
                encoder_hidden_size=model_args.encoder_hidden_size or base.config.hidden_size, **task
            )
        return PromptTuningConfig(**task)
    targets = choose_targets(base, peft_type, model_args.target_modules)
    if peft_type == IA3:
        feedforward = [name for name in targets if name in _FEEDFORWARD]
        return IA3Config(target_modules=targets, feedforward_modules=feedforward, **task)
    rank = model_args.lora_rank or _DEFAULT_RANK
    alpha = model_args.lora_alpha or 2 * rank
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=model_args.lora_dropout, target_modules=targets, **task)


def choose_targets(base: PreTrainedModel, peft_type: str, given: list[str] | None) -> list[str] | str:
    """
    Return the target modules of an adapter, by the ends of their names.

    Raises:
        UserError: the base has no linear layer of a given name.
    """
    model_type = base.config.model_type
    if not given:
        return list((_IA3_TARGETS if peft_type == IA3 else TARGETS)[model_type])
    if given == [_ALL_LINEAR] and peft_type != IA3:
        return _ALL_LINEAR
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    for target in given:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise UserError(
                f"--target_modules {target} is no linear layer of {base.config.name_or_path}: give some of "
                f"{', '.join(TARGETS[model_type])}."
            )
    return given


def place_virtual_tokens(model: PeftModel) -> None:
    """Count positions over virtual and real tokens alone, without the padding in between."""
    # PEFT leaves positions out; the base then counts the padding, and a row depends on its neighbours in the batch.
    model.register_forward_pre_hook(lambda _, args, kwargs: (args, _dropped(kwargs)), with_kwargs=True)
    base = model.get_base_model()
    base.register_forward_pre_hook(_positions_of_mask, with_kwargs=True)
    prepare = model.base_model_prepare_inputs_for_generation
    model.base_model_prepare_inputs_for_generation = lambda *args, **kwargs: _dropped(prepare(*args, **kwargs))


def _dropped(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the inputs without positions, as PEFT would drop them with a warning at every call."""
    return {name: value for name, value in inputs.items() if name != "position_ids"}


def _positions_of_mask(
    base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    mask = kwargs.get("attention_mask")
    if kwargs.get("position_ids") is not None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return None
    inputs = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    # Of the last tokens alone: in generation with a cache the mask is longer than the inputs.
    positions = (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
    return args, kwargs | {"position_ids": positions}


def attach_loss(model: PreTrainedModel | PeftModel, label_smoothing: float = 0.0) -> None:
    """Attach the chunked loss where the head is frozen; a model all of which is trained keeps transformers' own."""
    if isinstance(model, PeftModel):
        # Adapters inside the base call its forward without its hooks.
        caller = model.get_base_model() if model.active_peft_config.is_prompt_learning else model
        attach_label_loss(model.get_base_model(), label_smoothing, caller)
