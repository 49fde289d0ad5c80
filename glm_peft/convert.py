"""
Between published P-Tuning v2 checkpoints and PEFT adapters.

    python -m glm_peft.convert import CHECKPOINT --base BASE --output_dir ADAPTER --verify
    python -m glm_peft.convert export ADAPTER --base BASE --output_dir CHECKPOINT

Adapters work with stock PEFT; exported checkpoints with the published scripts, as `--ptuning_checkpoint`.
"""

import logging
from types import SimpleNamespace

import torch
from peft import PrefixTuningConfig, TaskType, load_peft_weights
from peft.utils.other import _prepare_prompt_learning_config
from safetensors.torch import save_file
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from glm_peft.adapters import check_sizes, check_width, load_adapter, read_adapter_config
from glm_peft.base_model import load_base_model, load_config
from glm_peft.convert_arguments import parse_convert_arguments
from glm_peft.errors import UserError, exit_with_user_errors
from glm_peft.legacy import read_published_prefix, rotate_prefix_keys, write_published_prefix
from glm_peft.prediction_files import make_output_dir
from glm_peft.reporting import set_up_logging

logger = logging.getLogger("glm_peft.convert")

_VERIFIED = 1e-4  # of the largest logit, in float32


@exit_with_user_errors()
def main(argv: list[str] | None = None) -> None:
    """Does what the arguments ask for."""
    arguments = parse_convert_arguments(argv)
    set_up_logging()
    config = load_config(SimpleNamespace(model_name_or_path=arguments.base))
    if arguments.direction == "import":
        import_checkpoint(arguments.source, arguments.base, config, arguments.output_dir)
        if arguments.verify:
            verify(arguments.source, arguments.base, arguments.output_dir)
    else:
        export_adapter(arguments.source, config, arguments.output_dir)


def import_checkpoint(checkpoint: str, base: str, config: PreTrainedConfig, output_dir: str) -> None:
    """
    Write a published prefix as an adapter, without loading the base.

    Raises:
        UserError: there is no prefix in the checkpoint, or it is another base's.
    """
    prefix = read_published_prefix(checkpoint)
    check_width(prefix.weight.shape[1], config, checkpoint)
    folder = make_output_dir(output_dir)
    weight = rotate_prefix_keys(prefix.weight, config)
    save_file({"prompt_embeddings": weight.contiguous()}, folder / "adapter_model.safetensors")
    adapter = PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=len(weight),
        base_model_name_or_path=base,
        num_transformer_submodules=1,
        inference_mode=True,
    )
    _prepare_prompt_learning_config(adapter, config).save_pretrained(folder)
    logger.info("%d virtual tokens from %s, as an adapter in %s", len(weight), checkpoint, folder)


def export_adapter(adapter: str, config: PreTrainedConfig, output_dir: str) -> None:
    """
    Write an adapter's prefix as the published scripts save one without projection.

    Raises:
        UserError: there is no prefix adapter, or it is another base's.
    """
    check_sizes(read_adapter_config(adapter), config, adapter)
    weight = load_peft_weights(adapter, device="cpu")["prompt_embeddings"]
    folder = make_output_dir(output_dir)
    raw = PreTrainedConfig.get_config_dict(config.name_or_path)[0]
    write_published_prefix(rotate_prefix_keys(weight, config, -len(weight)), raw, folder)
    logger.info("%d virtual tokens from %s, as a published checkpoint in %s", len(weight), adapter, folder)


@torch.no_grad()
def verify(checkpoint: str, base: str, adapter: str) -> None:
    """
    Compare the logits of the published arithmetic (text counted from 0, keys not rotated) with the adapter's.

    Raises:
        UserError: they differ.
    """
    model = load_base_model(SimpleNamespace(model_name_or_path=base, dtype="float32"))
    ids = _some_ids(model.config).to(model.device)
    expected = _published_logits(model, read_published_prefix(checkpoint).weight.to(model.device), ids)
    found = load_adapter(model, adapter).eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    difference = float((found - expected).abs().max())
    if difference > _VERIFIED * float(expected.abs().max()):
        raise UserError(
            f"The adapter in {adapter} gives logits that differ from those of {checkpoint} by {difference:.2g} on "
            f"{base}: do not use it, and report the base's config.json."
        )
    logger.info("Verified on %s: the logits differ by at most %.2g", base, difference)


def _some_ids(config: PreTrainedConfig) -> torch.Tensor:
    ids = torch.randint(4, config.vocab_size // 2, (1, 32), generator=torch.Generator().manual_seed(0))
    if config.model_type == "chatglm":
        ids[0, 20], ids[0, 21] = config.gmask_token_id, config.bos_token_id
    return ids


def _published_logits(model: PreTrainedModel, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The base with the prefix as it is, and positions that do not count it."""
    config, length = model.config, len(weight)
    states = weight.view(length, config.num_hidden_layers, 2, config.num_key_value_heads, -1).permute(1, 2, 3, 0, 4)
    cache = DynamicCache([(layer[0][None], layer[1][None]) for layer in states])
    mask = torch.ones(1, length + ids.shape[1], dtype=torch.long, device=ids.device)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


if __name__ == "__main__":
    main()
