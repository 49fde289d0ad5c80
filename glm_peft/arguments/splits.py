"""Name the datasets for evaluation, one or several: `--validation_file easy=easy.json,hard=hard.json`."""

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.sources import read_train_sources
from glm_peft.errors import UserError

VALIDATION = "validation"
_NAMED = re.compile(r"([A-Za-z]\w*)=")
_NEXT = re.compile(r",\s*(?=[A-Za-z]\w*=)")


def validation_files(validation_file: str | None) -> dict[str, str | None]:
    """
    Return the file of each split for evaluation, `validation`, or `validation_NAME` for each name that is given.

    Raises:
        UserError: a file has no name while others have one, or two have the same.
    """
    # A file whose own name looks like NAME=FILE is taken as a file.
    if validation_file is None or not _NAMED.match(validation_file) or Path(validation_file).exists():
        return {VALIDATION: validation_file}
    pairs = [part.strip().partition("=") for part in _NEXT.split(validation_file)]
    names = [name for name, _, _ in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or any("," in file or not file for _, _, file in pairs):
        problem = f"{twice[0]} is there twice" if twice else "a file has no name, or a name no file"
        raise UserError(
            f"--validation_file {validation_file}: {problem}; give one file, or NAME=FILE,NAME=FILE and so on."
        )
    return {f"{VALIDATION}_{name}": file for name, _, file in pairs}


def expand_splits(splits: list[str], data_args: DataArguments) -> list[str]:
    """Return the names of the splits, with those of `--validation_file`, or of the sources, for `validation`."""
    held_out = [f"{VALIDATION}_{name}" for name in _held_out_files(data_args)]
    own = held_out or list(validation_files(data_args.validation_file))
    return list(chain.from_iterable(own if split == VALIDATION else [split] for split in splits))


def file_of(data_args: DataArguments, split: str) -> str | None:
    """Return the file of a split, as `expand_splits` names it; `None` where its rows are of a dataset on the Hub."""
    if split.startswith(VALIDATION) and data_args.validation_split is not None:
        return _held_out_files(data_args).get(split.removeprefix(f"{VALIDATION}_"), data_args.train_file)
    if split.startswith(VALIDATION):
        return validation_files(data_args.validation_file)[split]
    return getattr(data_args, f"{split}_file")


def _held_out_files(data_args: DataArguments) -> dict[str, str]:
    """Return the files of the sources by name, where rows of each are held out; empty where it is one file."""
    sources = read_train_sources(data_args.train_file) if data_args.validation_split is not None else []
    return {source.name: source.file for source in sources}


def evaluation_sets(datasets: Mapping[str, Any]) -> Any:
    """Return what the Trainer takes: the one dataset without a name, or all by name, or `None`."""
    # The Trainer puts the names into those of its metrics: eval_easy_loss.
    named = {name.removeprefix(f"{VALIDATION}_"): value for name, value in datasets.items() if is_named(name)}
    return named or datasets.get(VALIDATION)


def is_named(split: str) -> bool:
    """Whether a split is one of several for evaluation."""
    return split.startswith(f"{VALIDATION}_")


def split_of(metric_key_prefix: str) -> str:
    """Return the split whose scores begin so: `eval` → `validation`, `eval_easy` → `validation_easy`."""
    return VALIDATION + metric_key_prefix.removeprefix("eval")


def check_metric(metric: str | None, validation_file: str | None) -> None:
    """
    Raise a `UserError` where the best model is to be chosen by a metric that no evaluation computes.

    Args:
        metric: the value of `--metric_for_best_model`, where it is used.
    """
    # The Trainer finds out at its first evaluation, with a KeyError.
    names = [split.removeprefix(f"{VALIDATION}_") for split in validation_files(validation_file) if is_named(split)]
    own = ("keep_", *(f"{name}_" for name in names))  # what --keep_file measures is of no data set
    if metric and names and not metric.removeprefix("eval_").startswith(own):
        raise UserError(
            f"--metric_for_best_model {metric} is of none of the data sets of --validation_file: give one of theirs, "
            f"such as {names[0]}_loss."
        )
