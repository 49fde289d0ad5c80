"""The arguments of the doctor: those of training, so that a recipe can be examined as it is."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.splits import expand_splits
from glm_peft.errors import UserError

if TYPE_CHECKING:  # its import takes seconds, which the help has no time for
    from glm_peft.arguments.training import TrainArguments, TrainingArguments

DOCTOR_WORDS = {
    "usage": "python -m glm_peft.doctor [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Examines data, tokenizer and memory before training, without loading weights; takes every flag "
    "and file of training. Exit code 0: training can start, 1: it would fail, 2: the flags are wrong.",
}


def parse_doctor_arguments(
    argv: list[str] | None = None,
) -> "TrainArguments":
    """
    Parse the arguments of `python -m glm_peft.doctor [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    from glm_peft.arguments.trainer_settings import check_streaming
    from glm_peft.arguments.training import ExaminedArguments, TrainArguments

    arguments = TrainArguments(*read_doctor_arguments(argv, ExaminedArguments))
    check_streaming(arguments.data, arguments.training)
    return arguments


def read_doctor_arguments(argv: Sequence[str] | None, training_type: type) -> tuple[Any, ...]:
    """
    Parse the arguments of the doctor, and require rows to examine.

    Args:
        argv: the words after the command's name; `None` for those of this process.
        training_type: the dataclass of the Trainer's flags.

    Raises:
        UserError: an argument is wrong, or there is nothing to examine.
    """
    types = (ModelArguments, DataArguments, training_type)
    arguments = parse_command(sys.argv[1:] if argv is None else argv, types, **DOCTOR_WORDS)
    if not wanted_splits(*arguments[1:]):
        raise UserError(
            "There is nothing to examine: give --train_file, --validation_file, --test_file or a data set."
        )
    return arguments


def wanted_splits(data_args: DataArguments, training_args: "TrainingArguments") -> list[str]:
    """Return the splits that have a file or that a task needs, or else `train` of the dataset on the Hub."""
    # A file without its --do_ flag is examined, too: the doctor is asked before the flags are all there.
    tasks = {"train": training_args.do_train, "validation": training_args.do_eval, "test": training_args.do_predict}
    given = {name: is_needed or getattr(data_args, f"{name}_file") for name, is_needed in tasks.items()}
    given["validation"] = given["validation"] or data_args.validation_split
    names = [name for name, is_given in given.items() if is_given]
    return expand_splits(names or (["train"] if data_args.dataset_name else []), data_args)
