"""What all chat formats have in common: prompts and answers as ids, within a limit of tokens."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from glm_peft.errors import UserError
from glm_peft.models.generations import GENERATIONS
from glm_peft.models.shortening import Message, shorten_prompt, shorten_text
from glm_peft.models.tool_formats import TURN_MARK, ToolCall, is_call


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
        messages = self.arrange(messages)
        ids = encode(messages)
        if max_length is None or len(ids) <= max_length:
            return EncodedText(ids, len(ids))
        return EncodedText(shorten_prompt(messages, encode, max_length), len(ids))

    def encode_answer(
        self, tokenizer: Tokenizer, answer: str | list[Message], max_length: int | None = None
    ) -> EncodedText:
        """
        Encode what the model has to learn: the answer, then the end token.

        Args:
            answer: a text, or the assistant messages of one turn, of which the last may be a call of a tool.
            max_length: the most tokens that the answer may have, end token counted; `None` for no limit.

        Raises:
            UserError: where `max_length` does not hold one character of the answer and the end token, or the call.
        """
        *earlier, last = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer

        # By itself, as in the published scripts: encoded with the prompt, its beginning could join the prompt's end.
        def encode(text: str) -> list[int]:
            ids = [id_ for message in earlier for id_ in (*self._block_ids(tokenizer, message), mark)]
            return [*ids, *self._block_ids(tokenizer, {**last, "content": text}), token_id(tokenizer, end)]

        mark = token_id(tokenizer, TURN_MARK) if earlier else 0
        end = "<|observation|>" if is_call(last) else self._stop_tokens(tokenizer)[0]
        ids = encode(last["content"])
        if max_length is None or len(ids) <= max_length:
            return EncodedText(ids, len(ids))
        if is_call(last):
            raise UserError(
                f"--max_target_length {max_length} is too short for a call of the tool {last['metadata']!r}, which "
                f"takes {len(ids)} tokens and means nothing when it is cut: give a larger value."
            )
        return EncodedText(shorten_text(last["content"], encode, max_length, "--max_target_length"), len(ids))

    def arrange(self, messages: list[Message]) -> list[Message]:
        """Return the messages of a conversation in the order in which the format writes them."""
        return messages

    def write_turn(self, answer: list[Message]) -> str:
        """Return the assistant messages of one turn as the model's generated text has them."""
        return TURN_MARK.join(self._block_text(message) for message in answer)

    def read_turn(self, text: str, names: Collection[str] | None = None) -> tuple[str, list[ToolCall]]:
        """
        Read the calls in a generated text, and what is said beside them.

        Args:
            names: of the tools that were offered; `None` where every name counts.
        """
        return text, []

    def stop_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """Return every id at which generation ends; the first is the one that ends an answer in training."""
        # Only the first must exist: GLM-4's later ones may be missing from a relative's tokenizer.
        ids = (find_token_id(tokenizer, token) for token in self._stop_tokens(tokenizer))
        return [index for index in ids if index is not None]

    def clean_answer(self, text: str) -> str:
        """Return a generated text without the white space around it."""
        return text.strip()  # in formats with roles the model writes the line feed after its role itself

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise a `UserError` where the tokenizer lacks a token that every prompt or answer of this format has."""
        for token in (*self.frame_tokens, self._stop_tokens(tokenizer)[0]):
            token_id(tokenizer, token)

    @abstractmethod
    def _prompt_ids(self, tokenizer: Tokenizer, messages: list[Message]) -> list[int]:
        """Encode the prompt, whatever its length."""

    def _block_ids(self, tokenizer: Tokenizer, message: Message) -> list[int]:
        return plain_ids(tokenizer, message["content"])

    def _block_text(self, message: Message) -> str:
        return message["content"]

    def _stop_tokens(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        return self.stop_tokens

    def _check_messages(self, messages: list[Message]) -> None:
        roles = [message["role"] for message in messages]
        if not self.has_roles and ("tools" in roles or any(map(is_call, messages))):
            raise UserError(
                f"The chat format {self.name} has no form for tools and their calls: leave them out, or take a model "
                "of ChatGLM3 or GLM-4."
            )
        if not self._can_render(roles):
            raise UserError(
                f"The chat format {self.name} takes {self.takes}, but the roles of a prompt are "
                f"{', '.join(roles) or 'none'}: correct them."
            )

    @abstractmethod
    def _can_render(self, roles: list[str]) -> bool:
        """Whether prompts may have these roles, in this order."""


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text, in which nothing becomes a control token."""
    if codec := getattr(tokenizer, "codec", None):  # which looks for none: the call around it takes most of the time
        return codec.encode([text])[0]
    # split_special_tokens: or the backend turns a control token written in a user's text into its id.
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def find_token_id(tokenizer: Tokenizer, token: str) -> int | None:
    """Return the id of a token, `None` where the tokenizer lacks it."""
    index = tokenizer.convert_tokens_to_ids(token) if token else None
    return None if index == tokenizer.unk_token_id else index  # <unk> is the answer for a token that it lacks


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token; raise a `UserError` where the tokenizer lacks it."""
    index = find_token_id(tokenizer, token)
    if index is None:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} has no token {token}, which the chat format needs: give the "
            f"--chat_format that its model was trained on, one of {', '.join((*GENERATIONS, 'plain'))}."
        )
    return index
