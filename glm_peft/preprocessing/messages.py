"""Read the messages of one row, whichever of the known shapes it has, and refuse what is no conversation."""

import json
from typing import Any

from glm_peft.models.shortening import Message
from glm_peft.preprocessing.columns import (
    IN_MESSAGES,
    Columns,
    describe_missing_column,
    find_other_form,
    holds_something,
)
from glm_peft.preprocessing.records import BadRow, Row, describe_value, quoted

# ShareGPT's names stand beside the published ones.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_OF_TOOLS = ("tool", "tool_call", "tool_response", "observation", "function", "function_call", "function_response")
_OF_TOOLS += ("ipython",)
_LOSS = ("loss", "weight")  # of a message: ChatGLM3's key and OpenAI's
_CALLS = ("tool_calls", "function_call", "tool_call_id")  # keys of a message


def read_messages(row: Row, columns: Columns, needs_answer: bool) -> list[Message]:
    """
    Read a row as messages `{"role", "content"}`: maybe a system message, then user and assistant taking turns.

    Args:
        needs_answer: whether the row must end with an answer; if not, an empty or absent one counts as none.

    Raises:
        BadRow: a column is missing, a value has the wrong type or is empty, or the roles do not take turns.
    """
    if other := find_other_form(row, columns):
        problem = f"this row is of another form ({other}) than the first ({columns.form}): give each a file of its own"
        raise BadRow(row, problem, "another form")
    if columns.messages:
        messages = _read_turns(row, columns.messages, needs_answer)
    else:
        messages = _read_history(row, columns)
        messages.append({"role": "user", "content": _read_prompt(row, columns)})
        answer = _read_answer(row, columns.response, needs_answer)
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
    return _with_system(row, columns, messages)


def read_muted(row: Row, columns: Columns) -> frozenset[int]:
    """
    Read which of a row's assistant messages, counted from 0, are context only, by `"loss": false` or `"weight": 0`.

    Raises:
        BadRow: one of the two is of another kind or value, they contradict, or they ask for loss on a question.
    """
    if not columns.messages:
        return frozenset()
    items = _list(row, columns.messages, row.values[columns.messages], "conversation")
    loss = [_read_loss(row, columns.messages, number, item) for number, item in enumerate(items, 1)]
    answers = [carries for item, carries in zip(items, loss, strict=True) if _is_answer(item)]
    return frozenset(number for number, carries in enumerate(answers) if carries is False)


def _read_loss(row: Row, column: str, number: int, item: dict[str, Any]) -> bool | None:
    """Return whether a message is to carry loss, `None` where it does not say."""
    said = {key: item[key] for key in _LOSS if item.get(key) is not None}
    for key, value in said.items():
        # In Python, though not in JSON, true is 1.
        if isinstance(value, bool) != (key == "loss") or value not in (0, 1):
            takes = "true or false" if key == "loss" else "0 or 1, loss off or on, as no other weighs it here"
            problem = f"{key!r} of message {number} must be {takes}, found {describe_value(value)}"
            raise BadRow(row, f"column {column!r}: {problem}", f"wrong {key}")
    values = {bool(value) for value in said.values()}
    if len(values) > 1:
        problem = f"'loss' and 'weight' of message {number} contradict each other; keep one of them"
        raise BadRow(row, f"column {column!r}: {problem}", "wrong loss")
    if values == {True} and not _is_answer(item):
        problem = f"message {number} asks for loss, which only answers of the assistant can carry"
        raise BadRow(row, f"column {column!r}: {problem}", "wrong loss")
    return next(iter(values), None)


def _is_answer(item: dict[str, Any]) -> bool:
    return ROLES.get(item[_keys_of(item)[0]]) == "assistant"


def _keys_of(item: Any) -> tuple[str, str] | None:
    pairs = _MESSAGE_KEYS if isinstance(item, dict) else ()
    return next((keys for keys in pairs if keys[0] in item and keys[1] in item), None)


def unread_values(row: Row, columns: Columns) -> dict[str, Any]:
    """Return what the row holds that is not read: columns, and keys of its messages."""
    left = {name: row.values[name] for name in columns.unread(row)}
    if columns.messages:
        messages = _list(row, columns.messages, row.values[columns.messages], "conversation")
        known = {key for keys in (*_MESSAGE_KEYS, _LOSS) for key in keys}
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


def _read_turns(row: Row, column: str, needs_answer: bool) -> list[Message]:
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
    keys = _keys_of(item)
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
