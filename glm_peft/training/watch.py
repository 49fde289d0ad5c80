"""Stop a training run at losses that are not finite, after signals, and early."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from glm_peft.adapters.trained_state import gather_trained
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import has_prefix
from glm_peft.training.checkpoint_writer import CheckpointWriter
from glm_peft.training.checkpoints import last_good_checkpoint
from glm_peft.training.interruptions import Interruption


class EarlyStopping(EarlyStoppingCallback):
    """Stop early by a metric that only one of several evaluations of a step has; stock warns at each of the others."""

    def on_evaluate(self, args: TrainingArguments, *more: object, metrics: dict[str, float], **kwargs: object) -> None:
        """Compare the metric with the best one, where it is among these."""
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, *more, metrics=metrics, **kwargs)


class Watch(TrainerCallback):
    """
    Stop training at a loss that is not finite, and ask for a checkpoint after a signal.

    The Trainer goes on after the former, showing 0.0 (`logging_nan_inf_filter`); the latter ends it without saving.
    """

    def __init__(self, trainer: Trainer, interruption: Interruption) -> None:
        self.trainer, self.interruption = trainer, interruption
        self._is_finite = torch.tensor(True, device=trainer.args.device)

    def note(self, loss: torch.Tensor) -> None:
        """Remember whether a loss [] is finite."""
        # On its device: reading it at once would wait for the GPU at every batch.
        self._is_finite &= torch.isfinite(loss).to(self._is_finite.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise a `UserError` where a loss of this step is not finite in any process."""
        # Before the optimizer takes a gradient of NaN, which would spoil the prefix and the moments for good.
        if not self._agree():
            self._stop("loss", state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Ask for a checkpoint after a signal."""
        control.should_save |= self.interruption.is_due

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Raise a `UserError` where a trained parameter is not finite."""
        # The last step can spoil what its own loss did not show.
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if not all(bool(value.isfinite().all()) for value in gather_trained(model).values()):
            self._stop("prefix" if has_prefix(model) else "result", state.global_step)

    def _agree(self) -> bool:
        """Return whether the losses of all processes were finite, and let all know of a signal that came to one."""
        if self.trainer.args.world_size == 1:
            return bool(self._is_finite)
        signal_number = torch.tensor(self.interruption.signal_number, device=self._is_finite.device)
        # Both in one collective, as it is made at every step.
        facts = torch.stack([self._is_finite.to(signal_number), signal_number])
        are_finite, signal_numbers = self.trainer.accelerator.gather(facts[None]).T.tolist()
        self.interruption.agree(max(signal_numbers))
        return all(are_finite)

    def _stop(self, what: str, step: int) -> None:
        kept = last_good_checkpoint(self.trainer.args.output_dir)
        raise UserError(
            f"The {what} is not finite at step {step} (learning rate {self.trainer._get_learning_rate():.3g}, base in "
            f"{self.trainer.model.dtype}): most likely the learning rate is too high, or float16 overflows; lower "
            f"--learning_rate, or use --dtype bfloat16 or float32; {kept}."
        )


class EndAfterSignal(TrainerCallback):
    """End the run after a signal, once its checkpoint is written."""

    def __init__(self, trainer: Trainer, interruption: Interruption, checkpoints: CheckpointWriter) -> None:
        self.trainer, self.interruption, self.checkpoints = trainer, interruption, checkpoints

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Leave, where this is the checkpoint that the signal asked for."""
        if not self.interruption.is_due or self.checkpoints.saved_step != state.global_step:
            return
        trainer = self.trainer
        # What the Trainer does at the end, such as drawing the curves, as the exit skips it.
        trainer.callback_handler.on_train_end(args, state, control)
        PartialState().destroy_process_group()
        if trainer.is_world_process_zero():
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            print(
                f"stopped by {self.interruption.name} at step {state.global_step}; the same command with "
                f"--resume_from_checkpoint last goes on from {checkpoint}",
                file=sys.stderr,
            )
        sys.exit(self.interruption.exit_code)
