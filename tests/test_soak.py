"""The soak of the server: it sends what it says, and finds what is wrong."""

import asyncio
import json
from collections import Counter

import httpx2
import pytest
from soak_requests import MALFORMED, Request, plan_requests
from soak_server import send

ASKED = Request("compared", {"model": "base", "messages": [], "max_tokens": 4}, expected="好的")


def test_a_tenth_leaves_and_a_twentieth_is_malformed():
    planned = plan_requests([ASKED], 200)
    assert Counter(request.kind for request in planned) == {"compared": 170, "left": 20, "malformed": 10}
    assert {request.body["stream"] for request in planned if request.kind == "compared"} == {False, True}
    assert {request.status for request in MALFORMED} == {200, 400, 404, 413}  # 200: the half-sent one has no answer


def chat(text: str) -> str:
    return json.dumps({"choices": [{"message": {"content": text}}]})


def stream(text: str, end: str) -> str:
    pieces = (json.dumps({"choices": [{"delta": {"content": piece}}]}) for piece in text)
    return "".join(f"data: {data}\n\n" for data in (*pieces, end))


@pytest.mark.parametrize(
    ("streams", "status", "text", "end"),
    [
        (False, 200, chat("好的"), "compared"),
        (False, 200, chat("好"), "wrong"),
        (False, 200, "{", "lost"),
        (False, 500, json.dumps({"error": {"message": "It failed."}}), "unexpected"),
        (True, 200, stream("好的", "[DONE]"), "compared"),
        (True, 200, stream("好好", "[DONE]"), "wrong"),
        (True, 200, stream("好的", "{}"), "lost"),
        (True, 200, "", "lost"),
    ],
)
def test_an_answer_that_is_wrong_cut_or_missing_is_found(streams, status, text, end):
    request = Request("compared", ASKED.body | {"stream": streams}, expected=ASKED.expected)

    async def ask() -> str:
        transport = httpx2.MockTransport(lambda _: httpx2.Response(status, text=text))
        async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
            return await send(client, request)

    assert asyncio.run(ask()) == end
