"""
Run one trial of a search: a training run as `glm_peft/train.py` makes it, on a base and rows that all trials share.

With the same settings both give the same losses, bit for bit on a CPU.
"""

import copy
import logging
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, TrainerCallback, TrainerState

from glm_peft.adapters.assembly import check_trainable, open_base, put_trainable_adapter_on
from glm_peft.adapters.saved_adapter import resolve_adapter, resolve_prompt
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with
from glm_peft.arguments.methods import FULL
from glm_peft.arguments.search import Settings, as_command_line
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.arguments.training import TrainArguments, parse_train_arguments
from glm_peft.data import EncodedSplits, encode_splits
from glm_peft.errors import UserError
from glm_peft.prediction.evaluation import Answering, Scoring
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.training.trainer import PrefixTrainer

logger = logging.getLogger(__name__)

_SHARED_STATES = ("state", "quant_state")  # of bitsandbytes' layers: tensors outside parameters and buffers


def parse_trial(settings: Settings, output_dir: str | Path, keep_checkpoints: bool = False) -> TrainArguments:
    """
    Parse the arguments of a trial, which trains and evaluates, and keeps no checkpoints if not asked.

    Raises:
        UserError: training would refuse the settings.
    """
    own = {"output_dir": [str(output_dir)], "disable_tqdm": ["true"], "do_train": ["true"], "do_eval": ["true"]}
    # A trial that was stopped is done again as a new one, from its first step.
    own |= {"do_predict": ["false"], "resume_from_checkpoint": ["false"]}
    if not keep_checkpoints:
        # The best model is loaded from a checkpoint: the trainer needs one until the trial's end.
        needs_best = settings.get("load_best_model_at_end", ["false"])[-1].lower() in ("true", "1", "yes")
        own |= {"save_total_limit": ["1"]} if needs_best else {"save_strategy": ["no"]}
    return parse_train_arguments(as_command_line(settings | own))


def resolve_trial(arguments: TrainArguments, config: PreTrainedConfig) -> TrainArguments:
    """
    Return the arguments with everything resolved that depends on the method or on a given adapter.

    Args:
        config: of the base.

    Raises:
        UserError: training would refuse them for this base.
    """
    model_args, adapter = resolve_adapter(arguments.model, is_trainable=True)
    check_trainable(model_args, config)
    return arguments.resolve(model_args, resolve_prompt(arguments.data, adapter))


class Workbench:
    """
    The base, the tokenizer and the rows that all trials share, loaded once.

    Args:
        arguments: the arguments of training before a trial changes any.
    """

    def __init__(self, arguments: TrainArguments) -> None:
        self.base = open_base(arguments.model, arguments.data, is_trainable=True)
        self.splits = load_splits(arguments.data, ["train", "validation"])
        self.model = self.base.load_model(arguments.training.device)
        self._encoded: tuple[tuple[Any, ...], EncodedSplits | None] = ((), None)

    def encode(self, data_args: DataArguments, with_prompts: bool) -> EncodedSplits:
        """Return the encoded splits: those of the trial before, where no argument of the encoding has changed."""
        key = (with_prompts, *(getattr(data_args, name) for name in flags_with(data_args, "encodes")))
        if self._encoded[0] != key:
            base = self.base
            encoded = encode_splits(self.splits, base.chat_format, base.tokenizer, data_args, with_prompts)
            self._encoded = (key, encoded)
        return self._encoded[1]

    def make_trainer(self, arguments: TrainArguments) -> PrefixTrainer:
        """
        Build a trainer with a fresh adapter.

        Args:
            arguments: of this trial, resolved.
        """
        _, data_args, training_args = arguments
        data = self.encode(data_args, training_args.predict_with_generate)
        collator = TrainingCollator(self.base.tokenizer, data_args.ignore_pad_token_for_loss)
        batching = plan_batching(data.examples["train"], collator, self.base.config, arguments)
        answering = Answering(self.make_model(arguments), self.base.tokenizer, self.base.chat_format)
        scoring = Scoring.from_arguments(answering, training_args, data_args)
        trainer = PrefixTrainer(
            answering.model,
            training_args,
            data_collator=collator,
            batching=batching,
            eval_dataset=evaluation_sets(data.examples),
            score_answers=scoring.make_scorers(data.prompts),
            joins_sets=data_args.validation_split is not None,
        )
        # Which the Trainer adds in the place of the bar that is switched off, and which prints every log.
        trainer.remove_callback(PrinterCallback)
        return trainer

    def make_model(self, arguments: TrainArguments) -> nn.Module:
        """Put a fresh adapter on a copy of the base, which shares its weights unless these are trained themselves."""
        # At the same point as in `glm_peft/train.py`: the adapter's first values are drawn next.
        transformers.set_seed(arguments.training.seed)
        is_full = arguments.model.peft_type == FULL
        model = copy.deepcopy(self.model) if is_full else share_weights(self.model)
        return put_trainable_adapter_on(model, replace(self.base, model_args=arguments.model), arguments.training)


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of the base that shares its tensors, but not the hooks and adapters that the copy gets."""
    # A base cannot be given back as it was: PEFT replaces layers of it, and attention and loss are attached to it.
    shared = [*base.parameters(), *base.buffers()]
    shared += [state for module in base.modules() for name in _SHARED_STATES if (state := vars(module).get(name))]
    # What is in its memo counts as copied already.
    return copy.deepcopy(base, {id(value): value for value in shared})


class EvaluationReport(TrainerCallback):
    """
    Report each evaluation of a trial to Optuna, and end the trial where Optuna finds it behind the others.

    Args:
        trial: Optuna's.
        metric: by which trials are compared, such as `loss`.
        number_of_sets: number of validation sets.
    """

    def __init__(self, trial: optuna.Trial, metric: str, number_of_sets: int) -> None:
        self.trial, self.metric, self.number_of_sets = trial, metric, number_of_sets
        self.step, self.metrics = -1, {}

    def on_evaluate(
        self, args: Any, state: TrainerState, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        """
        Report the metrics to Optuna, once all validation sets are evaluated at this step.

        Raises:
            optuna.TrialPruned: the trial is behind.
        """
        # The Trainer calls this once for each validation set, and Optuna keeps only the first report of a step.
        self.metrics = metrics if state.global_step != self.step else self.metrics | metrics
        self.step = state.global_step
        if sum(name.endswith("_loss") for name in self.metrics) >= self.number_of_sets:
            value = compute_objective(self.metrics, self.metric)
            logger.info(
                "Trial %d, step %d of %d: eval_%s %.4f",
                self.trial.number,
                self.step,
                state.max_steps,
                self.metric,
                value,
            )
            self.trial.report(value, self.step)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def run_trial(workbench: Workbench, arguments: TrainArguments, trial: optuna.Trial, metric: str) -> dict[str, float]:
    """
    Train and evaluate as `glm_peft/train.py` does.

    Args:
        arguments: of this trial, resolved.
        trial: Optuna's, to which evaluations on the way are reported.
        metric: that is reported.

    Returns:
        The metrics of what was trained.

    Raises:
        UserError: the settings do not go together, or the loss is not finite.
        optuna.TrialPruned: it is behind the others.
    """
    trainer = workbench.make_trainer(arguments)
    trainer.interruption.signals = ()  # a trial that was stopped is done again, and needs no checkpoint
    sets = len(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else 1
    report = EvaluationReport(trial, metric, sets)
    trainer.add_callback(report)
    trainer.train()
    trainer.remove_callback(report)  # a trial that came to its end is not ended early any more
    # Where the last step was evaluated, once more would give the same; not where the best model was loaded since.
    is_known = report.step == trainer.state.global_step and not trainer.args.load_best_model_at_end
    return report.metrics if is_known else trainer.evaluate()


def compute_objective(metrics: dict[str, float], metric: str) -> float:
    """
    Return the result that trials are compared by; the mean where there are several validation sets.

    Raises:
        UserError: it is not finite.
    """
    of_sets = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith(f"_{metric}")]
    value = metrics.get(f"eval_{metric}", fmean(of_sets) if of_sets else math.nan)
    if not math.isfinite(value):
        raise UserError(f"eval_{metric} is not finite ({value}): most likely the learning rate is too high.")
    return value
