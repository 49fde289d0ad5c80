"""The arguments of prediction: the rows or the prompt, where the answers go, and how they are generated."""

import sys
from argparse import SUPPRESS
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import Any

from glm_peft.arguments.command_line import names_of_fields, parse_command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.effects import naming_places
from glm_peft.arguments.fields import flags_with, option
from glm_peft.arguments.former_options import REFUSED
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training_defaults import TrainingDefaults
from glm_peft.arguments.transformers_source import trainer_flags
from glm_peft.errors import UserError

PREDICTION_WORDS = {
    "usage": "python -m glm_peft.predict [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Answers to a file or to one prompt, by a base alone or with an adapter. Flags win over the file.",
}

_MANY = ("!prompt",)  # needed by what is for the rows of a file
_RENAMED = {"generation_num_beams": "num_beams"}


def for_prediction(kind: type) -> type:
    """Return the dataclass with its help texts for prediction; flags of training alone are hidden from the help."""
    # A subclass, so that the checks and the type stay those of training's arguments.
    changed = [
        (own.name, own.type, field(default=own.default, metadata={**own.metadata, "help": _help_of(own)}))
        for own in fields(kind)
        if "prediction" in own.metadata
    ]
    return make_dataclass(kind.__name__, changed, bases=(kind,), frozen=True)


def _help_of(own: Field) -> str:
    stated = own.metadata["prediction"]
    return SUPPRESS if stated in ("ignored", "refused") else stated


@dataclass
class PredictArguments(GenerationArguments):
    """
    The flags of prediction that training does not have.

    Raises:
        UserError: an argument of sampling is given without `do_sample`.
    """

    _argument_group_name = "prediction"

    output_dir: str | None = option(
        None, "Folder for generated_predictions.jsonl and predict_results.json.", needs=_MANY
    )
    prompt: str | None = option(None, "A question to answer on stdout, instead of --test_file.")
    resume: bool = option(False, "Continue the stopped run whose answers are in --output_dir.", needs=_MANY)
    seed: int = option(
        42, "Seed of --do_sample; the same seed and batches give the same answers.", needs=("do_sample",)
    )
    per_device_eval_batch_size: int | None = option(
        None,
        "Rows in a batch. None: 8 to 64, as many as fit with their KV cache into 1 GiB, or 1/8 of the GPU's memory.",
        needs=("!max_batch_tokens",),
        outdoes=("max_batch_tokens",),
    )
    max_batch_tokens: int | None = option(
        None,
        "Most tokens in a batch, instead of a number of rows: rows * --num_beams * (longest prompt + "
        "--max_new_tokens). None: --per_device_eval_batch_size.",
        needs=_MANY,
    )

    def __post_init__(self) -> None:
        check_sampling(self)


def check_sampling(arguments: GenerationArguments) -> None:
    """Raise a `UserError` where an argument of sampling is given without `do_sample`."""
    for name in ("top_p", "top_k", "temperature"):
        value = getattr(arguments, name)
        if value is not None and not arguments.do_sample:
            raise UserError(f"--{name} {value} has no effect without --do_sample: add that or leave it out.")


PREDICTION_TYPES = (
    for_prediction(ModelArguments),
    for_prediction(DataArguments),
    PredictArguments,
)
"""The dataclasses of `python -m glm_peft.predict`; flags of training alone are not in its help."""


def parse_predict_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, PredictArguments]:
    """
    Parse the arguments of `python -m glm_peft.predict [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Args:
        argv: the words after the command's name; `None` for those of this process.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    of_training = names_of_fields([trainer_flags(TrainingDefaults)]).keys()
    of_training -= names_of_fields(PREDICTION_TYPES).keys() | _RENAMED.keys()
    # A recipe of training is easily given to prediction, and the nearest names here would mislead.
    refused = dict.fromkeys(of_training, "is for training: leave it out, as only flags of --help go with prediction")
    model_args, data_args, predict_args = parse_command(
        argv, PREDICTION_TYPES, _RENAMED, refused | REFUSED, **PREDICTION_WORDS
    )
    with naming_places(model_args.places):
        for arguments in (model_args, data_args):
            refuse_training(arguments)
        _check_task(data_args, predict_args)
    return model_args, data_args, predict_args


def refuse_training(arguments: ModelArguments | DataArguments) -> None:
    """Refuse the flags of training alone that have another value than their default."""
    # At its default a flag may stand in a configuration file for both commands.
    for name in flags_with(arguments, "prediction", "refused"):
        value = getattr(arguments, name)
        if value != type(arguments).__dataclass_fields__[name].default:
            raise UserError(f"--{name} {value} is for training and has no effect on prediction: leave it out.")


def parse_for_answering(argv: list[str] | None, types: Sequence[type], words: Mapping[str, str]) -> tuple[Any, ...]:
    """
    Parse the arguments of a command that answers: those of the base first, then its own.

    Args:
        argv: `None` for those of this process.
        types: the dataclasses.
        words: usage and description of the command.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    arguments = parse_command(sys.argv[1:] if argv is None else argv, types, **words)
    refuse_training(arguments[0])
    return arguments


def _check_task(data_args: DataArguments, predict_args: PredictArguments) -> None:
    source = data_args.test_file or data_args.dataset_name
    if predict_args.prompt is None and source is None:
        raise UserError('There is nothing to predict: give --test_file FILE, --dataset_name NAME, or --prompt "…".')
    if predict_args.prompt is not None and source is not None:  # `is not None`, as an empty --prompt is given, too
        raise UserError(f"--prompt is given beside {source}: give one prompt or many, not both.")
    if predict_args.prompt is not None and not predict_args.prompt.strip():
        raise UserError(f"--prompt {predict_args.prompt!r} is empty: give a question.")
    if predict_args.prompt is None and predict_args.output_dir is None:
        raise UserError("--output_dir is not given: name a folder for the predictions and the scores.")
