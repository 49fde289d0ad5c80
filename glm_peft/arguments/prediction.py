"""The arguments of prediction: which rows or prompt, where the answers go, and how they are generated."""

import sys
from argparse import SUPPRESS
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.fields import option
from glm_peft.arguments.generation import GenerationArguments
from glm_peft.arguments.model import ModelArguments
from glm_peft.errors import UserError

PREDICTION_WORDS = {
    "usage": "python -m glm_peft.predict [CONFIG.yaml|CONFIG.json] [--flags]",
    "description": "Answers to a file or to one prompt, by a base alone or with an adapter. Flags win over the file.",
}

# Of training, and accepted where they are as they are by themselves, as in a configuration of both.
_REFUSED = (
    "prefix_init",
    "prefix_init_text",
    "prefix_init_std",
    "prefix_dropout",
    "save_tokenizer",
    "train_file",
    "validation_file",
    "max_train_samples",
    "max_eval_samples",
    "packing",
    "max_length",
    "train_on",
    "ignore_pad_token_for_loss",
)
# The adapter says them, or they change nothing; commands of published scripts have them.
_IGNORED = ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "overwrite_cache")
_IGNORED += ("peft_type", "lora_rank", "lora_alpha", "lora_dropout", "target_modules")
_OTHER_HELP = {
    **dict.fromkeys((*_REFUSED, *_IGNORED), SUPPRESS),
    "adapter_name_or_path": "Adapter to answer with: a folder or a Hub id of a PEFT adapter, or a published P-Tuning "
    "v2 checkpoint. None: the base alone.",
    "test_file": "Rows to answer (.json, .jsonl, .csv, .parquet); answers may be missing. None: --dataset_name.",
    "max_target_length": "Most tokens of an answer where --max_new_tokens and --val_max_target_length are not given.",
    "val_max_target_length": "Another name for --max_new_tokens. None: --max_target_length.",
}


def _with_other_help(kind: type, help_texts: Mapping[str, str]) -> type:
    """The dataclass with other help texts, or none, for some of its fields."""
    changed = [
        (own.name, own.type, field(default=own.default, metadata={**own.metadata, "help": help_texts[own.name]}))
        for own in fields(kind)
        if own.name in help_texts
    ]
    return make_dataclass(kind.__name__, changed, bases=(kind,))


@dataclass
class PredictArguments(GenerationArguments):
    """
    What to answer, and how.

    Raises:
        UserError: an argument of sampling is given without `do_sample`.
    """

    _argument_group_name = "prediction"

    output_dir: str | None = option(None, "Folder for generated_predictions.jsonl and predict_results.json.")
    prompt: str | None = option(None, "A question to answer on stdout, instead of --test_file.")
    resume: bool = option(False, "Go on with the stopped run that left its answers in --output_dir.")
    seed: int = option(42, "Seed of --do_sample; the same seed and batches give the same answers.")
    per_device_eval_batch_size: int | None = option(
        None,
        "Rows in a batch. None: 8 to 64, as many as have their keys and values in 1 GiB or 1/8 of the GPU's memory.",
    )
    max_batch_tokens: int | None = option(
        None,
        "Instead of a number of rows, most tokens in a batch: rows * --num_beams * (longest prompt + "
        "--max_new_tokens). None: --per_device_eval_batch_size.",
    )

    def __post_init__(self) -> None:
        for name in ("top_p", "top_k", "temperature"):
            value = getattr(self, name)
            if value is not None and not self.do_sample:
                raise UserError(f"--{name} {value} has no effect without --do_sample: add that or leave it out.")


PREDICTION_TYPES = (
    _with_other_help(ModelArguments, _OTHER_HELP),
    _with_other_help(DataArguments, _OTHER_HELP),
    PredictArguments,
)
"""What `python -m glm_peft.predict` takes; what is for training alone is not in its help."""


def parse_predict_arguments(
    argv: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, PredictArguments]:
    """
    The arguments of `python -m glm_peft.predict [CONFIG.yaml|CONFIG.json] [--flags]`; flags win over the file.

    Args:
        argv: the words after the command's name; `None` for those of this process.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, predict_args = parse_command(
        argv, PREDICTION_TYPES, {"generation_num_beams": "num_beams"}, **PREDICTION_WORDS
    )
    for arguments in (model_args, data_args):
        _refuse_training(arguments)
    _check_task(data_args, predict_args)
    return model_args, data_args, predict_args


def _refuse_training(arguments: Any) -> None:
    for own in fields(arguments):
        value = getattr(arguments, own.name)
        if own.name in _REFUSED and value != own.default:
            raise UserError(f"--{own.name} {value} is for training and has no effect on prediction: leave it out.")


def _check_task(data_args: DataArguments, predict_args: PredictArguments) -> None:
    source = data_args.test_file or data_args.dataset_name
    if predict_args.prompt is None and source is None:
        raise UserError('There is nothing to predict: give --test_file FILE, --dataset_name NAME, or --prompt "…".')
    if predict_args.prompt is not None and source is not None:
        raise UserError(f"--prompt is given beside {source}: give one prompt or many, not both.")
    if predict_args.prompt is not None and not predict_args.prompt.strip():
        raise UserError(f"--prompt {predict_args.prompt!r} is empty: give a question.")
    if predict_args.prompt is None and predict_args.output_dir is None:
        raise UserError("--output_dir is not given: name a folder for the predictions and the scores.")
