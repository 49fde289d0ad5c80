"""The flags of the data: which rows are read, and how they become examples."""

from dataclasses import dataclass
from typing import Literal

from glm_peft.arguments.fields import flags_with, option, require, require_at_least_one
from glm_peft.arguments.sources import read_train_sources
from glm_peft.arguments.transformers_flags import EVALUATION
from glm_peft.errors import UserError

# Facts that several flags share, see `option`.
_COLUMN = {"recipe": "changed", "public": "text", "reads": True, "needs": ("!prompt",)}
_LENGTH = {"recipe": "always", "encodes": True, "search": "varied", "shapes_prompt": True}
_TEXT = {"recipe": "changed", "public": "text", "encodes": True, "search": "varied", "shapes_prompt": True}

DPO = "dpo"
"""The value of `--objective` that learns which of two answers is preferred."""

_MAX_SOURCE_LENGTH, _MAX_TARGET_LENGTH = 1024, 128  # those of the published scripts


@dataclass(frozen=True)
class DataArguments:
    """
    The files, their columns, and how many tokens of a row are used.

    Raises:
        UserError: a number is out of its range.
    """

    _argument_group_name = "data"

    train_file: str | None = option(
        None,
        "Rows to train on (.json, .jsonl, .csv, .tsv, .parquet); several with weights as FILE:WEIGHT,FILE:WEIGHT, or "
        "NAME=FILE:WEIGHT. None: --dataset_name.",
        recipe="always",
        public="sources",
        joined=True,
        prediction="refused",
    )
    validation_file: str | None = option(
        None,
        "Rows for --do_eval, in the same form; several as NAME=FILE,NAME=FILE. None: --validation_split or "
        "--dataset_name.",
        prediction="refused",
        outdoes=("validation_split",),
    )
    validation_split: float | None = option(
        None,
        "Rows of training to hold out for --do_eval: a share below 1, or a number; rows that begin with the same "
        "question stay together. None: --validation_file or --dataset_name.",
        recipe="changed",
        prediction="refused",
        needs=("do_eval", "eval_strategy"),
        outdoes=("validation_file",),
    )
    stopping_strategy: Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"] = option(
        "first_exhausted",
        "When a mixture of several sources ends: when the first source has no more rows, or when every row has been "
        "used, with the rows of smaller sources repeated or not.",
        recipe="changed",
        prediction="refused",
        needs=("train_file",),
    )
    streaming: bool = option(
        False,
        "Read the training rows during training, for data larger than memory; needs --max_steps.",
        recipe="changed",
        prediction="refused",
        needs=("train_file", "dataset_name"),
    )
    shuffle_buffer_size: int = option(
        10_000,
        "Examples that --streaming holds and draws from at random; 1 keeps the order of the rows.",
        recipe="changed",
        prediction="refused",
        needs=("streaming",),
    )
    rows_seed: int = option(
        42,
        "Seed of --validation_split, and of the order in which several sources are mixed or a stream is shuffled.",
        recipe="changed",
        prediction="refused",
        needs=("validation_split", "train_file", "streaming"),
    )
    test_file: str | None = option(
        None,
        "Rows for --do_predict; answers may be missing. None: --dataset_name.",
        search="free",
        prediction="Rows to answer (.json, .jsonl, .csv, .tsv, .parquet); answers may be missing. None: "
        "--dataset_name.",
    )
    dataset_name: str | None = option(
        None,
        "Data set on the Hub for splits without a file. None: only files.",
        recipe="always",
        outdoes=("train_file", "validation_file", "test_file"),
    )
    dataset_config_name: str | None = option(
        None, "Configuration of --dataset_name. None: its default.", recipe="always", needs=("dataset_name",)
    )
    prompt_column: str | None = option(
        None,
        "Column of the questions. None: a well-known name such as content, prompt, instruction, question or messages.",
        **_COLUMN,
    )
    response_column: str | None = option(
        None, "Column of the answers. None: summary, response, output or answer.", **_COLUMN
    )
    history_column: str | None = option(
        None,
        "Column of earlier [question, answer] pairs. None: history, where there is one.",
        **_COLUMN,
    )
    system_column: str | None = option(
        None, "Column of the system text of each row. None: system or system_prompt, where there is one.", **_COLUMN
    )
    tools_file: str | None = option(
        None,
        "JSON file with a list of tools, for rows that offer none of their own. None: none.",
        recipe="changed",
        encodes=True,
        needs=("!prompt",),
    )
    # None in these until it is resolved, so that the adapter to load decides where nothing is given.
    source_prefix: str | None = option(
        None, "Text before every question. None: that of --adapter_name_or_path, or nothing.", **_TEXT
    )
    system_text: str | None = option(
        None,
        "System text of rows that have none of their own. None: that of --adapter_name_or_path, or nothing.",
        **_TEXT,
    )
    max_source_length: int | None = option(
        None,
        "Most tokens of a prompt, special ones counted; longer ones are cut. None: as --adapter_name_or_path was "
        "trained, or 1024.",
        **_LENGTH,
    )
    max_target_length: int | None = option(
        None,
        "Most tokens of an answer, its end token counted; longer ones are cut. None: as --adapter_name_or_path was "
        "trained, or 128.",
        prediction="Most tokens of an answer where --max_new_tokens and --val_max_target_length are not given. "
        "None: as --adapter_name_or_path was trained, or 128.",
        **_LENGTH,
    )
    val_max_target_length: int | None = option(
        None,
        "Most tokens of an answer in evaluation. None: --max_target_length.",
        encodes=True,
        shapes_prompt=True,
        needs=EVALUATION,
        outdoes=("max_new_tokens",),
        prediction="Another name for --max_new_tokens. None: --max_target_length.",
    )
    max_train_samples: int | None = option(
        None, "Use only so many rows to train on, of each source. None: all.", recipe="changed", prediction="refused"
    )
    max_eval_samples: int | None = option(
        None,
        "Use only so many rows to evaluate on, of each set. None: all.",
        prediction="refused",
        needs=("do_eval", "eval_strategy"),
    )
    max_predict_samples: int | None = option(
        None, "Use only so many rows to predict. None: all.", search="free", needs=("do_predict", "!prompt")
    )
    packing: bool | None = option(
        None,
        "true: pack all examples into rows of --max_length tokens, which the batch size then counts; false: never "
        "pack. None: pack the examples of each batch if that costs less than padding.",
        recipe="changed",
        prediction="refused",
        search="varied",
    )
    # Short, as attention under a dense mask costs more in one long row than in two short ones.
    max_length: int = option(
        512,
        "Most tokens of a row with --packing.",
        recipe="changed",
        prediction="refused",
        search="varied",
        needs=("packing",),
    )
    objective: Literal["sft", "dpo"] = option(
        "sft",
        "Training objective: sft, learn the answers; dpo, learn to prefer the chosen answer of a row to the rejected "
        "one.",
        recipe="changed",
        encodes=True,
        prediction="refused",
    )
    train_on: Literal["all", "last"] = option(
        "all",
        "In rows of messages, train on every answer or on the last one.",
        recipe="changed",
        encodes=True,
        prediction="refused",
        search="varied",
        needs=("objective!=dpo",),
    )
    # Off, as a file of which a third cannot be used should not pass unseen.
    skip_bad_rows: bool = option(
        False, "Leave out and count rows that cannot be used, instead of stopping at the first one.", recipe="changed"
    )
    ignore_pad_token_for_loss: bool = option(True, "Leave padding out of the loss.", prediction="refused")
    preprocessing_num_workers: int | None = option(
        None, "Processes that encode rows. None: only the main process.", search="free"
    )
    # Of the published scripts: kept so that their recipes run as they are.
    overwrite_cache: bool = option(
        False, "Changes nothing: rows are encoded anew in every run.", search="free", prediction="ignored"
    )
    metric_protocol: Literal["thudm", "chatglm3"] | None = option(
        None,
        "How scores are computed. thudm: BLEU-4 over characters, times 100, against references encoded, cut to "
        "--max_target_length tokens and decoded; chatglm3: BLEU-4 over words. None: as published for the chat format.",
        needs=("predict_with_generate", "do_predict", "!prompt"),
    )

    def __post_init__(self) -> None:
        left_open = {name for name in flags_with(self, "shapes_prompt") if getattr(self, name) is None}
        object.__setattr__(self, "left_open", left_open)  # for an adapter to decide, see `resolve_prompt`
        self._fill_in("max_source_length", _MAX_SOURCE_LENGTH)
        self._fill_in("max_target_length", _MAX_TARGET_LENGTH)
        self._fill_in("val_max_target_length", self.max_target_length)
        require_at_least_one(
            self,
            "max_source_length",
            "max_target_length",
            "val_max_target_length",
            "max_length",
            "max_train_samples",
            "max_eval_samples",
            "max_predict_samples",
            "preprocessing_num_workers",
            "shuffle_buffer_size",
        )
        self._check_sources()

    def _check_sources(self) -> None:
        wanted = self.validation_split
        require(
            wanted is None or 0 < wanted < 1 or (wanted >= 1 and wanted == int(wanted)),
            "--validation_split must be a share between 0 and 1, or a whole number of rows",
            wanted,
        )
        if wanted and self.validation_file:
            raise UserError(
                f"--validation_split {wanted:g} and --validation_file {self.validation_file} both give rows to "
                "evaluate on: leave one of them out."
            )
        if wanted and self.streaming:
            raise UserError(
                f"--validation_split {wanted:g} is drawn from all rows, which --streaming never has at once: give a "
                "--validation_file instead."
            )
        sources = read_train_sources(self.train_file)  # what is wrong with them is told before anything is read
        if self.stopping_strategy != "first_exhausted" and not sources:
            raise UserError(
                f"--stopping_strategy {self.stopping_strategy} needs several sources: give --train_file as "
                "FILE:WEIGHT,FILE:WEIGHT."
            )

    def _fill_in(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)  # a frozen dataclass; called from __post_init__ alone
