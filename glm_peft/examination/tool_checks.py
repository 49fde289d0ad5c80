"""Find what is odd in conversations with tools: calls that no parser reads again, calls written as text, no loss."""

import json

from glm_peft.errors import UserError
from glm_peft.examination.data_checks import Finding
from glm_peft.models.chat_formats import ChatFormat
from glm_peft.models.tool_formats import ToolCall, is_call
from glm_peft.preprocessing.conversations import Conversation, Split


def check_tools(split: Split, chat_format: ChatFormat, train_on: str) -> list[Finding]:
    """
    Run every check of the calls of tools of one split; a finding without rows is left out.

    Args:
        chat_format: writes the calls, and must read them again.
        train_on: the value of `--train_on`.
    """
    unread = [f"{one.where} ({', '.join(names)})" for one in split if (names := _unreadable(one, chat_format))]
    as_text = [one.where for one in split if any(map(_is_call_as_text, one.messages))]
    silent = [f"{one.where} ({number})" for one in split if (number := _count_silent(one, chat_format, train_on))]
    findings = [
        Finding("calls of tools that the row does not offer", split.unoffered, "add the tools or correct the names"),
        Finding(
            f"calls of tools that cannot be read again as {chat_format.name} writes them",
            unread,
            "give tools other names, or arguments that JSON and Python have, as the calls will be lost in use",
        ),
        Finding(
            "answers that are a call of a tool written as text",
            as_text,
            "write them as tool_calls, or they are learnt as text that nobody reads as a call",
        ),
        Finding("rows with turns of the assistant that carry no loss", silent, "--train_on all trains on every turn"),
    ]
    return [finding for finding in findings if finding.rows]


def _unreadable(conversation: Conversation, chat_format: ChatFormat) -> list[str]:
    if not chat_format.has_roles:
        return []  # such a row is refused as a whole
    calls = (message for message in conversation.messages if is_call(message))
    return [call["metadata"] for call in calls if not _is_read_again(call, chat_format)]


def _is_read_again(call: dict[str, str], chat_format: ChatFormat) -> bool:
    wanted = ToolCall(call["metadata"], json.loads(call["content"]))
    return chat_format.read_turn(chat_format.write_turn([call]), [wanted.name]) == ("", [wanted])


def _is_call_as_text(message: dict[str, str]) -> bool:
    content = message["content"].strip()
    if message["role"] != "assistant" or is_call(message) or not content.startswith("{"):
        return False
    try:
        return {"name", "arguments"} == json.loads(content).keys()
    except (ValueError, RecursionError):
        return False


def _count_silent(conversation: Conversation, chat_format: ChatFormat, train_on: str) -> int:
    """Count the turns of a row of messages that nothing is learnt of."""
    try:
        every = len(conversation.trained_turns("all", chat_format.arrange))
        return every - len(conversation.trained_turns(train_on, chat_format.arrange)) if conversation.is_chat else 0
    except UserError:
        return 0  # a row that the chat format refuses is told of elsewhere
