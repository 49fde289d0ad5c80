"""What stands before every request: who may ask, how much may be sent and wait, and what is told if all fails."""

import asyncio
import hmac
import logging
import time
import traceback
import uuid
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glm_peft.arguments.address import is_loopback
from glm_peft.serving.engine import Engine
from glm_peft.serving.http.faults import RequestError
from glm_peft.serving.http.measurements import Measurements

logger = logging.getLogger(__name__)

ANSWERED = ("/v1/chat/completions", "/v1/completions")
_READING_SECONDS = 60  # in which the body of a request must have come
_CLIENT_GONE = 499  # nginx's number for it
_DISCARDED = 16  # times the limit: a client that sends more is cut off, another gets its answer


@dataclass
class Limits:
    """
    What clients may do.

    Args:
        api_key: that they must send; `None` for none.
        max_request_bytes: the most that a request may have.
        max_waiting: the most requests that may wait for their turn.
    """

    api_key: bytes | None = None
    max_request_bytes: int = 4 << 20
    max_waiting: int = 256


class Gate:
    """
    ASGI middleware that every request comes through, and that counts those that are being answered.

    Args:
        engine: generates.
        limits: what clients may do.
        measurements: counts the requests.
    """

    def __init__(self, engine: Engine, limits: Limits, measurements: Measurements) -> None:
        self.engine, self.limits, self.measurements = engine, limits, measurements
        self.answering = 0
        self.is_closing = False

    def stand_before(self, app: ASGIApp) -> "Gate":
        """Hand to an application what is let in."""
        self.app = app
        return self

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or say why not; an error that nobody foresaw is told without what was sent."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, reply = time.perf_counter(), _Reply(send)
        scope.setdefault("state", {})["request_id"] = reply.request_id
        try:
            await self._let_in(scope, receive, reply)
        except _ClientGone:
            reply.status = _CLIENT_GONE
        except asyncio.CancelledError:  # by the server, which ends and does not wait for the rest of a request
            if reply.status is None:
                await self.closing_error().response()(scope, receive, reply)
        except RequestError as error:
            await error.response()(scope, receive, reply)
        except Exception as error:
            # Without the error's own words, which may quote the request.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("%s in request %s:\n%s", type(error).__name__, reply.request_id, frames)
            if reply.status is None:
                message = f"The server failed at this request; its log says where, under {reply.request_id}."
                await RequestError(500, message).response()(scope, receive, reply)
        finally:
            self._count(scope, reply.status or _CLIENT_GONE, time.perf_counter() - start)

    async def _let_in(self, scope: Scope, receive: Receive, reply: "_Reply") -> None:
        path = scope["path"]
        headers = dict(scope["headers"])
        if path != "/health":
            self._check_client(headers)
        if path not in ("/health", "/metrics"):
            self.check_open()
        body = await self._read_body(receive, headers)
        if path not in ANSWERED:
            await _run(self.app, scope, body, receive, reply)
            return
        self.check_open()  # again, as the body may have taken its time
        waiting = self.answering - self.engine.load().running
        if waiting >= self.limits.max_waiting:
            message = f"{waiting} requests wait already, and at most {self.limits.max_waiting} may: try again later."
            raise RequestError(429, message, headers={"Retry-After": "1"})
        self.answering += 1
        try:
            await _run(self.app, scope, body, receive, reply)
        finally:
            self.answering -= 1

    def check_open(self) -> None:
        """Raise a `RequestError` where the server takes no requests any more."""
        if self.is_closing or self.engine.failure() is not None:
            raise self.closing_error()

    def closing_error(self) -> RequestError:
        """Make the error of a server that is about to end."""
        return RequestError(503, "The server is shutting down and takes no requests any more: ask another one.")

    def _check_client(self, headers: dict[bytes, bytes]) -> None:
        key = self.limits.api_key
        if key is None:
            # Any page in a browser of this machine can send requests here, but not without saying where it is from.
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and not is_loopback(urlsplit(origin).hostname or ""):
                raise RequestError(403, "Without a key no requests of web pages from elsewhere are answered.")
            return
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key):
            message = "The key is missing or wrong: send the header Authorization: Bearer KEY."
            raise RequestError(401, message, headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, receive: Receive, headers: dict[bytes, bytes]) -> bytes:
        """Read the body while it comes, whatever length the client claims."""
        limit = self.limits.max_request_bytes
        try:
            size, body = await asyncio.wait_for(_collect(receive, limit), _READING_SECONDS)
        except asyncio.TimeoutError:
            message = f"The request did not come to its end within {_READING_SECONDS} seconds: send it again."
            raise RequestError(408, message, headers={"Connection": "close"}) from None
        if size > limit:
            message = f"The request has more than {limit} bytes, which --max_request_bytes allows: send a shorter one."
            raise RequestError(413, message, headers={"Connection": "close"})
        return body

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # Only names that exist: a client must not fill the memory with names of its own.
        model = scope["state"].get("model")
        model = model if isinstance(model, str) and model in self.engine.answerers.by_name else ""
        endpoint = getattr(scope.get("route"), "path", "")
        self.measurements.count_request(model, endpoint, status, seconds)


class _ClientGone(Exception):
    """The client has closed the connection before it had its answer."""


class _Reply:
    """Send a response with the request's id, and note its status and its end."""

    def __init__(self, send: Send) -> None:
        self.send, self.request_id = send, uuid.uuid4().hex
        self.status: int | None = None
        self.is_complete = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self.request_id.encode())]
        await self.send(message)
        self.is_complete = message["type"] == "http.response.body" and not message.get("more_body")


async def _collect(receive: Receive, limit: int) -> tuple[int, bytes]:
    """Return the size of a body in bytes, and the body; of one that is too large only a beginning is kept."""
    # To its end: a client that is still sending when the answer comes may never see it.
    chunks, size, more = [], 0, True
    while more and size <= _DISCARDED * limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        chunk, more = message.get("body", b""), message.get("more_body", False)
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
    return size, b"".join(chunks)


async def _run(app: ASGIApp, scope: Scope, body: bytes, receive: Receive, reply: _Reply) -> None:
    """Run the application on a request that is read, until it is done or the client goes away."""
    parts = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def read_again() -> Message:
        return next(parts, None) or await asyncio.Event().wait()

    task = asyncio.ensure_future(app(scope, read_again, reply))
    gone = asyncio.ensure_future(_wait_until_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if reply.is_complete:
            await task
    finally:
        gone.cancel()
        # At once and to its end, so that the place of the answer is free afterwards.
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))
    if task.cancelled():
        raise _ClientGone
    task.result()


async def _wait_until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
