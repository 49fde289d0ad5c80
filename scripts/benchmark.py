"""
Time and memory of this toolkit against the published recipe's way and plain PEFT, on any model and data.

    python scripts/benchmark.py --model_name_or_path MODEL --train_file FILE --output_file results.json
    python scripts/benchmark.py --shape real --num_layers 4 --model_name_or_path output/real --train_file FILE

Every variant runs in a process of its own, so that its peak memory is its own; the rounds are interleaved, so that a
machine that slows down slows all of them; the table has the medians. On CPUs peak memory is the resident set's, beside
what was allocated of it, on a GPU what was allocated. Where a variant fails, its row says why, and the others go on.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmark_answers import PREDICTION, measure_prediction
from benchmark_cases import ALL_FLOAT32, TRAINING, measure_training, model_arguments, resolve_dtype
from make_tiny_model import make_tiny_model
from real_size import SIZES, published_options
from tqdm import tqdm

from glm_peft.reporting.files import write_atomically

VARIANTS = {"training": TRAINING, "prediction": PREDICTION}
# Random weights with the published vocabulary: what a step takes is decided by the sizes alone.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"generation": "chatglm", "hidden_size": 256, "num_layers": 6, "num_heads": 8, "vocab_size": 130528},
    "balanced": {"generation": "chatglm3", "hidden_size": 1024, "num_layers": 12, "num_heads": 8, "vocab_size": 65024},
    "real": published_options("chatglm3"),
    **{f"real-{generation}": published_options(generation) for generation in SIZES if generation != "chatglm3"},
}
Run = dict[str, float | str]


def main() -> None:
    """Measures everything that is asked for, or, as a worker, one variant."""
    arguments = parse_arguments()
    if arguments.worker:
        print(json.dumps(measure(*arguments.worker.split(":"), arguments)))
        return
    if arguments.shape:
        make_model(arguments)
    results = run_rounds(arguments)
    for task in filter(results.get, arguments.tasks):
        print(format_table(task, results[task]))
    failed = [f"{task}, {name}" for task in arguments.tasks for name, row in results[task].items() if "failed" in row]
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The model, the data, the shape of a step, and what is compared."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a base")
    parser.add_argument("--shape", choices=SHAPES, help="make the model first, in that folder, unless it is there")
    parser.add_argument("--num_layers", type=int, help="with --shape: so many of its layers")
    parser.add_argument("--train_file", required=True, help="rows to train on and to predict")
    parser.add_argument("--output_file", default="benchmark.json", help="default: benchmark.json")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--steps", type=int, default=4, help="training steps that are timed, after one that is not")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of a batch; default: 16")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1, help="batches of a step; default: 1")
    parser.add_argument("--rows", type=int, default=48, help="rows to predict; default: 48")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="tokens of each answer; default: 32")
    parser.add_argument("--num_virtual_tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--max_source_length", type=int, default=64, help="default: 64")
    parser.add_argument("--max_target_length", type=int, default=64, help="default: 64")
    parser.add_argument(
        "--log_normal",
        type=float,
        nargs=2,
        metavar=("MEDIAN", "SIGMA"),
        help="train on rows whose answers are stretched to log-normal lengths of this median in tokens",
    )
    parser.add_argument("--dtype", default="auto", help="precision of the base; default: auto")
    parser.add_argument("--quantization_bit", type=int, choices=(4, 8), help="load the base quantized")
    parser.add_argument("--tasks", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="default: both")
    parser.add_argument("--variants", nargs="+", choices=sorted({*TRAINING, *PREDICTION}), help="default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def make_model(arguments: argparse.Namespace) -> None:
    """Write a model of the shape that is asked for, in 16 bits as published, where its folder is not there."""
    layers = {"num_layers": arguments.num_layers} if arguments.num_layers else {}
    if not Path(arguments.model_name_or_path).exists():
        make_tiny_model(arguments.model_name_or_path, dtype="bfloat16", **SHAPES[arguments.shape] | layers)


def measure(task: str, name: str, arguments: argparse.Namespace) -> Run:
    """One variant, in this process."""
    return (measure_training if task == "training" else measure_prediction)(name, arguments)


def run_rounds(arguments: argparse.Namespace) -> dict[str, Any]:
    """All variants once, then all of them again but those that failed, and so on; the file has each as it comes."""
    jobs = list_jobs(arguments)
    runs: dict[tuple[str, str], list[Run]] = {job: [] for job in jobs}
    with tqdm(total=len(jobs) * arguments.rounds, unit="run") as progress:
        for job in jobs * arguments.rounds:
            progress.set_description(", ".join(job))
            if not any("failed" in run for run in runs[job]):
                runs[job].append(run_worker(job))
            results = summarize(runs) | {"settings": vars(arguments)}
            write_atomically(arguments.output_file, json.dumps(results, indent=2) + "\n")
            progress.update()
    return results


def list_jobs(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Task and variant of all that is asked for."""
    wanted = set(arguments.variants or {*TRAINING, *PREDICTION})
    resolved = resolve_dtype(model_arguments(arguments))
    if ALL_FLOAT32 in wanted and (arguments.dtype, resolved) != ("auto", "float32"):
        wanted.remove(ALL_FLOAT32)
        print(f'"{ALL_FLOAT32}" is left out: here no weight is kept in another precision.', file=sys.stderr)
    return [(task, name) for task in arguments.tasks for name in VARIANTS[task] if name in wanted]


def run_worker(job: tuple[str, str]) -> Run:
    """One variant in a process of its own: what was measured, or why it `failed`."""
    command = [sys.executable, *sys.argv, "--worker", ":".join(job)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if not done.returncode:
        return json.loads(done.stdout.splitlines()[-1])
    tqdm.write(f"{', '.join(job)}: {done.stderr}", file=sys.stderr)
    if done.returncode < 0:  # by the system, which says nothing, where memory runs out
        return {"failed": f"killed by {signal.Signals(-done.returncode).name}"}
    return {"failed": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]}


def summarize(runs: dict[tuple[str, str], list[Run]]) -> dict[str, Any]:
    """The median of every number, by task and variant; of words the first; of a variant that failed only why."""
    results: dict[str, Any] = {task: {} for task in VARIANTS}
    for (task, name), measured in ((job, measured) for job, measured in runs.items() if measured):
        columns = {key: [run[key] for run in measured] for key in measured[-1] if "failed" not in measured[-1]}
        results[task][name] = {
            key: values[0] if isinstance(values[0], str) else statistics.median(values)
            for key, values in columns.items()
        } or measured[-1]
    return results


def format_table(task: str, results: dict[str, dict[str, Any]]) -> str:
    """A Markdown table, a line for each variant; below it what the toolkit says of its batches."""
    first = next((row for row in results.values() if "failed" not in row), {})
    keys = [key for key, value in first.items() if not isinstance(value, str)] or [""]
    lines = [f"| {task} | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(_cells(row, keys))} |" for name, row in results.items()]
    return "\n".join([*lines, first["batches"]] if "batches" in first else lines) + "\n"


def _cells(row: Run, keys: list[str]) -> list[str]:
    if "failed" in row:
        return [f"failed: {row['failed']}".replace("|", "\\|")]
    return [_cell(row[key]) for key in keys]


def _cell(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
