"""A conversation that goes on: its turns, and the prompt that the next answer is generated from."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from glm_peft.errors import UserError
from glm_peft.models.shortening import Message


@dataclass
class Dialogue:
    """
    Turns of a user and a model, from the first on.

    Args:
        system: the system text; `None` for none.
        messages: questions and answers by turns.
        forgotten: how many of the oldest messages no longer fit into the prompt.
    """

    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0

    def add(self, role: str, content: str) -> None:
        """Append a message."""
        self.messages.append({"role": role, "content": content})

    def undo(self) -> str | None:
        """Take back the last question and what was answered to it; return the question, `None` where there is none."""
        while self.messages:
            message = self.messages.pop()
            self.forgotten = min(self.forgotten, len(self.messages))
            if message["role"] == "user":
                return message["content"]
        return None

    def clear(self) -> None:
        """Forget all turns, but not the system text."""
        self.messages, self.forgotten = [], 0

    def whole(self) -> list[Message]:
        """Return all messages, the system text first."""
        return self._with_system(0)

    def encode(self, encode: Callable[[list[Message]], list[int]], max_length: int) -> list[int]:
        """
        Encode the prompt for the next answer, without the oldest turns where all of them are too long.

        Args:
            encode: returns the token ids of a conversation.
            max_length: the most tokens that the prompt may have.

        Raises:
            UserError: the last question alone is too long; it is not cut.
        """
        for start in range(self.forgotten, len(self.messages), 2):
            ids = encode(self._with_system(start))
            if len(ids) <= max_length:
                self.forgotten = start
                return ids
        raise UserError(
            f"This question takes {len(ids)} tokens with the system text, and {max_length} find room beside "
            "an answer: ask a shorter one, or give a smaller --max_new_tokens."
        )

    def _with_system(self, start: int) -> list[Message]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.messages[start:]]


def append_row(file: Path, dialogue: Dialogue) -> None:
    """
    Append a conversation to a file of JSON lines, as a row that training reads.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"messages": dialogue.whole()}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}): give another file.") from error
