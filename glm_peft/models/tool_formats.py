"""
Write tools and calls of tools as ChatGLM3 and GLM-4 were trained on, and read calls out of what a model generated.

Generated text is never evaluated: JSON is decoded, and of Python only literals are read. A conversation holds tools as
a message of the role `tools`, whose content is the JSON list of the function objects; a call as an assistant message
with the tool's name as `metadata` and a JSON object as content; what the tool said as an `observation`.
"""

import ast
import json
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import groupby
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message

TURN_MARK = "<|assistant|>"
"""What stands between the blocks of one turn: a thought, a call, another call."""
_CHATGLM3_HEAD = "Answer the following questions as best as you can. You have access to the following tools:\n"
_GLM4_HEAD = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
_GLM4_0414_HEAD = "# 可用工具\n"
_GLM4_SECTION = "\n## {name}\n\n{function}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
_HEAD_OF_TEMPLATE = re.compile(r"<\|system\|>\n([^{]*# 可用工具[^{]*)")
_FENCE = re.compile(r"```\w*")
_JSON_NAMES = {"true": True, "false": False, "null": None}


@dataclass(frozen=True)
class ToolCall:
    """Call of a tool; `arguments` is `None` where they cannot be read."""

    name: str
    arguments: dict[str, Any] | None


def is_call(message: Message) -> bool:
    """Whether a message of a conversation is a call of a tool."""
    return bool(message.get("metadata"))


def tool_names(messages: list[Message]) -> list[str]:
    """Return the names of the tools that a conversation offers."""
    return [tool["name"] for message in messages if message["role"] == "tools" for tool in _functions(message)]


def _functions(message: Message) -> list[dict[str, Any]]:
    return json.loads(message["content"])


def interleave_calls(messages: list[Message]) -> list[Message]:
    """
    Put each result right behind its call, as ChatGLM3 was trained.

    Raises:
        UserError: several calls have no results to stand between them.
    """
    arranged: list[Message] = []
    groups = [list(group) for _, group in groupby(messages, _kind)]
    while groups:
        group = groups.pop(0)
        if _kind(group[0]) != "call" or len(group) == 1:
            arranged += group
            continue
        results = groups.pop(0) if groups else []
        if len(results) != len(group) or _kind(results[0]) != "observation":
            raise UserError(
                f"The chat format chatglm3 writes a call, its result, then the next call, but {len(group)} calls "
                "stand together without their results: give one call at a time, or the results."
            )
        arranged += [message for pair in zip(group, results, strict=True) for message in pair]
    return arranged


def _kind(message: Message) -> str:
    return "call" if is_call(message) else message["role"]


def write_chatglm3_tools(message: Message) -> str:
    """Write the system block of tools of ChatGLM3-6B."""
    return _CHATGLM3_HEAD + json.dumps(_functions(message), indent=4, ensure_ascii=False)


def write_glm4_tools(message: Message, chat_template: str | None, is_0414: bool) -> str:
    """Write the system block of tools of GLM-4, whose introduction is that of the checkpoint's own chat template."""
    found = _HEAD_OF_TEMPLATE.search(chat_template or "")
    head = found[1] if found else _GLM4_0414_HEAD if is_0414 else _GLM4_HEAD
    sections = (
        _GLM4_SECTION.format(name=tool["name"], function=json.dumps(tool, indent=4, ensure_ascii=False))
        for tool in _functions(message)
    )
    return head + "".join(sections)


def write_python_call(arguments: str) -> str:
    """Write the call of ChatGLM3-6B out of the JSON object of its arguments."""
    values = json.loads(arguments)
    # Otherwise the published parser could not read it again: `tool_call(a-b=1)` is something else in Python.
    if all(key.isidentifier() and not iskeyword(key) and normalize("NFKC", key) == key for key in values):
        written = ", ".join(f"{key}={_literal(value)}" for key, value in values.items())
    else:
        written = f"**{values!r}"
    return f"```python\ntool_call({written})\n```"


def _literal(value: Any) -> str:
    return "1e309" if value == float("inf") else repr(value)


def read_turn(
    text: str, names: Collection[str] | None, read_arguments: Callable[[str], dict[str, Any] | None]
) -> tuple[str, list[ToolCall]]:
    """
    Read a generated turn, in which blocks are separated by `TURN_MARK`.

    Args:
        names: of the tools that were offered; a block that begins with the line of another is text. `None` for any.
        read_arguments: reads what follows the name; `None` where it cannot be read.

    Returns:
        what is said beside the calls, and the calls.
    """
    said, calls, pieces = [], [], text.split(TURN_MARK)
    while pieces:
        # One after the other until it can be read, as an argument may hold the mark as text.
        blocks = (TURN_MARK.join(pieces[:size]) for size in range(1, len(pieces) + 1))
        found = [_read_call(block, names, read_arguments) for block in blocks]
        size = next((size for size, call in enumerate(found, 1) if call and call.arguments is not None), 1)
        if found[size - 1]:
            calls.append(found[size - 1])
        else:
            said.append(pieces[0])
        pieces = pieces[size:]
    return "".join(said), calls


def _read_call(
    block: str, names: Collection[str] | None, read_arguments: Callable[[str], dict[str, Any] | None]
) -> ToolCall | None:
    name, line_feed, written = block.strip().partition("\n")
    name = name.strip()
    if not line_feed or not (name in names if names is not None else name and TURN_MARK not in name):
        return None
    arguments = read_arguments(written)
    return ToolCall(name, arguments) if arguments is not None or names is not None else None


def begins_as_call(block: str, names: Collection[str]) -> bool:
    """Whether a block that is still being generated may become a call."""
    name, line_feed, _ = block.lstrip().partition("\n")
    return name.strip() in names if line_feed else any(one.startswith(name.strip()) for one in names)


def read_json_arguments(written: str) -> dict[str, Any] | None:
    """Read the arguments of a call of GLM-4: a JSON object, or a Python literal; `None` where they are neither."""
    start = written.find("{")
    if start < 0 or _FENCE.sub("", written[:start]).strip():
        return None
    try:
        value, end = _decoder.raw_decode(written, start)
        rest = written[end:].lstrip(" \t")  # text may follow on a line of its own
        return _plain(value) if not rest or rest[0] in "\r\n" else None
    except (ValueError, RecursionError):
        return _literal_object(_without_fence(written))


def read_python_arguments(written: str) -> dict[str, Any] | None:
    """Read the arguments of a call of ChatGLM3: one expression `tool_call(a=1)`; `None` where it is none."""
    try:
        call = ast.parse(_without_fence(written), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
            return None
        return None if call.args else _plain(dict(_keyword_values(call)))
    except _UNREADABLE:
        return None


_UNREADABLE = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)


def _keyword_values(call: ast.Call) -> Iterator[tuple[str, Any]]:
    for keyword in call.keywords:
        value = ast.literal_eval(_JSONNames().visit(keyword.value))
        yield from [(keyword.arg, value)] if keyword.arg else value.items()


class _JSONNames(ast.NodeTransformer):
    """Models write JSON's `true`, `false` and `null` among Python's literals."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node


def _literal_object(written: str) -> dict[str, Any] | None:
    try:
        return _plain(ast.literal_eval(written))
    except _UNREADABLE:
        return None


def _without_fence(written: str) -> str:
    text = written.strip()
    if text.startswith("```"):
        text = text.partition("\n")[2]
    return text.removesuffix("```").strip()


def _plain(value: Any) -> dict[str, Any] | None:
    """Return an object as JSON can hold it, `None` for another value; sets and infinities raise an error."""
    return json.loads(json.dumps(value, allow_nan=False)) if isinstance(value, dict) else None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_decoder = json.JSONDecoder(parse_constant=_refuse_constant, strict=False)
