"""The arguments of `python -m glm_peft.inspect_adapter`: the adapters, and the base and rows to try one on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glm_peft.arguments.command_line import parse_command
from glm_peft.arguments.fields import option, require_at_least_one
from glm_peft.arguments.settings import split_words
from glm_peft.errors import UserError

INSPECTION_WORDS = {
    "usage": "python -m glm_peft.inspect_adapter ADAPTER [OTHER] [--flags]",
    "description": "What is in a prefix adapter or a published P-Tuning v2 checkpoint: sizes and norms, how far OTHER "
    "is from it, and, with --base and --test_file, the attention on it and the loss without each virtual token, or, "
    "with --base and --keep_file, how far it moves the base's answers to general prompts.",
}

_MOST_ADAPTERS = 2
_ROWS = ("test_file",)


@dataclass
class InspectArguments:
    """
    The base and the rows to try an adapter on, and what to write.

    Raises:
        UserError: a number is out of its range, or an argument lacks another one that it needs.
    """

    _argument_group_name = "inspection"

    base: str | None = option(
        None, "Base model of ADAPTER: a folder in a published layout or a Hub id.", "model_name_or_path"
    )
    test_file: str | None = option(
        None,
        "Rows with answers, on which attention and loss are measured with --base (.json, .jsonl, .csv, .tsv, "
        ".parquet).",
    )
    keep_file: str | None = option(
        None,
        "General prompts, or builtin: how far ADAPTER moves the answers of --base is measured, as in training.",
    )
    max_keep_samples: int = option(
        256, "Use only so many prompts of --keep_file; every other one is measured.", needs=("keep_file",)
    )
    # Few: of a prefix of 128 each row takes 131 passes through the base.
    max_predict_samples: int = option(
        16, "Use only so many rows; each takes a pass for every virtual token.", needs=_ROWS
    )
    prompt_column: str | None = option(None, "Column of the questions, as in training.", needs=_ROWS)
    response_column: str | None = option(None, "Column of the answers, as in training.", needs=_ROWS)
    history_column: str | None = option(
        None, "Column of earlier [question, answer] pairs, as in training.", needs=_ROWS
    )
    system_column: str | None = option(None, "Column of the system text of each row, as in training.", needs=_ROWS)
    source_prefix: str | None = option(None, "Text before every question. None: as ADAPTER was trained.", needs=_ROWS)
    system_text: str | None = option(
        None, "System text of rows that have none. None: as ADAPTER was trained.", needs=_ROWS
    )
    max_source_length: int | None = option(
        None, "Most tokens of a prompt; longer ones are cut. None: as ADAPTER was trained, or 1024.", needs=_ROWS
    )
    max_target_length: int | None = option(
        None, "Most tokens of an answer; longer ones are cut. None: as ADAPTER was trained, or 128.", needs=_ROWS
    )
    chat_format: Literal["chatglm", "chatglm2", "chatglm3", "glm4", "plain"] | None = option(
        None, "Chat format of the prompts, and the generation if no file says it. None: what the adapter or base says."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Precision of the base; auto: bfloat16 on GPUs and CPUs that have it, else float16 or, on CPUs, float32.",
        needs=(*_ROWS, "keep_file"),
    )
    per_device_eval_batch_size: int = option(
        8,
        "Virtual tokens that are masked at a time, each in a copy of the row; rows of --keep_file at a time.",
        needs=(*_ROWS, "keep_file"),
    )
    prune: int | None = option(
        None, "Write an adapter of so many virtual tokens, those that matter most, into --output_dir."
    )
    output_dir: str | None = option(
        None, "Folder for the numbers (inspection.json), the picture, and the adapter of --prune. None: only stdout."
    )

    def __post_init__(self) -> None:
        numbers = (
            "max_predict_samples",
            "max_keep_samples",
            "max_source_length",
            "max_target_length",
            "per_device_eval_batch_size",
        )
        require_at_least_one(self, *numbers, "prune")
        for name in ("test_file", "keep_file"):
            if getattr(self, name) and not self.base:
                raise UserError(f"--{name} {getattr(self, name)} needs the model that reads it: give --base too.")
        if self.prune and not (self.test_file and self.output_dir):
            raise UserError(
                f"--prune {self.prune} needs --base and --test_file, by which the virtual tokens are chosen, and "
                "--output_dir, where the adapter goes: give all three."
            )


def parse_inspect_arguments(argv: list[str] | None = None) -> tuple[list[str], InspectArguments]:
    """
    Parse the one or two adapters of `python -m glm_peft.inspect_adapter ADAPTER [OTHER] [--flags]`, and the flags.

    Raises:
        UserError: anything that is wrong with the arguments, told in one sentence.
    """
    adapters, flags = split_words(argv)
    (arguments,) = parse_command(flags, (InspectArguments,), **INSPECTION_WORDS)
    if not 1 <= len(adapters) <= _MOST_ADAPTERS:
        raise UserError(f"One adapter or two stand before the flags, found {len(adapters)}: name ADAPTER [OTHER].")
    if arguments.output_dir:
        _check_output_dir(arguments.output_dir, adapters)
    return adapters, arguments


def _check_output_dir(output_dir: str, adapters: list[str]) -> None:
    for adapter in adapters:  # --prune would write over the adapter that it reads
        if Path(output_dir).resolve() == Path(adapter).resolve():
            raise UserError(f"--output_dir {output_dir} is the folder of the adapter itself: give another one.")
