"""The frozen base and its tokenizer: loaded, and checked to belong together."""

import logging
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import glm_peft.models  # noqa: F401  (registers the generations)
from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM2, CHATGLM3, GLM4

logger = logging.getLogger(__name__)


def load_tokenizer(model_args: Any) -> PreTrainedTokenizerBase:
    """
    The base's tokenizer, which pads on the left.

    Raises:
        UserError: there is no such folder or Hub id, or its tokenizer file cannot be read.
    """
    kwargs = _hub_kwargs(model_args)
    tokenizer = _load(AutoTokenizer, model_args, **kwargs)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"The tokenizer of {model_args.model_name_or_path} has no padding token: set pad_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


def load_config(model_args: Any) -> PreTrainedConfig:
    """
    The base's config, in the fields of its network.

    Raises:
        UserError: there is no such folder or Hub id, or it is of no generation that glm_peft knows.
    """
    # Only here do the later generations differ for the network: in what rope_ratio means.
    chat_format = getattr(model_args, "chat_format", None)
    generation = {"generation": chat_format} if chat_format in (CHATGLM2, CHATGLM3, GLM4) else {}
    config = _load(AutoConfig, model_args, **_hub_kwargs(model_args), **generation)
    if config.model_type not in ("chatglm", "glm", "glm4"):
        raise UserError(
            f"{model_args.model_name_or_path} is a model of type {config.model_type!r}, but glm_peft tunes "
            "ChatGLM-6B, ChatGLM2-6B, ChatGLM3-6B, GLM-4-9B and GLM-4-0414: give one of their folders or Hub ids."
        )
    return config


def load_base_model(model_args: Any, device: torch.device | str | None = None) -> PreTrainedModel:
    """
    The base in evaluation mode, without gradients.

    Args:
        model_args: `model_name_or_path`, `dtype`, `quantization_bit`, `attn_implementation` and the Hub's arguments.
        device: where it goes; a GPU if there is one, otherwise the CPU, where `None`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = choose_dtype(getattr(model_args, "dtype", "auto"), device)
    kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, **_hub_kwargs(model_args)}
    if getattr(model_args, "attn_implementation", None):
        kwargs["attn_implementation"] = model_args.attn_implementation
    if getattr(model_args, "quantization_bit", None):
        kwargs["quantization_config"] = _quantization_config(model_args.quantization_bit, dtype)
    config = load_config(model_args)
    model = _load(AutoModelForCausalLM, model_args, config=config, **kwargs)
    return model.eval().requires_grad_(False)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where a GPU has it, float16 on older ones, float32 on CPUs, where half precision is slow."""
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def check_pair(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """
    Raise a `UserError` where the tokenizer's ids are not those that the weights were trained with.

    Compared are the sizes and the special ids that both sides carry; each generation has its own.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pairs = {"<eos>": (tokenizer.eos_token_id, ends), "<pad>": (tokenizer.pad_token_id, [config.pad_token_id])}
    if config.model_type == "chatglm":
        pairs["[gMASK]"] = (tokenizer.convert_tokens_to_ids("[gMASK]"), [config.gmask_token_id])
        pairs["<sop>"] = (tokenizer.bos_token_id, [config.bos_token_id])
    differing = [name for name, (id_, expected) in pairs.items() if None not in expected and id_ not in expected]
    if len(tokenizer) <= config.vocab_size and not differing:
        return
    found = "; ".join(f"{name} is {pairs[name][0]} there, {pairs[name][1]} here" for name in differing)
    raise UserError(
        f"The tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} tokens and the weights in "
        f"{config.name_or_path} a vocabulary of {config.vocab_size}{': ' + found if found else ''}, so they do not "
        "belong together: take both from one repository and one revision of it."
    )


def _quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _hub_kwargs(model_args: Any) -> dict[str, Any]:
    names = {"cache_dir": "cache_dir", "model_revision": "revision"}
    values = {name: getattr(model_args, field, None) for field, name in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _load(auto_class: Any, model_args: Any, **kwargs: Any) -> Any:
    """`from_pretrained`, with a missing folder or Hub id told in one sentence."""
    try:
        return auto_class.from_pretrained(model_args.model_name_or_path, **kwargs)
    except OSError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"--model_name_or_path {model_args.model_name_or_path} cannot be loaded ({reason}): give a folder in the "
            "published layout or a Hub id."
        ) from error
