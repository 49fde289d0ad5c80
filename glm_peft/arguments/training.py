"""The arguments of training: the model and its adapter, the data, and how to train, score and generate."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from glm_peft.arguments.command_line import warn
from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import changed
from glm_peft.arguments.methods import FULL, IN_EMBEDDINGS, METHODS, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.splits import check_metric
from glm_peft.arguments.trainer_settings import check_streaming, check_trainer_settings, choose_count
from glm_peft.arguments.training_defaults import (
    DistillationDefaults,
    ExaminedDefaults,
    TrainingDefaults,
    read_train_arguments,
)
from glm_peft.errors import UserError

# Where the package's name is not the service's.
_TRACKER_PACKAGES = {
    "azure_ml": "azureml-sdk",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
    "tensorboard": "-e '.[tensorboard]'",
}


@dataclass
class TrainingArguments(TrainingDefaults, Seq2SeqTrainingArguments):
    """
    transformers' own arguments with defaults for a prefix, and the settings of generation.

    Raises:
        UserError: `output_dir` is missing, a number is out of its range, a token for the Hub is given (it would be
            saved in clear), the package of a service to report to is not installed, or the best model is to be chosen
            by a score without `predict_with_generate`.
    """

    def __post_init__(self) -> None:
        self.learning_rate_is_given = self.learning_rate is not None
        self.learning_rate = (
            self.learning_rate if self.learning_rate_is_given else METHODS[PREFIX_TUNING].learning_rate
        )
        self._check_values()
        self.include_num_input_tokens_seen = choose_count(self.include_num_input_tokens_seen)
        if self.early_stopping_patience:  # the callback asks for a metric, also where no best model is loaded
            self.metric_for_best_model = self.metric_for_best_model or "loss"
        if self.greater_is_better is None and self._is_of_kept(self.metric_for_best_model):
            self.greater_is_better = str(self.metric_for_best_model).endswith("same_answers")
        # Two names of one flag: transformers 5.20 knows only the old one, later releases warn of it.
        if self.activation_checkpointing is None:
            self.activation_checkpointing = bool(self.gradient_checkpointing)
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs
        # The Trainer's own push would send everything in the folder; glm_peft.publishing.callback sends a named list.
        self.sends_to_hub, self.push_to_hub = self.push_to_hub, False
        if self.ddp_backend and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            warn(f"--ddp_backend {self.ddp_backend} has no effect on one process.")
            self.ddp_backend = None
        super().__post_init__()
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.layer_compiler = self._take_over_compilation()
        check_trainer_settings(self)
        if self.n_gpu > 1:
            # The Trainer would use them by DataParallel, whose copies of the model lack the hooks of the prefix.
            warn(f"{self.n_gpu} GPUs are there, one is used: accelerate launch --num_processes {self.n_gpu} uses all.")
            self._n_gpu = 1
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, where it is installed, prints its guess
        # Without generated answers an evaluation computes the loss alone.
        by_score = (self.load_best_model_at_end or self.early_stopping_patience) and (
            not str(self.metric_for_best_model).endswith("loss")
        )
        by_score = by_score and not self._is_of_kept(self.metric_for_best_model)
        by_score = by_score and "rewards/" not in str(self.metric_for_best_model)  # of --objective dpo
        if by_score and not self.predict_with_generate:
            raise UserError(
                f"--metric_for_best_model {self.metric_for_best_model} is a score of generated answers: "
                "give --predict_with_generate too, or use loss."
            )

    def _take_over_compilation(self) -> dict[str, str | None] | None:
        """Return the options of `torch.compile` for each layer; the Trainer would compile the whole model."""
        if not self.torch_compile:
            return None
        options = {"backend": self.torch_compile_backend, "mode": self.torch_compile_mode}
        self.torch_compile, self.torch_compile_backend = False, None
        os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
        return options

    @property
    def wanted_splits(self) -> list[str]:
        """Return the splits that the tasks need, of `train`, `validation` and `test`."""
        wanted = {"train": self.do_train, "validation": self.do_eval, "test": self.do_predict}
        return [name for name, is_wanted in wanted.items() if is_wanted]

    @property
    def num_card_rows(self) -> int:
        """Return the most rows of data that the card of this run shows."""
        return self.card_examples if self.do_predict else 0

    def _check_values(self) -> None:
        self.check_values()
        for name in self._VALID_DICT_FIELDS:  # read by transformers as JSON, with a traceback where it is none
            _require_json(name, getattr(self, name))
        _check_deepspeed(self.deepspeed)
        _check_trackers([self.report_to] if isinstance(self.report_to, str) else self.report_to or [])

    def _is_of_kept(self, metric: str | None) -> bool:
        """Whether a metric is one of those that `--keep_file` gives."""
        return bool(self.keep_file) and str(metric).removeprefix("eval_").startswith("keep_")


@dataclass
class ExaminedArguments(ExaminedDefaults, TrainingArguments):
    """The arguments of training, for the doctor."""


@dataclass
class DistillationArguments(DistillationDefaults, TrainingArguments):
    """The arguments of training, for `glm_peft.distil`."""

    @property
    def num_card_rows(self) -> int:
        """Return the most held-out questions that the card of this run shows."""
        return self.card_examples


@dataclass(frozen=True)
class TrainArguments:
    """All arguments of training, which unpack into those of the model, of the data and of the Trainer."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.data, self.training))

    def resolve(self, model_args: ModelArguments, data_args: DataArguments) -> "TrainArguments":
        """
        Return the arguments with the learning rate and the packing that the method decides where none were given.

        Args:
            model_args: the arguments of the model, resolved by the adapter that training goes on from.
            data_args: those of the data, resolved by it, too.

        Raises:
            UserError: a flag cannot be used with this method.
        """
        with naming_places(getattr(data_args, "places", {})):
            return self._resolve(model_args, data_args)

    def _resolve(self, model_args: ModelArguments, data_args: DataArguments) -> "TrainArguments":
        method, training_args = model_args.peft_type, copy.copy(self.training)
        # Only now: the method may be that of the adapter to go on from.
        if not training_args.learning_rate_is_given:
            training_args.learning_rate = METHODS[method].learning_rate
        if method in IN_EMBEDDINGS:
            if data_args.packing:
                raise UserError(
                    f"--packing puts several examples into a row, and the virtual tokens of --peft_type {method} "
                    "stand before the first one only: leave one of them out."
                )
            data_args = changed(data_args, packing=False)  # not by itself either
        if method == FULL and training_args.keep_file:
            raise UserError(
                "--keep_file compares an adapter with the base under it, which --peft_type none changes: leave it out."
            )
        if data_args.objective == DPO:
            data_args = _check_pairs(method, data_args, training_args)
        if method == FULL and training_args.label_smoothing_factor:
            raise UserError(
                "--label_smoothing_factor needs a frozen head, which --peft_type none trains: leave it out."
            )
        return TrainArguments(model_args, data_args, training_args)


def _check_pairs(method: str, data_args: DataArguments, training_args: TrainingArguments) -> DataArguments:
    """Refuse what pairs of answers cannot have, and return the arguments without packing."""
    problems = {
        "--peft_type none changes the base, to which the answers are held": method == FULL,
        "--packing would take pairs apart, which are compared": data_args.packing,
        "--label_smoothing_factor is of another loss than that taken": training_args.label_smoothing_factor,
    }
    for problem, is_there in problems.items():
        if is_there:
            raise UserError(f"{problem} by --objective dpo: leave one of them out.")
    return changed(data_args, packing=False)


def parse_train_arguments(argv: list[str] | None = None) -> TrainArguments:
    """
    Parse the arguments of `glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Args:
        argv: the words after the script's name; `None` for those of this process.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    model_args, data_args, training_args = read_train_arguments(argv, TrainingArguments)
    with naming_places(data_args.places):
        check_streaming(data_args, training_args)
        is_best_wanted = training_args.load_best_model_at_end or training_args.save_strategy == "best"
        if is_best_wanted or training_args.early_stopping_patience:
            check_metric(training_args.metric_for_best_model, data_args.validation_file)
    return TrainArguments(model_args, data_args, training_args)


def _require_json(name: str, value: Any) -> None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"--{name} is not JSON ({error}), found {value}.") from error


def _check_deepspeed(given: Any) -> None:
    """Require that the file of DeepSpeed's settings is there."""
    # transformers looks for it with the plugin half made, which then stays in the state of the process.
    if isinstance(given, str) and not given.startswith("{") and not Path(given).is_file():
        raise UserError(f"--deepspeed {given}: there is no such file; give one with DeepSpeed's settings.")


def _check_trackers(names: list[str]) -> None:
    """Require that every service to report to is known and installed."""
    # transformers finds out only when the Trainer is made, once the base is loaded.
    if names in ([], ["none"], ["all"]):
        return
    from transformers.integrations import integration_utils as integrations

    known, at_hand = integrations.INTEGRATION_TO_CALLBACK, integrations.get_available_reporting_integrations()
    # transformers' list never has flyte, and kubeflow only inside a job of it.
    at_hand += ["flyte"] if integrations.is_flytekit_available() else []
    for name in names:
        if name not in known:
            raise UserError(
                f"--report_to {name} is no service that is known: give some of {', '.join(known)}, or none."
            )
        if name not in [*at_hand, "kubeflow"]:
            package = _TRACKER_PACKAGES.get(name, name)
            raise UserError(
                f"--report_to {name} needs a package that is not installed: `pip install {package}` installs it, or "
                "leave the flag out."
            )
