"""
Turn messages into the ids that training, evaluation, prediction and chat all use, in five prompt formats.

A training sequence is `encode_prompt(...).ids + encode_answer(...).ids`, with the loss on the second part.
Content is always encoded as plain text, so a control token written in it never becomes one.

`max_length` counts every token, special ones too. A prompt that is too long loses its oldest turns (system messages
stay), then the end of its last message: it is always exactly the prompt of a shorter conversation. An answer that is
too long loses its end, but not its end token.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from glm_peft.errors import UserError
from glm_peft.models.generations import CHATGLM, CHATGLM2, CHATGLM3, GLM4
from glm_peft.models.shortening import Message, shorten_prompt, shorten_text


@dataclass(frozen=True)
class EncodedText:
    """Token ids, with the number of them that there would be without `max_length`."""

    ids: list[int]
    whole_length: int

    @property
    def truncated(self) -> bool:
        """Whether `max_length` cut something off the text."""
        return len(self.ids) < self.whole_length


class ChatFormat(ABC):
    """Format in which one generation is asked and answers; it holds no state and serves every tokenizer."""

    name: str
    has_roles = False
    takes: str  # which conversations it can express, for error messages
    frame_tokens: tuple[str, ...] = ()  # the first two begin every prompt, the others must exist
    stop_tokens: tuple[str, ...] = ()  # the first of them ends an answer

    def encode_prompt(
        self, tokenizer: Tokenizer, messages: list[Message], max_length: int | None = None
    ) -> EncodedText:
        """
        Encode the prompt that the model is given to answer; it ends right where the answer starts.

        Args:
            messages: a conversation that ends with a question (or an observation).
            max_length: the most tokens that the prompt may have, special tokens counted; `None` for no limit.

        Raises:
            UserError: for a conversation that the format cannot express, and where `max_length` does not hold the
                special tokens, the system messages and one character of the last message.
        """

        def encode(messages: list[Message]) -> list[int]:
            return self._prompt_ids(tokenizer, messages)

        self._check_messages(messages)
        ids = encode(messages)
        if max_length is None or len(ids) <= max_length:
            return EncodedText(ids, len(ids))
        return EncodedText(shorten_prompt(messages, encode, max_length), len(ids))

    def encode_answer(self, tokenizer: Tokenizer, answer: str, max_length: int | None = None) -> EncodedText:
        """
        Encode what the model has to learn: the answer, then the end token.

        Args:
            max_length: the most tokens that the answer may have, end token counted; `None` for no limit.

        Raises:
            UserError: where `max_length` does not hold one character of the answer and the end token.
        """

        # By itself, as in the published scripts: encoded with the prompt, its beginning could join the prompt's end.
        def encode(text: str) -> list[int]:
            return [*self._body_ids(tokenizer, text), _token_id(tokenizer, self._stop_tokens(tokenizer)[0])]

        ids = encode(answer)
        if max_length is None or len(ids) <= max_length:
            return EncodedText(ids, len(ids))
        return EncodedText(shorten_text(answer, encode, max_length, "--max_target_length"), len(ids))

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return every id at which generation ends; the first is the one that ends an answer in training."""
        # Only the first must exist: GLM-4's later ones may be missing from a relative's tokenizer.
        ids = (_find_token_id(tokenizer, token) for token in self._stop_tokens(tokenizer))
        return [index for index in ids if index is not None]

    def clean_answer(self, text: str) -> str:
        """Return a generated text without the white space around it."""
        return text.strip()  # in formats with roles the model writes the line feed after its role itself

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise a `UserError` where the tokenizer lacks a token that every prompt or answer of this format has."""
        for token in (*self.frame_tokens, self._stop_tokens(tokenizer)[0]):
            _token_id(tokenizer, token)

    @abstractmethod
    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        """Encode the prompt, whatever its length."""

    def _body_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        return _plain_ids(tokenizer, text)

    def _stop_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return self.stop_tokens

    def _check_messages(self, messages: list[Message]) -> None:
        roles = [message["role"] for message in messages]
        if not self._can_render(roles):
            raise UserError(
                f"The chat format {self.name} takes {self.takes}, but the roles of a prompt are "
                f"{', '.join(roles) or 'none'}: correct them."
            )

    @abstractmethod
    def _can_render(self, roles: list[str]) -> bool:
        """Whether prompts may have these roles, in this order."""


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
        return before + _plain_ids(tokenizer, self._render(history, contents[-1])) + after

    @abstractmethod
    def _render(self, history: list[tuple[str, str]], query: str) -> str:
        """Write the prompt's text, out of the answered questions and the open one."""

    def _special_ids(self, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
        """Return the ids before the text and those after it."""
        return [_token_id(tokenizer, token) for token in self.frame_tokens], []


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
        bare, whole = _plain_ids(tokenizer, "a"), tokenizer("a")["input_ids"]
        start = next(index for index in range(len(whole)) if whole[index : index + len(bare)] == bare)
        return whole[:start], whole[start + len(bare) :]


class _RoleFormat(ChatFormat):
    """Format with roles, in which every message is a block that begins with its role's token."""

    has_roles = True
    takes = "messages of system, user, assistant and observation, the last of user or observation"

    def _can_render(self, roles: list[str]) -> bool:
        known = {"system", "user", "assistant", "observation"}
        return set(roles) <= known and roles[-1:] in (["user"], ["observation"])

    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        ids = [_token_id(tokenizer, token) for token in self.frame_tokens[:2]]
        for message in messages:
            ids.append(_token_id(tokenizer, f"<|{message['role']}|>"))
            ids += self._body_ids(tokenizer, message["content"])
        return [*ids, _token_id(tokenizer, "<|assistant|>")]  # the line feed after it belongs to the answer


class _ChatGLM3Format(_RoleFormat):
    """ChatGLM3-6B's, in which the line feed after the role and the content are encoded each by itself."""

    name = CHATGLM3
    frame_tokens = ("[gMASK]", "sop", "<|user|>", "<|assistant|>")
    stop_tokens = ("</s>", "<|user|>", "<|observation|>")

    def _body_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        # As in the published code: each then begins with SentencePiece's own leading blank.
        return _plain_ids(tokenizer, "\n") + _plain_ids(tokenizer, text)


class _GLM4Format(_RoleFormat):
    """GLM-4-9B's and its native relatives', in which the line feed after the role is encoded with the content."""

    name = GLM4
    frame_tokens = ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>")
    stop_tokens = ("<|user|>", "<|endoftext|>", "<|observation|>")  # not eos_token, the second, but the next speaker

    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        # No block without content, as in the chat template of the published tokenizer_config.json.
        return super()._prompt_ids(tokenizer, [message for message in messages if message["content"]])

    def _body_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        return _plain_ids(tokenizer, "\n" + text)


_FORMATS = (_ChatGLMFormat(), _ChatGLM2Format(), _ChatGLM3Format(), _GLM4Format(), _PlainFormat())
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
    found = (_find_token_id(tokenizer, token) is not None for token in _GLM4Format.frame_tokens)
    return GLM4 if all(found) else None


def _plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    # split_special_tokens: or the backend turns a control token written in a user's text into its id.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _find_token_id(tokenizer: Tokenizer, token: str) -> int | None:
    index = tokenizer.convert_tokens_to_ids(token) if token else None
    return None if index == tokenizer.unk_token_id else index  # <unk> is the answer for a token that it lacks


def _token_id(tokenizer: Tokenizer, token: str) -> int:
    index = _find_token_id(tokenizer, token)
    if index is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no token {token}, which the chat format needs: give the "
            f"--chat_format that its model was trained on, one of {', '.join(CHAT_FORMATS)}."
        )
    return index
