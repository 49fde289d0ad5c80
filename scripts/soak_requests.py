"""What is sent to a server that is soaked: questions with their offline answers, and what is malformed."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from make_demo_data import product_rows
from make_tiny_model import make_tiny_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from glm_peft.arguments.serve import parse_serve_arguments
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.answerers import Answerers, open_answerers, parse_adapters

TEXTS, MIB = 40, 1 << 20
MOST_SECONDS = 120  # that anybody waits
LENGTHS, LONG = (1, 4, 16, 40), 400  # tokens of answers that are awaited, and of those that nobody waits for
LEAVING = (0.02, 0.1, 0.3)  # seconds


@dataclass(frozen=True)
class Request:
    """What is sent; what must come back, and after how many seconds the client leaves."""

    kind: str
    body: bytes | dict[str, Any] | Callable[[], AsyncIterator[bytes]]
    status: int = 200
    expected: str | None = None
    leaves_after: float | None = None


def make_tiny_models(folder: Path, generation: str) -> list[str]:
    """Makes a base and its adapters; returns the server's words for them."""
    base, causal = make_tiny_model(folder / "base", generation, hidden_size=32), {"task_type": "CAUSAL_LM"}
    targets = ["query_key_value"] if generation == "chatglm" else ["q_proj", "v_proj"]
    configs = {f"prefix-{number}": PrefixTuningConfig(num_virtual_tokens=number, **causal) for number in (3, 37)}
    configs["lora"] = LoraConfig(r=4, init_lora_weights=False, target_modules=targets, **causal)
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder / name)
    return ["--model_name_or_path", str(base), "--adapters", *(f"{name}={folder / name}" for name in configs)]


def answer_offline(words: list[str]) -> list[Request]:
    """All questions to all models with the answers of offline prediction, each question alone."""
    model_args, args = parse_serve_arguments(words)
    answerers = open_answerers(model_args, parse_adapters(args.adapters or [], model_args.adapter_name_or_path))
    bodies = [body for name in answerers.by_name for body in questions_to(name)]
    return [Request("compared", body, expected=answer(answerers, body)) for body in tqdm(bodies, desc="offline")]


def questions_to(name: str) -> Iterator[dict[str, Any]]:
    """Questions of many lengths, a fifth of which are answered by draws."""
    rows = [row["content"] for row in product_rows(TEXTS, seed=0)]
    for number, row in enumerate(rows):
        messages = [{"role": "user", "content": "；".join([*rows[: number % 8], row])}]
        draws = {"temperature": 0.9, "seed": number} if number % 5 == 0 else {}
        yield {"model": name, "messages": messages, "max_tokens": LENGTHS[number % 4], **draws}


def answer(answerers: Answerers, body: dict[str, Any]) -> str:
    """The answer of offline prediction to a question that is there alone."""
    given = {name: body[name] for name in ("temperature", "seed") if name in body}
    settings = GenerationSettings(max_new_tokens=body["max_tokens"], do_sample=bool(given), **given)
    return answerers.answer(body["model"], answerers.encode(body["model"], body["messages"]), settings)


def plan_requests(asked: list[Request], number: int) -> list[Request]:
    """Mixes questions, a tenth of them from clients that leave, with malformed requests."""
    chance, requests = random.Random(0), []
    for index in range(number):
        request = chance.choice(MALFORMED if index % 20 == 10 else asked)
        if isinstance(request.body, dict):
            request = replace(request, body=request.body | {"stream": chance.random() < 0.5})
        if index % 10 == 5:
            body = request.body | {"max_tokens": LONG}
            request = Request("left", body, leaves_after=chance.choice(LEAVING))
        requests.append(request)
    return requests


async def half_a_body() -> AsyncIterator[bytes]:
    """A body whose rest never comes."""
    yield b'{"model": "base", '
    await asyncio.sleep(MOST_SECONDS)


USUAL = {"model": "base", "messages": [{"role": "user", "content": "你好"}]}
WRONG_FIELDS = (
    {"messages": []},
    {"messages": [{"role": "assistant", "content": "好"}] * 2},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    {"messages": [{"role": "user", "content": "衬衫" * 200_000}]},
    {"max_tokens": 10**9},
    {"temperature": "hot"},
)
MALFORMED = (
    *(Request("malformed", USUAL | fields, 400) for fields in WRONG_FIELDS),
    Request("malformed", USUAL | {"model": "nobody"}, 404),
    Request("malformed", b'{"model": "base", "messages": [', 400),
    Request("malformed", b'{"model": "\\ud800"}', 400),
    Request("malformed", b" " * (5 * MIB), 413),
    Request("malformed", half_a_body, leaves_after=0.2),
)
