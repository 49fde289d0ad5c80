"""Restore what the Trainer does not: the order of examples, losses not logged yet, patience, the best checkpoint."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import SCHEDULER_NAME
from transformers.trainer_utils import IntervalStrategy

from glm_peft.errors import UserError
from glm_peft.training.checkpoints import read_record, remove_unfinished
from glm_peft.training.parallel.backends import backend_name

logger = logging.getLogger(__name__)

POSITION_NAME = "training_position_{}.safetensors"
"""One for each process: the random state at the start of the epoch, and the losses that were not logged yet."""


class Resumption(TrainerCallback):
    """
    Save and restore the position of a training run.

    Args:
        trainer: its private losses are read and set, as it offers no other way.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.checkpoint: Path | None = None
        self.started_at: float | None = None
        self.is_over = False
        self._random_state: torch.Tensor | None = None
        self._epoch_random_state = torch.random.get_rng_state()

    def begin(self, checkpoint: str | None) -> None:
        """
        Prepare to resume from a checkpoint, before the trainer reads it.

        Raises:
            UserError: its optimizer was sharded by another backend or among another number of processes.
        """
        self.checkpoint = Path(checkpoint) if checkpoint else None
        record = read_record(checkpoint) if checkpoint else None
        # By which the checkpoints of a run know one another, and those of an earlier run in the same folder do not.
        self.started_at = record.get("started_at") if record else broadcast_object_list([time.time()])[0]
        processes = self.trainer.args.world_size
        if record:
            _check_backend(self.checkpoint, record, self.trainer.args)
        if record and record["processes"] != processes:
            logger.warning(
                "%s was written by %d process(es), and this run has %d: it goes on with the same weights, optimizer "
                "and schedule, and where a step has as many examples as before with the same ones, but with other "
                "random numbers, so not bit for bit.",
                *(checkpoint, record["processes"], processes),
            )

    def save(self, folder: str | Path) -> None:
        """Write the position of this process."""
        trainer = self.trainer
        # A Python float is saved as float64: rounded, a resumed run's mean loss would not be that of an unbroken one.
        position = {
            "epoch_random_state": self._epoch_random_state,
            "loss_since_log": trainer._tr_loss.detach(),
            "logged_loss": torch.tensor(trainer._total_loss_scalar, dtype=torch.float64),
            "logged_step": torch.tensor(trainer._globalstep_last_logged),
        }
        if trainer.preference:
            position["rewards_since_log"] = trainer.preference.sums[True]
        save_file(position, Path(folder) / POSITION_NAME.format(trainer.args.process_index))

    def is_of_run(self, checkpoint: Path) -> bool:
        """Return whether a checkpoint is there and was written by this run, before a resume or after it."""
        record = read_record(checkpoint)
        return record is not None and record.get("started_at") == self.started_at

    def was_over(self, max_steps: int) -> bool:
        """Restore what the state of the trainer refers to, and return whether training had come to its end."""
        if self.checkpoint:
            self._find_best()
        step, has_stopped = self.trainer.state.global_step, self._restore_patience()
        self.is_over = has_stopped or step >= max_steps
        if self.is_over and self.checkpoint:
            length = "--max_steps" if self.trainer.args.max_steps > 0 else "--num_train_epochs"
            how = "it had stopped early" if has_stopped else f"raise {length} to train on"
            logger.warning(f"All {step} steps of {self.checkpoint} are done, so none is taken now: {how}.")
        return self.is_over

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Restore losses and random state, and make up for an evaluation that the run was stopped before."""
        if args.should_save:
            remove_unfinished(args.output_dir)
        if self.trainer.record:
            self.trainer.record.begin(state.global_step)
        path = self.checkpoint and self.checkpoint / POSITION_NAME.format(args.process_index)
        if not path or not path.is_file():
            return
        position, trainer = load_file(path), self.trainer
        # Here and not earlier: the Trainer has set the losses to zero by now, and drawn no random number yet.
        trainer._tr_loss = position["loss_since_log"].to(trainer._tr_loss.device)
        trainer._total_loss_scalar = position["logged_loss"].item()
        trainer._globalstep_last_logged = int(position["logged_step"])
        if trainer.preference and "rewards_since_log" in position:
            trainer.preference.sums[True] += position["rewards_since_log"]
        trainer._load_rng_state(str(self.checkpoint))
        self._epoch_random_state = position["epoch_random_state"]
        # At the end of an epoch the next one draws its order from the state that was just loaded.
        self._random_state = None if float(state.epoch).is_integer() else self._epoch_random_state
        was_stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_evaluate", False)
        if was_stopped or _lacks_evaluation_of_epoch(args, state):
            control.should_evaluate, control.should_save = True, was_stopped
            now = time.time()
            trainer._maybe_log_save_evaluate(trainer._tr_loss, None, trainer.model, None, state.epoch, None, now)

    def on_epoch_begin(self, *args: object, **kwargs: object) -> None:
        """Set the random state to that from which the order of a resumed epoch was drawn; note it for checkpoints."""
        # The Trainer draws the order anew when it resumes in the middle of an epoch, and would skip other examples.
        if self._random_state is not None:
            torch.random.set_rng_state(self._random_state)
            self._random_state = None
        self._epoch_random_state = torch.random.get_rng_state()

    def _find_best(self) -> None:
        """Set the path of the best checkpoint, or forget it where it is gone."""
        state = self.trainer.state
        # Beside the checkpoint, not at the saved path: the folder may have been moved, or come from another machine.
        best = self.checkpoint.parent / f"checkpoint-{state.best_global_step}"
        if self.is_of_run(best):
            state.best_model_checkpoint = str(best)
        elif state.best_global_step and self.trainer.args.load_best_model_at_end:
            logger.warning("The best checkpoint so far, %s, is gone: the best from here on is taken.", best)
            state.best_global_step = state.best_metric = state.best_model_checkpoint = None

    def _restore_patience(self) -> bool:
        """Restore the patience of early stopping, and return whether the run had stopped early."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                # Where the earlier run had no such callback, the Trainer would not find its state when it saves.
                saved = self.trainer.state.stateful_callbacks.setdefault(type(callback).__name__, callback.state())
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
                return callback.early_stopping_patience_counter >= callback.early_stopping_patience
        return False


def _lacks_evaluation_of_epoch(args: TrainingArguments, state: TrainerState) -> bool:
    """Return whether the run was stopped between saving the last step of an epoch and the evaluation after it."""
    evaluated = {entry["step"] for entry in state.log_history if any(name.startswith("eval_") for name in entry)}
    # An epoch's last checkpoint by --save_steps is written before the evaluation that ends the epoch.
    is_due = args.eval_strategy == IntervalStrategy.EPOCH and args.eval_delay <= state.epoch
    return is_due and float(state.epoch).is_integer() and state.global_step not in evaluated


def check_learning_rate(checkpoint: Path, learning_rate: float) -> None:
    """Raise a `UserError` where the saved schedule has another learning rate, which the Trainer would go on with."""
    file = checkpoint / SCHEDULER_NAME
    saved = torch.load(file, weights_only=True).get("base_lrs") if file.is_file() else None
    if saved and learning_rate not in saved:
        raise UserError(
            f"--learning_rate {learning_rate:g} has no effect on {checkpoint}, whose optimizer goes on with "
            f"{saved[0]:g}: give that, or start anew from its adapter with --adapter_name_or_path {checkpoint}."
        )


def _check_backend(checkpoint: Path, record: dict[str, Any], training_args: TrainingArguments) -> None:
    """Refuse a sharded optimizer of DeepSpeed, which only the same stage with as many processes can read."""
    written = (record.get("engine", "one process"), record["processes"])
    own = (backend_name(training_args), training_args.world_size)
    if written != own and any(backend.startswith("zero") for backend, _ in (written, own)):
        raise UserError(
            f"{checkpoint} was written by {written[1]} process(es) under {written[0]}, and this run has {own[1]} "
            f"under {own[0]}, which cannot read its optimizer: resume as it was written, or start anew from its "
            f"adapter with --adapter_name_or_path {checkpoint}."
        )
