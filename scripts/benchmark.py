"""
Time and memory of this toolkit against the published recipe's way and plain PEFT, on any model and data.

    python scripts/benchmark.py --model_name_or_path MODEL --train_file FILE --output_file results.json

Every variant runs in a process of its own, so that its peak memory is its own; the rounds are interleaved, so that a
machine that slows down slows all of them; the table has the medians. On CPUs peak memory is the resident set's, on a
GPU what was allocated.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from transformers import BatchEncoding

from glm_peft.adapters import create_adapter
from glm_peft.arguments import DataArguments
from glm_peft.base_model import load_base_model, load_tokenizer
from glm_peft.chat_formats import get_chat_format
from glm_peft.collators import GenerationCollator, TrainingCollator
from glm_peft.conversations import load_splits
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.generation import generate_answers
from glm_peft.generation_settings import GenerationSettings
from glm_peft.label_loss import attach_label_loss
from glm_peft.prefix_attention import attach_prefix_attention

TRAINING = ("toolkit", "full logits", "prefix in a cache", "published way", "plain PEFT")
PREDICTION = ("toolkit", "one at a time", "plain PEFT")


@dataclass(frozen=True)
class Variant:
    """What a variant of training has of this toolkit's savings."""

    label_loss: bool = True
    prefix_attention: bool = True
    pad_to_maximum: bool = False
    activation_checkpointing: bool = False


VARIANTS = {
    "toolkit": Variant(),
    "full logits": Variant(label_loss=False),
    "prefix in a cache": Variant(prefix_attention=False),
    "published way": Variant(label_loss=False, pad_to_maximum=True, activation_checkpointing=True),
    "plain PEFT": Variant(label_loss=False, prefix_attention=False),
}


def main() -> None:
    """Measures everything that is asked for, or, as a worker, one variant."""
    arguments = parse_arguments()
    if arguments.worker:
        task, variant = arguments.worker.split(":")
        measure = measure_training if task == "training" else measure_prediction
        print(json.dumps(measure(variant, arguments)))
        return
    jobs = [("training", name) for name in TRAINING] + [("prediction", name) for name in PREDICTION]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {job: [] for job in jobs}
    for number in range(arguments.rounds):
        for job in jobs:
            runs[job].append(run_worker(job))
            print(f"round {number + 1}/{arguments.rounds}: {job[0]}, {job[1]}", file=sys.stderr)
    results = summarize(runs) | {"settings": vars(arguments)}
    Path(arguments.output_file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    for task in ("training", "prediction"):
        print(format_table(task, results[task]))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The model, the data and the shape of a step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_file", default="benchmark.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="training steps that are timed, after one that is not")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--rows", type=int, default=48, help="rows to predict")
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--num_virtual_tokens", type=int, default=128)
    parser.add_argument("--max_source_length", type=int, default=64)
    parser.add_argument("--max_target_length", type=int, default=64)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run_worker(job: tuple[str, str]) -> dict[str, float]:
    """One variant in a process of its own."""
    command = [sys.executable, *sys.argv, "--worker", ":".join(job)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def measure_training(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Forward, backward and optimizer; the first step is not counted."""
    variant, setting = VARIANTS[name], load_setting(arguments)
    model = build_model(arguments, variant)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-3)
    seconds = []
    batches = list(training_batches(setting, variant, arguments))
    for batch in batches:
        start = time.perf_counter()
        model(**batch.to(model.device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds[1:])
    return {
        "examples a second": arguments.batch_size / step,
        "seconds a step": step,
        "share of padding": 1 - statistics.mean(batch["attention_mask"].float().mean().item() for batch in batches),
        "peak memory in MiB": peak_memory(),
    }


def measure_prediction(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Greedy answers of a fixed length, so that every variant does the same work."""
    setting = load_setting(arguments)
    model = build_model(arguments, Variant(label_loss=False, prefix_attention=False)).eval()
    prompts = setting.prompts[: arguments.rows]
    size = 1 if name == "one at a time" else arguments.batch_size
    start = time.perf_counter()
    if name == "toolkit":
        answer_with_toolkit(model, setting, prompts, arguments)
    else:
        answer_in_order(model, setting, prompts, size, arguments)
    synchronize()
    seconds = time.perf_counter() - start
    return {"rows a second": len(prompts) / seconds, "peak memory in MiB": peak_memory()}


def load_setting(arguments: argparse.Namespace) -> SimpleNamespace:
    """Tokenizer, chat format and the encoded rows."""
    tokenizer = load_tokenizer(arguments)
    chat_format = get_chat_format(tokenizer, None)
    data_args = DataArguments(
        train_file=arguments.train_file,
        test_file=arguments.train_file,
        max_source_length=arguments.max_source_length,
        max_target_length=arguments.max_target_length,
        max_train_samples=arguments.batch_size * (arguments.steps + 1),
        max_predict_samples=arguments.rows,
    )
    splits = load_splits(data_args, ["train", "test"])
    examples, _ = build_training_features(splits["train"], chat_format, tokenizer, data_args)
    prompts = build_generation_features(splits["test"], chat_format, tokenizer, data_args).dataset["input_ids"][:]
    return SimpleNamespace(tokenizer=tokenizer, chat_format=chat_format, examples=examples, prompts=prompts)


def build_model(arguments: argparse.Namespace, variant: Variant) -> PeftModel:
    """A fresh prefix on the base, with the savings of the variant."""
    torch.manual_seed(0)
    prefix = {"num_virtual_tokens": arguments.num_virtual_tokens, "prefix_projection": False}
    none = {"encoder_hidden_size": None, "adapter_name_or_path": None}
    model = create_adapter(load_base_model(arguments), SimpleNamespace(**prefix, **none)).train()
    if variant.prefix_attention:
        attach_prefix_attention(model)
    if variant.label_loss:
        attach_label_loss(model.get_base_model())
    if variant.activation_checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def training_batches(setting: SimpleNamespace, variant: Variant, arguments: argparse.Namespace) -> Iterator[Any]:
    """The same rows for every variant, padded to the longest of the batch or to the two maximum lengths."""
    length = arguments.max_source_length + arguments.max_target_length
    collate = TrainingCollator(setting.tokenizer, pad_to_multiple_of=length if variant.pad_to_maximum else None)
    for start in range(0, len(setting.examples), arguments.batch_size):
        rows = setting.examples.select(range(start, start + arguments.batch_size))
        yield BatchEncoding(collate(list(rows)))


def answer_with_toolkit(
    model: PeftModel, setting: SimpleNamespace, prompts: list[list[int]], arguments: argparse.Namespace
) -> None:
    """The engine of `glm_peft.predict`."""
    settings = GenerationSettings(max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size)
    generate_answers(model, setting.tokenizer, _Endless(setting.chat_format), {"input_ids": prompts}, settings)


def answer_in_order(
    model: PeftModel, setting: SimpleNamespace, prompts: list[list[int]], size: int, arguments: argparse.Namespace
) -> None:
    """Stock `generate` on batches in the order of the file."""
    collate = GenerationCollator(setting.tokenizer)
    for start in range(0, len(prompts), size):
        batch = collate([{"input_ids": ids} for ids in prompts[start : start + size]])
        inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
        model.generate(**inputs, max_new_tokens=arguments.max_new_tokens, do_sample=False, eos_token_id=None)


class _Endless:
    """A chat format whose answers are never ended."""

    def __init__(self, chat_format: Any) -> None:
        self.clean_answer = chat_format.clean_answer

    def stop_token_ids(self, tokenizer: Any) -> list[int]:
        return [-1]


def synchronize() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """MiB that the process had at most: allocated on the GPU, resident on CPUs."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def summarize(runs: dict[tuple[str, str], list[dict[str, float]]]) -> dict[str, Any]:
    """The median of every number, by task and variant."""
    results: dict[str, Any] = {"training": {}, "prediction": {}}
    for (task, name), measured in runs.items():
        results[task][name] = {key: statistics.median(run[key] for run in measured) for key in measured[0]}
    return results


def format_table(task: str, results: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a line for each variant."""
    keys = list(next(iter(results.values())))
    lines = [f"| {task} | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[key]:.2f}' for key in keys)} |" for name, row in results.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
