"""Settings of transformers' trainer that cannot work, or not here, refused before anything is loaded."""

from typing import Any

import torch
from transformers import Seq2SeqTrainingArguments, Trainer, get_scheduler

from glm_peft.arguments.command_line import warn
from glm_peft.errors import UserError

_AT_HAND = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
_COUNTS = {"true": "all", "false": "no"}
_ANY_STEPS = 1000  # a schedule is made for as many, to see whether it has all that it needs


def settle_stock_settings(args: Seq2SeqTrainingArguments) -> None:
    """
    Refuse what would fail after the base is loaded, or have no effect; leave out what is done in any case.

    Args:
        args: the training arguments, which are changed.

    Raises:
        UserError: an optimizer lacks its package, a schedule its numbers, a setting the one that it belongs to, or
            the device or this toolkit cannot do what is asked for.
    """
    _check_optimizer(args)
    _check_schedule(args)
    if args.fp16 and args.device.type == "cpu":
        raise UserError("--fp16 has no effect on a CPU: leave it out, or give --bf16.")
    if args.use_liger_kernel:
        raise UserError(
            "--use_liger_kernel would take the place of the loss in chunks, which saves the same memory: leave it out."
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise UserError("--dataloader_persistent_workers needs workers: give --dataloader_num_workers too.")
    if args.save_strategy == "best" and not args.metric_for_best_model:
        raise UserError("--save_strategy best needs to know by what: give --metric_for_best_model loss, or a score.")
    if args.enable_jit_checkpoint:
        warn("--enable_jit_checkpoint is left out: on SIGTERM a checkpoint is written in any case.")
        args.enable_jit_checkpoint = False


def choose_count(given: Any) -> str:
    """
    A value of `--include_num_input_tokens_seen`, which stock's command line takes for yes or no only.

    Raises:
        UserError: it is none.
    """
    name = str(given).lower()
    if name not in ("no", "all", "non_padding", *_COUNTS):
        raise UserError(f"--include_num_input_tokens_seen must be all, non_padding or no, found {given}.")
    return _COUNTS.get(name, name)


def _check_optimizer(args: Seq2SeqTrainingArguments) -> None:
    if args.optim in _AT_HAND:
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"--optim {args.optim.value} cannot be used ({_one_line(error)}): install it, or give another."
        ) from error


def _check_schedule(args: Seq2SeqTrainingArguments) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    steps = (args.get_warmup_steps(_ANY_STEPS), _ANY_STEPS)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, *steps, dict(args.lr_scheduler_kwargs or {}))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--lr_scheduler_type {args.lr_scheduler_type.value} cannot work so ({_one_line(error)}): give what it "
            "needs as JSON in --lr_scheduler_kwargs, or another schedule."
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")
