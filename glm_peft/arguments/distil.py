"""Parse `python -m glm_peft.distil`: the documents, the conversations about them, and the settings of training."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import option, require, require_at_least_one
from glm_peft.arguments.methods import PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.sources import read_train_sources
from glm_peft.errors import UserError

if TYPE_CHECKING:
    from glm_peft.arguments.training import TrainArguments, TrainingArguments

DISTIL_WORDS = {
    "usage": "accelerate launch -m glm_peft.distil [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Distils documents into a prefix, with which the base answers as if it had read them; takes every "
    "flag and file of training. Give the same command again to continue a stopped run.",
}

_OWN_QUESTIONS = ("!train_file",)


@dataclass(frozen=True)
class DistilArguments:
    """
    The documents, how conversations about them are made, and what is learnt of the model that reads them.

    Raises:
        UserError: no document is given, or a number is out of its range.
    """

    _argument_group_name = "documents"

    document: list[str] | None = option(
        None,
        "Files that the prefix replaces: .txt, .md, .jsonl, .pdf, .docx, such as a handbook or a system text. Must "
        "be given.",
        "system_prompt",
        recipe="always",
    )
    num_conversations: int = option(
        1024,
        "Questions that the base asks and answers about the documents, where --train_file gives none.",
        recipe="always",
        needs=_OWN_QUESTIONS,
    )
    num_held_out: int = option(32, "Questions that are held out, to evaluate the prefix.", recipe="always")
    chunk_tokens: int = option(
        512, "Most tokens of the part that each question is asked about.", recipe="changed", needs=_OWN_QUESTIONS
    )
    question_language: Literal["zh", "en"] | None = option(
        None, "Language of the questions. None: that of the documents.", recipe="changed", needs=_OWN_QUESTIONS
    )
    question_temperature: float = option(
        1.0,
        "Sampling temperature of the questions: higher gives more varied ones.",
        recipe="changed",
        needs=_OWN_QUESTIONS,
    )
    max_context_tokens: int | None = option(
        None,
        "Most tokens of the documents in the context at once; longer ones are read in overlapping parts. "
        "None: the context length of the base.",
        recipe="changed",
    )
    teacher_top_k: int = option(
        20,
        "Most likely tokens at each position whose probabilities are learnt, all others as one; 0: all tokens.",
        recipe="always",
    )
    prefix_start: Literal["document", "chunks"] = option(
        "document",
        "Initial keys and values of the prefix: those of the first tokens of the documents, or of parts from all "
        "over.",
        recipe="always",
        needs=("!prefix_init",),
    )
    num_frozen_tokens: int = option(
        1, "First virtual tokens that are not trained, which makes training more stable.", recipe="changed"
    )

    def __post_init__(self) -> None:
        if not self.document:
            raise UserError("--document is not given: name a file to distil, such as handbook.md.")
        require_at_least_one(self, "num_conversations", "num_held_out", "chunk_tokens", "max_context_tokens")
        require(self.question_temperature > 0, "--question_temperature must be above 0", self.question_temperature)
        for name in ("teacher_top_k", "num_frozen_tokens"):
            require(getattr(self, name) >= 0, f"--{name} must be 0 or more", getattr(self, name))


def parse_distil_arguments(argv: list[str] | None = None) -> tuple[DistilArguments, "TrainArguments"]:
    """
    Parse the arguments of `python -m glm_peft.distil [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Args:
        argv: the words after the command's name; `None` for those of this process.

    Returns:
        Those of the documents, and those of training.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    from glm_peft.arguments.training import DistillationArguments, TrainArguments  # slow: the help has no time for it

    distil_args, *arguments = read_distil_arguments(argv, DistillationArguments)
    return distil_args, TrainArguments(*arguments)


def read_distil_arguments(argv: Sequence[str] | None, training_type: type) -> tuple[Any, ...]:
    """
    Parse the arguments of distilling, and refuse those of training that have no meaning there.

    Args:
        argv: the words after the command's name; `None` for those of this process.
        training_type: the dataclass of the Trainer's flags.

    Raises:
        UserError: an argument is wrong.
    """
    types = (DistilArguments, ModelArguments, DataArguments, training_type)
    words = sys.argv[1:] if argv is None else argv
    distil_args, model_args, data_args, training_args = parse_command(words, types, **DISTIL_WORDS)
    with naming_places(data_args.places):
        _check_method(model_args)
        _check_data(data_args, training_args)
        if distil_args.num_frozen_tokens and training_args.weight_decay:
            raise UserError(
                f"--weight_decay {training_args.weight_decay} would shrink the frozen tokens, too: leave it out, or "
                "give --num_frozen_tokens 0."
            )
    return distil_args, model_args, data_args, training_args


def _check_method(model_args: ModelArguments) -> None:
    if model_args.peft_type not in (None, PREFIX_TUNING):
        raise UserError(f"--peft_type {model_args.peft_type} cannot be a document: leave it out, as a prefix can.")
    if model_args.prefix_projection:
        raise UserError("--prefix_projection cannot start as a document: leave it out.")


def _check_data(data_args: DataArguments, training_args: "TrainingArguments") -> None:
    """Refuse what has no meaning where the answers are the teacher's."""
    if read_train_sources(data_args.train_file):
        raise UserError(f"--train_file {data_args.train_file} is a mixture, and questions are in one file: name that.")
    for name in ("validation_file", "validation_split", "test_file", "dataset_name"):
        if getattr(data_args, name):
            raise UserError(
                f"--{name} {getattr(data_args, name)} is not read here: questions are in --train_file, of which "
                "--num_held_out are held out, so leave it out."
            )
    if data_args.objective != "sft":
        raise UserError(f"--objective {data_args.objective} has no meaning here: leave it out.")
    for name in ("do_predict", "predict_with_generate", "label_smoothing_factor", "keep_file"):
        if getattr(training_args, name):
            raise UserError(
                f"--{name} has no meaning here, where a prefix learns what a model says that reads: leave it out."
            )
