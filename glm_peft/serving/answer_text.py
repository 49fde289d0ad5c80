"""The text of an answer while its tokens come: whole characters, up to a stop string."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from glm_peft.prediction.evaluation import Answering
from glm_peft.serving.engine import AnswerRequest, Engine


@dataclass(frozen=True)
class Piece:
    """
    New text of an answer.

    Args:
        text: what is new; may be empty.
        num_tokens: of the answer so far, its end token counted.
        finish_reason: `stop` or `length` with the last piece, `None` before.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None


async def stream_text(engine: Engine, request: AnswerRequest, stop: Sequence[str] = ()) -> AsyncIterator[Piece]:
    """
    Yield the text of an answer as it grows; all pieces together are what `predict` answers.

    Args:
        stop: strings before the first of which the answer ends.
    """
    raise NotImplementedError
    yield
