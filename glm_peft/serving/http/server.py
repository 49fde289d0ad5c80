"""Listen, and end in order: what is under way is answered first."""

import asyncio
import logging
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from glm_peft.serving.engine import Engine
from glm_peft.serving.http.guards import Gate

_FLUSH_SECONDS = 2  # for last bytes to slow clients, once all is answered
_IDLE_SECONDS = 75  # longer than clients and balancers keep connections, so that none is closed under a request


class Server(uvicorn.Server):
    """
    A server that at SIGTERM or Ctrl-C lets what is under way end, and takes nothing new; a second one ends it.

    Args:
        app: answers.
        gate: knows what is under way.
        engine: generates; where its worker fails, the server ends.
        drain_seconds: the longest that requests under way may take to end.
        greeting: is printed once clients are answered.
    """

    def __init__(
        self, app: FastAPI, gate: Gate, engine: Engine, drain_seconds: float = 30.0, greeting: str = ""
    ) -> None:
        # Its logs go where those of the command go, and show paths and status, nothing of what is sent.
        logging.getLogger("uvicorn.access").setLevel(logging.INFO)
        options = {"log_config": None, "lifespan": "off", "ws": "none", "http": "h11", "server_header": False}
        super().__init__(
            uvicorn.Config(app, timeout_keep_alive=_IDLE_SECONDS, timeout_graceful_shutdown=_FLUSH_SECONDS, **options)
        )
        self.gate, self.engine, self.drain_seconds = gate, engine, drain_seconds
        self.deadline, self.greeting = float("inf"), greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say so."""
        await super().startup(sockets)
        print(self.greeting, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; unlike in uvicorn the signal is not raised again afterwards, as this is a good end."""
        self.deadline = 0.0 if self.gate.is_closing else time.monotonic() + self.drain_seconds
        self.gate.is_closing = True

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server is to end; called ten times a second."""
        is_over = await super().on_tick(counter)
        if time.monotonic() >= self.deadline and self.gate.answering:
            await asyncio.to_thread(self.engine.close)  # what is left is told that it will not be answered
            is_over = True
        is_over = is_over or (self.gate.is_closing and not self.gate.answering)
        return is_over or self.engine.failure() is not None
