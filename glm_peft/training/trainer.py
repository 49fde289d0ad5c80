"""
The stock `Seq2SeqTrainer`, but for what stock cannot do with a prefix.

- Scores: stock generation on decoder-only models scores the prompt with the answer and needs labels beside prompts.
- Checkpoints: of a projected prefix PEFT saves only the result, from which training cannot go on. Stock writes them
  in place, where a kill leaves a part, and keeps neither the order of the examples nor the losses not logged yet.
- A loss that is not finite: stock goes on and shows 0.0.
- Ctrl-C and SIGTERM: stock loses what it has.
"""

import logging
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from glm_peft.adapters.sharding import cut_optimizer, gather_optimizer
from glm_peft.adapters.trained_state import (
    gather_trained,
    load_trained_state,
    save_trained_state,
    save_weights,
    tidy_weights,
)
from glm_peft.arguments.splits import VALIDATION, split_of
from glm_peft.errors import UserError
from glm_peft.models.unwrapping import has_prefix
from glm_peft.training.checkpoints import (
    UNFINISHED,
    explain_failed_writing,
    last_good_checkpoint,
    publish_checkpoint,
    rotate_checkpoints,
)
from glm_peft.training.interruptions import Interruption, StoppedAtOnce
from glm_peft.training.parallel.engines import engine_name, zero_stage
from glm_peft.training.parallel.shared_steps import SharedStepsTrainer
from glm_peft.training.parallel.sharing import own_labels, own_rows
from glm_peft.training.parallel.zero_placement import cut_before_moving
from glm_peft.training.resumption import Resumption

Scorer = Callable[[], dict[str, float]]

logger = logging.getLogger(__name__)


class PrefixTrainer(SharedStepsTrainer):
    """
    Trains a prefix.

    Args:
        score_answers: generates answers and returns their scores, by name; they join the loss in every evaluation.
            One for each split, such as `validation_easy`, where there are several.
    """

    def __init__(self, *args: Any, score_answers: Scorer | Mapping[str, Scorer] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_answers = score_answers if isinstance(score_answers, Mapping) else {VALIDATION: score_answers}
        self.label_smoother = None  # label_loss smooths; stock would not shift the labels of a model with a prefix
        self.is_finite = torch.tensor(True, device=self.args.device)
        self.interruption = Interruption(self.args.world_size > 1, self.is_world_process_zero())
        self.resumption = Resumption(self)
        self._run_dir: Path | None = None
        self._saved_step = -1
        if self.args.early_stopping_patience:
            args = self.args
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
        self.add_callback(_Watch(self))
        self.add_callback(self.resumption)

    def create_accelerator_and_postprocess(self) -> None:
        """As stock; no GPU has to hold the whole base, not even at first."""
        super().create_accelerator_and_postprocess()
        if zero_stage(self.args) == 3:
            cut_before_moving(self.accelerator)

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> TrainOutput:
        """
        As stock, but Ctrl-C and SIGTERM end it after the step, with a checkpoint.

        Raises:
            SystemExit: with 130 or 143, after such a signal.
        """
        self.resumption.begin(resume_from_checkpoint)
        with self.interruption:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As stock; remembers on the device, without waiting for it, whether every loss was finite."""
        loss = super().training_step(*args, **kwargs)
        self.is_finite &= torch.isfinite(loss).to(self.is_finite.device)
        return loss

    def every_loss_is_finite(self) -> bool:
        """Whether the losses of all processes were finite so far; tells them of a signal that came to one, too."""
        if self.args.world_size == 1:
            return bool(self.is_finite)
        signal_number = torch.tensor(self.interruption.signal_number, device=self.is_finite.device)
        facts = self.accelerator.gather(torch.stack([self.is_finite.to(signal_number), signal_number])[None])
        are_finite, signal_numbers = facts.T.tolist()
        self.interruption.agree(max(signal_numbers))
        return all(are_finite)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As stock; the mean loss is that of the whole training, also where a part of it was before a stop."""
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 1)
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As stock, for the loss; then the scores of generated answers, so that callbacks see both."""
        self.gather_function = self.accelerator.gather_for_metrics  # Seq2SeqTrainer counts rows that fill a batch up
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with self.interruption.stops_at_once() if self.is_in_train else nullcontext(), torch.random.fork_rng(devices):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            score_answers = self.score_answers.get(split_of(metric_key_prefix))
            scores = score_answers() if score_answers else {}
        output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def evaluation_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """As stock; but it does not depend on how many processes share the batches."""
        with own_labels(self.args):
            return super().evaluation_loss(model, own_rows(inputs))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """What was trained, whole under every engine; stock gathers the base too, and fails with a prefix in parts."""
        trained = gather_trained(self._own_model)
        if self.args.should_save:
            folder = output_dir or self.args.output_dir
            save_weights(self._own_model, trained, partial(self._save, folder))
            save_trained_state(self._own_model, trained, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As stock; under FSDP the files of one process, which any number of them can go on from."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        optimizer = gather_optimizer(self.optimizer.state_dict())
        if self.args.should_save:
            torch.save(optimizer, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        files = [Path(checkpoint) / name for name in (OPTIMIZER_NAME, SCHEDULER_NAME)]
        optimizer, schedule = [torch.load(file, map_location="cpu", weights_only=True) for file in files]
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        self.optimizer.load_state_dict(cut_optimizer(optimizer, parameters))
        self.lr_scheduler.load_state_dict(schedule)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """As stock, but it is there as a whole or not at all: written apart, and moved to its place at the end."""
        output_dir, step = Path(self.args.output_dir), self.state.global_step
        with explain_failed_writing(f"The checkpoint of step {step}", output_dir):
            self._run_dir = output_dir / UNFINISHED
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = None
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if self.state.best_global_step == step or best.is_dir():
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                folder = output_dir / UNFINISHED / f"checkpoint-{step}"
                self.state.save_to_json(folder / TRAINER_STATE_NAME)  # again, with the place of the best
                tidy_weights(folder)
                resumable, engine = not self.args.save_only_model, engine_name(self.args)
                publish_checkpoint(folder, self.args.world_size, resumable, engine)
                rotate_checkpoints(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self._saved_step = step

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir or super()._get_output_dir(trial))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.resumption.save(output_dir)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, num_train_epochs: int, *args: Any
    ) -> tuple[int, int]:
        """As stock; but where training was over, there are no epochs left: stock would take one more step."""
        start = super()._init_training_state(max_steps, steps_per_epoch, num_train_epochs, *args)
        return (num_train_epochs, 0) if self.resumption.was_over(max_steps) else start

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As stock; nothing, where the evaluation that a resumed run began with stops it early."""
        return ([], None) if self.control.should_training_stop else super().get_batch_samples(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: torch.nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        except StoppedAtOnce:
            self._save_checkpoint(model, trial)
            self.callback_handler.on_save(self.args, self.state, self.control)
        if self.interruption.is_due and self._saved_step == self.state.global_step:
            self._leave()

    def _leave(self) -> None:
        """Ends the run after a signal, its checkpoint being there."""
        self.callback_handler.on_train_end(self.args, self.state, self.control)
        PartialState().destroy_process_group()
        if self.is_world_process_zero():
            checkpoint = Path(self.args.output_dir) / f"checkpoint-{self._saved_step}"
            print(
                f"stopped by {self.interruption.name} at step {self._saved_step}; the same command with "
                f"--resume_from_checkpoint last goes on from {checkpoint}",
                file=sys.stderr,
            )
        sys.exit(self.interruption.exit_code)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        wanted = self.args.metric_for_best_model
        names = [name.removeprefix("eval_") for name in metrics]
        if wanted and wanted.removeprefix("eval_") not in names:
            raise UserError(
                f"--metric_for_best_model {wanted} is no score of this evaluation: give one of {', '.join(names)}."
            )
        return super()._determine_best_metric(metrics, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_trained_state(self._own_model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_trained_state(self._own_model, self.state.best_model_checkpoint)

    @property
    def _own_model(self) -> torch.nn.Module:
        return self.accelerator.unwrap_model(self.model)


class _Watch(TrainerCallback):
    """
    Looks for losses that are not finite, and for signals.

    The former before each step of the optimizer, so that the prefix takes no spoilt gradient, and at the end.
    """

    def __init__(self, trainer: PrefixTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.every_loss_is_finite():
            self._stop("loss", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.trainer.interruption.is_due

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = self.trainer._own_model
        if not _is_finite(gather_trained(model)):
            self._stop("prefix" if has_prefix(model) else "result", state.global_step)

    def _stop(self, what: str, step: int) -> None:
        kept = last_good_checkpoint(self.trainer.args.output_dir)
        raise UserError(
            f"The {what} is not finite at step {step} (learning rate {self.trainer._get_learning_rate():.3g}, base in "
            f"{self.trainer.model.dtype}): most likely the learning rate is too high, or float16 overflows; lower "
            f"--learning_rate, or use --dtype bfloat16 or float32; {kept}."
        )


def _is_finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())
