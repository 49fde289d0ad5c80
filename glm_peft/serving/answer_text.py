"""The text of an answer while its tokens come: whole characters, up to a stop string."""

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import takewhile

from glm_peft.models.chat_format import ChatFormat
from glm_peft.models.tool_formats import TURN_MARK, ToolCall, begins_as_call
from glm_peft.serving.engine import AnswerRequest, Engine
from glm_peft.serving.streaming import GrowingText


@dataclass(frozen=True)
class Piece:
    """
    New text of an answer.

    Args:
        text: what is new; may be empty.
        num_tokens: of the answer so far, its end token counted.
        finish_reason: `stop`, `length` or `tool_calls` with the last piece, `None` before.
        calls: of tools, with the last piece.
    """

    text: str
    num_tokens: int
    finish_reason: str | None = None
    calls: tuple[ToolCall, ...] = ()


async def stream_text(
    engine: Engine, request: AnswerRequest, stop: Sequence[str] = (), keeps_marks: bool = False
) -> AsyncIterator[Piece]:
    """
    Yield the text of an answer as it grows; all pieces together are what `predict` answers.

    Args:
        stop: strings before the first of which the answer ends.
        keeps_marks: keep the marks between blocks of the answer, for `tell_calls`.
    """
    ids, growing = [], None
    async with aclosing(engine.generate(request)) as arrivals:
        async for new in arrivals:
            if growing is None:  # only now has the engine found that there is one of this name
                growing = GrowingText(engine.answerers.by_name[request.name], stop, keeps_marks)
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


async def tell_calls(
    pieces: AsyncIterator[Piece], names: Collection[str], chat_format: ChatFormat
) -> AsyncIterator[Piece]:
    """
    Take the calls of tools out of the text of an answer, whose pieces come from `stream_text` with their marks.

    What may become a call is held back until the answer has ended; if it is none, it is text.
    """
    text = sent = ""
    async for piece in pieces:
        text += piece.text
        blocks = text.split(TURN_MARK)
        if not piece.finish_reason:
            said, calls = "".join(takewhile(lambda block: not begins_as_call(block, names), blocks)), []
        else:
            said, calls = chat_format.read_turn(text, names)
            if piece.finish_reason != "stop" or any(call.arguments is None for call in calls):
                calls = []
            said = said if calls else "".join(blocks)
            piece = replace(piece, calls=tuple(calls), finish_reason="tool_calls" if calls else piece.finish_reason)
        yield replace(piece, text=said[len(sent) :])  # even if it is nothing: that tokens come is told at once
        sent = said
