"""Read what is to be answered: the messages of a chat, or the prompt of a completion."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from glm_peft.models.chat_formats import CHAT_FORMATS
from glm_peft.models.shortening import Message
from glm_peft.models.tool_formats import is_call, tool_names
from glm_peft.prediction.evaluation import Answering
from glm_peft.preprocessing.records import quoted
from glm_peft.preprocessing.tool_messages import (
    ToolMessage,
    match_results,
    read_tool_message,
    read_tools,
    with_tools,
)
from glm_peft.serving.http.faults import RequestError
from glm_peft.serving.http.request_fields import refuse

_T = TypeVar("_T")
# OpenAI's names beside those of the chat formats.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_ROLES |= {"tool": "observation", "observation": "observation"}
_KEYS = ("role", "content", "name", "tool_call_id", "tool_calls")


def read_messages(body: Mapping[str, Any]) -> list[Message]:
    """
    Read the messages of a chat, with the tools that it offers; the order of their roles is left to the chat format.

    Raises:
        RequestError: they are no messages, or one has an unknown role, no text, or something else than text; a call
            of a tool cannot be read, or its answer is missing.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        refuse("messages", "must be a list of at least one message", messages)
    read = [one for number, message in enumerate(messages) for one in _read_message(number, message)]
    if any(is_call(one.message) for one in read):
        read = _try("messages", match_results, read)
    return with_tools([one.message for one in read], _offered(body))


def read_tool_names(body: Mapping[str, Any]) -> list[str]:
    """Return the names of the tools that an answer may call."""
    return tool_names(with_tools([], _offered(body)))


def _offered(body: Mapping[str, Any]) -> str | None:
    return None if body.get("tool_choice") == "none" else _try("tools", read_tools, body.get("tools"))


def _try(param: str, read: Callable[..., _T], *values: Any) -> _T:
    try:
        return read(*values)
    except ValueError as error:
        sentence = str(error)
        raise RequestError(400, f"{sentence[0].upper()}{sentence[1:]}.", param) from None


def _read_message(number: int, message: Any) -> list[ToolMessage]:
    place = f"messages[{number}]"
    if not isinstance(message, dict):
        refuse(place, "must be an object with role and content", message)
    for key in message:
        if key not in _KEYS and message[key] not in (None, [], {}):  # clients send an answer back with all of its keys
            refuse(f"{place}.{key}", "is not supported here", message[key])
    role = message.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        refuse(f"{place}.role", f"must be one of {quoted(_ROLES)}", role)
    calls = bool(message.get("tool_calls"))
    content = "" if calls and message.get("content") is None else message.get("content")
    content = _read_content(f"{place}.content", content)
    if role == "user" and not content.strip():
        refuse(f"{place}.content", "must not be empty", content)
    if calls or _ROLES[role] == "observation":
        return _try("messages", read_tool_message, number + 1, {**message, "content": content})
    return [ToolMessage(number + 1, {"role": _ROLES[role], "content": content})]


def _read_content(place: str, content: Any) -> str:
    """Return a text, or the texts of its parts joined."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            refuse(place, "must be a text or a list of parts of the type text", content)
    return "".join(part["text"] for part in parts)


def read_prompt(body: Mapping[str, Any]) -> str | list[int]:
    """
    Read the prompt of a completion: a text, or token ids.

    Raises:
        RequestError: it is neither, or there are several.
    """
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        (prompt,) = prompt  # of a client that always sends a list of prompts
    is_ids = isinstance(prompt, list) and all(type(one) is int for one in prompt)
    if not (isinstance(prompt, str) or is_ids) or not prompt:
        refuse("prompt", "must be one text or one list of token ids, and not empty", prompt)
    return prompt


def encode_text(answering: Answering, prompt: str | list[int]) -> list[int]:
    """
    Encode a text to go on from, as it is but for the tokens that begin every prompt; check token ids.

    Raises:
        RequestError: there is no token of an id.
    """
    if isinstance(prompt, str):
        # No chat: the text alone between the tokenizer's special tokens, and what looks like one in it stays text.
        return CHAT_FORMATS["plain"].encode_prompt(answering.tokenizer, [{"role": "user", "content": prompt}]).ids
    size = answering.model.config.vocab_size
    unknown = next((index for index in prompt if not 0 <= index < size), None)
    if unknown is not None:
        raise RequestError(400, f"prompt holds the token id {unknown}, and there are 0 to {size - 1} here.", "prompt")
    return prompt
