"""The flags of the data: which rows are read, and how they become examples."""

from dataclasses import dataclass
from typing import Literal

from glm_peft.arguments.fields import option, require_at_least_one
from glm_peft.arguments.transformers_flags import EVALUATION

# Facts that several flags share, see `option`.
_COLUMN = {"recipe": "changed", "public": "text", "reads": True, "needs": ("!prompt",)}
_LENGTH = {"recipe": "always", "encodes": True, "search": "varied"}


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
        "Rows to train on (.json, .jsonl, .csv, .parquet). None: --dataset_name.",
        recipe="always",
        prediction="refused",
    )
    validation_file: str | None = option(
        None,
        "Rows for --do_eval, in the same form; several as NAME=FILE,NAME=FILE. None: --dataset_name.",
        prediction="refused",
    )
    test_file: str | None = option(
        None,
        "Rows for --do_predict; answers may be missing. None: --dataset_name.",
        search="free",
        prediction="Rows to answer (.json, .jsonl, .csv, .parquet); answers may be missing. None: --dataset_name.",
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
    source_prefix: str | None = option(
        None,
        "Text before every question. None: nothing.",
        recipe="changed",
        public="text",
        encodes=True,
        search="varied",
    )
    # The lengths' defaults are those of the published scripts.
    max_source_length: int = option(
        1024, "Most tokens of a prompt, special ones counted; longer ones are cut.", **_LENGTH
    )
    max_target_length: int = option(
        128,
        "Most tokens of an answer, its end token counted; longer ones are cut.",
        prediction="Most tokens of an answer where --max_new_tokens and --val_max_target_length are not given.",
        **_LENGTH,
    )
    val_max_target_length: int | None = option(
        None,
        "The same in evaluation. None: --max_target_length.",
        encodes=True,
        needs=EVALUATION,
        outdoes=("max_new_tokens",),
        prediction="Another name for --max_new_tokens. None: --max_target_length.",
    )
    max_train_samples: int | None = option(
        None, "Use only so many rows to train on. None: all.", recipe="changed", prediction="refused"
    )
    max_eval_samples: int | None = option(
        None,
        "Use only so many rows to evaluate on. None: all.",
        prediction="refused",
        needs=("do_eval", "eval_strategy"),
    )
    max_predict_samples: int | None = option(
        None, "Use only so many rows to predict. None: all.", search="free", needs=("do_predict", "!prompt")
    )
    packing: bool | None = option(
        None,
        "Train on rows of several examples, which the batch size then counts. None: put the examples of a batch into "
        "fewer rows where that costs less than padding.",
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
    train_on: Literal["all", "last"] = option(
        "all",
        "In rows of messages, train on every answer or on the last one.",
        recipe="changed",
        encodes=True,
        prediction="refused",
        search="varied",
    )
    # Off, as a file of which a third cannot be used should not pass unseen.
    skip_bad_rows: bool = option(
        False, "Leave out and count rows that cannot be used, instead of stopping there.", recipe="changed"
    )
    ignore_pad_token_for_loss: bool = option(True, "Whether padding has no part in the loss.", prediction="refused")
    preprocessing_num_workers: int | None = option(
        None, "Processes that encode rows. None: this one alone.", search="free"
    )
    # Of the published scripts: kept so that their recipes run as they are.
    overwrite_cache: bool = option(
        False, "Changes nothing: rows are encoded anew in every run.", search="free", prediction="ignored"
    )
    metric_protocol: Literal["thudm", "chatglm3"] | None = option(
        None,
        "How scores are taken. thudm: BLEU-4 over characters, times 100, against answers encoded, cut to "
        "--max_target_length tokens and decoded; chatglm3: over words. None: as published for the chat format.",
        needs=("predict_with_generate", "do_predict", "!prompt"),
    )

    def __post_init__(self) -> None:
        if self.val_max_target_length is None:  # as in the published scripts
            object.__setattr__(self, "val_max_target_length", self.max_target_length)
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
        )
