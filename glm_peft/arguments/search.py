"""Parse `python -m glm_peft.search`: what to search, and the settings of training that every trial starts from."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import flags_with, option, require_at_least_one
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.transformers_flags import (
    SHARED_BY_TRIALS,
    SHARED_BY_TRIALS_KINDS,
    WITHOUT_INFLUENCE,
    WITHOUT_INFLUENCE_KINDS,
)
from glm_peft.errors import UserError

SEARCH_WORDS = {
    "usage": "python -m glm_peft.search [CONFIG.yaml|CONFIG.json] --space SPACE.yaml [--flags]",
    "description": "Trains with many values of the arguments in SPACE.yaml and writes the best as a configuration of "
    "training; takes every flag and file of training. Give the same command again to continue a stopped search.",
}

Settings = dict[str, list[str]]
"""The words of each argument of training by its name, as they would follow its flag."""

SWITCHES = ("peft_type", "prefix_init", "prefix_projection")
"""The arguments that decide which others have an effect, and so are drawn first."""


@dataclass(frozen=True)
class SearchArguments:
    """
    What is searched, with how many trials, and by which metric they are compared.

    Raises:
        UserError: no space is given, or a number is out of its range.
    """

    _argument_group_name = "search"

    space: str = option("", "YAML or JSON file of the arguments to search and their values. Must be given.")
    n_trials: int = option(20, "Trials in all, including those of an earlier run of the same search.")
    metric: Literal["loss", "rouge-1", "rouge-2", "rouge-l", "bleu-4", "exact_match"] = option(
        "loss", "What trials are compared by, on the validation rows: the loss, lower is better, or a score."
    )
    trial_steps: int | None = option(
        None,
        "Steps of each trial, if the final training is to be longer. None: as long as the final training.",
    )
    random_trials: int = option(
        5,
        "How many trials at the start have random values and are not ended early; later ones learn from the results.",
    )
    stop_early: bool = option(
        True, "End a trial that is behind the median of the others at one of its evaluations (--eval_strategy)."
    )
    sampler_seed: int = option(0, "Seed of the values that are tried; the seed of training is --seed in all trials.")
    keep_checkpoints: bool = option(
        False, "Keep the checkpoints of every trial, as --save_strategy says.", needs=("save_strategy!=no",)
    )

    def __post_init__(self) -> None:
        if not self.space:
            raise UserError("--space is not given: name a YAML file such as configs/search_space.yaml.")
        require_at_least_one(self, "n_trials", "trial_steps", "random_trials")

    @property
    def direction(self) -> str:
        """Return Optuna's word for which values are better."""
        return "minimize" if self.metric == "loss" else "maximize"


def parse_search_arguments(argv: list[str] | None = None) -> tuple[SearchArguments, Settings]:
    """
    Parse `python -m glm_peft.search [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Returns:
        The arguments of the search, and the settings of training that are not the defaults.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    from glm_peft.arguments.training import TrainingArguments

    search_args, *arguments = read_search_arguments(argv, TrainingArguments)
    training_args = arguments[-1]
    # Each of several processes would draw values of its own from Optuna.
    if training_args.world_size > 1 or training_args.deepspeed or training_args.fsdp:
        raise UserError(
            f"A search runs in one process without DeepSpeed or FSDP, and this is one of {training_args.world_size}: "
            "start it with python -m glm_peft.search, and leave out --deepspeed and --fsdp."
        )
    # What was given and nothing else, as `best.yaml` is to hold no defaults.
    given = {name: value for each in arguments for name, value in each.given.items()}
    return search_args, {name: as_words(value) for name, value in given.items()}


def read_search_arguments(argv: Sequence[str] | None, training_type: type) -> tuple[Any, ...]:
    """
    Parse the arguments of a search, and require data for its trials.

    Args:
        argv: the words after the command's name; `None` for those of this process.
        training_type: the dataclass of the Trainer's flags.

    Raises:
        UserError: an argument is wrong, or lacks another one that it needs.
    """
    argv = sys.argv[1:] if argv is None else argv
    types = (SearchArguments, ModelArguments, DataArguments, training_type)
    # Every trial trains and evaluates: what needs that has an effect.
    arguments = parse_command([*argv, "--do_train", "--do_eval"], types, **SEARCH_WORDS)
    search_args, _, data_args, training_args = arguments
    if data_args.streaming:
        raise UserError(
            "--streaming is for one long training, and a search holds its rows for all trials: leave it out."
        )
    for file in ("train_file", "validation_file"):
        is_held_out = file == "validation_file" and data_args.validation_split is not None
        if getattr(data_args, file) is None and data_args.dataset_name is None and not is_held_out:
            raise UserError(f"A search trains and evaluates every trial: give --{file} or --dataset_name.")
    if search_args.metric != "loss" and not training_args.predict_with_generate:
        raise UserError(
            f"--metric {search_args.metric} is a score of generated answers: give --predict_with_generate too, or "
            "leave it out to compare the loss."
        )
    return arguments


def is_searchable(name: str) -> bool:
    """Return whether trials may differ in an argument of training."""
    # Our own flags say themselves whether they may be searched; transformers' may, but for what trials must share.
    for kind in (ModelArguments, DataArguments):
        if name in kind.__dataclass_fields__:
            return name in flags_with(kind, "methods") or name in flags_with(kind, "search", "varied")
    return name not in SHARED_BY_TRIALS and not name.startswith(SHARED_BY_TRIALS_KINDS)


def may_change(name: str) -> bool:
    """Return whether a search may be continued with another value of this argument of training."""
    is_free = any(name in flags_with(kind, "search", "free") for kind in (ModelArguments, DataArguments))
    return is_free or name in WITHOUT_INFLUENCE or name.startswith(WITHOUT_INFLUENCE_KINDS)


def as_words(value: object) -> list[str]:
    """Return a parsed value as the words that would follow its flag."""
    values = value if isinstance(value, list) else [value]
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in values]


def as_command_line(settings: Mapping[str, list[str]]) -> list[str]:
    """Return the words that give these settings to `glm_peft/train.py`."""
    words: list[str] = []
    for name, values in settings.items():
        # One value is joined to its flag, as it may begin with a hyphen.
        words += [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]
    return words
