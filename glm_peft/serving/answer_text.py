"""The text of an answer while its tokens come: whole characters, up to a stop string."""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from glm_peft.serving.engine import AnswerRequest, Engine
from glm_peft.serving.streaming import GrowingText


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
    ids, growing = [], None
    async with aclosing(engine.generate(request)) as arrivals:
        async for new in arrivals:
            if growing is None:  # only now has the engine found that there is one of this name
                growing = GrowingText(engine.answerers.by_name[request.name], stop)
                ends = engine.answerers.stop_token_ids(request.name)
            ids += new
            is_last = ids[-1] in ends or len(ids) == request.settings.max_new_tokens
            text = growing.grow(ids, is_last)
            if is_last or growing.is_stopped:
                is_cut = not growing.is_stopped and ids[-1] not in ends
                yield Piece(text, len(ids), "length" if is_cut else "stop")
                return
            if text:
                yield Piece(text, len(ids))
