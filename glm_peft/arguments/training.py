"""The arguments of training: the model and its adapter, the data, and how to train, score and generate."""

import copy
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Seq2SeqTrainingArguments

from glm_peft.arguments.command_line import parse_command, warn
from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import changed, option, require, require_at_least_one
from glm_peft.arguments.methods import FULL, IN_EMBEDDINGS, METHODS, PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.splits import check_metric
from glm_peft.arguments.trainer_settings import check_streaming, check_trainer_settings, choose_count
from glm_peft.arguments.training_defaults import TRAINING_WORDS, TrainingDefaults
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

    def _check_values(self) -> None:
        if not self.output_dir:
            raise UserError("--output_dir is not given: name a folder for the adapter and the results.")
        # The command line refuses it by name; here it is refused from Python, too.
        if self.hub_token is not None:
            raise UserError("hub_token would be saved in clear: set the environment variable HF_TOKEN instead.")
        for name in self._VALID_DICT_FIELDS:  # read by transformers as JSON, with a traceback where it is none
            _require_json(name, getattr(self, name))
        _check_deepspeed(self.deepspeed)
        _check_trackers([self.report_to] if isinstance(self.report_to, str) else self.report_to or [])
        require_at_least_one(
            self,
            "max_new_tokens",
            "num_beams",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "keep_every",
        )
        require(self.learning_rate > 0, "--learning_rate must be above 0", self.learning_rate)
        require(self.card_examples >= 0, "--card_examples must be 0 or more", self.card_examples)
        require(self.dpo_beta > 0, "--dpo_beta must be above 0", self.dpo_beta)
        require(self.keep_weight >= 0, "--keep_weight must be 0 or more", self.keep_weight)
        require(self.max_keep_samples >= 2, "--max_keep_samples must be 2 or more", self.max_keep_samples)
        self._check_early_stopping()
        if not self.do_sample:
            self._drop_sampling()
        require(self.top_p is None or 0 < self.top_p <= 1, "--top_p must be above 0 and at most 1", self.top_p)
        require(self.top_k is None or self.top_k >= 0, "--top_k must be 0 or more", self.top_k)
        require(self.temperature is None or self.temperature > 0, "--temperature must be above 0", self.temperature)

    def _is_of_kept(self, metric: str | None) -> bool:
        """Whether a metric is one of those that `--keep_file` gives."""
        return bool(self.keep_file) and str(metric).removeprefix("eval_").startswith("keep_")

    def _check_early_stopping(self) -> None:
        patience, threshold = self.early_stopping_patience, self.early_stopping_threshold
        require(patience is None or patience >= 1, "--early_stopping_patience must be 1 or more", patience)
        require(threshold >= 0, "--early_stopping_threshold must be 0 or more", threshold)
        if patience is None and threshold:
            raise UserError("--early_stopping_threshold has no effect alone: give --early_stopping_patience too.")
        if patience and self.eval_strategy == "no":
            raise UserError(
                f"--early_stopping_patience {patience} counts evaluations during training, but there are none: "
                "give --eval_strategy steps or epoch, and --validation_file."
            )

    def _drop_sampling(self) -> None:
        # No error: `--do_sample false` must be able to win over a recipe that samples.
        for name in ("top_p", "top_k", "temperature"):
            setattr(self, name, None)


@dataclass
class ExaminedArguments(TrainingArguments):
    """The arguments of training, for the doctor: it writes nothing, so no `output_dir` is needed."""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or "unused"
        super().__post_init__()


@dataclass
class DistillationArguments(TrainingArguments):
    """The arguments of training, for `glm_peft.distil`: it always trains and evaluates, and goes on by itself."""

    # As published (Cartridges, arXiv 2506.06266): what is learnt is what the base itself would say.
    learning_rate: float | None = option(2e-2, "Highest learning rate.", recipe="always")
    do_train: bool = option(True, "Train the prefix.")
    do_eval: bool = option(True, "Take the divergence on the questions that are held out.")
    resume_from_checkpoint: str | None = option(
        "last", "Checkpoint to go on from: a folder, or last, the newest in --output_dir, if any."
    )


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
    types = (ModelArguments, DataArguments, TrainingArguments)
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_command(argv, types, **TRAINING_WORDS)
    with naming_places(data_args.places):
        _check_tasks(data_args, training_args)
        check_streaming(data_args, training_args)
        is_best_wanted = training_args.load_best_model_at_end or training_args.save_strategy == "best"
        if is_best_wanted or training_args.early_stopping_patience:
            check_metric(training_args.metric_for_best_model, data_args.validation_file)
    return TrainArguments(model_args, data_args, training_args)


def _check_tasks(data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Require a task, and data for each task."""
    files = {"do_train": "train_file", "do_eval": "validation_file", "do_predict": "test_file"}
    wanted = [task for task in files if getattr(training_args, task)]
    if not wanted:
        raise UserError("There is nothing to do: give --do_train, --do_eval or --do_predict.")
    for task in wanted:
        is_held_out = task == "do_eval" and data_args.validation_split is not None
        if getattr(data_args, files[task]) is None and data_args.dataset_name is None and not is_held_out:
            raise UserError(f"--{task} needs data: give --{files[task]} or --dataset_name.")
    for task, file in files.items():
        # A recipe may name the rows of other commands, too; but a validation that is not made is a mistake.
        is_meant = file not in data_args.places or task == "do_eval"
        is_meant &= not (task == "do_train" and data_args.validation_split and training_args.do_eval)
        if task not in wanted and getattr(data_args, file) and is_meant:
            warn(f"{data_args.places.get(file, f'--{file}')} has no effect without --{task}.")


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
