"""Find the columns of a file that hold the prompt, the answer, the history, the system text or the messages."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm_peft.arguments.data import DPO, DataArguments
from glm_peft.errors import UserError
from glm_peft.preprocessing.records import Row, quoted

# The names of the published scripts come first: GLM-4's and ChatGLM3's; ADGEN's and the chat data of ChatGLM-6B and
# ChatGLM2. Then Alpaca's, and those of other well-known data.
_MESSAGE_COLUMNS = ("messages", "conversations")
_PAIR_COLUMNS = (
    ("content", "summary"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("question", "answer"),
    ("prompt", "completion"),
    ("instruction", "response"),
    ("query", "response"),
    ("query", "answer"),
    ("instruction", "answer"),
    ("question", "response"),
    ("question", "output"),
    ("prompt", "output"),
    ("prompt", "answer"),
    ("input", "output"),
    ("input", "target"),
)
TOOL_COLUMNS = ("tools", "functions")  # read beside messages
_HISTORY, _SYSTEM = "history", ("system", "system_prompt")
_ALPACA_PROMPT, _ALPACA_INPUT = "instruction", "input"
_CHOSEN, _REJECTED = "chosen", "rejected"
_UNREAD = ("tools", "functions", "tool_calls", "context", "knowledge", "background", "documents")
_UNREAD += ("document", "passage", "image", "images", "audio", "audios", "video", "videos", "weight", "loss")
_UNREAD += ("choices", "options", "reasoning", "reasoning_content", "thinking")
# What reads a column that carries meaning, for the remark that it is not read.
_READERS = {
    **dict.fromkeys(_MESSAGE_COLUMNS, "read where --prompt_column is left out"),
    **dict.fromkeys((prompt for prompt, _ in _PAIR_COLUMNS), "--prompt_column reads it"),
    **dict.fromkeys((response for _, response in _PAIR_COLUMNS), "--response_column reads it"),
    _HISTORY: "--history_column reads it beside a --prompt_column",
    **dict.fromkeys(_SYSTEM, "--system_column reads it"),
    **dict.fromkeys(_UNREAD, "no flag reads it"),
    **dict.fromkeys((_CHOSEN, _REJECTED), "--objective dpo reads it"),
}
IN_MESSAGES = "[]."  # between the name of a column of messages and that of a key in them
_MOST_NAMED = 8  # columns in one remark
_EMPTY = (None, "", [], {}, "[]", "{}")  # the last two as CSV files and ShareGPT's tools have them


@dataclass(frozen=True)
class Columns:
    """
    Names of the columns to read: `messages`, or `prompt` with the others; `required` are those of flags.

    With `rejected`, `response` is the answer that is preferred to it, and `messages` end with the question; without
    `messages` and `prompt` both answers are whole conversations.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    input: str | None = None  # Alpaca's: what the instruction is about
    rejected: str | None = None
    required: tuple[str | None, ...] = ()
    form: str = ""  # what the log calls them; empty where flags name them

    @property
    def named(self) -> set[str]:
        """Return all names."""
        names = (self.messages, self.prompt, self.response, self.history, self.system, self.input, self.rejected)
        return {name for name in (*names, *(TOOL_COLUMNS if self.messages or self.rejected else ())) if name}

    def unread(self, row: Row) -> list[str]:
        """Return the columns of a row that hold something and are not read."""
        read = self.named
        names = [name for name, value in row.values.items() if name not in read and holds_something(value)]
        return names if self.reads_history(row) else [*names, self.history]

    def reads_history(self, row: Row) -> bool:
        """Whether the history of the row is read; a text under its name that no flag gives is something else."""
        history = row.values.get(self.history)
        is_text = isinstance(history, str) and history.lstrip()[:1] not in ("[", "")
        return not is_text or self.history in self.required

    def describe(self, names: Iterable[str]) -> str:
        """Write which of the columns that a file has are read, and as what."""
        found = [name for name in names if name in self.named]
        # The classic way to read half of a row: nobody should have to guess what became of it.
        joined = "; an input follows its instruction on a line of its own" if self.input in found else ""
        return f"reading the columns {quoted(found)}{f' as {self.form}' if self.form else ''}{joined}"


def find_columns(row: Row, data_args: DataArguments, needs_answer: bool) -> Columns:
    """
    Find the columns to read: those of the flags, else the well-known names that the file's first row has.

    History, system text and Alpaca's input are read wherever they have their well-known names.

    Raises:
        UserError: a column of the flags is missing (with the nearest name), or the row has no well-known name.
    """
    given = {
        "history": data_args.history_column,
        "system": data_args.system_column,
    }
    for name, column in given.items():
        if column:
            _require_column(row, column, f"--{name}_column; rows that have none may hold it empty")
    if _are_pairs(row, data_args, needs_answer):
        main = _pair_columns(row, data_args)
    elif data_args.prompt_column or data_args.response_column:
        main = _flagged_columns(row, data_args, needs_answer)
    else:
        main = _known_columns(row, needs_answer)
    if data_args.history_column and "messages" in main:
        raise UserError(
            f"{row.where}: --history_column {data_args.history_column} needs a prompt, but the column read is "
            f"{main['messages']!r}, whose conversations hold their earlier turns; leave the flag out, or give "
            "--prompt_column."
        )
    known = {
        "history": _HISTORY if "prompt" in main else None,
        "system": next((name for name in _SYSTEM if name in row.values), _SYSTEM[0]),
        "input": _ALPACA_INPUT if main.get("prompt") == _ALPACA_PROMPT else None,
    }
    taken = main.values()
    others = {role: given.get(role) or (name if name not in taken else None) for role, name in known.items()}
    form = "" if data_args.prompt_column else _name_form(row, main)
    return Columns(**main, **others, required=tuple(filter(None, given.values())), form=form)


def find_other_form(row: Row, columns: Columns) -> str | None:
    """Return the name of the form that a row has where it is not the one that the file's first row has."""
    if not columns.form:
        return None
    # An instruction may be empty beside its input; rows of tables hold null in the columns of other forms.
    held = {name: value for name, value in row.values.items() if value == "" or holds_something(value)}
    try:
        main = _known_columns(replace(row, values=held), needs_answer=False)
    except UserError:  # a row of no form is told by the column that it lacks
        return None
    asked = main.get("messages") or main["prompt"]
    return None if asked in (columns.messages, columns.prompt) else f"{_name_form(row, main)}, column {asked!r}"


def _name_form(row: Row, main: Mapping[str, Any]) -> str:
    if "rejected" in main:
        return "answers preferred and rejected"
    if "messages" in main:
        items = row.values[main["messages"]]
        has_from = isinstance(items, list) and isinstance(next(iter(items), None), dict) and "from" in items[0]
        return "ShareGPT's conversations" if has_from else "messages"
    return "Alpaca's" if main["prompt"] == _ALPACA_PROMPT else "question and answer"


def holds_something(value: Any) -> bool:
    """Whether the value of a column or of a message's key is not empty."""
    return value not in _EMPTY


def describe_unread(unread: Counter[str]) -> str | None:
    """
    Write which columns that hold something were not read, those that are known to carry meaning first.

    Args:
        unread: the number of rows in which each holds something.

    Returns:
        `None` where every column was read.
    """
    names = sorted(unread, key=lambda name: not _reader(name))
    shown = [f"{name!r} ({_rows(unread[name])}{_reader(name)})" for name in names[:_MOST_NAMED]]
    more = [f"{len(names) - _MOST_NAMED} more"] if len(names) > _MOST_NAMED else []
    return f"not read: {', '.join(shown + more)}" if names else None


def carries_meaning(names: Iterable[str]) -> bool:
    """Whether one of the columns is known to carry meaning."""
    return any(_reader(name) for name in names)


def _rows(number: int) -> str:
    return f"{number} row{'s' if number > 1 else ''}"


def _reader(name: str) -> str:
    key = name.rpartition(IN_MESSAGES)[2].lower()
    return f"; {_READERS[key]}" if key in _READERS else ""


def _flagged_columns(row: Row, data_args: DataArguments, needs_answer: bool) -> dict[str, Any]:
    prompt, response = data_args.prompt_column, data_args.response_column
    if not prompt or (needs_answer and not response):
        missing = "--response_column" if prompt else "--prompt_column"
        raise UserError(f"{row.file}: {missing} is not given; the columns found are {quoted(row.values)}.")
    _require_column(row, prompt, "--prompt_column")
    if needs_answer:
        _require_column(row, response, "--response_column")
    return {"prompt": prompt, "response": response}


def _are_pairs(row: Row, data_args: DataArguments, needs_answer: bool) -> bool:
    """Whether a row has two answers, of which one is preferred; a `UserError` where the objective needs other rows."""
    if needs_answer and data_args.objective == DPO:
        for name in (data_args.response_column or _CHOSEN, _REJECTED):
            _require_column(row, name, "--objective dpo")
        return True
    if not {_CHOSEN, _REJECTED} <= row.values.keys() or data_args.response_column or _has_answer(row):
        return False
    if needs_answer:
        raise UserError(
            f"{row.where}: 'chosen' and 'rejected' are answers of which one is preferred: give --objective dpo to "
            "learn that, or name the answers to learn with --prompt_column and --response_column."
        )
    return True


def _has_answer(row: Row) -> bool:
    """Whether the row has an answer beside the two."""
    messages = next((row.values[name] for name in _MESSAGE_COLUMNS if name in row.values), None)
    last = messages[-1] if isinstance(messages, list) and messages else {}
    is_answered = isinstance(last, dict) and last.get("role", last.get("from")) in ("assistant", "gpt")
    return is_answered or any({prompt, response} <= row.values.keys() for prompt, response in _PAIR_COLUMNS)


def _pair_columns(row: Row, data_args: DataArguments) -> dict[str, Any]:
    known = (*(prompt for prompt, _ in _PAIR_COLUMNS), *_MESSAGE_COLUMNS)
    asked = data_args.prompt_column or next((name for name in known if name in row.values), None)
    both = {"response": data_args.response_column or _CHOSEN, "rejected": _REJECTED}
    if asked is None:
        return both
    _require_column(row, asked, "--prompt_column")
    return {"messages" if holds_messages(row.values[asked]) else "prompt": asked, **both}


def holds_messages(value: Any) -> bool:
    """Whether a value is a message or a list of some, or the JSON text of such a list."""
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip().startswith("[{"))


def _known_columns(row: Row, needs_answer: bool) -> dict[str, Any]:
    for name in _MESSAGE_COLUMNS:
        if name in row.values:
            return {"messages": name}
    pairs = [(prompt, response) for prompt, response in _PAIR_COLUMNS if prompt in row.values]
    whole = [(prompt, response) for prompt, response in pairs if response in row.values]
    # Rows to predict need no answer; one that they have is the reference.
    found = whole or ([] if needs_answer else pairs)
    if found:
        return dict(zip(("prompt", "response"), found[0], strict=True))
    raise UserError(
        f"{row.where}: the columns found are {quoted(row.values)}; name yours with --prompt_column and "
        "--response_column, or use content and summary, prompt and response, instruction and output, question and "
        "answer, messages, or conversations."
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
