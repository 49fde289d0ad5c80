"""Answer chats and completions, whole or while they are generated, by transformers' response builders."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from typing import Any

from fastapi.responses import JSONResponse, Response, StreamingResponse
from openai.types import Completion, CompletionChoice, CompletionUsage
from starlette.types import Receive, Scope, Send
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from glm_peft.errors import UserError
from glm_peft.models.tool_formats import ToolCall
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answer_text import Piece, stream_text, tell_calls
from glm_peft.serving.engine import AnswerRequest, Engine, EngineStopped
from glm_peft.serving.http.faults import RequestError
from glm_peft.serving.http.measurements import Measurements
from glm_peft.serving.http.prompts import encode_text, read_messages, read_prompt, read_tool_names
from glm_peft.serving.http.request_fields import NEUTRAL, Asked, find_model, read_asked

_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the pieces


class EventStream(StreamingResponse):
    """
    Send an answer while it is generated, and close it in any case.

    Args:
        events: what is sent.
        pieces: the answer that they are made of.
    """

    def __init__(self, events: AsyncIterator[str], pieces: AsyncIterator[Piece]) -> None:
        super().__init__(events, headers=_STREAM_HEADERS, media_type="text/event-stream")
        self.pieces = pieces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; that the client is still there is watched outside."""
        async with aclosing(self.pieces), aclosing(self.body_iterator):
            await self.stream_response(send)


class _Answers:
    """
    What both kinds of requests have in common.

    Args:
        engine: generates.
        defaults: the settings where a request says nothing.
        seed: of the draws where a request gives none; `None` for another one each time.
        measurements: counts tokens and seconds.
        encoder: the one thread that encodes, as tokenizers keep the options of their last call.
    """

    neutral: dict[str, tuple[Any, ...]]
    own_fields: tuple[str, ...]
    id_prefix: str
    chunk_kind: str

    # The stock handlers load models by name, which is not wanted here: neither manager exists.
    def __init__(
        self,
        engine: Engine,
        defaults: GenerationSettings,
        seed: int | None,
        measurements: Measurements,
        encoder: Executor,
    ) -> None:
        self.engine, self.defaults, self.seed = engine, defaults, seed
        self.measurements, self.encoder = measurements, encoder

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        """
        Answer a request.

        Raises:
            RequestError: it is not answered.
        """
        asked = read_asked(body, self.engine.names(), self.defaults, self.seed, self.neutral, self.own_fields)
        # Not here, where a long text would keep all others waiting.
        loop, encode = asyncio.get_running_loop(), self.read_encoder(body)
        names = self.read_tool_names(body)
        try:
            prompt = await loop.run_in_executor(self.encoder, encode, asked.name)
            self._check_length(asked, prompt)
        except KeyError:
            find_model(asked.name, self.engine.names())  # it may have been unloaded meanwhile
            raise
        answer_id = f"{self.id_prefix}-{request_id}"
        pieces = self.measurements.watch(asked.name, len(prompt), self._generate(asked, prompt, names))
        if asked.stream:
            # With the first piece at hand a fault still has its own status.
            first = await anext(pieces)
            return EventStream(self._events(answer_id, asked, len(prompt), first, pieces), pieces)
        async with aclosing(pieces):
            answer = [piece async for piece in pieces]
        text, last = "".join(piece.text for piece in answer), answer[-1]
        usage = _usage(len(prompt), last.num_tokens)
        fields = {"tool_calls": _describe_calls(answer_id, last.calls)} if last.calls else {}
        content = text if text or not last.calls else None
        return JSONResponse(
            self._build_completion(answer_id, content, asked.name, last.finish_reason, usage, **fields)
        )

    def read_encoder(self, body: dict[str, Any]) -> Callable[[str], list[int]]:
        """Read the prompt; return a function that encodes it for a model of a name."""
        raise NotImplementedError

    def read_tool_names(self, body: dict[str, Any]) -> list[str]:
        """Return the names of the tools that the answer may call."""
        return []

    def build_chunk(self, answer_id: str, name: str, **fields: Any) -> str:
        """Build an event of a streamed answer."""
        raise NotImplementedError

    def _check_length(self, asked: Asked, prompt: list[int]) -> None:
        new = asked.settings.max_new_tokens
        longest = self.engine.longest_prompt(asked.name, new)
        if len(prompt) > longest:
            message = f"The prompt has {len(prompt)} tokens, and at most {max(longest, 0)} find room beside an answer "
            message += f"of up to {new}: shorten it, or give a smaller max_tokens."
            raise RequestError(400, message, code="context_length_exceeded")

    async def _generate(self, asked: Asked, prompt: list[int], names: list[str]) -> AsyncIterator[Piece]:
        """Yield the pieces of an answer; what the engine refuses becomes a fault of the request."""
        request = AnswerRequest(asked.name, prompt, asked.settings)
        whole = pieces = stream_text(self.engine, request, asked.stop, keeps_marks=bool(names))
        if names:
            pieces = tell_calls(whole, names, self.engine.answerers.by_name[asked.name].chat_format)
        async with aclosing(whole), aclosing(pieces):
            try:
                async for piece in pieces:
                    yield piece
            except UserError as error:
                raise RequestError(400, str(error)) from error
            except EngineStopped as error:
                raise RequestError(503, f"The answer cannot be generated. {error}") from error

    async def _events(
        self, answer_id: str, asked: Asked, num_prompt: int, piece: Piece, pieces: AsyncIterator[Piece]
    ) -> AsyncIterator[str]:
        name, is_first = asked.name, True
        try:
            while True:
                if piece.text or is_first:
                    yield self.build_chunk(answer_id, name, text=piece.text, is_first=is_first)
                is_first = False
                if piece.calls:
                    calls = _describe_calls(answer_id, piece.calls)
                    numbered = [{"index": index} | call for index, call in enumerate(calls)]
                    yield self.build_chunk(answer_id, name, tool_calls=numbered)
                if piece.finish_reason:
                    break
                piece = await anext(pieces)
        except RequestError as error:
            yield self.chunk_to_sse(json.dumps(error.body(), ensure_ascii=False))
            return
        usage = _usage(num_prompt, piece.num_tokens)
        # As transformers does for its own client; by OpenAI's rules in a chunk of its own, where it is asked for.
        of_last = None if asked.include_usage else usage
        yield self.build_chunk(answer_id, name, finish_reason=piece.finish_reason, usage=of_last)
        if asked.include_usage:
            chunk = {"id": answer_id, "object": self.chunk_kind, "created": int(time.time()), "model": name}
            yield self.chunk_to_sse(json.dumps(chunk | {"choices": [], "usage": usage.model_dump(exclude_none=True)}))
        yield "data: [DONE]\n\n"


def _usage(num_prompt: int, num_answer: int) -> CompletionUsage:
    total = num_prompt + num_answer
    return CompletionUsage(prompt_tokens=num_prompt, completion_tokens=num_answer, total_tokens=total)


def _describe_calls(answer_id: str, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{answer_id}_{index}",
            "type": "function",
            "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)},
        }
        for index, call in enumerate(calls)
    ]


class ChatHandler(_Answers, ChatCompletionHandler):
    """Answers of `/v1/chat/completions`."""

    own_fields = ("messages", "max_completion_tokens", "tools", "parallel_tool_calls")
    neutral = NEUTRAL | {
        "logprobs": (False,),
        "top_logprobs": (0,),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
    }
    id_prefix, chunk_kind = "chatcmpl", "chat.completion.chunk"

    def read_encoder(self, body: dict[str, Any]) -> Callable[[str], list[int]]:
        """Read the messages; return a function that encodes them as a model of a name was trained to be asked."""
        messages = read_messages(body)
        return lambda name: self.engine.answerers.encode(name, messages)

    def read_tool_names(self, body: dict[str, Any]) -> list[str]:
        """Return the names of the tools that the answer may call."""
        return read_tool_names(body)

    def build_chunk(self, answer_id: str, name: str, text: str = "", is_first: bool = False, **fields: Any) -> str:
        """Build an event of a streamed answer; the first says whose it is."""
        role, content = "assistant" if is_first else None, text or None
        return self._build_chunk_sse(answer_id, content=content, role=role, model=name, **fields)


class TextHandler(_Answers, CompletionHandler):
    """Answers of `/v1/completions`."""

    own_fields = ("prompt",)
    neutral = NEUTRAL | {"best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": ()}
    id_prefix, chunk_kind = "cmpl", "text_completion"

    def read_encoder(self, body: dict[str, Any]) -> Callable[[str], list[int]]:
        """Read the prompt; return a function that encodes it for a model of a name."""
        prompt = read_prompt(body)
        return lambda name: encode_text(self.engine.answerers.by_name[name], prompt)

    def build_chunk(self, answer_id: str, name: str, is_first: bool = False, **fields: Any) -> str:
        """Build an event of a streamed answer."""
        return self._build_chunk_sse(answer_id, name, **fields)

    def _build_completion(
        self, answer_id: str, text: str, name: str, finish_reason: str, usage: CompletionUsage
    ) -> dict[str, Any]:
        """Build a whole answer, as the stock handler does in the midst of generating it."""
        choice = CompletionChoice(text=text, index=0, finish_reason=finish_reason)
        kind = {"object": "text_completion", "created": int(time.time())}
        return Completion(id=answer_id, model=name, choices=[choice], usage=usage, **kind).model_dump(
            exclude_none=True
        )
