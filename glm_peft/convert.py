"""
Convert published P-Tuning v2 checkpoints to PEFT adapters and back, or merge an adapter into its base.

    python -m glm_peft.convert import CHECKPOINT --base BASE --output_dir ADAPTER --verify
    python -m glm_peft.convert export ADAPTER --base BASE --output_dir CHECKPOINT
    python -m glm_peft.convert merge ADAPTER --base BASE --output_dir MODEL

Adapters work with stock PEFT, exported checkpoints with the published scripts, as `--ptuning_checkpoint`. Merged are
LoRA and (IA)³ adapters; a prefix has no place in the weights of a base.
"""

import logging

import torch
from peft import PeftType
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from glm_peft.adapters.base_checks import check_config, check_generation, check_model_type, read_origin
from glm_peft.adapters.files import (
    check_sizes,
    check_width,
    make_prefix_config,
    read_adapter_config,
    read_flat_prefix,
)
from glm_peft.adapters.loading import load_adapter
from glm_peft.adapters.merging import merge_adapter
from glm_peft.adapters.published_checkpoints import read_published_prefix, rotate_prefix_keys, write_published_prefix
from glm_peft.adapters.trained_state import tidy_weights
from glm_peft.arguments.conversion import parse_convert_arguments
from glm_peft.arguments.fields import changed
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError
from glm_peft.models.folder_kind import A_BASE, A_CHECKPOINT, A_PEFT_ADAPTER, check_source
from glm_peft.models.loading import find_generation, load_base_model, load_config
from glm_peft.provenance.record import describe_base, describe_weights, write_provenance
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.files import make_output_dir
from glm_peft.reporting.log import set_up_logging

logger = logging.getLogger("glm_peft.convert")

_ADAPTER = ("ADAPTER", A_PEFT_ADAPTER)
_SOURCES = {"import": ("CHECKPOINT", A_CHECKPOINT), "export": _ADAPTER, "merge": _ADAPTER}
_VERIFIED = 1e-4  # of the largest logit, in float32


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """Import, export or merge as the arguments ask, and verify the result where they ask for it."""
    arguments = parse_convert_arguments(argv)
    set_up_logging()
    if arguments.verify and arguments.direction == "merge":
        raise UserError("--verify compares a prefix with its published checkpoint: leave it out of merge.")
    check_source(arguments.source, *_SOURCES[arguments.direction])
    check_source(arguments.base, "--base", A_BASE)
    model_args = ModelArguments(arguments.base, chat_format=arguments.chat_format)
    if arguments.direction == "import":
        import_checkpoint(arguments.source, model_args, arguments.output_dir)
        checkpoint, adapter = arguments.source, arguments.output_dir
    elif arguments.direction == "export":
        export_adapter(arguments.source, model_args, arguments.output_dir)
        checkpoint, adapter = arguments.output_dir, arguments.source
    else:
        check_base(arguments.source, model_args, load_config(model_args))
        merge_adapter(arguments.source, model_args, arguments.output_dir)
    if arguments.verify:
        verify(checkpoint, model_args, adapter)


def import_checkpoint(checkpoint: str, model_args: ModelArguments, output_dir: str) -> None:
    """
    Write a published prefix as a PEFT adapter, without loading the base.

    Args:
        checkpoint: the folder `checkpoint-N` that the published training wrote.
        model_args: the base and its chat format.

    Raises:
        UserError: there is no prefix in the checkpoint, it cannot be read, or it is another base's.
    """
    prefix, base = read_published_prefix(checkpoint), model_args.model_name_or_path
    config = load_config(model_args)
    check_width(prefix.weight.shape[1], config, checkpoint)
    generation = check_base(checkpoint, model_args, config)
    folder = make_output_dir(output_dir)
    # PEFT counts the text from P, the published code from 0: the keys are rotated as far.
    weight = rotate_prefix_keys(prefix.weight, config)
    # `contiguous`, as safetensors refuses views.
    save_file({"prompt_embeddings": weight.contiguous()}, folder / "adapter_model.safetensors")
    make_prefix_config(len(weight), config, base).save_pretrained(folder)
    tidy_weights(folder)
    record = {"base": describe_base(config, generation), "converted_from": describe_weights(checkpoint)}
    write_provenance(folder, record | ({"chat_format": model_args.chat_format} if model_args.chat_format else {}))
    logger.info("%d virtual tokens from %s, as an adapter in %s", len(weight), checkpoint, folder)


def export_adapter(adapter: str, model_args: ModelArguments, output_dir: str) -> None:
    """
    Write an adapter's prefix as the published scripts save one without projection.

    Args:
        adapter: folder or Hub id of the adapter.
        model_args: the base and its chat format.

    Raises:
        UserError: there is no prefix adapter, it cannot be read, or it is another base's.
    """
    adapter_config = read_adapter_config(adapter)
    if adapter_config.peft_type != PeftType.PREFIX_TUNING:
        raise UserError(f"{adapter} is a {adapter_config.peft_type.value} adapter: only a prefix can be exported.")
    config = load_config(model_args)
    check_base(adapter, model_args, config)
    check_sizes(adapter_config, config, adapter)
    weight = read_flat_prefix(adapter, adapter_config).float()
    folder = make_output_dir(output_dir)
    # The config as published and not as translated: the published scripts read it.
    raw = PreTrainedConfig.get_config_dict(config.name_or_path)[0]
    raw.pop("_commit_hash", None)  # transformers puts it there, the file has none
    write_published_prefix(rotate_prefix_keys(weight, config, -len(weight)), raw, folder)
    logger.info("%d virtual tokens from %s, as a published checkpoint in %s", len(weight), adapter, folder)


def check_base(source: str, model_args: ModelArguments, config: PreTrainedConfig) -> str | None:
    """Check that the base is the one that the prefix was trained on, and return its generation where it is known."""
    origin, generation = read_origin(source), find_generation(model_args)
    check_generation(origin, model_args.model_name_or_path, generation)
    check_model_type(origin, config)
    check_config(origin, config)
    return generation


@torch.no_grad()
def verify(checkpoint: str, model_args: ModelArguments, adapter: str) -> None:
    """
    Compare the logits of the published arithmetic (text counted from 0, keys not rotated) with the adapter's.

    Raises:
        UserError: they differ.
    """
    base = model_args.model_name_or_path
    # Half precision would hide a difference.
    model = load_base_model(changed(model_args, dtype="float32", adapter_name_or_path=checkpoint))
    ids = _some_ids(model.config).to(model.device)
    expected = _published_logits(model, read_published_prefix(checkpoint).weight.to(model.device), ids)
    # Another base may have been asked for: then there was a warning, and the arithmetic is verified all the same.
    adapted = load_adapter(model, adapter, allow_other_base=True).eval()
    found = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    difference = float((found - expected).abs().max())
    if difference > _VERIFIED * float(expected.abs().max()):
        raise UserError(
            f"The adapter {adapter} gives logits that differ from those of {checkpoint} by {difference:.2g} on "
            f"{base}: do not use what was written, and report the base's config.json."
        )
    logger.info("Verified on %s: the logits differ by at most %.2g", base, difference)


def _some_ids(config: PreTrainedConfig) -> torch.Tensor:
    ids = torch.randint(4, config.vocab_size // 2, (1, 32), generator=torch.Generator().manual_seed(0))
    if config.model_type == "chatglm":  # which refuses a row without [gMASK] and <sop>
        ids[0, 20], ids[0, 21] = config.gmask_token_id, config.bos_token_id
    return ids


def _published_logits(model: PreTrainedModel, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the base's logits with the prefix's keys as they are, and positions that do not count the prefix."""
    config, length = model.config, len(weight)
    states = weight.view(length, config.num_hidden_layers, 2, config.num_key_value_heads, -1).permute(1, 2, 3, 0, 4)
    cache = DynamicCache([(layer[0][None], layer[1][None]) for layer in states])
    mask = torch.ones(1, length + ids.shape[1], dtype=torch.long, device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


if __name__ == "__main__":
    main()
