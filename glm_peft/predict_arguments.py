"""The arguments of prediction: which rows or prompt, where the answers go, and how they are generated."""

import os
import sys
from dataclasses import dataclass

from glm_peft.command_help import PREDICTION_WORDS
from glm_peft.command_line import parse_command
from glm_peft.errors import UserError
from glm_peft.shared_arguments import DataArguments, GenerationArguments, ModelArguments, option


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
    per_device_eval_batch_size: int = option(8, "Rows in a batch.")
    max_batch_tokens: int | None = option(
        None,
        "Instead of a number of rows, most tokens in a batch: rows * --num_beams * (longest prompt + "
        "--max_new_tokens). None: --per_device_eval_batch_size rows.",
    )

    def __post_init__(self) -> None:
        for name in ("top_p", "top_k", "temperature"):
            value = getattr(self, name)
            if value is not None and not self.do_sample:
                raise UserError(f"--{name} {value} has no effect without --do_sample: add that or leave it out.")


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
    types = (ModelArguments, DataArguments, PredictArguments)
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, predict_args = parse_command(
        argv, types, {"generation_num_beams": "num_beams"}, **PREDICTION_WORDS
    )
    _check_task(data_args, predict_args)
    return model_args, data_args, predict_args


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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"glm_peft.predict is one process, but {os.environ['WORLD_SIZE']} were started: use "
            "`accelerate launch glm_peft/train.py --do_predict` for several."
        )
