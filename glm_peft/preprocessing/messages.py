"""Read the messages of one row, whichever of the known shapes it has, and refuse what is no conversation."""

import math
from itertools import pairwise
from typing import Any

from glm_peft.models.shortening import Message
from glm_peft.models.tool_formats import is_call, tool_names
from glm_peft.preprocessing.columns import (
    IN_MESSAGES,
    TOOL_COLUMNS,
    Columns,
    find_other_form,
    holds_something,
)
from glm_peft.preprocessing.records import BadRow, Row, describe_value, quoted
from glm_peft.preprocessing.row_values import read_by, read_list, read_text, read_value, without_nulls
from glm_peft.preprocessing.tool_messages import (
    KEYS,
    RESULT_ROLES,
    ToolMessage,
    match_results,
    read_tool_message,
    read_tools,
    spoken_turns,
    with_tools,
)

# ShareGPT's names stand beside the published ones.
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_MESSAGE_KEYS = (("role", "content"), ("from", "value"))
_LOSS = ("loss", "weight")  # of a message: ChatGLM3's key and OpenAI's


def read_messages(row: Row, columns: Columns, needs_answer: bool) -> list[Message]:
    """
    Read a row as messages `{"role", "content"}`: maybe a system message, then user and assistant taking turns.

    Tools that it offers are a message behind the system text; calls and results stand within the assistant's turns.

    Args:
        needs_answer: whether the row must end with an answer; if not, an empty or absent one counts as none.

    Raises:
        BadRow: a column is missing, a value has the wrong type or is empty, or the roles do not take turns; a call of
            a tool cannot be read, or its answer does not follow.
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
    return with_tools(_with_system(row, columns, messages), _read_tools(row, columns))


def _items(row: Row, columns: Columns) -> list[Any]:
    return read_list(row, columns.messages, row.values[columns.messages], "conversation")


def _read_tools(row: Row, columns: Columns) -> str | None:
    """Read the tools of a row of messages: those of its column, or of its system message as GLM-4 has them."""
    if not columns.messages:
        return None
    items = _items(row, columns)
    offered = {name: row.values.get(name) for name in TOOL_COLUMNS}
    offered[columns.messages] = next((item["tools"] for item in items if item.get("tools")), None)
    read = {
        name: read_by(row, name, "wrong tools", read_tools, without_nulls(row, tools))
        for name, tools in offered.items()
    }
    found = {name: tools for name, tools in read.items() if tools}
    if len(set(found.values())) > 1:
        raise BadRow(row, f"the columns {quoted(found)} offer different tools; keep one of them", "two lists of tools")
    return next(iter(found.values()), None)


def find_unoffered_calls(row: Row, columns: Columns, messages: list[Message]) -> list[str]:
    """Return the places and names of calls of tools that a row does not offer."""
    if not columns.messages or not any(map(is_call, messages)):
        return []
    offered = tool_names(messages)
    calls = [one for one in _read_items(row, columns.messages, _items(row, columns)) if is_call(one.message)]
    return [
        f"{row.where}, message {call.number} ({call.message['metadata']!r})"
        for call in calls
        if call.message["metadata"] not in offered
    ]


def read_weights(row: Row, columns: Columns) -> dict[int, float]:
    """
    Read what the loss of a row's assistant messages, counted from 0, is multiplied by, where they say it.

    Returns:
        The values of `weight`; 0 and 1 for those of `loss`.

    Raises:
        BadRow: one of the two is of another kind or value, they contradict, they ask for loss on a question, or they
            weigh a part of a turn.
    """
    if not columns.messages:
        return {}
    items = _items(row, columns)
    loss = [_read_loss(row, columns.messages, number, item) for number, item in enumerate(items, 1)]
    if not any(carries is not None for carries in loss):
        return {}
    # One item may have become several messages: a thought and calls, or a call and what the tool said.
    read = [(one.message["role"] == "assistant", one.number) for one in _read_items(row, columns.messages, items)]
    answers = [number for is_answer, number in read if is_answer]
    problems = [
        f"message {number} asks for loss, which only answers of the assistant can carry"
        for number, carries in enumerate(loss, 1)
        if carries and number not in answers
    ]
    problems += [
        f"messages {one} and {other} are one turn, of which all messages carry loss or none, with one weight"
        for (is_answer, one), (follows, other) in pairwise(read)
        if is_answer and follows and len({1 if loss[n - 1] is None else loss[n - 1] for n in (one, other)}) > 1
    ]
    if problems:
        raise BadRow(row, f"column {columns.messages!r}: {problems[0]}", "wrong loss")
    return {place: loss[number - 1] for place, number in enumerate(answers) if loss[number - 1] is not None}


def _read_loss(row: Row, column: str, number: int, item: dict[str, Any]) -> float | None:
    """Return what the loss of a message is multiplied by, `None` where it does not say."""
    said = {key: item[key] for key in _LOSS if item.get(key) is not None}
    for key, value in said.items():
        # In Python, though not in JSON, true is 1.
        is_number = isinstance(value, int | float) and 0 <= value < math.inf
        if isinstance(value, bool) != (key == "loss") or not is_number:
            takes = "true or false" if key == "loss" else "a number of 0 or more"
            problem = f"{key!r} of message {number} must be {takes}, found {describe_value(value)}"
            raise BadRow(row, f"column {column!r}: {problem}", f"wrong {key}")
    values = {bool(value) for value in said.values()}
    if len(values) > 1:
        problem = f"'loss' and 'weight' of message {number} contradict each other; keep one of them"
        raise BadRow(row, f"column {column!r}: {problem}", "wrong loss")
    return float(said.get("weight", said["loss"])) if "loss" in said else said.get("weight")


def unread_values(row: Row, columns: Columns) -> dict[str, Any]:
    """Return what the row holds that is not read: columns, and keys of its messages."""
    left = {name: row.values[name] for name in columns.unread(row)}
    if columns.messages:
        messages = _items(row, columns)
        known = {key for keys in (*_MESSAGE_KEYS, KEYS, _LOSS) for key in keys}
        for number, item in enumerate(messages):
            named = {"name"} if item.get("role", item.get("from")) in RESULT_ROLES else set()
            for key in (key for key in item if key not in known | named and holds_something(item[key])):
                left.setdefault(f"{columns.messages}{IN_MESSAGES}{key}", {})[number] = item[key]
    return left


def _read_prompt(row: Row, columns: Columns) -> str:
    prompt = read_text(row, columns.prompt, read_value(row, columns.prompt), "prompt", may_be_empty=True)
    given = row.values.get(columns.input)
    if given not in (None, ""):  # joined as Alpaca's readers do
        prompt = "\n".join(filter(None, (prompt, read_text(row, columns.input, given, "input", may_be_empty=True))))
    return read_text(row, columns.prompt, prompt, "prompt")


def _with_system(row: Row, columns: Columns, messages: list[Message]) -> list[Message]:
    """Put the system text of the row's column before its messages."""
    system = read_value(row, columns.system) if columns.system in columns.required else row.values.get(columns.system)
    if system in (None, ""):
        return messages
    text = read_text(row, columns.system, system, "system text", may_be_empty=True)
    if messages[0]["role"] == "system":
        if messages[0]["content"] not in ("", text):
            problem = "the conversation has another system message; keep one of the two"
            raise BadRow(row, f"column {columns.system!r}: {problem}", "two system texts")
        messages = messages[1:]
    return [{"role": "system", "content": text}, *messages]


def _read_answer(row: Row, column: str | None, needs_answer: bool) -> str | None:
    if needs_answer:
        return read_text(row, column, read_value(row, column), "answer")
    answer = row.values.get(column)
    if answer is None:
        return None
    return read_text(row, column, answer, "answer", may_be_empty=True) if answer != "" else None


def _read_history(row: Row, columns: Columns) -> list[Message]:
    column = columns.history
    history = read_value(row, column) if column in columns.required else row.values.get(column)
    if history is None or history == "" or not columns.reads_history(row):
        return []
    messages = []
    for number, pair in enumerate(read_list(row, column, history, "history"), 1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            problem = f"a history is a list of [question, answer] pairs, found {describe_value(pair)} as pair {number}"
            raise BadRow(row, f"column {column!r}: {problem}", "wrong history")
        for role, text, name in zip(("user", "assistant"), pair, ("question", "answer"), strict=True):
            content = read_text(row, column, text, f"{name} of history pair {number}")
            messages.append({"role": role, "content": content})
    return messages


def _read_turns(row: Row, column: str, needs_answer: bool) -> list[Message]:
    items = read_list(row, column, read_value(row, column), "conversation")
    spoken = turns = _read_items(row, column, items)
    if any("metadata" in turn.message or turn.message["role"] == "observation" for turn in turns):
        turns = read_by(row, column, "unanswered call", match_results, turns)
        spoken = spoken_turns(turns)
    _check_turns(row, column, spoken, needs_answer)
    # A file to predict may keep the place of the answer empty.
    last = turns[-1].message
    if last["role"] == "assistant" and not last["content"].strip() and not needs_answer:
        turns.pop()
    for turn in turns:
        role, content = turn.message["role"], turn.message["content"]
        if role not in ("system", "observation"):  # a tool may have nothing to say
            read_text(row, column, content, f"{role} content of message {turn.number}")
    return [turn.message for turn in turns]


def _read_items(row: Row, column: str, items: list[Any]) -> list[ToolMessage]:
    turns: list[ToolMessage] = []
    for number, item in enumerate(items, 1):
        of_tool = []
        if isinstance(item, dict):
            item, following = without_nulls(row, item), items[number] if number < len(items) else None
            of_tool = read_by(row, column, "wrong call", read_tool_message, number, item, following)
            if item.get("tools") and not holds_something(item.get("content")):
                continue  # GLM-4's place for the tools, which is no system text
        turns += of_tool or [ToolMessage(number, _read_message(row, column, number, item))]
    return turns


def _read_message(row: Row, column: str, number: int, item: Any) -> Message:
    keys = isinstance(item, dict) and next(
        (keys for keys in _MESSAGE_KEYS if keys[0] in item and keys[1] in item), None
    )
    if not keys:
        problem = f"message {number} must have 'role' and 'content', found {describe_value(item)}"
        raise BadRow(row, f"column {column!r}: {problem}", "wrong message")
    role, content = item[keys[0]], item[keys[1]]
    if not isinstance(role, str) or role not in ROLES:
        known = quoted((*ROLES, "tool", "observation"))
        problem = f"the role of message {number} must be one of {known}, found {describe_value(role)}"
        raise BadRow(row, f"column {column!r}: {problem}", "unknown role")
    content = read_text(row, column, content, f"content of message {number}", may_be_empty=True)
    return {"role": ROLES[role], "content": content}


def _check_turns(row: Row, column: str, turns: list[ToolMessage], needs_answer: bool) -> None:
    """Check that user and assistant take turns after an optional system message, up to an answer if it is needed."""
    roles = [turn.message["role"] for turn in turns]
    first = 1 if roles[:1] == ["system"] else 0
    problem = None
    for number, turn in enumerate(turns[first:]):
        expected = ("user", "assistant")[number % 2]
        if turn.message["role"] != expected:
            problem = f"message {turn.number} has the role {turn.message['role']!r} where {expected!r} must follow"
            break
    else:
        if len(roles) == first:
            problem = f"the conversation has no question, found {describe_value(roles)} as its roles"
        elif needs_answer and roles[-1] != "assistant":
            problem = f"the last message must be the assistant's answer, found one of the role {roles[-1]!r}"
    if problem:
        raise BadRow(row, f"column {column!r}: {problem}", "roles out of turn")
