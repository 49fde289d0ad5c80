"""The FastAPI application: its routes, and OpenAI's form for whatever goes wrong."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from glm_peft.errors import UserError
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answerers import BASE
from glm_peft.serving.engine import Engine
from glm_peft.serving.http.faults import RequestError
from glm_peft.serving.http.guards import ANSWERED, Gate, Limits
from glm_peft.serving.http.handlers import ChatHandler, TextHandler
from glm_peft.serving.http.measurements import Measurements
from glm_peft.serving.http.request_fields import find_model, parse_object, refuse


@dataclass
class Service:
    """
    What is served, and how.

    Args:
        engine: generates.
        limits: what clients may do.
        defaults: the settings of requests that say nothing.
        seed: of the draws of requests that give none; `None` for another one each time.
        allow_adapter_updates: whether adapters may come and go.
    """

    engine: Engine
    limits: Limits
    defaults: GenerationSettings
    seed: int | None = None
    allow_adapter_updates: bool = False


def build_app(service: Service) -> tuple[FastAPI, Gate]:
    """Build the application, and the gate before it, which knows what is under way."""
    engine, measurements = service.engine, Measurements(service.engine)
    gate = Gate(engine, service.limits, measurements)
    # Without the pages of documentation, which would load scripts from elsewhere.
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_middleware(gate.stand_before)
    _tell_faults(app)
    _add_answers(app, service, measurements)
    _add_models(app, engine)
    _add_updates(app, service)

    @app.get("/health")
    async def tell_health() -> dict[str, str]:
        gate.check_open()
        return {"status": "ok"}

    @app.get("/metrics")
    async def tell_measurements() -> Response:
        return Response(measurements.render(), media_type=CONTENT_TYPE_LATEST)

    return app, gate


def _tell_faults(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def tell(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(UserError)
    async def tell_mistake(request: Request, error: UserError) -> JSONResponse:
        return RequestError(400, str(error)).response()

    @app.exception_handler(HTTPException)
    async def tell_route(request: Request, error: HTTPException) -> JSONResponse:
        message = f"There is no {request.method} {request.url.path[:80]} here ({error.detail}): "
        message += "POST /v1/chat/completions takes conversations, docs/serving.md lists all paths."
        return RequestError(error.status_code, message, headers=error.headers).response()


async def _read_object(request: Request) -> dict[str, Any]:
    body = parse_object(await request.body())
    request.state.model = body.get("model")  # for the count of requests
    return body


def _add_answers(app: FastAPI, service: Service, measurements: Measurements) -> None:
    def answer_by(handler: ChatHandler | TextHandler) -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            return await handler.handle_request(await _read_object(request), request.state.request_id)

        return answer

    encoder = ThreadPoolExecutor(1)
    for path, kind in zip(ANSWERED, (ChatHandler, TextHandler), strict=True):
        handler = kind(service.engine, service.defaults, service.seed, measurements, encoder)
        app.add_api_route(path, answer_by(handler), methods=["POST"], response_model=None)


def _add_models(app: FastAPI, engine: Engine) -> None:
    start = int(time.time())

    def describe(name: str) -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": start, "owned_by": "glm_peft"}
        return model if name == BASE else model | {"parent": BASE}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in engine.names()]}

    @app.get("/v1/models/{name:path}")
    async def tell_model(name: str) -> dict[str, Any]:
        return describe(find_model(name, engine.names()))

    # `transformers chat` asks for this first. Unlike in the stock server nothing is ever loaded.
    @app.post("/load_model")
    async def tell_loaded(request: Request) -> Response:
        name = find_model((await _read_object(request)).get("model"), engine.names())
        event = json.dumps({"status": "ready", "model": name, "cached": True})
        return Response(f"data: {event}\n\n", media_type="text/event-stream")


def _add_updates(app: FastAPI, service: Service) -> None:
    engine, updating = service.engine, asyncio.Lock()

    async def read(request: Request, *names: str) -> list[str]:
        if not service.allow_adapter_updates:
            message = "Adapters cannot come and go here: start the server with --allow_adapter_updates."
            raise RequestError(404, message)
        body = await _read_object(request)
        for name in names:
            if not isinstance(body.get(name), str) or not body[name].strip():
                refuse(name, "must be a text that is not empty", body.get(name))
        return [body[name] for name in names]

    @app.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> dict[str, str]:
        name, path = await read(request, "lora_name", "lora_path")
        if name == BASE:
            raise RequestError(400, f"The name {BASE} is that of the base: give another one.", "lora_name")
        try:
            async with updating:
                await asyncio.to_thread(engine.add_adapter, name, path)
        except UserError as error:  # whose sentences are those of the command line
            raise RequestError(400, str(error).replace("--adapter_name_or_path", "lora_path"), "lora_path") from None
        return {"status": f"{name} answers now."}

    @app.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> dict[str, str]:
        (name,) = await read(request, "lora_name")
        find_model(name, [one for one in engine.names() if one != BASE], "lora_name")
        async with updating:
            await asyncio.to_thread(engine.remove_adapter, name)
        return {"status": f"{name} takes no more requests."}
