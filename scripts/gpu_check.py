"""
Checks this toolkit on a GPU and measures it at real sizes; run it by scripts/gpu_check.sh.

Weights are drawn on the device and never written. Each line is measured in a process of its own, so that its peak of
memory is its own, and one that fails says so and takes no other with it; meanwhile the next process imports.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import benchmark_answers
import benchmark_cases
import make_tiny_model
import peft
import serving_benchmark
import torch
import transformers
from benchmark_answers import Prediction
from gpu_equality import compare_with_cpu
from gpu_lines import LINES, PLAIN, Line
from gpu_weights import drawn_weights
from real_size import published_options

from glm_peft.adapters.compilation import compile_layers
from glm_peft.errors import UserError
from glm_peft.examination.memory_estimate import Settings, estimate_memory
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import load_tokenizer
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.packing import BatchPackingCollator, RowCost
from glm_peft.serving.engines import open_engine

COLUMNS = ("s a step", "tokens/s", "share of rate, %", "peak memory, GB", "foretold, GB", "remark")
MOST_SECONDS = 150  # of a line, before it counts as failed
Result = dict[str, float | str]


def main() -> None:
    """Measure every line, each as a row of the table as soon as it is known; or, as a worker, the one on stdin."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measure(LINES[sys.stdin.readline().strip()], arguments.small)))
        return
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    machine = {"device": torch.cuda.get_device_name() if has_gpu else "CPU"}
    machine |= {module.__name__: module.__version__ for module in (torch, transformers, peft)}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print(f"\n| line | {' | '.join(COLUMNS)} |\n{'|---' * (len(COLUMNS) + 1)}|", flush=True)
    results: dict[str, Result] = {}
    for name, result in run_lines(arguments):
        results[name] = result
        text = json.dumps({"machine": machine, "lines": results}, indent=2, ensure_ascii=False)
        (arguments.output_dir / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
        print(f"| {name} | {' | '.join(_cell(result.get(column, '')) for column in COLUMNS)} |", flush=True)
    failed = [name for name, result in results.items() if str(result["remark"]).startswith(("FAILED", "not begun"))]
    if failed:
        sys.exit(f"{len(failed)} of {len(results)} lines failed or were not begun: {'; '.join(failed)}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return which lines are measured, at which size, and for how long."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path("output/gpu_check"), help="folder for gpu_check.json")
    parser.add_argument("--lines", nargs="+", choices=LINES, default=list(LINES), metavar="LINE", help="default: all")
    parser.add_argument("--seconds", type=float, default=510, help="after which no line is begun; default: 510")
    parser.add_argument("--small", action="store_true", help="tiny models and a few tokens, to try this script")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_lines(arguments: argparse.Namespace) -> Iterator[tuple[str, Result]]:
    """Yield each line with what was measured, or why it was not."""
    end = time.monotonic() + arguments.seconds
    command = [sys.executable, __file__, "--worker", *(["--small"] if arguments.small else [])]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    start = partial(subprocess.Popen, command, encoding="utf-8", **pipes)
    waiting = start()
    for number, name in enumerate(arguments.lines, 1):
        left = end - time.monotonic()
        if left <= 0:
            yield name, {"remark": "not begun: the time is up"}
            continue
        worker, waiting = waiting, start() if number < len(arguments.lines) else None
        try:
            said, error = worker.communicate(name, timeout=min(left, MOST_SECONDS))
            lines = error.strip().splitlines()
            reason = f"exit code {worker.returncode}; {lines[-1] if lines else 'nothing said'}"
            yield name, {"remark": f"FAILED: {reason}"} if worker.returncode else json.loads(said.splitlines()[-1])
        except subprocess.TimeoutExpired:
            worker.kill()
            yield name, {"remark": f"FAILED: not done after {min(left, MOST_SECONDS):.0f} s"}
    if waiting:
        waiting.kill()


def _cell(value: float | str) -> str:
    if isinstance(value, str):
        return value.replace("|", "\\|")
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def measure(line: Line, small: bool) -> Result:
    """One line, in this process; attention or bits that the machine lacks are no failure."""
    sizes = {"MATRIX": 64, "NUMBERS": 2**10} if small else {"MATRIX": 8192}
    compiling = partial(compile_layers, backend="eager") if small else compile_layers
    changed = patch.multiple(benchmark_cases, compile_layers=compiling, **sizes)
    with tempfile.TemporaryDirectory() as folder, drawn_weights(), changed:
        if line.kind == "equal":
            return compare_with_cpu(line.generation, Path(folder), torch.cuda.is_available())
        setting = make_setting(line, small, Path(folder) / "base")
        try:
            return MEASURES[line.kind](line, setting)
        except UserError as error:
            if not (line.attention or line.bits):
                raise
            return {"remark": f"not here: {error}"}


def make_setting(line: Line, small: bool, folder: Path) -> SimpleNamespace:
    """Write config and tokenizer of a base without its weights; return all that says what is measured."""
    small_sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "ffn_size": None, "vocab_size": 512}
    options = published_options(line.generation) | (small_sizes if small else {})
    with patch("make_tiny_model.write_weights"):
        make_tiny_model.make_tiny_model(folder, dtype="bfloat16", **options)
    setting = SimpleNamespace(
        model_name_or_path=str(folder),
        num_virtual_tokens=4 if small else 128,
        dtype="bfloat16",
        quantization_bit=line.bits,
        attn_implementation=line.attention,
        vocab_size=options["vocab_size"],
        rows=min(line.rows, 3) if small else line.rows,
        lengths=(6, 6) if small else line.lengths,
        max_new_tokens=3 if small else 64,
        steps=1 if small else 3,
    )
    setting.tokenizer = load_tokenizer(benchmark_cases.model_arguments(setting))
    setting.chat_format = get_chat_format(setting.tokenizer, None)
    return setting


def measure_step(line: Line, setting: SimpleNamespace) -> Result:
    """Forward, backward and optimizer: the median of several steps, after one that is not counted."""
    model, _ = benchmark_cases.build_model(setting, line.variant)
    batch = make_batch(line, setting, model)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    benchmark_cases.train_step(model, optimizer, batch)
    forget_peak()
    seconds = statistics.median(benchmark_cases.train_step(model, optimizer, batch) for _ in range(setting.steps))
    tokens, labels = int(batch["real_tokens"]), int(batch["real_labels"])
    peak, flops = benchmark_cases.peak_memory(), benchmark_cases.useful_flops(model, tokens, labels)
    settings = Settings(
        "bfloat16",
        quantization_bit=line.bits,
        num_virtual_tokens=setting.num_virtual_tokens,
        batch_size=len(batch["input_ids"]),
        tokens=batch["input_ids"].shape[1],
        labels=setting.lengths[1],
        activation_checkpointing=line.variant.activation_checkpointing,
    )
    foretold = estimate_memory(model.config, settings)
    rate = benchmark_cases.matrix_rate(model)
    return {
        "s a step": seconds,
        "tokens/s": tokens / seconds,
        "share of rate, %": 100 * flops / seconds / rate,
        "peak memory, GB": peak * 2**20 / 1e9,
        # For steps as the toolkit makes them; CUDA itself is in the reserve, and not in what torch allocates.
        **({} if line.variant == PLAIN else {"foretold, GB": (foretold.total - foretold.reserve) / 1e9}),
        "remark": f"of {rate / 1e12:.3g} TFLOP/s of a product of matrices",
    }


def make_batch(line: Line, setting: SimpleNamespace, model: peft.PeftModel) -> Any:
    """Rows of random ids, padded or packed."""
    torch.manual_seed(0)
    prompt, answer = setting.lengths
    shares = torch.rand(setting.rows).clamp(0.1) if line.differing else torch.ones(setting.rows)
    rows = [make_row(setting, round(prompt * share), round(answer * share)) for share in shares.tolist()]
    collate = TrainingCollator(setting.tokenizer)
    if line.packed:
        cost = RowCost(setting.num_virtual_tokens, model.config.hidden_size)
        collate = BatchPackingCollator(setting.tokenizer, collate, model.config, cost)
    return benchmark_cases.counted(collate(rows), rows).to(model.device)


def make_row(setting: SimpleNamespace, prompt: int, answer: int) -> dict[str, Any]:
    """An example of so many tokens, in the form of the generation."""
    ends = setting.chat_format.encode_prompt(setting.tokenizer, [{"role": "user", "content": "?"}]).ids
    ids = torch.randint(5, 60, (max(prompt - len(ends), 1),)).tolist() + ends
    answers = torch.randint(5, 60, (max(answer, 1),)).tolist()
    labels = [-100] * len(ids) + answers
    return {"input_ids": ids + answers, "labels": labels, "length": len(labels)}


def measure_answers(line: Line, setting: SimpleNamespace) -> Result:
    """Greedy answers of a fixed length, after some that are not counted."""
    model = benchmark_cases.build_model(setting, PLAIN)[0].eval()
    prompts = [make_row(setting, setting.lengths[0], 1)["input_ids"][:-1] for _ in range(setting.rows)]
    answer = benchmark_answers.answer_in_order if line.stock else benchmark_answers.answer_with_engine
    answer_all = partial(answer, model, setting, prompts, Prediction(), setting.rows, setting)
    answer_all()
    forget_peak()
    start = time.perf_counter()
    answer_all()
    benchmark_cases.synchronize()
    seconds = time.perf_counter() - start
    peak, rate = benchmark_cases.peak_memory(), benchmark_cases.memory_rate(model)
    read = setting.max_new_tokens * benchmark_answers.weight_bytes(model)
    return {
        "tokens/s": setting.rows * setting.max_new_tokens / seconds,
        "share of rate, %": 100 * read / seconds / rate,
        "peak memory, GB": peak * 2**20 / 1e9,
        "remark": f"of {rate / 1e9:,.0f} GB/s of memory",
    }


def measure_serving(line: Line, setting: SimpleNamespace) -> Result:
    """Requests of several clients at once, after one of each that is not counted."""
    setting.requests = 4 * setting.rows
    with tempfile.TemporaryDirectory() as folder:
        engine = open_engine(*serving_benchmark.make_adapters(setting, Path(folder)))
    names = ["first"] if line.rows == 1 else ["first", "second", "third", "base"]
    try:
        requests = serving_benchmark.make_requests(engine, names, setting)
        asyncio.run(serving_benchmark.measure_clients(engine, requests[: setting.rows], setting.rows))
        forget_peak()
        figures = asyncio.run(serving_benchmark.measure_clients(engine, requests, setting.rows))
    finally:
        engine.close()
    remark = f"first token after {figures['first token, s']:.3g} s"
    peak = benchmark_cases.peak_memory() * 2**20 / 1e9
    return {"tokens/s": figures["tokens/s"], "peak memory, GB": peak, "remark": remark}


MEASURES = {"step": measure_step, "answers": measure_answers, "serving": measure_serving}


def forget_peak() -> None:
    """Forget what was allocated on a GPU while the model was made."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
