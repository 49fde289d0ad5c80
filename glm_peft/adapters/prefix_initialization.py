"""Initialize a new prefix: with random values of a chosen deviation, or the keys and values of an instruction."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError


def initialize_prefix(model: PeftModel, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments) -> None:
    """Initialize a new prefix as `--prefix_init` says; without it PEFT's own initialization stays."""
    if model_args.prefix_init == "normal":
        initialize_normal(model, model_args.prefix_init_std)
    elif model_args.prefix_init == "text":
        # `split_special_tokens`, so that a special token spelt in the instruction stays plain text.
        text = tokenizer(model_args.prefix_init_text, add_special_tokens=False, split_special_tokens=True)
        initialize_from_text(model, text["input_ids"])


def initialize_normal(model: PeftModel, std: float) -> None:
    """Draw the prefix's embeddings anew, with standard deviation `std` (PEFT's own is 1)."""
    nn.init.normal_(_encoder(model).embedding.weight, std=std)


@torch.no_grad()
def initialize_from_text(model: PeftModel, ids: list[int]) -> None:
    """
    Initialize the prefix with the keys and values of an instruction, cut or repeated to P tokens.

    For Glm and Glm4, where the text counts its positions from P, the model then computes exactly what it would with
    the instruction in front of the prompt. ChatGLM-6B reads a prompt in both directions, and a prefix cannot see the
    prompt behind it, so there it is as near as the mask allows.

    Args:
        ids: the instruction's tokens, without special ones.

    Raises:
        UserError: the instruction is empty, or the prefix is projected and so cannot be set.
    """
    config = model.active_peft_config
    if config.prefix_projection:
        raise UserError("--prefix_init text sets the prefix itself: leave out --prefix_projection.")
    if not ids:
        raise UserError("--prefix_init_text is empty: give an instruction.")
    length = config.num_virtual_tokens
    base = model.get_base_model()
    repeated = torch.tensor([(ids * -(-length // len(ids)))[:length]], device=base.device)  # -(-a // b) rounds up
    _encoder(model).load_prompt_embeddings(keys_and_values(base, repeated))


@torch.no_grad()
def keys_and_values(base: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Compute the keys and values of ids [1, P] as a flat prefix [P, layers * 2 * kv], in float32."""
    is_training, inputs = base.training, {"input_ids": ids, "logits_to_keep": 1}  # those of all may not fit
    if base.config.model_type == "chatglm":
        # Its text counts from 0, so what stands before it has negative positions.
        positions = torch.arange(-ids.shape[1], 0, device=ids.device)
        inputs["position_rows"] = torch.stack([positions, torch.zeros_like(positions)])[None]
        inputs["attention_mask"] = torch.ones_like(ids)
    cache = base.eval()(**inputs, use_cache=True).past_key_values  # activation checkpointing would drop it
    base.train(is_training)
    states = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    return states.permute(3, 0, 1, 2, 4).reshape(ids.shape[1], -1).float()


def _encoder(model: PeftModel) -> nn.Module:
    return model.prompt_encoder[model.active_adapter]
