"""Count requests, tokens and seconds for Prometheus."""

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from glm_peft.serving.answer_text import Piece
from glm_peft.serving.engine import Engine, Load

# Upper ends in seconds: of small models on a GPU, up to a long answer on a CPU.
_OF_TOKENS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
_OF_WAITING = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60)
_OF_REQUESTS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)
_MEANINGS = {
    "running": "Requests that are being answered.",
    "waiting": "Requests that have not begun.",
    "used_slots": "Tokens whose keys and values are kept, those of the prefixes included.",
    "slots": "The most tokens that can be kept.",
}


class Measurements:
    """
    What has been asked and answered since the start.

    Args:
        engine: says what it is doing now.
    """

    def __init__(self, engine: Engine) -> None:
        # Not the registry of the whole process, in which a second application would clash with this one.
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        for field in fields(Load):
            gauge = Gauge(f"glm_peft_{field.name}", _MEANINGS[field.name], registry=registry)
            gauge.set_function(lambda name=field.name: getattr(engine.load(), name))
        model, own = ["model"], {"registry": registry}
        self._requests = Counter(
            "glm_peft_requests", "Requests; 499: the client went away.", ["model", "endpoint", "status"], **own
        )
        self._prompt_tokens = Counter(
            "glm_peft_prompt_tokens", "Tokens of prompts, without virtual ones.", model, **own
        )
        self._answer_tokens = Counter("glm_peft_answer_tokens", "Tokens of answers.", model, **own)
        self._first_token = Histogram(
            "glm_peft_time_to_first_token_seconds", "From a read prompt on.", model, buckets=_OF_WAITING, **own
        )
        self._between_tokens = Histogram(
            "glm_peft_time_between_tokens_seconds", "Within an answer.", model, buckets=_OF_TOKENS, **own
        )
        self._seconds = Histogram(
            "glm_peft_request_seconds", "Of whole requests.", ["endpoint"], buckets=_OF_REQUESTS, **own
        )

    def count_request(self, model: str, endpoint: str, status: int, seconds: float) -> None:
        """Count a request that has ended."""
        self._requests.labels(model, endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    async def watch(self, model: str, num_prompt: int, pieces: AsyncIterator[Piece]) -> AsyncIterator[Piece]:
        """
        Hand on the pieces of an answer, and count its tokens and when they came.

        Args:
            num_prompt: tokens of the prompt.
        """
        self._prompt_tokens.labels(model).inc(num_prompt)
        last, num_tokens = time.perf_counter(), 0
        async with aclosing(pieces):
            async for piece in pieces:
                new, now = piece.num_tokens - num_tokens, time.perf_counter()
                if new:
                    histogram, each = (self._between_tokens, new) if num_tokens else (self._first_token, 1)
                    histogram.labels(model).observe((now - last) / each)
                    self._answer_tokens.labels(model).inc(new)
                    last, num_tokens = now, piece.num_tokens
                yield piece

    def render(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
