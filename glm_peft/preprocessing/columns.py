"""Find the columns of a file that hold the prompt, the answer, the history or the messages."""

import difflib
import logging
from dataclasses import dataclass

from glm_peft.arguments.data import DataArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.records import Row, quoted

logger = logging.getLogger(__name__)

# The names of the published scripts: GLM-4's and ChatGLM3's; ADGEN's and the chat data of ChatGLM-6B and ChatGLM2.
_MESSAGE_COLUMNS = ("messages", "conversations")
_PAIR_COLUMNS = (("content", "summary"), ("prompt", "response"))


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read: `messages` alone, or `prompt` with `response` and `history`."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    history_required: bool = False  # a flag names it, so a row without it is an error


def find_columns(row: Row, data_args: DataArguments, needs_answer: bool) -> Columns:
    """
    Find the columns to read: those of the flags, else the well-known names that the file's first row has.

    Raises:
        UserError: a column of the flags is missing (with the nearest name), or the row has no well-known name.
    """
    flags = (data_args.prompt_column, data_args.response_column)
    columns = _flagged_columns(row, data_args, needs_answer) if any(flags) else _known_columns(row, needs_answer)
    if data_args.history_column and columns.prompt:
        _require_column(row, data_args.history_column, "--history_column")
        columns = Columns(None, columns.prompt, columns.response, data_args.history_column, history_required=True)
    return columns


def _flagged_columns(row: Row, data_args: DataArguments, needs_answer: bool) -> Columns:
    prompt, response = data_args.prompt_column, data_args.response_column
    if not prompt or (needs_answer and not response):
        missing = "--response_column" if prompt else "--prompt_column"
        raise UserError(f"{row.file}: {missing} is not given; the columns found are {quoted(row.values)}.")
    _require_column(row, prompt, "--prompt_column")
    if needs_answer:
        _require_column(row, response, "--response_column")
    return Columns(prompt=prompt, response=response)


def _known_columns(row: Row, needs_answer: bool) -> Columns:
    for name in _MESSAGE_COLUMNS:
        if name in row.values:
            logger.info("%s: reading the conversations of the column %r.", row.file, name)
            return Columns(messages=name)
    for prompt, response in _PAIR_COLUMNS:
        # Rows to predict need no answer; one that they have is the reference.
        if prompt in row.values and (response in row.values or not needs_answer):
            history = "history" if prompt == "prompt" else None
            names = quoted(filter(None, (prompt, response, history)))
            logger.info("%s: no --prompt_column given; reading the well-known columns %s.", row.file, names)
            return Columns(prompt=prompt, response=response, history=history)
    raise UserError(
        f"{row.where}: the columns found are {quoted(row.values)}; name yours with --prompt_column and "
        "--response_column, or use content and summary, prompt and response, messages, or conversations."
    )


def _require_column(row: Row, name: str, flag: str) -> None:
    if name not in row.values:
        raise UserError(f"{row.where}: {describe_missing_column(row, name)} ({flag}).")


def describe_missing_column(row: Row, name: str) -> str:
    """Write that the row lacks the column, which of its columns is nearest, and which there are."""
    # difflib counts "Prompt" and "prompt" as different in a letter, which should be the nearest of all.
    by_lower_case = {str(column).lower(): column for column in row.values}
    near = difflib.get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.4)
    nearest = f"the nearest is {by_lower_case[near[0]]!r}, " if near else ""
    return f"there is no column {name!r}, {nearest}the columns found are {quoted(row.values) or 'none'}"
