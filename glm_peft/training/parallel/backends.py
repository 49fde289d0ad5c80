"""
Resolve the backend that shares a run among its processes: DDP, FSDP2 or DeepSpeed's ZeRO-2.

Where the backend of its config file cannot run, accelerate silently falls back to another one, or to processes that
each train alone. That is refused here before the base is loaded, as are settings that a backend fails with.
"""

import os

import torch
from accelerate.utils import DistributedType, parse_flag_from_env

from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.errors import UserError

_CPU_CONFIG = "accelerate_configs/cpu_2_processes.yaml"
_UNSHARDED_CONFIG = "accelerate_configs/multi_gpu.yaml"
_NO_FSDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)


def resolve_backend(model_args: ModelArguments, training_args: TrainingArguments) -> torch.device:
    """
    Check that the backend of accelerate's config file can run with these arguments.

    Args:
        model_args: `quantization_bit`.
        training_args: `deepspeed_plugin`, `fsdp_plugin_args` and what accelerate made of them.

    Returns:
        The device onto which the base is to be loaded: the CPU where FSDP2 then gives each GPU its shard.

    Raises:
        UserError: accelerate chose another backend, or the backend cannot work with one of the arguments.
    """
    _check_in_use(training_args)  # first: the checks of a backend presume that it is in use
    stage, version = zero_stage(training_args), fsdp_version(training_args)
    if stage:
        _check_zero(stage, training_args)
    if not version:
        return training_args.device
    _check_fsdp(version, model_args, training_args)
    return torch.device("cpu")


def backend_name(training_args: TrainingArguments) -> str:
    """Return `zero2`, `fsdp2`, `ddp`, or `one process`."""
    stage, version = zero_stage(training_args), fsdp_version(training_args)
    if stage or version:
        return f"zero{stage}" if stage else f"fsdp{version}"
    return "ddp" if training_args.world_size > 1 else "one process"


def zero_stage(training_args: TrainingArguments) -> int:
    """Return the stage of DeepSpeed's ZeRO; 0 without it."""
    plugin = training_args.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def fsdp_version(training_args: TrainingArguments) -> int:
    """Return 1 or 2; 0 without FSDP."""
    # `--fsdp` fills the plugin, accelerate's config file only the environment; their defaults are not the same.
    if training_args.fsdp_plugin_args is not None:
        return int(training_args.fsdp_plugin_args.get("fsdp_version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else 0


def _check_in_use(training_args: TrainingArguments) -> None:
    """Check that accelerate chose the backend that was asked for, and that all processes train together."""
    # With `ACCELERATE_USE_CPU=true` files for DeepSpeed and FSDP become DDP, with exit code 0.
    in_use = training_args.distributed_state.distributed_type
    if zero_stage(training_args) and (in_use != DistributedType.DEEPSPEED or _are_alone(training_args)):
        raise UserError(
            "The config file asks for DeepSpeed, which these settings would replace by another backend in silence: on "
            "CPUs set use_cpu: false in it, leave out --use_cpu, and give --ddp_backend gloo, with the environment "
            "variable DS_ACCELERATOR=cpu."
        )
    if fsdp_version(training_args) and in_use in _NO_FSDP:
        raise UserError(
            "The config file asks for FSDP, which needs GPUs, and accelerate would use another backend in silence: on "
            f"CPUs use {_CPU_CONFIG}."
        )
    if _are_alone(training_args):
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started, but each would train alone, as there is no GPU that "
            "they could share the work by: give --use_cpu true, or start one process."
        )


def _are_alone(training_args: TrainingArguments) -> bool:
    # Without `--use_cpu true` accelerate ignores on CPUs that a launcher started several.
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and training_args.world_size == 1


def _check_fsdp(version: int, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    if version == 1:
        raise UserError(
            "FSDP version 1 flattens trained and frozen parameters into one tensor, from which no adapter can be "
            "saved: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml has it."
        )
    if not training_args.do_train:
        raise UserError(
            "FSDP2 shards a model when training begins, and --do_train is not given: evaluate with "
            f"{_UNSHARDED_CONFIG}, or predict with python -m glm_peft.predict."
        )
    if training_args.optim == "adafactor":
        raise UserError("--optim adafactor cannot work on a sharded adapter, as FSDP2 has it: use adamw_torch or sgd.")
    if model_args.quantization_bit:
        raise UserError(
            f"--quantization_bit {model_args.quantization_bit} and FSDP do not go together: what a quantized base "
            f"needs beside its weights is not sharded with them; use {_UNSHARDED_CONFIG}, where each GPU holds the "
            "quantized base, or leave it out."
        )


def _check_zero(stage: int, training_args: TrainingArguments) -> None:
    if stage == 3:
        # Sharded while it is loaded, a base reports no missing weights, its published tensors cannot be split (their
        # targets are empty), and no prefix can start from a text; sharded later, it must first fit into each GPU.
        raise UserError(
            "The config file asks for ZeRO-3, which shards the base; here FSDP2 does that: use "
            "accelerate_configs/fsdp2.yaml, or accelerate_configs/deepspeed_zero2.yaml where the base fits into a GPU."
        )
    if not training_args.do_train and training_args.do_eval:
        raise UserError(
            f"ZeRO-{stage} works in training alone, and --do_train is not given: evaluate with {_UNSHARDED_CONFIG}."
        )
    if training_args.save_only_model and training_args.load_best_model_at_end:
        raise UserError(
            "--save_only_model and --load_best_model_at_end do not go together with DeepSpeed: leave one of them out."
        )
