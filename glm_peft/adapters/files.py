"""Read an adapter's config and weights from its folder, and check them against the base."""

from pickle import UnpicklingError

import torch
from peft import PeftConfig, PrefixTuningConfig, TaskType, load_peft_weights
from peft.utils.other import _prepare_prompt_learning_config
from transformers import PreTrainedConfig

from glm_peft.errors import UserError

_LONGEST = 200  # characters of another library's error


def read_flat_prefix(adapter_name_or_path: str, config: PrefixTuningConfig) -> torch.Tensor:
    """
    Read the prefix of a PEFT adapter [P, layers * 2 * kv].

    Raises:
        UserError: its weights are missing, broken, NaN or infinite, or not of the shape that its config says.
    """
    try:
        weights = load_peft_weights(adapter_name_or_path, device="cpu")
    except Exception as error:  # a broken file can fail in any way
        raise UserError(
            f"The weights of the adapter {adapter_name_or_path} cannot be read ({describe_fault(error)}): copy it "
            "again, or take an earlier checkpoint."
        ) from error
    # PEFT saves a prefix as this one tensor, that of a projection as its result.
    weight = weights.get("prompt_embeddings")
    wanted = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
    found = None if weight is None else tuple(weight.shape)
    if found != wanted or not bool(weight.isfinite().all()):
        what = f"has the shape {found}" if found != wanted else "holds NaN or infinite values"
        raise UserError(
            f"prompt_embeddings of the adapter {adapter_name_or_path} {what}, where its adapter_config.json asks for "
            f"finite values of the shape {wanted}: copy it again, or take an earlier checkpoint."
        )
    return weight


def describe_fault(error: Exception) -> str:
    """Return what another library said of a file, on one line; of a pickle its words advise to run what is in it."""
    reason = "" if isinstance(error, UnpicklingError) else f": {' '.join(str(error).split())[:_LONGEST]}"
    return f"{type(error).__name__}{reason}"


def read_adapter_config(adapter_name_or_path: str) -> PeftConfig:
    """Read the config of a PEFT adapter; raise a `UserError` where there is none."""
    try:
        config = PeftConfig.from_pretrained(adapter_name_or_path)
        if config.peft_type is None:  # PEFT reads any JSON object as a config, with defaults for what it lacks
            raise ValueError("There is no peft_type in it.")
        return config
    except Exception as error:  # PEFT's own depend on what is wrong with the file
        raise UserError(
            f"{adapter_name_or_path}/adapter_config.json cannot be read ({type(error).__name__}): copy the adapter "
            "again, or give the output folder of a training run or the Hub id of an adapter."
        ) from error


def make_prefix_config(num_virtual_tokens: int, config: PreTrainedConfig, base: str) -> PeftConfig:
    """
    Return PEFT's config of a prefix without a projection.

    Args:
        config: of the base that the prefix is for.
        base: folder or Hub id of that base.
    """
    adapter = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=num_virtual_tokens,
        base_model_name_or_path=base,
        num_transformer_submodules=1,  # a decoder alone
        inference_mode=True,
    )
    # Private in PEFT, but what it calls itself to fill in layers, heads and width from a base's config.
    return _prepare_prompt_learning_config(adapter, config)


def check_width(width: int, config: PreTrainedConfig, source: str) -> None:
    """Raise a `UserError` where a published prefix of `width` parameters per virtual token does not fit this base."""
    # A published prefix is one flat row for each virtual token, so only the product of the sizes can be compared.
    wanted = prefix_width(config)
    if width != wanted:
        raise UserError(
            f"The prefix in {source} has {width} parameters per virtual token, but {config.name_or_path} needs "
            f"{wanted} (layers x 2 x key-value heads x head size): it was trained on another base; give that one."
        )


def check_sizes(adapter_config: PrefixTuningConfig, config: PreTrainedConfig, adapter: str) -> None:
    """Raise a `UserError` where an adapter's layers and widths are not those of the base's config."""
    # Stock PEFT loads a prefix of more layers than the base has without a word.
    layers, width = adapter_config.num_layers, adapter_config.token_dim
    wanted = prefix_width(config) // (2 * config.num_hidden_layers)
    if (layers, width) == (config.num_hidden_layers, wanted):
        return
    raise UserError(
        f"The prefix in {adapter} is for {layers} layers of width {width} "
        f"({adapter_config.base_model_name_or_path}), but {config.name_or_path} has {config.num_hidden_layers} layers "
        f"of width {wanted}: load it on the base that it was trained on."
    )


def prefix_width(config: PreTrainedConfig) -> int:
    """Return the parameters of one virtual token: layers x (key and value) x key-value heads x head size."""
    return config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
