"""
How time and memory of a training step grow with the batch, the lengths, the prefix and the vocabulary.

    python scripts/cost_growth.py --train_file FILE --output_dir output/growth

One thing is changed at a time. Every row has all the tokens that the lengths allow, so that nothing is padding, and
every step is measured in a process of its own with one thread, in seconds of that thread: what else the machine does
matters little.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from make_tiny_model import make_tiny_model
from tqdm import tqdm

USUAL = {"batch": 16, "tokens of a row": 128, "virtual tokens": 128, "vocabulary": 130_528}
GROWTH = {
    "batch": (4, 8, 16, 32),
    "tokens of a row": (32, 64, 128, 256),
    "virtual tokens": (8, 32, 128, 512),
    "vocabulary": (16_316, 32_632, 65_264, 130_528),
}
MEASURES = {"CPU s a step": "seconds of one core", "peak memory, MiB": "MiB"}
PLOT_NAME = "cost_growth.png"
_BENCHMARK = Path(__file__).with_name("benchmark.py")


def main() -> None:
    """Measures, and writes a table and a picture."""
    arguments = parse_arguments()
    output_dir = Path(arguments.output_dir)
    jobs = [(axis, value) for axis, values in GROWTH.items() for value in values]
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    results: dict[str, dict[int, dict[str, float]]] = {axis: {} for axis in GROWTH}
    for axis, value in tqdm(jobs, unit="step"):
        setting = USUAL | {axis: value}
        key = tuple(setting.values())
        found[key] = found.get(key) or measure(setting, arguments)
        results[axis][value] = found[key]
    (output_dir / "cost_growth.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(format_table(results))
    print(f"picture: {plot(results, output_dir / PLOT_NAME)}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The data and the size of the network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--train_file", required=True, help="rows to train on, as long as need be repeated in each")
    parser.add_argument("--output_dir", required=True, help="for the networks, the table and the picture")
    parser.add_argument("--hidden_size", type=int, default=256, help="default: 256")
    parser.add_argument("--num_layers", type=int, default=6, help="default: 6")
    parser.add_argument("--steps", type=int, default=3, help="steps that are timed, after one that is not; default: 3")
    return parser.parse_args(argv)


def measure(setting: dict[str, int], arguments: argparse.Namespace) -> dict[str, float]:
    """The toolkit's step in one setting, by `scripts/benchmark.py`."""
    output_dir = Path(arguments.output_dir)
    base = make_base(output_dir / f"vocabulary-{setting['vocabulary']}", setting["vocabulary"], arguments)
    length, file = setting["tokens of a row"], output_dir / "benchmark.json"
    options = {
        "model_name_or_path": base,
        "train_file": arguments.train_file,
        "output_file": file,
        "rounds": 1,
        "steps": arguments.steps,
        "batch_size": setting["batch"],
        "num_virtual_tokens": setting["virtual tokens"],
        "max_source_length": length // 2,
        "max_target_length": length // 2,
        "tasks": "training",
        "variants": "toolkit",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, _BENCHMARK, *words, "--log_normal", str(length), "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{setting}: {done.stderr}")
    measured = json.loads(file.read_text(encoding="utf-8"))["training"]["toolkit"]
    return {name: measured[name] for name in MEASURES}


def make_base(folder: Path, vocabulary: int, arguments: argparse.Namespace) -> Path:
    """A ChatGLM-6B of random weights, made once."""
    if not folder.exists():
        sizes = {"hidden_size": arguments.hidden_size, "num_layers": arguments.num_layers, "vocab_size": vocabulary}
        make_tiny_model(folder, "chatglm", num_heads=max(arguments.hidden_size // 32, 1), **sizes)
    return folder


def format_table(results: dict[str, dict[int, dict[str, float]]]) -> str:
    """Markdown: a block of lines for each thing that was changed."""
    lines = [f"| what grows | to | {' | '.join(MEASURES)} |", "|---" * (2 + len(MEASURES)) + "|"]
    for axis, measured in results.items():
        for value, row in measured.items():
            time, memory = (row[name] for name in MEASURES)
            lines.append(f"| {axis} | {value:,} | {time:.2f} | {memory:,.0f} |")
    return "\n".join(lines)


def plot(results: dict[str, dict[int, dict[str, float]]], path: Path) -> Path:
    """Time above, memory below, a column for each thing that was changed; both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = Figure((12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(MEASURES), len(results), sharey="row", sharex="col")
    for axes_of_measure, (name, unit) in zip(rows, MEASURES.items(), strict=True):
        axes_of_measure[0].set_ylabel(unit)
        for axes, measured in zip(axes_of_measure, results.values(), strict=True):
            draw(axes, {value: row[name] for value, row in measured.items()})
        values = [row[name] for measured in results.values() for row in measured.values()]
        axes_of_measure[0].set_ylim(min(values) / 1.5, max(values) * 1.5)
        axes_of_measure[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes_of_measure[0].yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    for axes, axis in zip(rows[-1], results, strict=True):
        axes.set_xlabel(axis)
    rows[0][0].legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120, format="png")
    return path


def draw(axes: Any, measured: dict[int, float]) -> None:
    """What was measured, and what growth in proportion would be from the largest on down."""
    sizes = list(measured)
    axes.loglog(sizes, list(measured.values()), "o-", color="tab:blue", label="measured")
    last = measured[sizes[-1]] / sizes[-1]
    axes.loglog(sizes, [last * size for size in sizes], ":", color="grey", label="in proportion")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


if __name__ == "__main__":
    main()
