"""Log what is kept of the base before the first step and after the last, and what holding on to it costs."""

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_peft.arguments.training import TrainArguments
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.batching import Batching
from glm_peft.training.keeping import KEEP_FOLDER, Keeping, hear_base

KEPT_TITLES = {
    "keep_divergence": "divergence from the base on its own answers, nats per token",
    "keep_same_answers": "share of greedy answers that are the base's",
    "keep_loss_rise": "rise of the loss on the base's answers, nats per token",
}
"""What the measures are, by their names; in results `start_…` is of the adapter before its first step."""

logger = logging.getLogger(__name__)


class KeptLog(TrainerCallback):
    """
    Measure what is kept of the base at step 0 and, where no evaluation follows, at the end.

    Args:
        trainer: whose log they go into, so that curves and trackers have them.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: TrainerControl, **kwargs: Any) -> None:
        """Log the adapter as it starts, which may already be far from the base."""
        if state.global_step == 0 and not args.eval_on_start:
            self.trainer.log(self.trainer.measure_kept())

    def on_train_end(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        """Log the adapter that is saved."""
        if not args.do_eval:
            self.trainer.log(self.trainer.measure_kept())


def kept_results(log_history: list[dict[str, float]]) -> dict[str, float]:
    """Return the measures at the start of training and the last ones, as far as they were logged."""
    found = {}
    for entry in log_history:
        for name in KEPT_TITLES:
            if f"eval_{name}" in entry:
                found |= {f"start_{name}": entry[f"eval_{name}"]} if entry["step"] == 0 else {}
                found[f"eval_{name}"] = entry[f"eval_{name}"]
    return found


def begin_keeping(
    prompts: list[list[int]],
    answering: Answering,
    output_dir: Path,
    arguments: TrainArguments,
    batching: Batching | None,
) -> Keeping | None:
    """Let the base answer general prompts, and log what is measured by them; `None` where there are none."""
    if not prompts:
        return None
    model_args, _, training_args = arguments
    described, rows = {"quantization_bit": model_args.quantization_bit}, training_args.per_device_eval_batch_size
    keeping = hear_base(prompts, answering, output_dir / KEEP_FOLDER, rows, described)
    _log_keeping(keeping, training_args, batching)
    return keeping


def _log_keeping(keeping: Keeping, args: TrainingArguments, batching: Batching | None) -> None:
    """Log how many prompts are measured, and the share of the second loss in the tokens of training."""
    measured = (len(keeping.prompts) + 1) // 2
    logger.info("Kept: %d prompts of --keep_file %s are measured", measured, args.keep_file)
    if not args.keep_weight or not batching:
        return
    rows, examples = args.train_batch_size, batching.examples
    packed = "length" not in examples.column_names
    lengths = list(map(len, examples["input_ids"])) if packed else examples["length"][:]
    own = rows * args.gradient_accumulation_steps * sum(lengths) / len(lengths)
    kept = rows * keeping.mean_length() / args.keep_every
    logger.info(
        "Kept: the divergence from the base on %d others is a second loss, of weight %g: %d of them every %d steps, "
        "%.0f %% of the tokens that training reads",
        *(len(keeping.prompts) - measured, args.keep_weight, rows, args.keep_every, 100 * kept / (own + kept)),
    )
