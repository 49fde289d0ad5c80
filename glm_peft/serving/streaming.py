"""Stream an answer while it is generated: text of whole characters, never half of one."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria

from glm_peft.prediction.evaluation import Answering

_INCOMPLETE = "\ufffd"  # what decoders write for the first bytes of a character whose last are still to come


class TextStream(StoppingCriteria):
    """
    Hand on the text of a single answer as it grows; for `generate(stopping_criteria=…)`.

    A criterion, as transformers' streamers do not reach loops other than its own.

    Args:
        answering: decodes the ids.
        show: is called with each new piece of text.
    """

    def __init__(self, answering: Answering, show: Callable[[str], object]) -> None:
        self.answering, self.show = answering, show
        self.text = ""
        self._start: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Show what is new in the ids [1, prompt + answer]; return [1], `False`: the answer may go on."""
        if self._start is None:  # the first call comes after the first token
            self._start = input_ids.shape[1] - 1
        text = self.answering.decode(input_ids[0, self._start :].tolist())
        self._hand_on(text.rstrip(_INCOMPLETE))
        return torch.zeros(1, dtype=torch.bool, device=input_ids.device)

    def finish(self, answer: str) -> None:
        """Show the end of the finished answer, which may have been held back."""
        self._hand_on(answer)

    def _hand_on(self, text: str) -> None:
        # A later token may change how earlier ones are decoded: then nothing is shown until the texts agree again.
        if text.startswith(self.text) and len(text) > len(self.text):
            self.show(text[len(self.text) :])
            self.text = text
