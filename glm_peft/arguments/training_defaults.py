"""The flags that differ from transformers' training arguments or are added, without their import, which is slow."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glm_peft.arguments.command_line import parse_command, warn
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import option, require, require_at_least_one
from glm_peft.arguments.former_options import IGNORED
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

BUILTIN_PROMPTS = "builtin"
"""The value of `--keep_file` that stands for the prompts of this package."""

TRAINING_WORDS = {
    "usage": "accelerate launch glm_peft/train.py [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "P-Tuning v2 for ChatGLM models. Flags win over the file, whose keys are the flags without --.",
    "epilog": f"Accepted from published scripts, without effect: {', '.join(IGNORED)}.",
}


@dataclass
class TrainingDefaults(GenerationArguments):
    """Flags of the Trainer with defaults for a prefix, and those that only this toolkit has."""

    _argument_group_name = "training, evaluation and generation"

    learning_rate: float | None = option(
        None,
        "Highest learning rate. None: that of --peft_type, such as 5e-3 for a prefix and 2e-4 for LoRA.",
        recipe="always",
    )
    # transformers' 500 would show nothing of a short run.
    logging_steps: float = option(10, "Log every so many steps, or, below 1, after each such share of all steps.")
    # Off, as transformers' default shows a NaN loss as 0.
    logging_nan_inf_filter: bool = option(False, "Hide losses that are not finite from the log.")
    log_level_replica: Literal["detail", "debug", "info", "warning", "error", "critical", "passive"] = option(
        "error", "Least level of what the other processes log; that of the first one is log_level.", public="never"
    )
    # Declared again, as transformers' own command line takes it for yes or no only.
    include_num_input_tokens_seen: str = option(
        "no", "Log the tokens of training so far, and their rate: all, or non_padding.", nargs="?", const="all"
    )
    report_to: list[str] = option(
        ["none"],
        "Services to report to, such as tensorboard or wandb; none, or all that are installed.",
        public="never",
    )
    card_language: Literal["en", "zh"] = option("en", "Language of the model card, README.md in output_dir.")
    card_examples: int = option(
        3, "Rows of --test_file that the model card shows with their answers, on the Hub, too; 0 for none."
    )
    base_model_id: str | None = option(
        None,
        "With --push_to_hub: the base's Hub id, which the adapter names there. None: --model_name_or_path.",
        public="never",
        needs=("push_to_hub",),
    )
    early_stopping_patience: int | None = option(
        None, "End training after so many evaluations in a row without a better metric_for_best_model. None: never."
    )
    early_stopping_threshold: float = option(0.0, "By how much the metric must be better to count as better.")
    dpo_beta: float = option(
        0.1,
        "With --objective dpo: how strongly the answers are held to the base's, more with more.",
        recipe="changed",
        needs=("objective=dpo",),
    )
    keep_file: str | None = option(
        None,
        "General prompts, in a form that training reads, or builtin, 200 of this package: how far the answers to them "
        "move from the base's is measured before training, in every evaluation, and after it. None: not measured.",
        recipe="changed",
    )
    max_keep_samples: int = option(
        256,
        "Use only so many prompts of --keep_file; every other one is measured, the rest are for --keep_weight.",
        recipe="changed",
        needs=("keep_file",),
    )
    keep_weight: float = option(
        0.0,
        "Weight of a second loss: the divergence from the base on its own answers to prompts of --keep_file.",
        recipe="changed",
        needs=("keep_file",),
    )
    keep_every: int = option(
        4,
        "Take the second loss every so many steps, then so many times as strong; its cost is the share that the log "
        "tells.",
        recipe="changed",
        needs=("keep_weight",),
    )
    train_sampling_strategy: Literal["auto", "random", "sequential", "group_by_length", "batch_rebalance"] = option(
        "auto",
        "Order of the examples; auto: random, or group_by_length where that costs less padding than packing.",
        recipe="changed",
    )
    # Every trained parameter is used in every step: looking for others would cost time and memory.
    ddp_find_unused_parameters: bool | None = option(False, "Let DDP look for parameters without a gradient.")
    # Given, as the Trainer cannot read them off the signature of a PeftModel.
    label_names: list[str] = option(["labels"], "Columns of a batch that hold labels.")
    # Declared again, as transformers 5.20 has only the old name: both mean the same here, whichever it is.
    activation_checkpointing: bool | None = option(
        None,
        "Compute activations again in the backward pass: less memory, more time.",
        nargs="?",
        const=True,
        recipe="changed",
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = option(
        None,
        "Keyword arguments for activation checkpointing, as JSON. None: use_reentrant is false.",
        needs=("activation_checkpointing",),
    )

    def check_values(self) -> None:
        """
        Check what needs nothing of transformers; without `do_sample` its companions are dropped.

        Raises:
            UserError: `output_dir` is missing, a number is out of its range, or a token for the Hub is given.
        """
        if not self.output_dir:
            raise UserError("--output_dir is not given: name a folder for the adapter and the results.")
        # The command line refuses it by name; here it is refused from Python, too.
        if self.hub_token is not None:
            raise UserError("hub_token would be saved in clear: set the environment variable HF_TOKEN instead.")
        require_at_least_one(
            self,
            "max_new_tokens",
            "num_beams",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "keep_every",
        )
        self.do_eval = self.do_eval or self.eval_strategy != "no"  # as transformers does
        rate = self.learning_rate
        require(rate is None or rate > 0, "--learning_rate must be above 0", rate)
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
class ExaminedDefaults(TrainingDefaults):
    """Those of the doctor, which writes nothing."""

    output_dir: str | None = option("unused", "Folder that training is to write.")


@dataclass
class DistillationDefaults(TrainingDefaults):
    """Those of `glm_peft.distil`, which always trains and evaluates, and goes on by itself."""

    # As published (Cartridges, arXiv 2506.06266): what is learnt is what the base itself would say.
    learning_rate: float | None = option(2e-2, "Highest learning rate.", recipe="always")
    do_train: bool = option(True, "Train the prefix.")
    do_eval: bool = option(True, "Take the divergence on the questions that are held out.")
    card_examples: int = option(
        0, "Held-out questions that the model card shows with answers, which tell what is in the documents."
    )
    resume_from_checkpoint: str | None = option(
        "last", "Checkpoint to go on from: a folder, or last, the newest in --output_dir, if any."
    )


def read_train_arguments(argv: Sequence[str] | None, training_type: type) -> tuple[ModelArguments, DataArguments, Any]:
    """
    Parse the arguments of training, and require a task and data for it.

    Args:
        argv: the words after the script's name; `None` for those of this process.
        training_type: the dataclass of the Trainer's flags.

    Raises:
        UserError: an argument is wrong, or there is nothing to do.
    """
    types = (ModelArguments, DataArguments, training_type)
    model_args, data_args, training_args = parse_command(
        sys.argv[1:] if argv is None else argv, types, **TRAINING_WORDS
    )
    with naming_places(data_args.places):
        _check_tasks(data_args, training_args)
    return model_args, data_args, training_args


def _check_tasks(data_args: DataArguments, training_args: TrainingDefaults) -> None:
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
