"""
Turn messages into the ids that training, evaluation, prediction and chat all use, in five prompt formats.

A training sequence is `encode_prompt(...).ids + encode_answer(...).ids`, with the loss on the second part.
Content is always encoded as plain text, so a control token written in it never becomes one.

`max_length` counts every token, special ones too. A prompt that is too long loses its oldest turns (system messages
stay), then the end of its last message: it is always exactly the prompt of a shorter conversation. An answer that is
too long loses its end, but not its end token.
"""

from abc import abstractmethod

from transformers import PreTrainedTokenizerBase as Tokenizer

from glm_peft.errors import UserError
from glm_peft.models.chat_format import ChatFormat, find_token_id, plain_ids, token_id
from glm_peft.models.generations import CHATGLM, CHATGLM2, GLM4
from glm_peft.models.role_formats import ChatGLM3Format, GLM4Format
from glm_peft.models.shortening import Message


class _TextFormat(ChatFormat):
    """Format without roles, whose prompt is one text; system messages are lines before the first question."""

    takes = "questions and answers by turns, the last a question"

    def _can_render(self, roles: list[str]) -> bool:
        spoken = [role for role in roles if role != "system"]
        return len(spoken) % 2 == 1 and spoken == (["user", "assistant"] * len(spoken))[: len(spoken)]

    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        contents = [message["content"] for message in messages if message["role"] != "system"]
        system = [message["content"] for message in messages if message["role"] == "system" and message["content"]]
        contents[0] = "\n".join([*system, contents[0]])
        history = list(zip(contents[::2], contents[1::2], strict=False))
        before, after = self._special_ids(tokenizer)
        return before + plain_ids(tokenizer, self._render(history, contents[-1])) + after

    @abstractmethod
    def _render(self, history: list[tuple[str, str]], query: str) -> str:
        """Write the prompt's text, out of the answered questions and the open one."""

    def _special_ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Return the ids before the text and those after it."""
        return [token_id(tokenizer, token) for token in self.frame_tokens], []


class _ChatGLMFormat(_TextFormat):
    """ChatGLM-6B's: the bare question, or rounds from 0 where there is a history; special tokens come last."""

    name = CHATGLM
    frame_tokens = ("[gMASK]", "<sop>")
    stop_tokens = ("<eop>",)

    def _render(self, history: list[tuple[str, str]], query: str) -> str:
        if not history:
            return query
        rounds = [f"[Round {number}]\n问：{q}\n答：{a}\n" for number, (q, a) in enumerate(history)]
        return "".join(rounds) + f"[Round {len(history)}]\n问：{query}\n答："

    def _special_ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        return super()._special_ids(tokenizer)[::-1]


class _ChatGLM2Format(_TextFormat):
    """ChatGLM2-6B's: rounds from 1, a bare question's too, with empty lines between; special tokens come first."""

    name = CHATGLM2
    frame_tokens = ("[gMASK]", "sop")
    stop_tokens = ("</s>",)

    def _render(self, history: list[tuple[str, str]], query: str) -> str:
        rounds = [f"[Round {number}]\n\n问：{q}\n\n答：{a}\n\n" for number, (q, a) in enumerate(history, start=1)]
        return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{query}\n\n答："


class _PlainFormat(_TextFormat):
    """Format of a base not trained to chat: one bare question between the tokenizer's own special tokens."""

    name = "plain"
    takes = "a single question"

    def _can_render(self, roles: list[str]) -> bool:
        return [role for role in roles if role != "system"] == ["user"]

    def _stop_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return (tokenizer.eos_token,)

    def _render(self, history: list[tuple[str, str]], query: str) -> str:
        return query

    def _special_ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        # Tokenizers say how many special tokens they add, not where: seen on a text of one letter.
        bare, whole = plain_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]


_FORMATS = (_ChatGLMFormat(), _ChatGLM2Format(), ChatGLM3Format(), GLM4Format(), _PlainFormat())
CHAT_FORMATS: dict[str, ChatFormat] = {chat_format.name: chat_format for chat_format in _FORMATS}


def get_chat_format(tokenizer: Tokenizer, name: str | None = None) -> ChatFormat:
    """
    Choose the chat format of a tokenizer's model.

    Args:
        tokenizer: its `generation` says what it was made for; a stock fast tokenizer with GLM-4's tokens is `glm4`.
        name: a key of `CHAT_FORMATS` (the flag `--chat_format`), which wins over what the tokenizer says.

    Raises:
        UserError: where the name is unknown, where neither says the format, or where the tokenizer lacks its tokens.
    """
    choices = ", ".join(CHAT_FORMATS)
    if name is not None and name not in CHAT_FORMATS:
        raise UserError(f"--chat_format {name} is not a chat format: choose one of {choices}.")
    name = name or getattr(tokenizer, "generation", None) or _native_format_name(tokenizer)
    if name is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} does not say which prompts its model was trained on: "
            f"give --chat_format, one of {choices}."
        )
    CHAT_FORMATS[name].check_tokenizer(tokenizer)
    return CHAT_FORMATS[name]


def _native_format_name(tokenizer: Tokenizer) -> str | None:
    # The stock tokenizers of GLM-4-0414, glm-4-9b-chat-hf, GLM-Z1 and GLM-Edge: no `generation`, but GLM-4's tokens.
    found = (find_token_id(tokenizer, token) is not None for token in GLM4Format.frame_tokens)
    return GLM4 if all(found) else None
