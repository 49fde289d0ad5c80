"""
One trial of a search: a training run as `glm_peft/train.py` makes it, on a base and rows that all trials share.

With the same settings both give the same losses, bit for bit on a CPU.
"""

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import transformers
from accelerate.utils.memory import release_memory, should_reduce_batch_size
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PrinterCallback, Seq2SeqTrainer, TrainerCallback
from transformers.trainer_utils import HPSearchBackend, TrainOutput

from glm_peft.adapters.attention_check import check_attention
from glm_peft.adapters.base_checks import check_tokenizer
from glm_peft.adapters.compilation import compile_layers
from glm_peft.adapters.loading import create_adapter, settle_adapter
from glm_peft.adapters.other_methods import attach_loss
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.adapters.prefix_initialization import initialize_prefix
from glm_peft.arguments.methods import FULL, PREFIX_TUNING, settle_method
from glm_peft.arguments.search import Settings, as_command_line
from glm_peft.arguments.splits import evaluation_sets
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import check_pair, load_base_model, load_tokenizer
from glm_peft.models.unwrapping import base_of, has_prefix
from glm_peft.prediction.evaluation import choose_protocol, make_scorers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import load_splits
from glm_peft.provenance.recipe import select_scores
from glm_peft.training.trainer import PrefixTrainer

Arguments = tuple[Any, Any, Any]
"""Those of the model, of the data and of training."""
Objective = Callable[[dict[str, float]], float]

_ENCODED_BY = ("source_prefix", "max_source_length", "max_target_length", "val_max_target_length", "train_on")
_SHARED_STATES = ("state", "quant_state")  # of bitsandbytes' layers: numbers outside parameters and buffers


def parse_trial(settings: Settings, output_dir: str | Path, keep_checkpoints: bool = False) -> Arguments:
    """
    The arguments of a trial, which trains and evaluates, and keeps no checkpoints if not asked.

    Raises:
        UserError: training would refuse the settings.
    """
    own = {"output_dir": [str(output_dir)], "disable_tqdm": ["true"], "do_train": ["true"], "do_eval": ["true"]}
    own |= {"do_predict": ["false"], "resume_from_checkpoint": ["false"]}
    if not keep_checkpoints:
        needs_best = settings.get("load_best_model_at_end", ["false"])[-1].lower() in ("true", "1", "yes")
        own |= {"save_total_limit": ["1"]} if needs_best else {"save_strategy": ["no"]}
    return parse_train_arguments(as_command_line(settings | own))


def settle_trial(arguments: Arguments, config: PreTrainedConfig) -> Arguments:
    """
    The same arguments with everything settled that a method or an adapter decides.

    Args:
        config: of the base.

    Raises:
        UserError: training would refuse them for this base.
    """
    model_args, data_args, training_args = arguments
    settle_adapter(model_args, is_trainable=True)
    settle_method(model_args, data_args, training_args, config.model_type)
    if model_args.peft_type == PREFIX_TUNING:
        check_attention(config, model_args.attn_implementation)
    return arguments


class Workbench:
    """
    What all trials share: the base, which is loaded once, the tokenizer and the rows.

    Args:
        arguments: of the model, the data and training, as they are without what is searched.
        config: of the base.
    """

    def __init__(self, arguments: Arguments, config: PreTrainedConfig) -> None:
        model_args, data_args, training_args = arguments
        self.tokenizer, self.config = load_tokenizer(model_args), config
        check_pair(self.tokenizer, self.config)
        check_tokenizer(model_args.adapter_name_or_path, self.tokenizer)
        self.chat_format = get_chat_format(self.tokenizer, model_args.chat_format)
        self.splits = load_splits(data_args, ["train", "validation"])
        self.base = load_base_model(model_args, training_args.device)
        self._encoded: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})

    def encode(self, data_args: Any, with_prompts: bool) -> dict[str, Any]:
        """
        The examples of each split, and `prompts` by split where wanted; those of the trial before where equal.
        """
        key = (with_prompts, *(getattr(data_args, name) for name in _ENCODED_BY))
        if self._encoded[0] != key:
            encode = (self.chat_format, self.tokenizer, data_args)
            features = {name: build_training_features(split, *encode)[0] for name, split in self.splits.items()}
            asked = [name for name in self.splits if with_prompts and name != "train"]
            features["prompts"] = {name: build_generation_features(self.splits[name], *encode) for name in asked}
            self._encoded = (key, features)
        return self._encoded[1]

    def make_trainer(self, arguments: Arguments) -> "TrialTrainer":
        """
        A trainer with a fresh adapter.

        Args:
            arguments: of this trial, settled.
        """
        model_args, data_args, training_args = arguments
        features = self.encode(data_args, training_args.predict_with_generate)
        collator = TrainingCollator(self.tokenizer, data_args.ignore_pad_token_for_loss)
        batching = plan_batching(features["train"], collator, self.config, arguments)
        model = self.make_model(arguments)
        trainer = TrialTrainer(
            model,
            training_args,
            data_collator=collator,
            batching=batching,
            eval_dataset=evaluation_sets(features),
            score_answers=self.make_scorers(model, features["prompts"], data_args, training_args),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def make_model(self, arguments: Arguments) -> nn.Module:
        """A fresh adapter on the base."""
        model_args, _, training_args = arguments
        transformers.set_seed(training_args.seed)
        base = copy.deepcopy(self.base) if model_args.peft_type == FULL else share_weights(self.base)
        model = create_adapter(base, model_args)
        if has_prefix(model):
            initialize_prefix(model, self.tokenizer, model_args)
            attach_prefix_attention(model, model_args.prefix_dropout)
        attach_loss(model, training_args.label_smoothing_factor)
        compile_layers(base_of(model), training_args)
        return model

    def make_scorers(
        self, model: nn.Module, prompts: dict[str, Any], data_args: Any, training_args: Any
    ) -> dict[str, Callable[[], dict[str, float]]]:
        """What generates and scores answers, by split, where that is wanted."""
        settings = GenerationSettings.from_arguments(training_args, data_args)
        protocol = choose_protocol(self.chat_format, data_args.metric_protocol)
        return make_scorers((model, self.tokenizer, self.chat_format), prompts, settings, protocol)


def share_weights(base: PreTrainedModel) -> PreTrainedModel:
    """
    The base once more, without hooks or adapters that its copies get, and with the same numbers in memory.

    A base cannot be given back as it was: PEFT replaces layers of it, and attention and loss are attached to it.
    """
    shared = [*base.parameters(), *base.buffers()]
    shared += [state for module in base.modules() for name in _SHARED_STATES if (state := vars(module).get(name))]
    return copy.deepcopy(base, {id(value): value for value in shared})


class TrialTrainer(PrefixTrainer):
    """The trainer of one trial, whose evaluations stock reports to Optuna."""

    _last_evaluation: tuple[int, dict[str, float]] = (-1, {})

    def begin_trial(self, objective: Objective) -> None:
        """Set what stock's own `hyperparameter_search` sets before its trials."""
        self.hp_search_backend = HPSearchBackend.OPTUNA
        self.hp_space, self.compute_objective = (lambda trial: {}), objective

    def train(self, trial: Any = None, **kwargs: Any) -> TrainOutput:
        """As stock: a signal stops it at once, as nothing of a trial that is stopped is kept."""
        self.resumption.begin(None)
        return super(PrefixTrainer, self).train(trial=trial, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As stock."""
        metrics = super().evaluate(*args, **kwargs)
        self._last_evaluation = (self.state.global_step, metrics)
        return metrics

    def final_metrics(self) -> dict[str, float]:
        """Those of what was trained, by the evaluation after the last step where there was one."""
        step, metrics = self._last_evaluation
        return metrics if step == self.state.global_step and not self.args.load_best_model_at_end else self.evaluate()


class TrialFailed(Exception):
    """A trial that came to no number, for a reason that is none of this program's."""


class SearchTrainer(Seq2SeqTrainer):
    """
    The trainer whose `hyperparameter_search` is called: each of its trainings is a trainer of its own.

    Stock sets the values of a trial in the arguments of one trainer, where what belongs together is checked no more,
    the adapter is made before they are set, and callbacks go on with what they counted in the trial before.

    Args:
        workbench: base and rows.
        arguments: of training without what is searched.
        make_arguments: trial → its arguments.
        objective: metrics of an evaluation → the number that is compared.
        keep_checkpoints: whether to leave a trial's folder as it is.
        progress: a callback of every trial.
    """

    def __init__(
        self,
        workbench: Workbench,
        arguments: Arguments,
        make_arguments: Callable[[Any], Arguments],
        objective: Objective,
        keep_checkpoints: bool = False,
        progress: TrainerCallback | None = None,
    ) -> None:
        # Stock asks for rows of evaluation, and for a model at once.
        rows = evaluation_sets(workbench.encode(arguments[1], arguments[2].predict_with_generate))
        super().__init__(args=arguments[2], model_init=lambda: workbench.make_model(arguments), eval_dataset=rows)
        self.remove_callback(PrinterCallback)
        self.workbench, self.make_arguments, self.trial_objective = workbench, make_arguments, objective
        self.keep_checkpoints, self.progress = keep_checkpoints, progress

    def train(self, trial: Any = None, **kwargs: Any) -> None:
        """
        Train and evaluate one trial.

        Raises:
            TrialFailed: the settings do not go together, the loss is not finite, or memory is short.
            optuna.TrialPruned: it is behind the others.
        """
        reason = ""
        try:
            self._run(trial)
        except UserError as error:
            reason = str(error)
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not should_reduce_batch_size(error):
                raise
            reason = "out of memory"
        if reason:  # out here, where no error holds on to memory any more
            release_memory()
            trial.set_user_attr("reason", reason)
            raise TrialFailed(reason)

    def _run(self, trial: Any) -> None:
        arguments = self.make_arguments(trial)
        try:
            trainer = self.workbench.make_trainer(arguments)
            trainer.begin_trial(self.trial_objective)
            if self.progress:
                trainer.add_callback(self.progress)
            trainer.train(trial=trial)
            metrics = trainer.final_metrics()
            self.objective = self.trial_objective(metrics)
            trial.set_user_attr("metrics", select_scores(metrics))
        finally:
            if not self.keep_checkpoints:
                shutil.rmtree(arguments[2].output_dir, ignore_errors=True)


def compute_objective(metrics: dict[str, float], metric: str) -> float:
    """
    The number of an evaluation that trials are compared by; the mean where there are several sets of rows.

    Raises:
        UserError: it is not finite.
    """
    of_sets = [value for name, value in metrics.items() if name.startswith("eval_") and name.endswith(f"_{metric}")]
    value = metrics.get(f"eval_{metric}", fmean(of_sets) if of_sets else math.nan)
    if not math.isfinite(value):
        raise UserError(f"eval_{metric} is not finite ({value}): most likely the learning rate is too high.")
    return value
