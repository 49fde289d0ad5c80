"""
Makes each generation at its published size with random weights, trains and asks it, and removes it again.

    python scripts/real_size.py --output_dir output/real_size --generations chatglm3 --quantization_bit 4

Every command is typed as a user would and runs in a process of its own, of which two peaks of memory are taken: what
it allocated, and all that was resident, where pages of a weight file that is mapped count, which the system takes back
when it needs room. Beside them stands what the doctor foretells. 20 GB of disk are needed at a time.
"""

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from make_demo_data import product_rows

from glm_peft.arguments.model import ModelArguments
from glm_peft.examination.memory_estimate import Settings, estimate_memory
from glm_peft.models.loading import load_config

ROOT, PYTHON = Path(__file__).parents[1], sys.executable
# Layers, inner size of the MLP, rows of the embedding table, as published; all are 4,096 wide with 32 heads.
SIZES = {
    "chatglm": (28, 16384, 130528),
    "chatglm2": (28, 13696, 65024),
    "chatglm3": (28, 13696, 65024),
    "glm4": (40, 13696, 151552),
    "glm4_0414": (40, 13696, 151552),
}
COLUMNS = (
    *("generation", "bits", "weights, GB", "made in, s", "start and loading, s", "a step, s"),
    *("foretold, GB", "allocated, GB", "resident, GB", "answer: start and loading, s", "tokens/s", "allocated, GB"),
)


@dataclass(frozen=True)
class Command:
    """What a command took: seconds, and the most that its process allocated and had resident, in bytes."""

    seconds: float
    allocated: int
    resident: int


def main() -> None:
    """Measure every generation that is asked for; a row of the table as soon as it is known."""
    arguments = parse_arguments()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for generation in arguments.generations:
        row = measure(generation, arguments)
        with (arguments.output_dir / "rows.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"| {' | '.join(format_cells(row))} |", flush=True)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return which models are made, and the shape of a step."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for models, adapters and rows.jsonl")
    parser.add_argument("--generations", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--quantization_bit", choices=("4", "8"), help="load the base quantized")
    parser.add_argument("--dtype", default="auto", help="precision of the base; default: auto")
    parser.add_argument("--format", default="safetensors", choices=("safetensors", "bin"), help="of the weight files")
    parser.add_argument("--steps", type=int, default=2, help="training steps; default: 2")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step; default: 4")
    parser.add_argument("--max_length", type=int, default=64, help="most tokens of prompt and of answer; default: 64")
    parser.add_argument("--num_virtual_tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--answer_tokens", type=int, default=8, help="most tokens of the answer; default: 8")
    parser.add_argument("--num_layers", type=int, help="layers of a smaller model, to try this script")
    parser.add_argument("--hidden_size", type=int, default=4096, help="width of a smaller model")
    return parser.parse_args(argv)


def measure(generation: str, arguments: argparse.Namespace) -> dict[str, object]:
    """Make a model, train a prefix, ask it, remove the model; return what each took."""
    folder = arguments.output_dir / generation
    shutil.rmtree(folder, ignore_errors=True)
    model, adapter, data = folder / "model", folder / "adapter", folder / "rows.jsonl"
    folder.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in product_rows(arguments.batch_size, seed=0)))
    made = run(make_words(generation, model, arguments))
    base = ["--model_name_or_path", model, "--dtype", arguments.dtype]
    base += ["--quantization_bit", arguments.quantization_bit] if arguments.quantization_bit else []
    size = sum(file.stat().st_size for file in model.iterdir())
    try:
        trained = run([ROOT / "glm_peft" / "train.py", *base, *train_words(data, adapter, arguments)])
        asked = ["--adapter_name_or_path", adapter, "--test_file", data, "--max_predict_samples", "1"]
        asked += ["--max_new_tokens", arguments.answer_tokens, "--output_dir", folder / "answers"]
        answered = run(["-m", "glm_peft.predict", *base, *asked])
        foretold = foretell(model, arguments)
    finally:
        shutil.rmtree(model)
    results = read(adapter / "all_results.json") | read(folder / "answers" / "predict_results.json")
    commands = {"made": made, "trained": trained, "answered": answered}
    own = {name: str(value) for name, value in vars(arguments).items() if name not in ("output_dir", "generations")}
    took = {name: asdict(command) for name, command in commands.items()}
    return {"generation": generation, "weights": size, "foretold": foretold, "results": results, **took, **own}


def make_words(generation: str, model: Path, arguments: argparse.Namespace) -> list[object]:
    """Return the command that writes the model."""
    layers, inner, vocabulary = SIZES[generation]
    words = [ROOT / "scripts" / "make_tiny_model.py", "--output_dir", model, "--generation", generation]
    words += ["--dtype", "bfloat16", "--format", arguments.format, "--vocab_size", vocabulary, "--num_heads", "32"]
    words += ["--ffn_size", inner * arguments.hidden_size // 4096, "--hidden_size", arguments.hidden_size]
    return [*words, "--num_layers", arguments.num_layers or layers]


def train_words(data: Path, adapter: Path, arguments: argparse.Namespace) -> list[object]:
    """Return the flags of a training of a few steps."""
    words = ["--do_train", "--train_file", data, "--output_dir", adapter, "--max_steps", arguments.steps]
    words += ["--per_device_train_batch_size", arguments.batch_size, "--save_strategy", "no"]
    words += ["--max_source_length", arguments.max_length, "--max_target_length", arguments.max_length]
    return [*words, "--num_virtual_tokens", arguments.num_virtual_tokens]


def run(words: list[object]) -> Command:
    """Run a Python command to its end, and watch its memory; show what it said where it fails."""
    start = time.perf_counter()
    command = [PYTHON, *map(str, words)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as process:
        peaks = {"allocated": 0, "resident": 0}
        watcher = threading.Thread(target=watch, args=(process.pid, peaks), daemon=True)
        watcher.start()
        said = process.communicate()[0]
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{said}")
    return Command(time.perf_counter() - start, **peaks)


def watch(pid: int, peaks: dict[str, int]) -> None:
    """Keep the most memory that a process had, until it ends."""
    try:
        process = psutil.Process(pid)
        while True:
            memory = process.memory_info()
            found = {"allocated": memory.rss - memory.shared, "resident": memory.rss}
            peaks.update({name: max(peaks[name], value) for name, value in found.items()})
            time.sleep(0.1)
    except psutil.Error:
        return


def foretell(model: Path, arguments: argparse.Namespace) -> float:
    """Return the bytes that the doctor foretells of the training."""
    config = load_config(ModelArguments(model_name_or_path=str(model)))
    settings = Settings(
        dtype=arguments.dtype,
        quantization_bit=int(arguments.quantization_bit or 0) or None,
        num_virtual_tokens=arguments.num_virtual_tokens,
        batch_size=arguments.batch_size,
        tokens=2 * arguments.max_length,
        labels=arguments.max_length,
    )
    return estimate_memory(config, settings).total


def read(file: Path) -> dict[str, object]:
    return json.loads(file.read_text(encoding="utf-8"))


def format_cells(row: dict) -> list[str]:
    """Return a row's cells, as `COLUMNS` names them."""
    trained, answered, results = row["trained"], row["answered"], row["results"]
    numbers = [
        row["weights"] / 1e9,
        row["made"]["seconds"],
        trained["seconds"] - results["train_runtime"],
        results["train_runtime"] / int(row["steps"]),
        row["foretold"] / 1e9,
        trained["allocated"] / 1e9,
        trained["resident"] / 1e9,
        answered["seconds"] - results["predict_runtime"],
        int(row["answer_tokens"]) / results["predict_runtime"],
        answered["allocated"] / 1e9,
    ]
    bits = row["quantization_bit"] if row["quantization_bit"] != "None" else f"16 or 32 ({row['dtype']})"
    return [row["generation"], bits, *(f"{number:,.0f}" if number >= 100 else f"{number:.3g}" for number in numbers)]


if __name__ == "__main__":
    main()
