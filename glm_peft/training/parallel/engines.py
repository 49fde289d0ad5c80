"""
Which engine spreads a run over its processes: DDP, FSDP2 or DeepSpeed's ZeRO; and what each of them cannot do.

accelerate falls back to another engine in silence, or to processes that each train alone, where the one that its
config file asks for cannot run. Here that is refused, as is what an engine was seen to fail with, before the base is
loaded.
"""

import os

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from glm_peft.arguments.methods import ADALORA
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.errors import UserError

_CPU_CONFIG = "accelerate_configs/cpu_2_processes.yaml"
_WHOLE_CONFIG = "accelerate_configs/multi_gpu.yaml"
_NO_FSDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.DEEPSPEED)


def settle_engine(model_args: ModelArguments, training_args: TrainingArguments) -> torch.device:
    """
    Raise a `UserError` where the engine that was asked for cannot run, or cannot do what else is asked for.

    Args:
        model_args: the method and the quantization.
        training_args: the backend, and what else is asked for.

    Returns:
        Where the base is to be loaded: onto CPUs where the engine then gives each GPU its part.
    """
    _check_in_use(training_args)
    stage, version = zero_stage(training_args), fsdp_version(training_args)
    if version:
        _check_fsdp(version, model_args, training_args)
    if stage:
        _check_zero(stage, model_args, training_args)
        # transformers would build the base in parts, and no prefix can be initialised from a text with those.
        unset_hf_deepspeed_config()
    if model_args.peft_type == ADALORA and (stage or version):
        raise UserError(
            "--peft_type adalora weighs the gradients of whole matrices, which DeepSpeed and FSDP do not leave there: "
            f"use lora, or {_WHOLE_CONFIG}."
        )
    if stage == 3 or version:
        _check_parts(f"ZeRO-{stage}" if stage else "FSDP", model_args)
        return torch.device("cpu")
    return training_args.device


def engine_name(training_args: TrainingArguments) -> str:
    """`zero2`, `zero3` and so on, `fsdp2`, `ddp`, or `one process`."""
    stage, version = zero_stage(training_args), fsdp_version(training_args)
    if stage or version:
        return f"zero{stage}" if stage else f"fsdp{version}"
    return "ddp" if training_args.world_size > 1 else "one process"


def zero_stage(training_args: TrainingArguments) -> int:
    """Of DeepSpeed; 0 without it."""
    plugin = training_args.deepspeed_plugin
    return int(plugin.zero_stage) if plugin is not None else 0


def fsdp_version(training_args: TrainingArguments) -> int:
    """1 or 2; 0 without FSDP."""
    if training_args.fsdp_plugin_args is not None:
        return int(training_args.fsdp_plugin_args.get("fsdp_version", 2))
    return int(os.environ.get("FSDP_VERSION", "1")) if parse_flag_from_env("ACCELERATE_USE_FSDP") else 0


def _check_in_use(training_args: TrainingArguments) -> None:
    """The engine that was asked for is the one that accelerate chose, and all processes train together."""
    in_use = training_args.distributed_state.distributed_type
    if zero_stage(training_args) and (in_use != DistributedType.DEEPSPEED or _are_alone(training_args)):
        raise UserError(
            "The config file asks for DeepSpeed, which these settings would replace by another engine in silence: on "
            "CPUs set use_cpu: false in it, leave out --use_cpu, and give --ddp_backend gloo, with the environment "
            "variable DS_ACCELERATOR=cpu."
        )
    if fsdp_version(training_args) and in_use in _NO_FSDP:
        raise UserError(
            "The config file asks for FSDP, which needs GPUs, and accelerate would use another engine in silence: on "
            f"CPUs use {_CPU_CONFIG}, or DeepSpeed's accelerate_configs/deepspeed_zero3.yaml."
        )
    if _are_alone(training_args):
        raise UserError(
            f"{os.environ['WORLD_SIZE']} processes were started, but each would train alone, as there is no GPU that "
            "they could share the work by: give --use_cpu true, or start one process."
        )


def _are_alone(training_args: TrainingArguments) -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and training_args.world_size == 1


def _check_fsdp(version: int, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    if version == 1:
        raise UserError(
            "FSDP version 1 flattens what is trained and what is frozen into one, and a prefix cannot be told from it "
            "any more: set fsdp_version: 2, as accelerate_configs/fsdp2.yaml has it."
        )
    if not training_args.do_train:
        raise UserError(
            "FSDP2 takes a model apart when training begins, and --do_train is not given: evaluate with "
            f"{_WHOLE_CONFIG}, or predict with python -m glm_peft.predict."
        )
    if training_args.optim == "adafactor":
        raise UserError("--optim adafactor cannot work on a prefix in parts, as FSDP2 has it: use adamw_torch or sgd.")


def _check_zero(stage: int, model_args: ModelArguments, training_args: TrainingArguments) -> None:
    if stage < 3 and not training_args.do_train and training_args.do_eval:
        raise UserError(
            f"ZeRO-{stage} is an engine of training alone, and --do_train is not given: evaluate with {_WHOLE_CONFIG}."
        )
    if training_args.save_only_model and training_args.load_best_model_at_end:
        raise UserError(
            "--save_only_model and --load_best_model_at_end do not go together with DeepSpeed: leave one of them out."
        )


def _check_parts(engine: str, model_args: ModelArguments) -> None:
    """What fails where each process holds a part of the parameters."""
    if model_args.quantization_bit:
        raise UserError(
            f"--quantization_bit {model_args.quantization_bit} and {engine} do not go together: what a quantized base "
            f"needs beside its weights is not parted with them; use {_WHOLE_CONFIG}, where each GPU holds the "
            "quantized base, or leave it out."
        )
