"""
The stock `Seq2SeqTrainer`, but for what stock cannot do with a prefix.

- Scores: stock generation on decoder-only models scores the prompt with the answer and needs labels beside prompts.
- Checkpoints: of a projected prefix PEFT saves only the result, from which training cannot go on.
- A loss that is not finite: stock goes on and shows 0.0.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Seq2SeqTrainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from glm_peft.errors import UserError

ENCODER_NAME = "prefix_encoder.safetensors"


class PrefixTrainer(Seq2SeqTrainer):
    """
    Trains a prefix.

    Args:
        score_answers: generates answers and returns their scores, by name; they join the loss in every evaluation.
    """

    def __init__(self, *args: Any, score_answers: Callable[[], dict[str, float]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.score_answers = score_answers
        self.is_finite = torch.tensor(True, device=self.args.device)
        self.add_callback(_StopAtNonFiniteLoss(self))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As stock; remembers on the device, without waiting for it, whether every loss was finite."""
        loss = super().training_step(*args, **kwargs)
        self.is_finite &= torch.isfinite(loss)
        return loss

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
        file = Path(checkpoint) / ENCODER_NAME
        if not file.exists():
            raise UserError(
                f"{checkpoint} has no {ENCODER_NAME}, so it is no complete checkpoint of glm_peft: give another one, "
                "or start from its adapter with --adapter_name_or_path."
            )
        self._prefix_encoder.load_state_dict(load_file(file, device=str(self.args.device)))

    @property
    def _prefix_encoder(self) -> torch.nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        return model.prompt_encoder[model.active_adapter]


class _StopAtNonFiniteLoss(TrainerCallback):
    """Looks before the optimizer steps: neither the prefix nor a checkpoint ever takes a spoiled gradient."""

    def __init__(self, trainer: PrefixTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if bool(self.trainer.is_finite):
            return
        checkpoint = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint had been written yet"
        rate = self.trainer._get_learning_rate()
        raise UserError(
            f"The loss is not finite at step {state.global_step + 1} (learning rate {rate:.3g}, base in "
            f"{self.trainer.model.dtype}): most likely the learning rate is too high, or float16 overflows; lower "
            f"--learning_rate, or use --dtype bfloat16 or float32; {kept}."
        )
