"""Batches of requests that continuous batching cannot carry: those of ChatGLM-6B, and of adapters such as LoRA."""

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import StoppingCriteria

from glm_peft.serving.answerers import Answerers
from glm_peft.serving.engine import AnswerRequest, EngineStopped

COLLECTED_SECONDS = 0.005  # how long a batch waits for company
MOST_ROWS = 16

Deliver = Callable[[list[int], bool, BaseException | None], None]
"""Takes new ids of an answer, whether it ends with them, and the error that ended it."""


@dataclass(eq=False)
class Row:
    """A request in a batch, and where its ids go; `is_cancelled` ends it at its next token."""

    request: AnswerRequest
    deliver: Deliver
    is_cancelled: bool = False
    sent: int = field(default=0, init=False)

    def cancel(self) -> None:
        """Let the answer end at its next token."""
        self.is_cancelled = True

    def fits(self, other: AnswerRequest) -> bool:
        """Whether another request may be in the same batch: of the same adapter, and neither draws its tokens."""
        # Draws depend on the batch: who draws is alone, and so repeats by the seed.
        draws = self.request.settings.do_sample or other.settings.do_sample
        return self.request.name == other.name and not draws


class OrdinaryBatches:
    """
    A thread that answers requests in batches of one adapter each, from the first token to the last.

    Args:
        answerers: the base and its adapters.
        alone: keeps everybody else from the model meanwhile.
    """

    def __init__(self, answerers: Answerers, alone: Callable[[], AbstractContextManager[None]]) -> None:
        self.answerers, self.alone = answerers, alone
        self.failure: BaseException | None = None
        self._is_stopping = False
        self._waiting: list[Row] = []
        self._current: list[Row] = []
        self._new: queue.Queue[Row | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="ordinary batches", daemon=True)
        self._thread.start()

    def add(self, row: Row) -> None:
        """Take a request."""
        self._new.put(row)

    def num_waiting(self) -> int:
        """Return how many requests have not begun."""
        return self._new.qsize() + sum(not row.is_cancelled for row in self._waiting)

    def stop(self) -> None:
        """End the thread; what is under way is cancelled."""
        self._is_stopping = True
        self._new.put(None)  # wakes the thread
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_stopping:
                self._collect()
                self._current = self._next_batch()
                self._answer(self._current)
        except BaseException as error:  # told to all who wait, and by `failure` to the process
            self.failure = error
        self._fail_all([*self._current, *self._waiting])

    def _collect(self) -> None:
        """Wait for a first request, then a little for more."""
        with suppress(queue.Empty):
            while len(self._waiting) < MOST_ROWS and not self._is_stopping:
                row = self._new.get(timeout=COLLECTED_SECONDS if self._waiting else None)
                self._waiting += [row] if row else []

    def _next_batch(self) -> list[Row]:
        """Take the oldest request, and those that may be in its batch."""
        first, rest = self._waiting[:1], self._waiting[1:]
        batch = [*first, *(row for row in rest if first[0].fits(row.request))][:MOST_ROWS]
        self._waiting = [row for row in self._waiting if row not in batch]
        return [row for row in batch if not row.is_cancelled]

    def _answer(self, rows: list[Row]) -> None:
        if not rows:
            return
        rows.sort(key=lambda row: -len(row.request.prompt))  # as `generate_answers` puts them into its batch
        longest = max(row.request.settings.max_new_tokens for row in rows)
        settings = replace(rows[0].request.settings, max_new_tokens=longest, batch_size=len(rows))
        prompts = [row.request.prompt for row in rows]
        name = rows[0].request.name
        delivery = _Delivery(rows, self.answerers.stop_token_ids(name), lambda: self._is_stopping)
        with self.alone():
            self.answerers.answer_batch(name, prompts, settings, delivery)

    def _fail_all(self, rows: list[Row]) -> None:
        """Tell all who still wait that nothing more comes."""
        while not self._new.empty():
            row = self._new.get_nowait()
            rows += [row] if row else []
        for row in (row for row in rows if not row.is_cancelled):
            row.deliver([], True, self.failure or EngineStopped("The engine has stopped."))


class _Delivery(StoppingCriteria):
    """Hand on each new token of a batch, and end the rows that are finished or cancelled."""

    def __init__(self, rows: list[Row], stops: list[int], is_stopping: Callable[[], bool]) -> None:
        self.rows, self.stops, self.is_stopping = rows, stops, is_stopping

    def __call__(self, input_ids: torch.Tensor, scores: Any, rows: list[int] | None = None) -> torch.Tensor:
        """
        Deliver the last ids of [rows, prompt + answer]; return [rows], whether each is finished.

        Args:
            rows: which row of the batch stands where, when finished ones have left.
        """
        numbers = range(len(input_ids)) if rows is None else rows
        tokens = input_ids[:, -1].tolist()
        ended = [self._deliver(self.rows[number], token) for number, token in zip(numbers, tokens, strict=True)]
        return torch.tensor(ended, device=input_ids.device) | self.is_stopping()

    def _deliver(self, row: Row, token: int) -> bool:
        row.sent += 1
        limit = row.request.settings.max_new_tokens
        is_last = token in self.stops or row.sent == limit
        if row.sent <= limit and not row.is_cancelled:
            row.deliver([token], is_last, None)
        row.is_cancelled |= is_last  # a loop that keeps finished rows in the batch calls with padding
        return row.is_cancelled
