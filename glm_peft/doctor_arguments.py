"""The arguments of the doctor: those of training, so that a recipe can be examined as it is."""

import sys
from dataclasses import dataclass

from glm_peft.arguments import DataArguments, ModelArguments, TrainingArguments
from glm_peft.command_help import DOCTOR_WORDS
from glm_peft.command_line import parse_command
from glm_peft.errors import UserError


@dataclass
class ExaminedArguments(TrainingArguments):
    """Training's own arguments; nothing is written, so no `output_dir` is needed."""

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir or "unused"
        super().__post_init__()


def parse_doctor_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, ExaminedArguments]:
    """
    The arguments of `python -m glm_peft.doctor [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    types = (ModelArguments, DataArguments, ExaminedArguments)
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_command(argv, types, **DOCTOR_WORDS)
    if not wanted_splits(arguments[1]):
        raise UserError(
            "There is nothing to examine: give --train_file, --validation_file, --test_file or a data set."
        )
    return arguments


def wanted_splits(data_args: DataArguments) -> list[str]:
    """The splits that have a file; `train` of a data set on the Hub where no file is given at all."""
    names = [name for name in ("train", "validation", "test") if getattr(data_args, f"{name}_file")]
    return names or (["train"] if data_args.dataset_name else [])
