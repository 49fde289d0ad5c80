"""Put a base model and its adapter together, the same way for every command."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.adapters.attention_check import check_attention
from glm_peft.adapters.base_checks import check_tokenizer
from glm_peft.adapters.compilation import compile_layers
from glm_peft.adapters.loading import create_adapter, load_adapter
from glm_peft.adapters.other_methods import attach_loss
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import initialize_prefix
from glm_peft.adapters.saved_adapter import SavedAdapter, resolve_adapter, resolve_prompt
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.methods import PREFIX_TUNING, check_generation_of_method
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.chat_formats import ChatFormat, get_chat_format
from glm_peft.models.loading import check_pair, load_base_model, load_config, load_tokenizer
from glm_peft.models.unwrapping import base_of, has_prefix

if TYPE_CHECKING:  # of training alone
    from glm_peft.arguments.training import TrainingArguments


@dataclass(frozen=True)
class OpenedBase:
    """
    A base model whose tokenizer, config and chat format are read, but not yet its weights, and its adapter.

    Args:
        model_args: the arguments, where the adapter's files have filled in what was not given.
        data_args: those of the data, in the same way.
        adapter: what the adapter's files say; `None` where none is named.
        config: of the base.
        tokenizer: of the base, which pads on the left.
        chat_format: the form of the prompts.
    """

    model_args: ModelArguments
    data_args: DataArguments
    adapter: SavedAdapter | None
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    chat_format: ChatFormat

    def load_model(
        self, device: torch.device | str | None = None, runs_on: torch.device | None = None
    ) -> PreTrainedModel:
        """Load the weights of the base, frozen; the arguments are those of `load_base_model`."""
        return load_base_model(self.model_args, device, runs_on)


def open_base(
    model_args: ModelArguments, data_args: DataArguments | None = None, is_trainable: bool = False
) -> OpenedBase:
    """
    Read the small files of a base and its adapter, and check that they fit together, before any weight is loaded.

    Args:
        data_args: the arguments of the data; `None` to ask as the adapter was trained.
        is_trainable: whether the adapter is to be trained.

    Raises:
        UserError: a file is not there or cannot be read, or base, tokenizer, adapter and method do not go together.
    """
    # The adapter comes first: it may name the chat format, without which ChatGLM2 and ChatGLM3 look the same.
    with naming_places(getattr(model_args, "places", {})):
        model_args, adapter = resolve_adapter(model_args, is_trainable)
    tokenizer, config = load_tokenizer(model_args), load_config(model_args)
    # Revisions of ChatGLM-6B have ids that are 20,000 apart: the wrong tokenizer would give noise, and no error.
    check_pair(tokenizer, config)
    if adapter:
        check_tokenizer(adapter.origin, tokenizer)
    if is_trainable:
        check_trainable(model_args, config)
    chat_format = get_chat_format(tokenizer, model_args.chat_format)
    data_args = resolve_prompt(data_args or DataArguments(), adapter)
    return OpenedBase(model_args, data_args, adapter, config, tokenizer, chat_format)


def check_trainable(model_args: ModelArguments, config: PreTrainedConfig) -> None:
    """Raise a `UserError` where the method cannot tune this base, or its attention cannot carry a prefix."""
    check_generation_of_method(model_args.peft_type, config.model_type)
    if model_args.peft_type == PREFIX_TUNING:
        check_attention(config, model_args.attn_implementation)


def put_adapter_on(model: PreTrainedModel, base: OpenedBase) -> PreTrainedModel | PeftModel:
    """
    Put the adapter on the base for answering; without one the base answers alone.

    Raises:
        UserError: the adapter cannot be read, or is of another base.
    """
    if base.adapter is None:
        return model
    return load_adapter(model, base.adapter, allow_other_base=base.model_args.allow_other_base)


def put_trainable_adapter_on(
    model: PreTrainedModel, base: OpenedBase, training_args: "TrainingArguments"
) -> PreTrainedModel | PeftModel:
    """
    Put an adapter on the base for training: a new one where its arguments say it starts, or the saved one.

    The attention then carries the prefix, the loss is computed in chunks, and `--torch_compile` compiles the layers.

    Raises:
        UserError: the adapter to go on from cannot be read or is of another base, or no layer is there to adapt.
    """
    adapted = create_adapter(model, base.model_args, base.adapter)
    if has_prefix(adapted):
        # Before the hooks of the prefix, as a start from a text runs the bare base.
        initialize_prefix(adapted, base.tokenizer, base.model_args, base.chat_format.name)
    attach_for_training(adapted, training_args, base.model_args.prefix_dropout)
    return adapted


def attach_for_training(
    model: PreTrainedModel | PeftModel, training_args: "TrainingArguments", prefix_dropout: float = 0.0
) -> None:
    """Let the attention carry the prefix, compute the loss in chunks, and compile the layers by `--torch_compile`."""
    if has_prefix(model):
        attach_prefix_attention(model, prefix_dropout)
    # In chunks and at labels alone: full logits over a real vocabulary are most of a step's time and memory.
    attach_loss(model, training_args.label_smoothing_factor)
    if training_args.layer_compiler is not None:
        compile_layers(base_of(model), **training_args.layer_compiler)
