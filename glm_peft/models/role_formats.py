"""Chat formats of the generations whose messages are blocks that begin with their role: ChatGLM3 and GLM-4."""

import json
from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from glm_peft.models.chat_format import ChatFormat, plain_ids, token_id
from glm_peft.models.generations import CHATGLM3, GLM4
from glm_peft.models.shortening import Message
from glm_peft.models.tool_formats import (
    ToolCall,
    interleave_calls,
    is_call,
    read_json_arguments,
    read_python_arguments,
    read_turn,
    write_chatglm3_tools,
    write_glm4_tools,
    write_python_call,
)


class _RoleFormat(ChatFormat):
    """Format with roles, in which every message is a block that begins with its role's token."""

    has_roles = True
    takes = "messages of system, user, assistant and observation, the last of user or observation"

    def _can_render(self, roles: list[str]) -> bool:
        known = {"tools", "system", "user", "assistant", "observation"}
        return set(roles) <= known and roles[-1:] in (["user"], ["observation"])

    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        ids = [token_id(tokenizer, token) for token in self.frame_tokens[:2]]
        for message in messages:
            is_tools = message["role"] == "tools"
            ids.append(token_id(tokenizer, f"<|{'system' if is_tools else message['role']}|>"))
            written = {"content": self._tools_text(tokenizer, message)} if is_tools else message
            ids += self._block_ids(tokenizer, written)
        return [*ids, token_id(tokenizer, "<|assistant|>")]  # the line feed after it belongs to the answer

    def arrange(self, messages: list[Message]) -> list[Message]:
        # As published, tools stand before the system text.
        return sorted(messages, key=lambda message: message["role"] != "tools")

    def read_turn(self, text: str, names: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
        return read_turn(text, names, self._read_arguments)

    @abstractmethod
    def _tools_text(self, tokenizer: Tokenizer, message: Message) -> str:
        """Write the system block of the tools that are offered."""

    @abstractmethod
    def _read_arguments(self, written: str) -> dict[str, Any] | None:
        """Read the arguments of a generated call."""


class ChatGLM3Format(_RoleFormat):
    """ChatGLM3-6B's, in which the line feed after the role and the content are encoded each by itself."""

    name = CHATGLM3
    frame_tokens = ("[gMASK]", "sop", "<|user|>", "<|assistant|>")
    stop_tokens = ("</s>", "<|user|>", "<|observation|>")

    def arrange(self, messages: list[Message]) -> list[Message]:
        return interleave_calls(super().arrange(messages))

    def _block_ids(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        # As in the published code: each then begins with SentencePiece's own leading blank.
        header, call = message.get("metadata") or "", is_call(message)
        content = write_python_call(message["content"]) if call else message["content"]
        return plain_ids(tokenizer, f"{header}\n") + plain_ids(tokenizer, content)

    def _block_text(self, message: Message) -> str:
        if not is_call(message):
            return message["content"]
        # Decoded, the fence has that blank before it.
        return f"{message['metadata']}\n {write_python_call(message['content'])}"

    def _tools_text(self, tokenizer: Tokenizer, message: Message) -> str:
        return write_chatglm3_tools(message)

    def _read_arguments(self, written: str) -> dict[str, Any] | None:
        return read_python_arguments(written)


class GLM4Format(_RoleFormat):
    """GLM-4-9B's and its native relatives', in which the line feed after the role is encoded with the content."""

    name = GLM4
    frame_tokens = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    stop_tokens = ("<|user|>", "<|endoftext|>", "<|observation|>")  # not eos_token, the second, but the next speaker

    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        # No block without content, as in the chat template of the published tokenizer_config.json; GLM-4-0414's keeps
        # what a tool said, even if it is nothing.
        kept = "observation" if _is_0414(tokenizer) else None
        shown = [message for message in messages if message["content"] or message["role"] == kept]
        return super()._prompt_ids(tokenizer, shown)

    def _block_ids(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        content = message["content"]
        if is_call(message) and _is_0414(tokenizer):  # whose arguments are written anew
            content = json.dumps(json.loads(content), ensure_ascii=False)
        return plain_ids(tokenizer, f"{message.get('metadata') or ''}\n{content}")

    def _block_text(self, message: Message) -> str:
        return f"{message['metadata']}\n{message['content']}" if is_call(message) else message["content"]

    def _tools_text(self, tokenizer: Tokenizer, message: Message) -> str:
        return write_glm4_tools(message, _template_of(tokenizer), _is_0414(tokenizer))

    def _read_arguments(self, written: str) -> dict[str, Any] | None:
        return read_json_arguments(written)


def _template_of(tokenizer: Tokenizer) -> str:
    template = getattr(tokenizer, "chat_template", None)
    return template if isinstance(template, str) else ""


def _is_0414(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer is of GLM-4-0414 or later, whose template takes tools beside the messages."""
    template = _template_of(tokenizer).replace('"', "'")
    by_template = "可用工具" in template  # that of a relative need not know tools
    return "item['tools']" not in template if by_template else getattr(tokenizer, "generation", None) != GLM4
