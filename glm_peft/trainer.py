"""
The stock `Seq2SeqTrainer`, but for what stock cannot do with a prefix.

- Scores: stock generation on decoder-only models scores the prompt with the answer and needs labels beside prompts.
- Checkpoints: of a projected prefix PEFT saves only the result, from which training cannot go on.
- A loss that is not finite: stock goes on and shows 0.0.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from glm_peft.errors import UserError

logger = logging.getLogger(__name__)

ENCODER_NAME = "prefix_encoder.safetensors"


def choose_checkpoint(resume_from_checkpoint: str | None, output_dir: str | Path) -> str | None:
    """
    The checkpoint folder to go on from, or `None` for a fresh start.

    Args:
        resume_from_checkpoint: a folder; or `last` (or `true`), the newest complete one in `output_dir`, if any.

    Raises:
        UserError: there is no such folder, or it is not complete.
    """
    if resume_from_checkpoint is None or resume_from_checkpoint.lower() == "false":
        return None
    if resume_from_checkpoint.lower() not in ("last", "true"):
        _check_checkpoint(resume_from_checkpoint)
        return resume_from_checkpoint
    found = _complete_checkpoints(output_dir)
    logger.info("Going on from %s", found[-1] if found else f"the beginning: no checkpoint is in {output_dir}")
    return str(found[-1]) if found else None


class PrefixTrainer(Seq2SeqTrainer):
    """
    Trains a prefix.

    Args:
        score_answers: generates answers and returns their scores, by name; they join the loss in every evaluation.
    """

    def __init__(self, *args: Any, score_answers: Callable[[], dict[str, float]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_answers = score_answers
        self.label_smoother = None  # label_loss smooths; stock would not shift the labels of a model with a prefix
        self.is_finite = torch.tensor(True, device=self.args.device)
        self.add_callback(_StopAtNonFiniteLoss(self))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As stock; remembers on the device, without waiting for it, whether every loss was finite."""
        loss = super().training_step(*args, **kwargs)
        self.is_finite &= torch.isfinite(loss).to(self.is_finite.device)
        return loss

    def every_loss_is_finite(self) -> bool:
        """Whether the losses of all processes were finite so far."""
        return bool(self.accelerator.gather(self.is_finite[None]).all())

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As stock, for the loss; then the scores of generated answers, so that callbacks see both."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        scores = self.score_answers() if self.score_answers else {}
        output.metrics.update({f"{metric_key_prefix}_{name}": score for name, score in scores.items()})
        return output

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        encoder = {name: value.contiguous() for name, value in self._prefix_encoder.state_dict().items()}
        save_file(encoder, Path(output_dir or self.args.output_dir) / ENCODER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self._load_encoder(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_encoder(self.state.best_model_checkpoint)

    def _load_encoder(self, checkpoint: str) -> None:
        saved = load_file(Path(checkpoint) / ENCODER_NAME, device=str(self.args.device))
        own = self._prefix_encoder.state_dict()
        if _shapes(saved) != _shapes(own):
            raise UserError(
                f"The prefix in {checkpoint} has the sizes {_shapes(saved)}, but this run's has {_shapes(own)}: "
                "resume with the base, --num_virtual_tokens and --prefix_projection of the run that wrote it."
            )
        self._prefix_encoder.load_state_dict(saved)

    @property
    def _prefix_encoder(self) -> torch.nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.prompt_encoder[model.active_adapter]


class _StopAtNonFiniteLoss(TrainerCallback):
    """Looks before each step of the optimizer, so that the prefix takes no spoilt gradient, and at the end."""

    def __init__(self, trainer: PrefixTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.trainer.every_loss_is_finite():
            self._stop("loss", state.global_step + 1)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not _is_finite(self.trainer._prefix_encoder.state_dict()):
            self._stop("prefix", state.global_step)

    def _stop(self, what: str, step: int) -> None:
        checkpoint = _last_good_checkpoint(self.trainer.args.output_dir)
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no good checkpoint yet"
        raise UserError(
            f"The {what} is not finite at step {step} (learning rate {self.trainer._get_learning_rate():.3g}, base in "
            f"{self.trainer.model.dtype}): most likely the learning rate is too high, or float16 overflows; lower "
            f"--learning_rate, or use --dtype bfloat16 or float32; {kept}."
        )


def _last_good_checkpoint(output_dir: str | Path) -> Path | None:
    newest_first = reversed(_complete_checkpoints(output_dir))
    return next((folder for folder in newest_first if _is_finite(load_file(folder / ENCODER_NAME))), None)


def _complete_checkpoints(output_dir: str | Path) -> list[Path]:
    """Oldest first."""
    return sorted(filter(_is_complete, Path(output_dir).glob("checkpoint-*")), key=_step)


def _is_finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def _check_checkpoint(folder: str) -> None:
    if not _is_complete(Path(folder)):
        found = f"has no {ENCODER_NAME} or no {TRAINER_STATE_NAME}" if Path(folder).is_dir() else "is no folder"
        raise UserError(
            f"--resume_from_checkpoint {folder} {found}, so it is no complete checkpoint: give another one, or last, "
            "or start from an adapter with --adapter_name_or_path."
        )


def _is_complete(folder: Path) -> bool:
    # The state is what is written last.
    return all((folder / name).is_file() for name in (ENCODER_NAME, TRAINER_STATE_NAME))


def _step(folder: Path) -> int:
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}
