"""The server's HTTP side, on an engine that only pretends: what is honoured, refused, guarded, counted and ended."""

import asyncio
import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGTERM
from types import SimpleNamespace

import httpx2
import openai
import pytest
from launches import make_adapter
from starlette.testclient import TestClient
from transformers import AutoTokenizer, GenerationConfig
from warm_starts import warm_python

from glm_peft import serve
from glm_peft.arguments.address import bind, refuse_unsafe_host, url_of
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.serve import parse_serve_arguments
from glm_peft.errors import UserError
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answerers import Answerers
from glm_peft.serving.engine import AnswerRequest, EngineStopped, Load
from glm_peft.serving.http.app import Service, build_app
from glm_peft.serving.http.guards import Limits
from glm_peft.serving.http.keys import read_key
from glm_peft.serving.http.server import Server

ASSETS = Path(__file__).parents[1] / "glm_peft" / "assets"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "ads", "messages": [{"role": "user", "content": "你好"}]}
WORDS = ["白色", "的", "衬衫"]


TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "衬衫"}'}}
CALLED = [*ASKED["messages"], {"role": "assistant", "content": None, "tool_calls": [CALL]}]
CALLED += [{"role": "tool", "tool_call_id": "1", "content": "7"}]


class PretendingEngine:
    """Answers every prompt with `WORDS`, a token each, and the end token."""

    def __init__(self) -> None:
        tokenizer = AutoTokenizer.from_pretrained(ASSETS)
        model = SimpleNamespace(config=SimpleNamespace(vocab_size=1000))
        answering = Answering(model, tokenizer, get_chat_format(tokenizer))
        names = ("base", "ads", "support")
        asked = dict.fromkeys(names, DataArguments())
        self.answerers = Answerers(None, model, dict.fromkeys(names, answering), asked)
        self.answer = tokenizer.convert_tokens_to_ids([*WORDS, "<eop>"])
        self.requests: list[AnswerRequest] = []
        self.running, self.pause = 0, 0.0
        self.error: Exception | None = None
        self.closed = threading.Event()

    async def generate(self, request: AnswerRequest) -> AsyncIterator[list[int]]:
        self.requests.append(request)
        if self.error:
            raise self.error
        self.running += 1
        try:
            for token in self.answer:
                await asyncio.sleep(self.pause)
                if self.closed.is_set():
                    raise EngineStopped("The engine is shutting down.")
                yield [token]
        finally:
            self.running -= 1

    def names(self) -> list[str]:
        return list(self.answerers.by_name)

    def longest_prompt(self, name: str, max_new_tokens: int) -> int:
        return 600 - max_new_tokens

    def load(self) -> Load:
        return Load(self.running, 0, 7, 640)

    def failure(self) -> BaseException | None:
        return None

    def add_adapter(self, name: str, path: str) -> None:
        if name in self.answerers.by_name:
            raise UserError(f"The name {name} is taken.")
        self.answerers.by_name[name] = self.answerers.by_name["base"]
        self.answerers.asked[name] = DataArguments()

    def remove_adapter(self, name: str) -> None:
        del self.answerers.by_name[name]

    def close(self, drain_seconds: float = 0.0) -> None:
        self.closed.set()


@pytest.fixture
def engine() -> PretendingEngine:
    return PretendingEngine()


def client_of(engine: PretendingEngine, allow_adapter_updates: bool = False, **limits) -> TestClient:
    defaults = GenerationSettings(max_new_tokens=100)
    app, _ = build_app(Service(engine, Limits(**limits), defaults, allow_adapter_updates=allow_adapter_updates))
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def client(engine: PretendingEngine) -> TestClient:
    return client_of(engine)


def error_of(response, status: int) -> dict:
    """What an error object says, which must be whole."""
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].endswith(".")
    return error


def events_of(text: str) -> list[dict]:
    *events, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def test_a_chat_is_answered_whole_and_as_a_stream(client, engine):
    whole = client.post(CHAT, json=ASKED).json()
    assert whole["choices"][0]["message"]["content"] == "白色的衬衫" and whole["model"] == "ads"
    usage = {"prompt_tokens": len(engine.requests[0].prompt), "completion_tokens": 4}
    assert whole["usage"].items() >= usage.items() and whole["choices"][0]["finish_reason"] == "stop"
    body = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, counted = events_of(client.post(CHAT, json=body).text)
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == WORDS
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0]["finish_reason"] == "stop" and "usage" not in last
    assert counted["choices"] == [] and counted["usage"] == whole["usage"]


def test_a_text_goes_on_without_a_chat_format_and_control_tokens_in_it_stay_text(client, engine):
    answer = client.post(TEXT, json={"model": "base", "prompt": "你好<eop>", "max_tokens": 2}).json()
    assert answer["choices"][0] == {"text": "白色的", "index": 0, "finish_reason": "length"}
    tokenizer = engine.answerers.by_name["base"].tokenizer
    plain = tokenizer("你好<eop>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert engine.requests[0].prompt == plain + tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    stream = client.post(TEXT, json={"model": "base", "prompt": [[5, 6]], "stream": True, "stop": "衬衫"})
    *chunks, last = events_of(stream.text)
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["白色", "的"]
    assert engine.requests[1].prompt == [5, 6] and last["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"do_sample": False, "max_new_tokens": 100}),
        ({"temperature": 0, "top_p": 0.5, "max_tokens": 5}, {"do_sample": False, "max_new_tokens": 5}),
        ({"temperature": 1e-9}, {"do_sample": False}),
        ({"temperature": 1}, {"do_sample": True, "temperature": 1.0}),
        ({"temperature": 1.5, "seed": -3}, {"do_sample": True, "temperature": 1.5, "seed": -3, "top_p": 0.7}),
        ({"top_k": 3, "max_completion_tokens": 7}, {"do_sample": True, "top_k": 3, "max_new_tokens": 7}),
        (
            {"generation_config": GenerationConfig(do_sample=True, max_new_tokens=9, top_k=2).to_json_string()},
            {"do_sample": True, "max_new_tokens": 9, "top_k": 2},
        ),
        (
            {"n": 1, "user": "a", "metadata": {}, "store": False, "logprobs": False, "tools": [], "top_p": None}
            | {"presence_penalty": 0, "response_format": {"type": "text"}, "parallel_tool_calls": True},
            {"do_sample": False},
        ),
    ],
)
def test_fields_are_honoured_for_their_request_alone(client, engine, fields, expected):
    assert client.post(CHAT, json=ASKED | fields).status_code == 200
    assert client.post(CHAT, json=ASKED).status_code == 200
    found, without = (vars(request.settings) for request in engine.requests)
    assert found.items() >= expected.items() and type(found["temperature"]) is float  # transformers takes no int
    assert (without["do_sample"], without["max_new_tokens"]) == (False, 100) and found["seed"] != without["seed"]


def say(*contents, role: str = "user") -> dict:
    return {"messages": [{"role": role, "content": content} for content in contents]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": None}, "model is not given: choose one of 'base', 'ads'"),
        ({"n": 2}, "n may only be 1 here, found the number 2"),
        ({"logprobs": True}, "logprobs may only be false"),
        ({"tools": [{"type": "function"}]}, "Tool 1 must be an object with the name of a function, found the object"),
        ({"tools": [TOOL, TOOL]}, "The tool 'look_up' is named twice"),
        ({"tools": [TOOL]}, "The chat format chatglm has no form for tools and their calls: leave them out, or take"),
        ({"tools": [TOOL], "tool_choice": "required"}, 'tool_choice may only be "none" or "auto" here'),
        (
            {"messages": CALLED[:2] + ASKED["messages"]},
            "Message 2 calls the tool 'look_up', and the tool's answer doe",
        ),
        ({"response_format": {"type": "json_object"}}, "response_format may only be"),
        ({"presence_penalty": 0.5}, "presence_penalty may only be 0"),
        ({"best_of_all": 3}, "best_of_all is no field that is supported here: leave it out"),
        ({"history": []}, "history is no field that is supported here: give messages in its place"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1,"),
        ({"max_tokens": True}, "max_tokens must be"),
        ({"max_tokens": 10**30}, "max_tokens must be"),
        ({"temperature": "warm"}, "temperature must be a number from 0 to 100, found the text"),
        ({"temperature": 10**400}, "temperature must be"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": 2**63}, "seed must be"),
        ({"stop": ["a", ""]}, "stop must be a text or a list of at most 4"),
        ({"stop": list("abcde")}, "stop must be a text or a list of at most 4"),
        ({"stream": 1}, "stream must be true or false"),
        ({"stream_options": {"more": True}}, "stream_options takes include_usage alone"),
        ({"generation_config": '{"num_beams": 4}'}, "generation_config may hold"),
        ({"messages": []}, "messages must be a list of at least one message"),
        ({"messages": ["a"]}, "messages[0] must be an object"),
        (say(""), "messages[0].content must not be empty"),
        (say([{"type": "image_url"}]), "messages[0].content must be a text or a list of parts"),
        (say("a", "b"), "a question, but the roles of a prompt are user, user: correct them."),
        (say("a", role="assistant"), "but the roles of a prompt are assistant"),
        (say("a", role="tool"), "but the roles of a prompt are observation"),
        (say("a", role="robot"), "messages[0].role must be one of 'system'"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "Message 1 calls a tool, which only th"),
        (say("长" * 700), "tokens, and at most 500 find room beside an answer of up to 100: shorten it"),
    ],
)
def test_what_is_not_honoured_is_refused_with_a_sentence(client, engine, fields, words):
    assert words in error_of(client.post(CHAT, json=ASKED | fields), 400)["message"]
    assert engine.requests == []


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt must be one text"),
        (["a", "b"], "prompt must be one text"),
        ([1, True], "prompt must be one text"),
        ([5, -1], "prompt holds the token id -1, and there are 0 to 999"),
        ([1000], "prompt holds the token id 1000"),
        (None, "prompt must be one text"),
    ],
)
def test_a_completion_has_one_prompt_of_ids_that_exist(client, prompt, words):
    assert words in error_of(client.post(TEXT, json={"model": "base", "prompt": prompt}), 400)["message"]


@pytest.mark.parametrize(
    ("content", "status", "words"),
    [
        (b'{"model": "ads",', 400, "is not valid JSON (Expecting property name enclosed in double quotes at line 1"),
        (b"[" * 1999, 400, "is not valid JSON (RecursionError)"),
        (b'{"a": NaN}', 400, "is not valid JSON (NaN is no number of JSON"),
        (b'{"a": "\xff"}', 400, "is not valid JSON (UnicodeDecodeError)"),
        (b'{"a": "\\ud800"}', 400, "is not valid JSON (UnicodeEncodeError)"),
        (b"[1]", 400, "must be a JSON object, found the list [1]"),
        (b"", 400, "is not valid JSON"),
        (b" " * 2001, 413, "The request has more than 2000 bytes"),
    ],
)
def test_a_body_that_is_no_request_gets_one_sentence(engine, content, status, words):
    client = client_of(engine, max_request_bytes=2000)
    assert words in error_of(client.post(CHAT, content=content), status)["message"]
    assert error_of(client.post(CHAT, content=iter([content])), status)  # without its length beforehand


def test_models_and_routes_are_told(client):
    models = client.get("/v1/models").json()["data"]
    assert [(model["id"], model.get("parent")) for model in models] == [
        ("base", None),
        ("ads", "base"),
        ("support", "base"),
    ]
    assert client.get("/v1/models/ads").json() == models[1]
    unknown = error_of(client.post(CHAT, json=ASKED | {"model": "adds"}), 404)
    assert unknown["message"] == "There is no model 'adds' here; choose one of 'base', 'ads', 'support'."
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")
    ready = {"status": "ready", "model": "ads", "cached": True}  # what `transformers chat` waits for
    assert client.post("/load_model", json={"model": "ads"}).text == f"data: {json.dumps(ready)}\n\n"
    error_of(client.post("/load_model", json={"model": "THUDM/chatglm3-6b"}), 404)
    for path in ("/reset", "/docs", "/openapi.json", "/v1/responses", "/v1/load_lora_adapter"):
        error_of(client.post(path, json={}), 404)
    assert "--allow_adapter_updates" in error_of(client.post("/v1/load_lora_adapter", json={}), 404)["message"]
    error_of(client.get(CHAT), 405)
    assert (
        "access-control-allow-origin"
        not in client.post(CHAT, json=ASKED, headers={"Origin": "http://localhost"}).headers
    )
    assert client.get("/health").json() == {"status": "ok"}


def test_who_has_no_key_is_not_answered(engine):
    client = client_of(engine, api_key="schlüssel".encode())
    for header in ({}, {"Authorization": b"Bearer wrong"}):
        assert error_of(client.post(CHAT, json=ASKED, headers=header), 401)["code"] == "invalid_api_key"
        error_of(client.get("/metrics", headers=header), 401)
    assert client.get("/health").status_code == 200
    assert client.post(CHAT, json=ASKED, headers={"Authorization": "Bearer schlüssel".encode()}).status_code == 200


def test_without_a_key_no_web_page_from_elsewhere_can_ask(client):
    error_of(client.post(CHAT, json=ASKED, headers={"Origin": "http://elsewhere.example:8000"}), 403)
    error_of(client.post(CHAT, json=ASKED, headers={"Origin": "null"}), 403)
    assert client.post(CHAT, json=ASKED, headers={"Origin": "http://127.0.0.1:3000"}).status_code == 200


def test_a_key_is_one_word_and_other_hosts_need_one(tmp_path, monkeypatch):
    monkeypatch.delenv("GLM_PEFT_API_KEY", raising=False)
    file = tmp_path / "key"
    for host in ("0.0.0.0", "::", "192.168.0.9", "gpu.example", ""):
        with pytest.raises(UserError, match="can be reached from other machines, and there is no key"):
            refuse_unsafe_host(host, read_key(None), "key", "--api_key_file", "GLM_PEFT_API_KEY")
    refuse_unsafe_host("localhost", None, "key", "--api_key_file", "GLM_PEFT_API_KEY")
    for content in ("", " \n", "two words"):
        file.write_text(content)
        with pytest.raises(UserError, match="a key is one word"):
            read_key(str(file))
    file.write_text("secret\n")
    assert read_key(str(file)) == (b"secret", f"$(cat {file})")
    with pytest.raises(UserError, match="cannot be read"):
        read_key(str(tmp_path / "other"))
    monkeypatch.setenv("GLM_PEFT_API_KEY", "")
    with pytest.raises(UserError, match="GLM_PEFT_API_KEY has 0 words"):
        read_key(None)


def test_adapters_come_and_go_where_that_is_allowed(engine):
    client = client_of(engine, allow_adapter_updates=True)
    new = {"lora_name": "poet", "lora_path": "output/poet"}
    assert client.post("/v1/load_lora_adapter", json=new).status_code == 200
    assert client.post(CHAT, json=ASKED | {"model": "poet"}).status_code == 200
    assert error_of(client.post("/v1/load_lora_adapter", json=new), 400)["message"] == "The name poet is taken."
    error_of(client.post("/v1/load_lora_adapter", json={"lora_name": "poet"}), 400)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "poet"}).status_code == 200
    error_of(client.post(CHAT, json=ASKED | {"model": "poet"}), 404)
    for name in ("poet", "base"):
        error_of(client.post("/v1/unload_lora_adapter", json={"lora_name": name}), 404)


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (EngineStopped("The worker ended."), 503, "The answer cannot be generated. The worker ended."),
        (UserError("The prompt finds no room."), 400, "The prompt finds no room."),
        (KeyError("你好"), 500, "The server failed at this request"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_faults_of_the_engine_are_told_and_nothing_of_a_request_is_logged(
    client, engine, caplog, error, status, words, stream
):
    engine.error = error
    found = error_of(client.post(CHAT, json=ASKED | {"stream": stream}), status)["message"]
    assert words in found and "你好" not in found + caplog.text
    assert ("KeyError in request" in caplog.text) == (status == 500)
    engine.error = None
    assert client.post(CHAT, json=ASKED).status_code == 200


def test_what_happens_is_counted(client):
    client.post(CHAT, json=ASKED)
    client.post(CHAT, json=ASKED | {"model": "made up"})
    client.get("/nowhere")
    said = client.get("/metrics").text
    count = 'glm_peft_requests_total{{endpoint="{}",model="{}",status="{}"}} 1.0'
    assert count.format(CHAT, "ads", 200) in said and count.format(CHAT, "", 404) in said
    assert count.format("", "", 404) in said and "made up" not in said
    assert 'glm_peft_answer_tokens_total{model="ads"} 4.0' in said and "glm_peft_slots 640.0" in said
    assert 'glm_peft_time_between_tokens_seconds_count{model="ads"} 3.0' in said
    assert 'glm_peft_time_to_first_token_seconds_count{model="ads"} 1.0' in said


# Over a real connection


@contextmanager
def serving(engine: PretendingEngine, drain_seconds: float = 5.0, **limits) -> Iterator[tuple[str, Server]]:
    app, gate = build_app(Service(engine, Limits(**limits), GenerationSettings()))
    listener = bind("127.0.0.1", 0)
    server = Server(app, gate, engine, drain_seconds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield url_of(listener), server
    finally:
        server.handle_exit(SIGTERM, None)
        engine.pause = 0.0
        thread.join(20)
        assert not thread.is_alive()


def wait_for(holds) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def send(url: str, body: dict | None = None, path: str = CHAT, length: int | None = None) -> socket.socket:
    """A connection on which a request was sent."""
    host, _, port = url.removeprefix("http://").partition(":")
    content = json.dumps(body).encode() if body else b""
    connection = socket.create_connection((host, int(port)), 10)
    method = "POST" if body else "GET"
    head = f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length or len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(4096).split()[1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place_and_half_a_request_takes_none(engine, stream):
    engine.pause = 0.3
    with serving(engine, max_waiting=1) as (url, server):
        half = send(url, ASKED, length=1000)
        for _ in range(2):
            with send(url, ASKED | {"stream": stream}) as connection:
                wait_for(lambda: engine.running == 1)
                assert stream is False or status_of(connection) == 200
            wait_for(lambda: engine.running == 0 and server.gate.answering == 0)
        with send(url, ASKED) as last:
            assert status_of(last) == 200
        half.close()


def test_an_adapter_that_goes_while_its_prompt_is_encoded_is_not_found(client, engine, monkeypatch):
    monkeypatch.setattr(engine.answerers, "encode", lambda name, _: engine.answerers.by_name.pop(name)[name])
    monkeypatch.setattr(engine.answerers, "by_name", {"base": {}, "ads": {}})
    assert error_of(client.post(CHAT, json=ASKED), 404)["message"] == (
        "There is no model 'ads' here; choose one of 'base'."
    )


def test_more_requests_than_may_wait_are_told_to_come_again(engine, monkeypatch):
    engine.pause = 0.2
    monkeypatch.setattr(engine, "load", lambda: Load(0, 0, 0, 0))  # as if none of them had begun
    with serving(engine, max_waiting=1) as (url, server), send(url, ASKED) as first:
        wait_for(lambda: server.gate.answering == 1)
        with send(url, ASKED) as second:
            answer = second.recv(4096).decode()
        assert " 429 " in answer.splitlines()[0] and "retry-after: 1" in answer
        assert status_of(first) == 200


def test_at_the_end_what_is_under_way_is_answered_and_nothing_new_is_taken(engine):
    engine.pause = 0.2
    with serving(engine) as (url, server), send(url, ASKED) as first:
        wait_for(lambda: engine.running == 1)
        server.handle_exit(SIGTERM, None)
        for path, body in ((CHAT, ASKED), ("/health", None)):
            with send(url, body, path) as refused:
                assert status_of(refused) == 503
        assert status_of(first) == 200
        wait_for(lambda: not server.servers[0].is_serving())


def test_what_takes_longer_than_the_drain_is_ended_with_an_error(engine):
    engine.pause = 0.4
    with serving(engine, drain_seconds=0) as (url, server), send(url, ASKED | {"stream": True}) as first:
        assert status_of(first) == 200  # with its first piece
        with send(url, ASKED) as second:
            wait_for(lambda: engine.running == 2)
            server.handle_exit(SIGTERM, None)
            assert status_of(second) == 503
        assert "The answer cannot be generated. The engine is shutting down." in first.recv(65536).decode()


def test_a_server_whose_worker_fails_ends(engine, monkeypatch):
    with serving(engine) as (url, server):
        monkeypatch.setattr(engine, "failure", lambda: RuntimeError("out of memory"))
        wait_for(lambda: not server.server_state.connections and not server.servers[0].is_serving())


def answer_by_blocks(engine: PretendingEngine, model: Path, *blocks: str) -> None:
    """Let the engine answer as a model of GLM-4 would, with these blocks of a turn."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    answering = Answering(SimpleNamespace(), tokenizer, get_chat_format(tokenizer))
    engine.answerers.by_name.update(dict.fromkeys(engine.answerers.by_name, answering))
    mark, end = tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|observation|>"])
    ids = [tokenizer(block, add_special_tokens=False)["input_ids"] for block in blocks]
    engine.answer = [id_ for block in ids for id_ in (mark, *block)][1:] + [end]
    engine.longest_prompt = lambda name, max_new_tokens: 10**6


@pytest.mark.parametrize("streamed", [False, True])
def test_the_openai_client_calls_tools(engine, tiny_model_dirs, streamed):
    answer_by_blocks(engine, tiny_model_dirs["glm4"], "你好", 'look_up\n{"word": "衬衫"}', "look_up\n{}")
    asked = {"model": "ads", "messages": CALLED, "tools": [TOOL], "max_tokens": 500}
    with serving(engine) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        if streamed:
            *chunks, last = client.chat.completions.create(**asked, stream=True)
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            assert [call.index for call in calls] == [0, 1]
            choice = last.choices[0]
        else:
            [choice] = client.chat.completions.create(**asked).choices
            said, calls = choice.message.content, choice.message.tool_calls
        told = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert (said, choice.finish_reason) == ("你好", "tool_calls")
    found = [(call.function.name, json.loads(call.function.arguments)) for call in calls]
    assert found == [("look_up", {"word": "衬衫"}), ("look_up", {})] and len({call.id for call in calls}) == 2
    assert told.message.tool_calls is None and told.finish_reason == "stop"
    with_tools, without = (request.prompt for request in engine.requests)
    assert len(with_tools) > len(without)


@pytest.mark.parametrize("text", ["look_up\n{broken", "look at\nthis", "look"])
def test_what_is_no_call_is_told_as_text(engine, tiny_model_dirs, text):
    answer_by_blocks(engine, tiny_model_dirs["glm4"], text)
    body = ASKED | {"tools": [TOOL], "stream": True}
    *chunks, last = events_of(client_of(engine).post(CHAT, json=body).text)
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text
    assert last["choices"][0]["finish_reason"] == "stop"


def test_the_openai_client_is_answered(engine):
    with serving(engine) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        answer = client.chat.completions.create(**ASKED, temperature=0.5, seed=1, stop=["x"])
        assert answer.choices[0].message.content == "白色的衬衫" and answer.usage.completion_tokens == 4
        stream = client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "白色的衬衫"
        assert chunks[-1].usage.completion_tokens == 4 and chunks[-2].choices[0].finish_reason == "stop"
        pieces = client.completions.create(model="base", prompt="你好", stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == "白色的衬衫"
        assert [model.id for model in client.models.list()] == ["base", "ads", "support"]
        with pytest.raises(openai.NotFoundError, match="There is no model"):
            client.chat.completions.create(**ASKED | {"model": "x"})
        with pytest.raises(openai.BadRequestError, match="n may only be 1"):
            client.chat.completions.create(**ASKED, n=2)


def test_a_port_in_use_and_a_host_of_elsewhere_are_told():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(UserError, match="is in use"):
            bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="cannot be listened on"):
        bind("192.0.2.1", 8000)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--port 70000", "--port must be from 0 to 65535"),
        ("--num_beams 2", "--num_beams is not for the server"),
        ("--top_p 0.5", "has no effect without --do_sample"),
        ("--max_waiting 0", "--max_waiting must be at least 1"),
    ],
)
def test_flags_out_of_range_are_refused(flag, words):
    with pytest.raises(UserError, match=words):
        parse_serve_arguments(["--model_name_or_path", "base", *flag.split()])


# The command, typed


def test_the_command_serves_what_its_table_says_until_it_is_told_to_end(tiny_model_dirs, tmp_path):
    base = tiny_model_dirs["chatglm3"]
    words = ["--model_name_or_path", str(base), "--adapters", f"ads={make_adapter(base, tmp_path / 'ads')}"]
    command = [warm_python(), "-m", "glm_peft.serve", *words, "--port", "0", "--max_new_tokens", "6"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        try:
            lines = [process.stdout.readline() for _ in range(6)]
            assert re.match(r"base +[\d.]+ MiB +", lines[1]) and re.match(
                r"ads +prefix_tuning +4 +[\d.]+ MiB", lines[2]
            )
            _, url, *_, body = shlex.split(lines[5].removeprefix("ask it: "))
            answer = httpx2.post(url, content=body, timeout=30).json()
            assert answer["model"] == "ads" and 0 < answer["usage"]["completion_tokens"] <= 6
        finally:
            process.send_signal(SIGTERM)
        said = process.stderr.read()
        assert process.wait(30) == 0, said
    assert '"POST /v1/chat/completions HTTP/1.1" 200' in said and "你好" not in said


def test_another_host_without_a_key_is_refused_before_anything_is_loaded(monkeypatch, capsys):
    monkeypatch.delenv("GLM_PEFT_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["serve", "--model_name_or_path", "nowhere", "--host", "0.0.0.0"])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert capsys.readouterr().err.startswith("error: --host 0.0.0.0 can be reached from other machines")
