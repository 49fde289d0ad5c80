"""Initialize a new prefix: with random values of a chosen deviation, zeros, or the keys and values of a text."""

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM, CHATGLM2, CHATGLM3, GLM4

# What the published demos of these generations say of the model, or it says of itself, and nothing of any task.
_INSTRUCTIONS = {
    CHATGLM: "你是一个名为 ChatGLM-6B 的人工智能助手，请针对用户的问题和要求提供适当的答复和支持。",
    CHATGLM2: "你是一个名为 ChatGLM2-6B 的人工智能助手，请针对用户的问题和要求提供适当的答复和支持。",
    CHATGLM3: "You are ChatGLM3, a large language model trained by Zhipu.AI. Follow the user's instructions.",
    GLM4: "你是一个名为 GLM-4 的人工智能助手，请针对用户的问题和要求提供适当的答复和支持。",
}
_OTHER_INSTRUCTION = "You are a helpful assistant. Follow the user's instructions."


def initialize_prefix(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, model_args: ModelArguments, chat_format: str
) -> None:
    """Initialize a new prefix as `--prefix_init` says; without it PEFT's own initialization stays."""
    start, text = model_args.prefix_init, model_args.prefix_init_text
    if start == "normal":
        initialize_normal(model, model_args.prefix_init_std)
    elif start == "zero":
        nn.init.zeros_(_encoder(model).embedding.weight)
    elif start:
        text = text or _INSTRUCTIONS.get(chat_format, _OTHER_INSTRUCTION)
        # `split_special_tokens`, so that a special token spelt in the instruction stays plain text.
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        initialize_from_text(model, ids)


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


def freeze_first_tokens(model: PeftModel, number: int) -> None:
    """Keep the first virtual tokens of a prefix without projection as they are; weight decay must be 0."""

    def cut_gradient(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output[..., :number, :].detach(), output[..., number:, :]], dim=-2)

    # In the forward pass and not at the gradient, of which a process may hold a shard.
    if number:
        _encoder(model).embedding.register_forward_hook(cut_gradient)


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
