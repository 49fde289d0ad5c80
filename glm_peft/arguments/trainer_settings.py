"""Refuse settings of transformers' Trainer that cannot work, or not here, before anything is loaded."""

from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, get_scheduler

from glm_peft.arguments.command_line import warn
from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.errors import UserError

# They need no package of their own, so transformers need not be asked.
_AT_HAND = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_COUNTS = {"true": "all", "false": "no"}  # what the flag was before it had three values
_ANY_STEPS = 1000  # a schedule is built for as many, to see whether it has all that it needs


def check_trainer_settings(args: Seq2SeqTrainingArguments) -> None:
    """
    Refuse settings that would fail after the base is loaded or have no effect; drop those that change nothing.

    Args:
        args: the training arguments, which are changed.

    Raises:
        UserError: an optimizer lacks its package, a schedule its settings, a flag the one that it belongs to, or the
            device or this toolkit cannot do what is asked for.
    """
    _check_optimizer(args)
    _check_schedule(args)
    if args.fp16 and args.device.type == "cpu":
        raise UserError("--fp16 has no effect on a CPU: leave it out, or give --bf16.")
    if args.use_liger_kernel:
        raise UserError(
            "--use_liger_kernel would take the place of the loss in chunks, which saves the same memory: leave it out."
        )
    # torch raises this one, and transformers the next, once the base is loaded.
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("--dataloader_persistent_workers needs workers: give --dataloader_num_workers too.")
    if args.save_strategy == "best" and not args.metric_for_best_model:
        raise UserError("--save_strategy best needs to know by what: give --metric_for_best_model loss, or a score.")
    if args.enable_jit_checkpoint:
        warn("--enable_jit_checkpoint is left out: on SIGTERM a checkpoint is written in any case.")
        args.enable_jit_checkpoint = False


def check_streaming(data_args: DataArguments, args: Seq2SeqTrainingArguments) -> None:
    """Raise a `UserError` where rows are streamed and a setting needs their number, or all of them at once."""
    if not data_args.streaming:
        return
    if data_args.objective == DPO:
        raise UserError("--objective dpo learns from pairs, which --streaming does not read: leave one of them out.")
    if args.max_steps <= 0:
        raise UserError("--streaming does not know how many rows there are: say with --max_steps how long to train.")
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        if getattr(args, name) == "epoch":
            raise UserError(
                f"--{name} epoch waits for the end of the rows, which --streaming does not know: give steps."
            )
    if args.train_sampling_strategy not in ("auto", "random"):
        raise UserError(
            f"--train_sampling_strategy {args.train_sampling_strategy} needs all rows at once, and --streaming has "
            "those of --shuffle_buffer_size: leave it out; --shuffle_buffer_size 1 keeps the order of the rows."
        )
    if args.accelerator_config.dispatch_batches or args.accelerator_config.split_batches:
        raise UserError(
            "--accelerator_config with dispatch_batches or split_batches cannot share the batches of --streaming, "
            "which differ in length: leave it out."
        )


def choose_count(given: Any) -> str:
    """
    Return the value that transformers has for what `--include_num_input_tokens_seen` was given.

    Raises:
        UserError: there is no such value.
    """
    name = str(given).lower()
    if name not in ("no", "all", "non_padding", *_COUNTS):
        raise UserError(f"--include_num_input_tokens_seen must be all, non_padding or no, found {given}.")
    return _COUNTS.get(name, name)


def _check_optimizer(args: Seq2SeqTrainingArguments) -> None:
    if args.optim in _AT_HAND:
        return
    from transformers import Trainer  # which imports what only training needs

    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"--optim {args.optim.value} cannot be used ({_one_line(error)}): install it, or give another."
        ) from error


def _check_schedule(args: Seq2SeqTrainingArguments) -> None:
    # Schedules say only when they are built what they need, so one is built for an optimizer of a single number.
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = (args.get_warmup_steps(_ANY_STEPS), _ANY_STEPS)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, *steps, dict(args.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} cannot be built ({_one_line(error)}): give what it "
            "needs as JSON in --lr_scheduler_kwargs, or another schedule."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
