"""
Measures what a prefix forgets: starts, learning rates and weights of --keep_weight, each a training by a recipe.

    OMP_NUM_THREADS=1 python scripts/forgetting_table.py configs/demo.yaml --output_dir output/forgetting

The new task is the recipe's, of any model. The old one are the prompts of --keep_file: nothing in the new task asks
the base to change its answers to them. Of the demo, whose new task are single product lines in the classical manner,
they are conversations in which earlier products stand before the last, and are made here: the base answers these in
manners of its own. Writes a Markdown table and a picture; further flags are the recipe's.
"""

import argparse
import contextlib
import io
import itertools
import json
import random
import sys
from pathlib import Path
from typing import Any

from demo_manners import MANNERS
from make_demo_data import draw_products, is_held_out, write_content, write_summary

from glm_peft import train

STARTS = {
    "peft": [],
    "normal": ["--prefix_init", "normal"],
    "zero": ["--prefix_init", "zero"],
    "text": ["--prefix_init", "text", "--prefix_init_text"],  # and the text
    "instruction": ["--prefix_init", "instruction"],
}
DEMO_TEXT = "观其白色，如初雪，裁雪纺以为半身裙"  # in the manner that is wanted of the demo
COLUMNS = {
    "BLEU-4": ("eval_bleu-4", ".1f"),
    "exact, %": ("eval_exact_match", ".0f"),
    "divergence at the start": ("start_keep_divergence", ".5f"),
    "divergence": ("eval_keep_divergence", ".5f"),
    "same answers": ("eval_keep_same_answers", ".2f"),
    "rise of loss": ("eval_keep_loss_rise", ".4f"),
    "seconds": ("train_runtime", ".0f"),
}
Run = dict[str, Any]


def write_conversations(file: Path, number: int, seed: int) -> None:
    """Conversations that end with a product line, after a round in a manner drawn at random."""
    chooser = random.Random(seed)
    products = draw_products(chooser, lambda product: not is_held_out(product))
    lines = []
    for _ in range(number):
        earlier = next(products)
        messages = [
            {"role": "user", "content": write_content(earlier)},
            {"role": "assistant", "content": write_summary(earlier, chooser.choice(sorted(MANNERS)), chooser)},
            {"role": "user", "content": write_content(next(products))},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False))
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def train_once(folder: Path, words: list[str]) -> dict[str, float]:
    """The results of a training, as a user types it."""
    before, sys.argv = sys.argv, ["train.py", *words, "--output_dir", str(folder)]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # which is for the table
            train.main()
    finally:
        sys.argv = before
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def measure(arguments: argparse.Namespace, flags: list[str]) -> list[Run]:
    """A run for every start, learning rate and weight, with every seed; the rows of the table as they are done."""
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    file = arguments.keep_file
    if file is None:
        file = arguments.output_dir / "conversations.jsonl"
        write_conversations(file, arguments.conversations, seed=0)
    print(f"| start | learning rate | weight | seed | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 4) + "|", flush=True)
    shared = [arguments.recipe, "--eval_strategy", "no", "--disable_tqdm", "true", "--keep_file", str(file), *flags]
    runs = []
    for start, rate, weight, seed in itertools.product(
        arguments.starts, arguments.rates, arguments.weights, arguments.seeds
    ):
        words = [*STARTS[start], *([arguments.start_text] if start == "text" else [])]
        words += ["--learning_rate", str(rate), "--seed", str(seed)]
        words += ["--keep_weight", str(weight)] if weight else []
        results = train_once(arguments.output_dir / "run", [*shared, *words])
        runs.append({"start": start, "rate": rate, "weight": weight, "seed": seed, **results})
        cells = [format(results[name], form) for name, form in COLUMNS.values()]
        print(f"| {start} | {rate:g} | {weight:g} | {seed} | {' | '.join(cells)} |", flush=True)
    (arguments.output_dir / "runs.json").write_text(json.dumps(runs, indent=1), encoding="utf-8")
    return runs


def draw(runs: list[Run], file: Path, score: str) -> None:
    """Learned against kept: a colour for each start, a mark for each weight, larger for a higher learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    starts, rates, weights = (list(dict.fromkeys(run[name] for run in runs)) for name in ("start", "rate", "weight"))
    for run in runs:
        style = {"color": f"C{starts.index(run['start'])}", "marker": "osD^vP*X"[weights.index(run["weight"]) % 8]}
        size = 40 * (1 + sorted(rates).index(run["rate"]))
        axes.scatter(run["eval_keep_divergence"], run[f"eval_{score}"], s=size, alpha=0.75, **style)
    for number, start in enumerate(starts):
        axes.scatter([], [], color=f"C{number}", label=f"start: {start}")
    for number, weight in enumerate(weights):
        axes.scatter([], [], color="grey", marker="osD^vP*X"[number % 8], label=f"--keep_weight {weight:g}")
    axes.set(xscale="log", xlabel="divergence from the base on old prompts (nats per token): less is kept →")
    axes.set(
        ylabel=f"{score.upper().replace('_', ' ')} on the new task: more is learned →",
        title="Learned against kept (large marks: the higher learning rate)",
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, dpi=120)


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Measure what prefixes learn and forget.")
    parser.add_argument("recipe", help="The recipe, such as configs/demo.yaml.")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Folder for runs.json, picture.png and the runs."
    )
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS), help="Default: all.")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.1, 0.02], help="Default: 0.1 0.02.")
    parser.add_argument("--weights", type=float, nargs="+", default=[0, 1], help="Default: 0 1.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="Default: 42.")
    parser.add_argument("--keep_file", help="Old prompts; if None, conversations about the demo's products.")
    parser.add_argument("--conversations", type=int, default=128, help="How many of those; default: 128.")
    parser.add_argument("--score", default="bleu-4", help="What the picture shows of the new task; default: bleu-4.")
    parser.add_argument("--start_text", default=DEMO_TEXT, help=f"Of the start from a text; default: {DEMO_TEXT}.")
    return parser.parse_known_args(argv)


def main() -> None:
    arguments, flags = parse_arguments()
    draw(measure(arguments, flags), arguments.output_dir / "picture.png", arguments.score)


if __name__ == "__main__":
    main()
