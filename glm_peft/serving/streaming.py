"""Stream an answer while it is generated: text of whole characters, never half of one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from glm_peft.prediction.evaluation import Answering

_INCOMPLETE = "\ufffd"  # what decoders write for the first bytes of a character whose last are still to come


class GrowingText:
    """
    Text of an answer that grows with its ids.

    Args:
        answering: decodes the ids.
        stop: strings before the first of which the text ends.
        keeps_marks: keep the marks between blocks of the answer.
    """

    def __init__(self, answering: Answering, stop: Sequence[str] = (), keeps_marks: bool = False) -> None:
        self.answering, self.stop, self.keeps_marks = answering, stop, keeps_marks
        self.text = ""
        self.is_stopped = False

    def grow(self, ids: list[int], is_last: bool = False) -> str:
        """Return what is new of the text of all ids so far; with the last of them nothing is held back."""
        text = self.answering.decode(ids, keeps_marks=True) if self.keeps_marks else self.answering.decode(ids)
        return self.grow_to(text if is_last else text.rstrip(_INCOMPLETE), is_last)

    def grow_to(self, text: str, is_last: bool = True) -> str:
        """Return what is new in a longer text."""
        ends = [text.index(word) for word in self.stop if word in text]
        self.is_stopped = bool(ends)
        text = text[: min(ends)] if ends else text if is_last else self._without_begun_stop(text)
        # A later token may change how earlier ones are decoded: then nothing is new until the texts agree again.
        if not text.startswith(self.text):
            return ""
        new, self.text = text[len(self.text) :], text
        return new

    def _without_begun_stop(self, text: str) -> str:
        """Hold back an end of the text that may become a stop string."""
        begun = [size for word in self.stop for size in range(1, len(word)) if text.endswith(word[:size])]
        return text[: len(text) - max(begun)] if begun else text


class TextStream(StoppingCriteria):
    """
    Hand on the text of a single answer as it grows; for `generate(stopping_criteria=…)`.

    A criterion, as transformers' streamers do not reach loops other than its own.

    Args:
        answering: decodes the ids.
        show: is called with each new piece of text.
    """

    def __init__(self, answering: Answering, show: Callable[[str], object]) -> None:
        self.growing, self.show = GrowingText(answering), show
        self._start: int | None = None

    @property
    def text(self) -> str:
        """What was shown."""
        return self.growing.text

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Show what is new in the ids [1, prompt + answer]; return [1], `False`: the answer may go on."""
        if self._start is None:  # the first call comes after the first token
            self._start = input_ids.shape[1] - 1
        self._show(self.growing.grow(input_ids[0, self._start :].tolist()))
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    def finish(self, answer: str) -> None:
        """Show the end of the finished answer, which may have been held back."""
        self._show(self.growing.grow_to(answer))

    def _show(self, text: str) -> None:
        if text:
            self.show(text)
