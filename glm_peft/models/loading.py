"""Load the frozen base and its tokenizer, and check that they belong together."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import glm_peft.models  # noqa: F401  (registers the generations)
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.hub.connection import set_up_connection
from glm_peft.models.folder_kind import A_BASE, PREFIX, Kind, check_source
from glm_peft.models.generations import CHATGLM2, CHATGLM3, GLM4, generation_by_fields
from glm_peft.models.head_input import copy_head_input
from glm_peft.models.layerwise_casting import SMALLEST_KEPT, cast_layerwise
from glm_peft.models.quantization import dequantize_to, keep_unpacked, quantization_config
from glm_peft.models.tokenization_common import read_json_beside, recorded_generation
from glm_peft.models.weight_files import check_weight_files
from glm_peft.reporting.results import describe_dtype

logger = logging.getLogger(__name__)

_SIXTEEN_BITS = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def load_tokenizer(model_args: ModelArguments) -> PreTrainedTokenizerBase:
    """
    Load the base's tokenizer, which pads on the left.

    Raises:
        UserError: there is no such folder or Hub id, or its tokenizer file cannot be read.
    """
    load_config(model_args)  # refuses a folder of another model in plainer words than the tokenizer would
    try:
        tokenizer = _load(AutoTokenizer.from_pretrained, model_args)
    except UserError as error:
        if "instantiate the backend tokenizer" not in str(error):
            raise
        raise UserError(
            f"The tokenizer file tokenizer.json is not in {model_args.model_name_or_path}: download it from the "
            "repository."
        ) from error
    tokenizer.padding_side = "left"  # what is generated must follow the prompt directly
    if tokenizer.pad_token_id is None:
        raise UserError(
            f"The tokenizer of {model_args.model_name_or_path} has no padding token: set pad_token in its "
            "tokenizer_config.json."
        )
    return tokenizer


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """
    Load the base's config, in the fields of its network.

    Raises:
        UserError: there is no such folder or Hub id, or it is of no generation that glm_peft knows.
    """
    check_source(model_args.model_name_or_path, "--model_name_or_path", A_BASE, **hub_arguments(model_args))
    return read_config(model_args)


def read_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Load the config of a base, or that which a published prefix has of its base; raise as `load_config` does."""
    # The networks of the later generations differ in one thing only: what rope_ratio means.
    chat_format = model_args.chat_format
    generation = {"generation": chat_format} if chat_format in (CHATGLM2, CHATGLM3, GLM4) else {}
    return _load(AutoConfig.from_pretrained, model_args, **generation)


def load_base_model(
    model_args: ModelArguments, device: torch.device | str | None = None, runs_on: torch.device | None = None
) -> PreTrainedModel:
    """
    Load the base in evaluation mode, without gradients.

    Args:
        model_args: which base, and in which precision.
        device: where it goes; `None`: to a GPU if there is one, otherwise to the CPU.
        runs_on: the device that `--dtype auto` is for, where a backend moves the base there later.

    Raises:
        UserError: the weights cannot be read, or some are missing.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_config(model_args)
    dtype, reason = choose_dtype(model_args.dtype, runs_on or device, config.dtype)
    kept = choose_kept_dtype(model_args, runs_on or device, config)
    logger.info("Precision of the base: %s, %s", describe_dtype(dtype, kept), reason)
    if device.type == "cpu" and dtype.itemsize == 2 and not has_fast_bfloat16():
        logger.info("This processor has no instructions for it: training is many times faster with --dtype auto")
    kwargs: dict[str, Any] = {"dtype": kept or dtype, "device_map": {"": device}, "output_loading_info": True}
    kwargs["ignore_mismatched_sizes"] = True  # they are refused below, in one sentence
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    if model_args.quantization_bit:
        kwargs["quantization_config"] = quantization_config(model_args.quantization_bit, dtype)
    check_base_weights(model_args)
    try:
        model, info = _load(AutoModelForCausalLM.from_pretrained, model_args, config=config, **kwargs)
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise UserError(
            f"The weights in {model_args.model_name_or_path} cannot be cut into the heads and groups of its "
            "config.json: take both from one repository and one revision of it."
        ) from error
    _check_complete(info, model_args)
    keep_unpacked(model)
    copy_head_input(model)
    model.eval().requires_grad_(False)
    if kept:
        dequantize_to(model, dtype)
        cast_layerwise(model)
    return model


def check_base_weights(model_args: ModelArguments) -> None:
    """
    Check the weight files of a base in a folder by their heads, and that a prefix inside them is not left out unsaid.

    Raises:
        UserError: a file is missing or broken, or the weights hold a prefix, and no adapter is named.
    """
    name = model_args.model_name_or_path
    if not Path(name).is_dir():  # a Hub id, whose download checks its files itself
        return
    source = check_source(name, "--model_name_or_path", A_BASE)
    check_weight_files(Path(name))
    if source.kind == Kind.MODEL_WITH_PREFIX and model_args.adapter_name_or_path is None:
        _tell_of_prefix(name, None)


def choose_dtype(dtype: str, device: torch.device, stored: torch.dtype | str | None = None) -> tuple[torch.dtype, str]:
    """
    Resolve `auto`: bfloat16 where the device has it, else float16 on GPUs and float32 on CPUs; and say why.

    Args:
        dtype: the value of `--dtype`.
        device: where the base runs.
        stored: what its weights are stored in, by its config; a CPU rounds none that are stored in float32.
    """
    if dtype != "auto":
        return getattr(torch, dtype), "as --dtype says"
    if device.type != "cpu":
        # Emulated bfloat16 counts as supported too where it is not ruled out.
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
        chosen = torch.bfloat16 if has_it else torch.float16
        return chosen, f"as this GPU has {'' if has_it else 'no '}instructions for bfloat16"
    # bfloat16 is 3 times as fast as float32 with such instructions, and some 70 times slower without.
    if not has_fast_bfloat16():
        return torch.float32, "as this processor has neither AMX nor AVX512-BF16, without which bfloat16 is slow"
    if str(stored).removeprefix("torch.") not in _SIXTEEN_BITS:
        return torch.float32, "as its weights are not stored in 16 bits"
    return torch.bfloat16, "as this processor has instructions for it (AMX or AVX512-BF16)"


def choose_kept_dtype(
    model_args: ModelArguments, device: torch.device, config: PreTrainedConfig
) -> torch.dtype | None:
    """Return the dtype that weights keep where `--dtype auto` computes in float32 on a CPU, or `None` for float32."""
    if model_args.dtype != "auto" or choose_dtype("auto", device, config.dtype)[0] != torch.float32:
        return None
    # The embeddings are the largest matrix.
    if config.vocab_size * config.hidden_size < SMALLEST_KEPT:
        return None
    # 8-bit layers round otherwise what comes in 16 bits; processes send each other weights, all in one dtype.
    if model_args.quantization_bit == 8 or PartialState().num_processes > 1:
        return None
    return _SIXTEEN_BITS.get(str(config.dtype).removeprefix("torch."))


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies matrices of bfloat16 by instructions of its own."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def check_pair(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """
    Raise a `UserError` where the tokenizer's ids are not those that the weights were trained with.

    Compared are the sizes and the special ids that both sides carry; each generation has its own.
    """
    # The weights may have more rows than the tokenizer has ids: published embedding tables are padded.
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    pairs = {"<eos>": (tokenizer.eos_token_id, ends), "<pad>": (tokenizer.pad_token_id, [config.pad_token_id])}
    if config.model_type == "chatglm":
        pairs["[gMASK]"] = (tokenizer.convert_tokens_to_ids("[gMASK]"), [config.gmask_token_id])
        pairs["<sop>"] = (tokenizer.bos_token_id, [config.bos_token_id])
    differing = [name for name, (id_, expected) in pairs.items() if None not in expected and id_ not in expected]
    if len(tokenizer) <= config.vocab_size and not differing:
        return
    found = "; ".join(f"{name} is {pairs[name][0]} in the first, {pairs[name][1]} in the second" for name in differing)
    raise UserError(
        f"The tokenizer in {tokenizer.name_or_path} has {len(tokenizer)} tokens and the weights in "
        f"{config.name_or_path} a vocabulary of {config.vocab_size}{': ' + found if found else ''}, so they do not "
        "belong together: take both from one repository and one revision of it."
    )


def _check_complete(info: dict[str, Any], model_args: ModelArguments) -> None:
    name = model_args.model_name_or_path
    # transformers initialises both kinds at random and only logs it.
    for key, found, expected in info["mismatched_keys"]:
        raise UserError(
            f"The weights in {name} have {key} of shape {tuple(found)} where its config.json asks for "
            f"{tuple(expected)}: take both from one repository and one revision of it."
        )
    if any(PREFIX in key for key in info["unexpected_keys"]):
        _tell_of_prefix(name, model_args.adapter_name_or_path)
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"The weights in {name} lack {len(missing)} of the model's parameters, such as {missing[0]}: download its "
            "files again."
        )


def _tell_of_prefix(name: str, adapter: str | None) -> None:
    if adapter is None:
        raise UserError(
            f"--model_name_or_path {name} is a whole model with a P-Tuning v2 prefix inside, which would be left out: "
            "give its folder as --adapter_name_or_path too, or make an adapter of the prefix with python -m "
            "glm_peft.convert import, or for a new prefix give the base that this one was trained on."
        )
    if Path(adapter) != Path(name):
        logger.warning("%s has a P-Tuning v2 prefix inside, which is left out: %s takes its place.", name, adapter)


def hub_arguments(model_args: ModelArguments) -> dict[str, Any]:
    """Return the arguments that say where on the Hub, and in which cache, the base's files are looked for."""
    values = {"cache_dir": model_args.cache_dir, "revision": model_args.model_revision}
    return {name: value for name, value in values.items() if value is not None}


def _load(read: Callable[..., Any], model_args: ModelArguments, **kwargs: Any) -> Any:
    """Call `read` (`from_pretrained` or the like), and tell whatever goes wrong in it in one sentence."""
    set_up_connection()
    try:
        # False, not left out: transformers may otherwise ask whether to run the repository's own code.
        return read(model_args.model_name_or_path, trust_remote_code=False, **hub_arguments(model_args), **kwargs)
    except UserError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        name, reason = model_args.model_name_or_path, " ".join(str(error).split()).rstrip(".")
        if not Path(name).exists():  # a path of a recipe that is used in another folder looks like a Hub id
            reason = f"there is no such folder in {Path.cwd()}, and of the Hub: {reason}"
        raise UserError(f"--model_name_or_path {name} cannot be loaded ({reason}): {_advice(error)}.") from error
    except pickle.UnpicklingError as error:  # whose words advise to run what is in the file
        raise UserError(
            f"The weights in {model_args.model_name_or_path} are broken or no plain tensors, so they are not read: "
            "download its files again."
        ) from error


def _advice(error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what is missing, or change --attn_implementation or --quantization_bit"
    if "attn_implementation" in str(error):
        return "give another --attn_implementation, or none"
    return "give a folder in the published layout or a Hub id, with all its files"


def find_generation(model_args: ModelArguments) -> str | None:
    """
    Find the generation of a base by its files, or by `chat_format` where they do not say it, or `None`.

    Args:
        model_args: which base, and the chat format that stands for its generation where nothing else does.
    """
    name, hub = model_args.model_name_or_path, hub_arguments(model_args)
    try:
        config = read_json_beside(name, "config.json", **hub)
        said = recorded_generation(read_json_beside(name, "tokenizer_config.json", **hub), config)
    except (OSError, ValueError):
        return None  # loading the base says what is wrong
    chat_format = model_args.chat_format
    return said or generation_by_fields(config) or (None if chat_format == "plain" else chat_format)
