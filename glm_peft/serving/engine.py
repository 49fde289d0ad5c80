"""Many requests at once on one base: what an engine takes, and what it gives back."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answerers import Answerers


class EngineStopped(RuntimeError):
    """The engine takes no requests: it is shutting down, or its worker has failed."""


@dataclass(frozen=True)
class AnswerRequest:
    """
    One prompt to be answered.

    Args:
        name: who answers: `base`, or an adapter.
        prompt: its token ids, as `Answerers.encode` returns them.
        settings: of this request alone; batch sizes and beams in it have no effect.
    """

    name: str
    prompt: list[int]
    settings: GenerationSettings


@dataclass(frozen=True)
class Load:
    """
    What an engine is doing now.

    Args:
        running: requests that are being answered.
        waiting: requests that have not begun.
        used_slots: tokens whose keys and values are kept, those of the prefixes included.
        slots: the most tokens that can be kept.
    """

    running: int
    waiting: int
    used_slots: int
    slots: int


class Engine(Protocol):
    """Answers requests of one event loop, as many at once as find room; one thread owns the model."""

    answerers: Answerers

    def generate(self, request: AnswerRequest) -> AsyncIterator[list[int]]:
        """
        Yield the ids of an answer as they are generated, one or more at a time, the end token included.

        Closing the iterator, or cancelling the task that iterates, frees the place of the request at once.

        Raises:
            UserError: the prompt finds no room, at the first step.
            EngineStopped: the worker failed or is shutting down.
        """
        ...

    def names(self) -> list[str]:
        """Return who can be asked now, the base first."""
        ...

    def longest_prompt(self, name: str, max_new_tokens: int) -> int:
        """Return how many tokens a prompt may have, its adapter's prefix and an answer of `max_new_tokens` beside."""
        ...

    def load(self) -> Load:
        """Return what the engine is doing now."""
        ...

    def failure(self) -> BaseException | None:
        """Return the error that ended the worker; `None` while it is well."""
        ...

    def add_adapter(self, name: str, path: str) -> None:
        """
        Load an adapter from a folder or the Hub while others are answered; blocks, so call it in a thread.

        Raises:
            UserError: the name is taken, or the adapter cannot be read or is of another base.
        """
        ...

    def remove_adapter(self, name: str) -> None:
        """
        Take no more requests for an adapter; those under way end as they began.

        Raises:
            UserError: there is none of this name.
        """
        ...

    def close(self, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let those under way end for at most `drain_seconds`, and stop the worker; blocks."""
        ...
