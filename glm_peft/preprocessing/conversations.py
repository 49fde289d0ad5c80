"""Turn rows of every known shape into conversations: checked messages, with the place that they came from."""

import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.splits import expand_splits, file_of
from glm_peft.errors import UserError
from glm_peft.preprocessing.columns import (
    IN_MESSAGES,
    Columns,
    carries_meaning,
    describe_missing_column,
    describe_unread,
    find_columns,
    holds_something,
)
from glm_peft.preprocessing.records import BadRow, Row, describe_value, quoted, read_hub_rows, read_rows

logger = logging.getLogger(__name__)

Message = dict[str, str]

# ShareGPT's names stand beside the published ones.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_OF_TOOLS = ("tool", "tool_call", "tool_response", "observation", "function", "function_call", "function_response")
_OF_TOOLS += ("ipython",)
_CALLS = ("tool_calls", "function_call", "tool_call_id")  # keys of a message
_LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """
    One row as messages `{"role", "content"}`: maybe a system message, then user and assistant taking turns.

    The last assistant message is the answer; a conversation that ends with the user's question has none.
    """

    messages: list[Message]
    where: str
    is_chat: bool  # a row of messages, where every assistant turn may be trained on, not one of columns
    number: int = 0  # of the line of the file on which it begins, or of the row where there are no lines; from 1
    unread: str = ""  # what the row holds in columns that are not read, as JSON

    @property
    def prompt(self) -> list[Message]:
        """Return the messages up to and including the last question."""
        return self.messages[:-1] if self.messages[-1]["role"] == "assistant" else self.messages

    @property
    def system(self) -> str | None:
        """Return the system text, or `None` where the row has none."""
        return self.messages[0]["content"] if self.messages[0]["role"] == "system" else None

    @property
    def answer(self) -> str | None:
        """Return the answer to the last question, or `None` where the row has none."""
        return self.messages[-1]["content"] if self.messages[-1]["role"] == "assistant" else None


@dataclass
class Split:
    """
    Conversations of one split, with the rows that were left out and the limit that stopped the reading.

    `unread` has the number of rows in which each column that was not read holds something.
    """

    name: str
    source: str
    conversations: list[Conversation] = field(default_factory=list)
    left_out: list[BadRow] = field(default_factory=list)
    limit: str | None = None
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def kind(self) -> str:
        """Return `train`, `validation` or `test`."""
        # Several files for evaluation are called `validation_NAME`.
        return self.name.partition("_")[0]

    @property
    def rows_read(self) -> int:
        """Return how many rows were used or left out."""
        return len(self.conversations) + len(self.left_out)

    def __len__(self) -> int:
        return len(self.conversations)

    def __iter__(self) -> Iterator[Conversation]:
        return iter(self.conversations)


def load_splits(data_args: DataArguments, splits: list[str]) -> dict[str, Split]:
    """
    Read the wanted splits from their files, or from the Hub data set where no file is given for a split.

    Args:
        data_args: the data arguments (`glm_peft.arguments.training.DataArguments`).
        splits: of `"train"`, `"validation"`, `"test"`. Rows of `test` need no answer. Where several files are given
            for evaluation, each has a name of its own instead of `"validation"`.

    Raises:
        UserError: a source is missing or cannot be read, columns are not found, or (unless `skip_bad_rows`) a row
            cannot be used; the message names file, line, column and what was found.
    """
    with paused_collection():
        return {name: _load_split(data_args, name) for name in expand_splits(splits, data_args)}


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause Python's collector of reference cycles while many rows are made."""
    # They all stay, and it would go through all of them again and again.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _load_split(data_args: DataArguments, name: str) -> Split:
    file = file_of(data_args, name)
    if file is None and data_args.dataset_name is None:
        raise UserError(f"There is no {name} data: give --{name}_file or --dataset_name.")
    rows = read_rows(file) if file else read_hub_rows(data_args.dataset_name, data_args.dataset_config_name, name)
    split = Split(name, file or f"{data_args.dataset_name} ({name})")
    limit = getattr(data_args, _LIMITS[split.kind])
    # islice ends the reading itself at the limit: the rest of a large file is neither read nor checked.
    split.conversations = list(islice(_conversations(rows, split, data_args), limit))
    if limit is not None and len(split) == limit:
        split.limit = f"--{_LIMITS[split.kind]} {limit}"
    if not split.conversations:
        raise UserError(_nothing_left(split))
    if split.unread:
        level = logging.WARNING if carries_meaning(split.unread) else logging.INFO
        logger.log(level, "%s: %s.", split.source, describe_unread(split.unread))
    return split


def _conversations(rows: Iterator[Row], split: Split, data_args: DataArguments) -> Iterator[Conversation]:
    columns, needs_answer = None, split.name != "test"
    for row in rows:
        try:
            if row.problem:
                raise BadRow(row, row.problem, "unreadable row")
            # By the first row that can be read; a later one without these columns is an error of that row.
            if columns is None:
                columns = find_columns(row, data_args, needs_answer)
            yield read_conversation(row, columns, needs_answer, split.unread)
        except BadRow as bad_row:
            if not data_args.skip_bad_rows:
                raise UserError(f"{bad_row}; correct it, or leave such rows out with --skip_bad_rows.") from None
            split.left_out.append(bad_row)


def _nothing_left(split: Split) -> str:
    if not split.left_out:
        return f"{split.source} holds no rows: it must hold at least one."
    return f"{split.source}: none of the {len(split.left_out)} rows can be used; the first: {split.left_out[0]}."


def read_conversation(
    row: Row, columns: Columns, needs_answer: bool, unread: Counter[str] | None = None
) -> Conversation:
    """
    Read a row as a conversation.

    Args:
        needs_answer: whether the row must end with an answer; if not, an empty or absent one counts as none.
        unread: counts the columns that hold something and are not read.

    Raises:
        BadRow: a column is missing, a value has the wrong type or is empty, or the roles do not take turns.
    """
    if columns.messages:
        messages = _read_messages(row, columns.messages, needs_answer)
    else:
        messages = _read_history(row, columns)
        messages.append({"role": "user", "content": _read_prompt(row, columns)})
        answer = _read_answer(row, columns.response, needs_answer)
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    messages = _with_system(row, columns, messages)
    left = _unread_values(row, columns)
    if unread is not None:
        unread.update(left.keys())
    as_json = json.dumps(left, default=str) if left else ""
    return Conversation(messages, row.where, is_chat=bool(columns.messages), unread=as_json, number=row.number)


def _unread_values(row: Row, columns: Columns) -> dict[str, Any]:
    """Return what the row holds that is not read: columns, and keys of its messages."""
    left = {name: row.values[name] for name in columns.unread(row)}
    if columns.messages:
        messages = _list(row, columns.messages, row.values[columns.messages], "conversation")
        known = {key for keys in _MESSAGE_KEYS for key in keys}
        for number, item in enumerate(messages):
            for key in filter(lambda key: key not in known and holds_something(item[key]), item):
                left.setdefault(f"{columns.messages}{IN_MESSAGES}{key}", {})[number] = item[key]
    return left


def _read_prompt(row: Row, columns: Columns) -> str:
    prompt = _text(row, columns.prompt, _value(row, columns.prompt), "prompt", may_be_empty=True)
    given = row.values.get(columns.input)
    if given not in (None, ""):  # joined as Alpaca's readers do
        prompt = "\n".join(filter(None, (prompt, _text(row, columns.input, given, "input", may_be_empty=True))))
    return _text(row, columns.prompt, prompt, "prompt")


def _with_system(row: Row, columns: Columns, messages: list[Message]) -> list[Message]:
    """Put the system text of the row's column before its messages."""
    system = _value(row, columns.system) if columns.system in columns.required else row.values.get(columns.system)
    if system in (None, ""):
        return messages
    text = _text(row, columns.system, system, "system text", may_be_empty=True)
    if messages[0]["role"] == "system":
        if messages[0]["content"] not in ("", text):
            problem = "the conversation has another system message; keep one of the two"
            raise BadRow(row, f"column {columns.system!r}: {problem}", "two system texts")
        messages = messages[1:]
    return [{"role": "system", "content": text}, *messages]


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        raise BadRow(row, describe_missing_column(row, column), "missing column")
    return row.values[column]


def _text(row: Row, column: str, value: Any, name: str, may_be_empty: bool = False) -> str:
    """Return the value if it is text, or raise a `BadRow` that calls it `name`."""
    if not isinstance(value, str):
        problem = f"column {column!r}: the {name} must be text, found {describe_value(value)}"
        raise BadRow(row, problem, "wrong type")
    if not may_be_empty and not value.strip():
        raise BadRow(row, f"column {column!r}: the {name} is empty, found {value!r}", f"empty {name.split(' of ')[0]}")
    # JSON can spell half of a surrogate pair, which no tokenizer and no output file can encode.
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = ascii(value[error.start])
        problem = f"column {column!r}: the {name} holds {found}, half of a character that cannot be encoded"
        raise BadRow(row, problem, "not text") from error
    return value


def _read_answer(row: Row, column: str | None, needs_answer: bool) -> str | None:
    if needs_answer:
        return _text(row, column, _value(row, column), "answer")
    answer = row.values.get(column)
    if answer is None:
        return None
    return _text(row, column, answer, "answer", may_be_empty=True) if answer != "" else None


def _read_history(row: Row, columns: Columns) -> list[Message]:
    column = columns.history
    history = _value(row, column) if column in columns.required else row.values.get(column)
    if history is None or history == "" or not columns.reads_history(row):
        return []
    messages = []
    for number, pair in enumerate(_list(row, column, history, "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            problem = f"a history is a list of [question, answer] pairs, found {describe_value(pair)} as pair {number}"
            raise BadRow(row, f"column {column!r}: {problem}", "wrong history")
        for role, text, name in zip(("user", "assistant"), pair, ("question", "answer"), strict=True):
            content = _text(row, column, text, f"{name} of history pair {number}")
            messages.append({"role": role, "content": content})
    return messages


def _list(row: Row, column: str, value: Any, name: str) -> list[Any]:
    """Return the value if it is a list, or the list that its text is in JSON."""
    if isinstance(value, str):  # as a CSV file holds it
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            problem = f"the {name} is text that is not JSON ({error.msg}), found {describe_value(value)}"
            raise BadRow(row, f"column {column!r}: {problem}", f"wrong {name}") from error
    if not isinstance(value, list):
        raise BadRow(
            row, f"column {column!r}: the {name} must be a list, found {describe_value(value)}", f"wrong {name}"
        )
    return value


def _read_messages(row: Row, column: str, needs_answer: bool) -> list[Message]:
    items = _list(row, column, _value(row, column), "conversation")
    messages = [_read_message(row, column, number, item) for number, item in enumerate(items, 1)]
    _check_turns(row, column, [message["role"] for message in messages], needs_answer)
    # A file to predict may keep the place of the answer empty.
    blank_answer = messages[-1]["role"] == "assistant" and not messages[-1]["content"].strip()
    if blank_answer and not needs_answer:
        messages.pop()
    for number, message in enumerate(messages, 1):
        if message["role"] != "system":
            _text(row, column, message["content"], f"{message['role']} content of message {number}")
    return messages


def _read_message(row: Row, column: str, number: int, item: Any) -> Message:
    # Exports give every message the keys of a call, null where there is none.
    if isinstance(item, dict) and (
        any(holds_something(item.get(key)) for key in _CALLS)
        or any(item.get(keys[0]) in _OF_TOOLS for keys in _MESSAGE_KEYS)
    ):
        problem = f"message {number} calls a tool or is a tool's answer, and conversations with tools are not read yet"
        raise BadRow(row, f"column {column!r}: {problem}", "tool call")
    keys = isinstance(item, dict) and next(
        (keys for keys in _MESSAGE_KEYS if keys[0] in item and keys[1] in item), None
    )
    if not keys:
        problem = f"message {number} must have 'role' and 'content', found {describe_value(item)}"
        raise BadRow(row, f"column {column!r}: {problem}", "wrong message")
    role, content = item[keys[0]], item[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        problem = f"the role of message {number} must be one of {quoted(ROLES)}, found {describe_value(role)}"
        raise BadRow(row, f"column {column!r}: {problem}", "unknown role")
    content = _text(row, column, content, f"content of message {number}", may_be_empty=True)
    return {"role": ROLES[role], "content": content}


def _check_turns(row: Row, column: str, roles: list[str], needs_answer: bool) -> None:
    """Check that user and assistant take turns after an optional system message, up to an answer if it is needed."""
    first = 1 if roles[:1] == ["system"] else 0
    problem = None
    for number, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            problem = f"message {first + number + 1} has the role {role!r} where {expected!r} must follow"
            break
    else:
        if len(roles) == first:
            problem = f"the conversation has no question, found {describe_value(roles)} as its roles"
        elif needs_answer and roles[-1] != "assistant":
            problem = f"the last message must be the assistant's answer, found one of the role {roles[-1]!r}"
    if problem:
        raise BadRow(row, f"column {column!r}: {problem}", "roles out of turn")
