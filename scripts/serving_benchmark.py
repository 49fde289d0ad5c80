"""
Speed of the engine that serves, beside one request at a time and offline prediction in batches, in the same run.

    python scripts/serving_benchmark.py --model_name_or_path MODEL --output_file serving.json

Adapters are prefixes of random numbers: what they say takes as long as what trained ones say. Rounds are interleaved,
so that a machine that slows down slows all variants; the table has the medians.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PrefixTuningConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_config
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.serving.engine import AnswerRequest
from glm_peft.serving.engines import SharedEngine, open_engine

TEXT = "类型#裤*版型#宽松*风格#性感*图案#线条*裤型#阔腿裤，请为这件商品写一段广告。"
Figures = dict[str, float]


def main() -> None:
    """Measure every variant in every round, and print the medians."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(*make_adapters(arguments, Path(folder)))
    try:
        rounds = run_rounds(variants_of(engine, arguments), arguments.rounds)
    finally:
        engine.close()
    results = {name: medians([figures[name] for figures in rounds]) for name in rounds[0]}
    settings = vars(arguments) | {"threads": torch.get_num_threads(), "dtype": str(engine.answerers.model.dtype)}
    text = json.dumps({"settings": settings, "results": results}, indent=2)
    Path(arguments.output_file).write_text(text + "\n", encoding="utf-8")
    print(format_table(results))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the base, the shape of the requests, and how often each variant is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a base")
    parser.add_argument("--output_file", default="serving.json", help="default: serving.json")
    parser.add_argument("--num_virtual_tokens", type=int, default=128, help="of each prefix; default: 128")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens of each answer; default: 64")
    parser.add_argument("--requests", type=int, default=32, help="in a measurement; default: 32")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="at once; default: 1 4 16")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--dtype", default="auto", help="precision of the base; default: auto")
    return parser.parse_args(argv)


def make_adapters(arguments: argparse.Namespace, folder: Path) -> tuple[ModelArguments, dict[str, str]]:
    """Save three prefixes of random numbers; return the arguments of the base, and the prefixes by name."""
    model_args = ModelArguments(model_name_or_path=arguments.model_name_or_path, dtype=arguments.dtype)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=arguments.num_virtual_tokens)
    with torch.device("meta"):  # a prefix needs no weights of the base
        base = AutoModelForCausalLM.from_config(load_config(model_args))
    model = get_peft_model(base, config)
    encoder = model.prompt_encoder["default"].to_empty(device="cpu")
    for name in ("first", "second", "third"):
        torch.nn.init.normal_(encoder.embedding.weight)
        model.save_pretrained(folder / name)
    return model_args, {name: str(folder / name) for name in ("first", "second", "third")}


def variants_of(engine: SharedEngine, arguments: argparse.Namespace) -> dict[str, Callable[[], Figures]]:
    """Return what is measured, by its name."""
    one = make_requests(engine, ["first"], arguments)
    mixed = make_requests(engine, ["first", "second", "third", "base"], arguments)
    variants: dict[str, Callable[[], Figures]] = {
        "one at a time": lambda: measure_offline(engine, one[: max(4, len(one) // 4)], batch_size=1),
        "offline, batches of 16": lambda: measure_offline(engine, one, batch_size=16),
    }
    for clients in arguments.clients:
        share = len(one) if clients > 1 else len(one) // 4
        variants[f"one adapter, {clients} clients"] = lambda clients=clients, share=share: asyncio.run(
            measure_clients(engine, one[:share], clients)
        )
        variants[f"three adapters and the base, {clients} clients"] = lambda clients=clients, share=share: asyncio.run(
            measure_clients(engine, mixed[:share], clients)
        )
    return variants


def make_requests(engine: SharedEngine, names: list[str], arguments: argparse.Namespace) -> list[AnswerRequest]:
    """Make requests of different lengths, no two alike, by turns for each name."""
    settings = GenerationSettings(max_new_tokens=arguments.max_new_tokens)
    requests = []
    for number in range(arguments.requests):
        name = names[number % len(names)]
        text = f"{number}：{TEXT[: 12 + 7 * (number % 4)]}"
        requests.append(
            AnswerRequest(name, engine.answerers.encode(name, [{"role": "user", "content": text}]), settings)
        )
    return requests


def measure_offline(engine: SharedEngine, requests: list[AnswerRequest], batch_size: int) -> Figures:
    """Answer all requests as `predict` does."""
    answering = engine.answerers.by_name[requests[0].name]
    settings = GenerationSettings(max_new_tokens=requests[0].settings.max_new_tokens, batch_size=batch_size)
    num_tokens: list[int] = []
    features = {"input_ids": [request.prompt for request in requests]}
    start = time.perf_counter()
    answering.generate(features, settings, on_batch=lambda batch: num_tokens.extend(batch.num_tokens))
    return {"tokens/s": sum(num_tokens) / (time.perf_counter() - start)}


async def measure_clients(engine: SharedEngine, requests: list[AnswerRequest], clients: int) -> Figures:
    """Let clients ask the requests, each the next one as soon as it is answered."""
    waiting, moments = list(requests), []

    async def ask_all() -> None:
        while waiting:
            moments.append(await time_tokens(engine, waiting.pop()))

    start = time.perf_counter()
    await asyncio.gather(*(ask_all() for _ in range(clients)))
    seconds = time.perf_counter() - start
    gaps = [after - before for times in moments for before, after in zip(times[1:], times[2:], strict=False)]
    return {
        "tokens/s": sum(len(times) - 1 for times in moments) / seconds,
        "first token, s": statistics.median(times[1] - times[0] for times in moments),
        "between tokens, s": statistics.median(gaps),
    }


async def time_tokens(engine: SharedEngine, request: AnswerRequest) -> list[float]:
    """Return the moment of asking and those of all tokens."""
    moments = [time.perf_counter()]
    async for ids in engine.generate(request):
        moments += [time.perf_counter()] * len(ids)
    return moments


def run_rounds(variants: dict[str, Callable[[], Figures]], rounds: int) -> list[dict[str, Figures]]:
    """Measure every variant once a round, after one measurement that is not counted."""
    next(iter(variants.values()))()
    with tqdm(total=rounds * len(variants), desc="Measuring", unit="run") as progress:
        measured = []
        for _ in range(rounds):
            measured.append({})
            for name, measure in variants.items():
                measured[-1][name] = measure()
                progress.update()
    return measured


def medians(runs: list[Figures]) -> Figures:
    """Return the median of each figure."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def format_table(results: dict[str, Figures]) -> str:
    """Format the results as a Markdown table, tokens a second also relative to the first two."""
    names = ("tokens/s", "first token, s", "between tokens, s")
    alone, offline = (list(results.values())[number]["tokens/s"] for number in (0, 1))
    rows = [f"| | {' | '.join(names)} | × one at a time | × offline |", "|---|" + "---:|" * 5]
    for name, figures in results.items():
        cells = [f"{figures[column]:.3g}" if column in figures else "" for column in names]
        speed = figures["tokens/s"]
        rows.append(f"| {name} | {' | '.join(cells)} | {speed / alone:.2f} | {speed / offline:.2f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
