"""
Read tools, calls of them and what they said, in OpenAI's form, ChatGLM3's and GLM-4's own, and ShareGPT's.

All become the messages that `glm_peft.models.tool_formats` describes. What is wrong is raised as a `ValueError` with a
sentence, to which files add the row and the server the message.
"""

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message
from glm_peft.models.tool_formats import is_call, read_python_arguments
from glm_peft.preprocessing.records import describe_value
from glm_peft.reporting.text_files import read_text

RESULT_ROLES = ("tool", "observation", "function", "tool_response", "function_response", "ipython")
_CALL_ROLES = ("function_call", "tool_call")
_CALL_KEYS = ("tool_calls", "function_call", "metadata")
KEYS = (*_CALL_KEYS, "tool_call_id", "tools", "parameters", "observation")
"""Keys of a message that are read here."""


class ToolMessage(NamedTuple):
    """
    Message of a conversation with tools.

    Args:
        number: of the message in the row, from 1, out of which it was made.
        message: as the chat formats take it.
        call_id: by which a call and its result are matched; `None` where they are in order.
    """

    number: int
    message: Message
    call_id: str | None = None


def read_tools(tools: Any) -> str | None:
    """
    Read a list of tools, bare function objects or OpenAI's with their type, as the content of a message of tools.

    Raises:
        ValueError: they are no such list, or a name is missing or comes twice.
    """
    tools = _decoded(tools, "the tools") if tools else None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"the tools must be a list, found {describe_value(tools)}")
    functions = [_read_function(number, tool) for number, tool in enumerate(tools, 1)]
    names = [function["name"] for function in functions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"the tool {twice!r} is named twice; give each tool a name of its own")
    return _as_json(functions, "the tools")


def read_tools_file(file: str | None) -> str | None:
    """
    Read the tools of `--tools_file`, as the content of a message of tools.

    Raises:
        UserError: the file cannot be read, or holds no tools.
    """
    if file is None:
        return None
    if not Path(file).is_file():
        raise UserError(f"--tools_file {file}: there is no such file.")
    try:
        tools = read_tools(read_text(file))
    except ValueError as error:
        raise UserError(f"--tools_file {file}: {error}.") from None
    if tools is None:
        raise UserError(f"--tools_file {file} holds no tools: it must hold a list of at least one.")
    return tools


def _read_function(number: int, tool: Any) -> dict[str, Any]:
    function = tool
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict) and tool.get("type") in (None, "function"):
        function = tool["function"]
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ValueError(f"tool {number} must be an object with the name of a function, found {describe_value(tool)}")
    return function


def read_tool_message(number: int, item: dict[str, Any], following: Any = None) -> list[ToolMessage]:
    """
    Read a message that calls tools, is a tool's answer, or both in one as ChatGLM3's training data has it.

    Args:
        number: of the message, from 1.
        item: the message, under whatever role.
        following: the next message, which tells a call from an answer that is a JSON object.

    Returns:
        Nothing for an ordinary message.

    Raises:
        ValueError: a call has no name or no JSON object of arguments.
    """
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if role == "tool" and "parameters" in item:
        call = _make_call(number, item.get("name"), item["parameters"])
        return [call, _make_result(number, item.get("observation"))]
    if role in RESULT_ROLES:
        return [_make_result(number, content, item.get("tool_call_id"))]
    if role in _CALL_ROLES:
        return [_read_named(number, content)]
    if role not in ("assistant", "gpt"):
        if any(item.get(key) for key in _CALL_KEYS):
            raise ValueError(f"message {number} calls a tool, which only the assistant can, not the role {role!r}")
        return []
    return _read_calls(number, item, content, following)


def _read_calls(number: int, item: dict[str, Any], content: Any, following: Any) -> list[ToolMessage]:
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError(f"the tool_calls of message {number} must be a list, found {describe_value(calls)}")
    if item.get("function_call"):
        calls = [*calls, {"function": item["function_call"]}]
    if calls:
        thought = [] if content in (None, "") else [_make_thought(number, content)]
        return thought + [_read_openai_call(number, call) for call in calls]
    if metadata := item.get("metadata"):  # GLM-4's form, and that of ChatGLM3's history
        arguments = read_python_arguments(content) if isinstance(content, str) and "tool_call(" in content else None
        return [_make_call(number, metadata, content if arguments is None else arguments)]
    if isinstance(following, dict) and following.get("role", following.get("from")) in RESULT_ROLES:
        # As the sample in GLM-4's README has it, though its model never writes it so.
        try:
            return [_read_named(number, content)]
        except ValueError:
            return []
    return []


def _read_openai_call(number: int, call: Any) -> ToolMessage:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError(f"a call of message {number} must have a function, found {describe_value(call)}")
    return _make_call(number, function.get("name"), function.get("arguments"), call.get("id"))


def _read_named(number: int, content: Any) -> ToolMessage:
    """Read a call that is one JSON object of name and arguments."""
    call = _decoded(content, f"the name and arguments in message {number}")
    if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys():
        raise ValueError(f"the call in message {number} must have name and arguments, found {describe_value(content)}")
    return _make_call(number, call["name"], call["arguments"])


def _make_call(number: int, name: Any, arguments: Any, call_id: Any = None) -> ToolMessage:
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise ValueError(f"a call in message {number} must name a tool, found {describe_value(name)}")
    what = f"the arguments of the call of {name!r} in message {number}"
    values = _decoded(arguments, what)
    if not isinstance(values, dict):
        raise ValueError(f"{what} must be a JSON object, found {describe_value(arguments)}")
    written = _as_json(values, what)
    # A text stays as it is, as GLM-4's scripts leave it.
    content = arguments.strip() if isinstance(arguments, str) else written
    return ToolMessage(number, {"role": "assistant", "content": content, "metadata": name}, _read_id(call_id))


def _make_thought(number: int, content: Any) -> ToolMessage:
    if not isinstance(content, str):
        raise ValueError(f"the content of message {number} must be text, found {describe_value(content)}")
    return ToolMessage(number, {"role": "assistant", "content": content})


def _make_result(number: int, content: Any, call_id: Any = None) -> ToolMessage:
    if isinstance(content, list) and content and all(isinstance(part, dict) and "text" in part for part in content):
        content = "".join(map(str, (part["text"] for part in content)))
    if not isinstance(content, str):  # as in ChatGLM3's script; what is missing is null
        content = _as_json(content, f"the content of message {number}")
    return ToolMessage(number, {"role": "observation", "content": content}, _read_id(call_id))


def _read_id(call_id: Any) -> str | None:
    return call_id if isinstance(call_id, str) and call_id else None


def _decoded(value: Any, what: str) -> Any:
    """Return the value, or what its text is in JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        reason = error if type(error) is ValueError else type(error).__name__  # ours, or that of Python's parser
        raise ValueError(f"{what} are no JSON ({reason}), found {describe_value(value)}") from None


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON, of which Python would keep the last value of a name that stands there twice."""
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in an object")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _as_json(value: Any, what: str) -> str:
    """Write a value as Python's `json` does, without escapes; it can be encoded as text, too."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} cannot be written as JSON, found {describe_value(value)}") from error
    return text


def match_results(messages: Sequence[ToolMessage]) -> list[ToolMessage]:
    """
    Put the results of several calls into the order of the calls.

    Raises:
        ValueError: a result has no call, or a call that is not the last message has no result.
    """
    matched: list[ToolMessage] = []
    calls: list[ToolMessage] = []
    for kind, group in groupby(messages, _kind):
        found = list(group)
        if kind == "result":
            found = _in_order(calls, found)
        elif calls:
            _refuse_unanswered(calls[0])
        calls = found if kind == "call" else []
        matched += found
    return matched


def _kind(one: ToolMessage) -> str:
    return "call" if is_call(one.message) else "result" if one.message["role"] == "observation" else "other"


def _in_order(calls: list[ToolMessage], results: list[ToolMessage]) -> list[ToolMessage]:
    if not calls:
        raise ValueError(f"message {results[0].number} is a tool's answer, and no call stands before it")
    ids = [call.call_id for call in calls]
    if all(ids) and all(result.call_id for result in results):
        by_id = {result.call_id: result for result in results}
        unknown = next((result for result in results if result.call_id not in ids), None)
        if unknown or len(by_id) < len(results):
            wrong = unknown or results[-1]
            raise ValueError(
                f"message {wrong.number} answers the call {wrong.call_id!r}, and each of {', '.join(map(repr, ids))} "
                "needs one answer"
            )
        missing = next((call for call in calls if call.call_id not in by_id), None)
        if missing:
            _refuse_unanswered(missing)
        return [by_id[call_id] for call_id in ids]
    if len(results) > len(calls):
        raise ValueError(f"message {results[len(calls)].number} is a tool's answer, and no call stands before it")
    if len(results) < len(calls):
        _refuse_unanswered(calls[len(results)])
    return results


def _refuse_unanswered(call: ToolMessage) -> None:
    name = call.message["metadata"]
    raise ValueError(f"message {call.number} calls the tool {name!r}, and the tool's answer does not follow")


def spoken_turns(messages: Sequence[ToolMessage]) -> list[ToolMessage]:
    """Return the messages that must take turns: without the calls within an answer, their thoughts and results."""
    return list(_spoken_turns(messages))


def _spoken_turns(messages: Sequence[ToolMessage]) -> Iterator[ToolMessage]:
    for index, one in enumerate(messages):
        following = messages[index + 1].message if index + 1 < len(messages) else None
        is_thought = one.message["role"] == "assistant" and following is not None and is_call(following)
        is_inner_call = is_call(one.message) and following is not None
        if not (is_thought or is_inner_call or one.message["role"] == "observation"):
            yield one


def with_tools(messages: list[Message], tools: str | None) -> list[Message]:
    """Return a conversation that offers tools, behind its system text, unless it offers some already."""
    if tools is None or any(message["role"] == "tools" for message in messages):
        return messages
    place = 1 if messages[:1] and messages[0]["role"] == "system" else 0
    return [*messages[:place], {"role": "tools", "content": tools}, *messages[place:]]
