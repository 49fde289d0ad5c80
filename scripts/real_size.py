"""
Makes each generation at its published size with random weights, tries it in several precisions, and removes it again.

    python scripts/real_size.py --output_dir output/real_size --generations chatglm3 --precisions auto 4

In each precision the base is loaded alone, trained, asked and served, with the trained prefix, or with none where
training failed. Every command is typed as a user would and runs in a process of its own, of which two peaks of memory
are taken: what it allocated, and all that was resident, where pages of a weight file that is mapped count, which the
system takes back when it needs room. Beside them stands what the doctor foretells. 20 GB of disk are needed at a time.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from make_demo_data import product_rows
from real_size_commands import ROOT, Figures, ask_server, run

from glm_peft.arguments.training import parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.examination.memory_estimate import describe_settings, estimate_memory
from glm_peft.models.loading import load_config

# Layers, inner size of the MLP, rows of the embedding table, as published.
SIZES = {
    "chatglm": (28, 16384, 130528),
    "chatglm2": (28, 13696, 65024),
    "chatglm3": (28, 13696, 65024),
    "glm4": (40, 13696, 151552),
    "glm4_0414": (40, 13696, 151552),
}
WIDTH, HEADS = 4096, 32
FORMATS = ("safetensors", "bin")
# What bitsandbytes imports when it is first used is no loading of weights.
LOADING = """
import json, sys, time
from glm_peft.arguments.model import ModelArguments
from glm_peft.models.loading import load_base_model
model_args = ModelArguments(**json.loads(sys.argv[1]))
if model_args.quantization_bit:
    import bitsandbytes, transformers.integrations.bitsandbytes
start = time.perf_counter()
load_base_model(model_args)
print(time.perf_counter() - start)
"""
# Titles, and the part of a row and the figure in it that they show; those of loading come for each format.
MADE = (("weights, GB", "made", "weights"), ("made in, s", "made", "seconds"))
LOADED = (("loading, s", "loading"), ("allocated, GB", "allocated"), ("resident, GB", "resident"))
TRIED = (
    ("training: start and loading, s", "trained", "start"),
    ("a step, s", "trained", "step"),
    ("foretold, GB", "foretold", "total"),
    ("allocated, GB", "trained", "allocated"),
    ("resident, GB", "trained", "resident"),
    ("answer: start and loading, s", "answered", "start"),
    ("tokens/s", "answered", "rate"),
    ("allocated, GB", "answered", "allocated"),
    ("server: up after, s", "served", "up"),
    ("first answer, 1 token, s", "served", "first"),
    ("second answer, s", "served", "second"),
    ("end, s", "served", "ended"),
    ("allocated, GB", "served", "allocated"),
    ("resident, GB", "served", "resident"),
)
Column = tuple[str, str, str]


def main() -> None:
    """Measure every generation that is asked for; a row of the table as soon as it is known."""
    arguments = parse_arguments()
    arguments.output_dir = arguments.output_dir.resolve()  # commands run in another folder
    titles = ["generation", "precision", *(title for title, _, _ in columns_of(arguments.formats))]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    rows = [row for generation in arguments.generations for row in measure(generation, arguments)]
    sys.exit(any("failed" in part for row in rows for part in row.values() if isinstance(part, dict)))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return which models are made, in which precisions they are tried, and the shape of a step."""
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n\n")[0])
    precisions = ("auto", "bfloat16", "float32", "4", "8")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for models, adapters and rows.jsonl")
    parser.add_argument("--generations", nargs="+", choices=SIZES, default=list(SIZES), help="default: all")
    parser.add_argument("--precisions", nargs="+", choices=precisions, default=["auto", "4"], help="default: auto 4")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["safetensors"],
        help="of the weight files: all are loaded, the first is trained, asked and served; default: safetensors",
    )
    parser.add_argument("--limit", type=float, default=1800, help="most seconds of a command; default: 1800")
    parser.add_argument("--steps", type=int, default=2, help="training steps; default: 2")
    parser.add_argument("--batch_size", type=int, default=4, help="rows of a step; default: 4")
    parser.add_argument("--max_length", type=int, default=64, help="most tokens of prompt and of answer; default: 64")
    parser.add_argument("--num_virtual_tokens", type=int, default=128, help="default: 128")
    parser.add_argument("--answer_tokens", type=int, default=8, help="most tokens of the answer; default: 8")
    parser.add_argument("--num_layers", type=int, help="layers of a smaller model, to try this script")
    parser.add_argument("--hidden_size", type=int, default=WIDTH, help="width of a smaller model")
    return parser.parse_args(argv)


def published_options(generation: str) -> dict[str, Any]:
    """Return the options of `make_tiny_model` by which a model has its published size."""
    layers, inner, vocabulary = SIZES[generation]
    sizes = {"hidden_size": WIDTH, "num_layers": layers, "num_heads": HEADS, "ffn_size": inner}
    return {"generation": generation, **sizes, "vocab_size": vocabulary}


def columns_of(formats: list[str]) -> list[Column]:
    """Return the columns behind generation and precision."""
    loaded = [(f".{name}: {title}", f"loaded_{name}", figure) for name in formats for title, figure in LOADED]
    return [*MADE, *loaded, *TRIED]


def measure(generation: str, arguments: argparse.Namespace) -> list[Figures]:
    """Make a model in each format, try it in each precision, and remove it; return a row for each precision."""
    folder = arguments.output_dir / generation
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # So long that both lengths are filled, as the foretold memory is that of full rows.
    data = [{name: text * arguments.max_length for name, text in row.items()} for row in product_rows(4, seed=0)]
    lines = "".join(json.dumps(row) + "\n" for row in data * arguments.batch_size)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    known = ("output_dir", "generations", "precisions")
    own = {name: value for name, value in vars(arguments).items() if name not in known}
    rows = [{"generation": generation, "precision": precision, **own} for precision in arguments.precisions]
    first, *others = arguments.formats
    for name in others:  # before the first, so that the disk holds one at a time
        with made_model(name, folder, generation, arguments) as (model, made):
            for row in rows:
                failed = {"failed": made["failed"]} if "failed" in made else None
                row[f"loaded_{name}"] = failed or load(model, row["precision"], arguments)
    with made_model(first, folder, generation, arguments) as (model, made):
        for row in rows:
            row["made"] = made
            try:
                if "failed" not in made:
                    row[f"loaded_{first}"] = load(model, row["precision"], arguments)
                    try_model(row, model, arguments)
            finally:
                write(row, arguments)
    return rows


@contextmanager
def made_model(
    name: str, folder: Path, generation: str, arguments: argparse.Namespace
) -> Iterator[tuple[Path, Figures]]:
    """Make a model with weight files of the format `name`, and remove it at the end, whatever happened."""
    model, options = folder / name, published_options(generation)
    options["ffn_size"] = options["ffn_size"] * arguments.hidden_size // WIDTH
    options |= {"hidden_size": arguments.hidden_size, "num_layers": arguments.num_layers or options["num_layers"]}
    words = [ROOT / "scripts" / "make_tiny_model.py", "--output_dir", model, "--dtype", "bfloat16", "--format", name]
    words += [word for option, value in options.items() for word in (f"--{option}", value)]
    try:
        made = run(words, folder / f"made_{name}.log", arguments.limit)
        if "failed" not in made:
            made["weights"] = sum(file.stat().st_size for file in model.iterdir())
        yield model, made
    finally:
        if model.exists():
            shutil.rmtree(model)


def base_of(model: Path, precision: str) -> dict[str, object]:
    """Return the arguments of a base."""
    is_quantized = precision in ("4", "8")
    chosen = {"quantization_bit": int(precision)} if is_quantized else {"dtype": precision}
    return {"model_name_or_path": str(model), **chosen}


def load(model: Path, precision: str, arguments: argparse.Namespace) -> Figures:
    """Load the base in a process that does nothing else."""
    log = model.parent / precision / f"loaded_{model.name}.log"
    figures = run(["-c", LOADING, json.dumps(base_of(model, precision))], log, arguments.limit)
    if "failed" not in figures:
        figures["loading"] = float(log.read_text(encoding="utf-8").split()[-1])
    return figures


def try_model(row: Figures, model: Path, arguments: argparse.Namespace) -> None:
    """Train a prefix, ask and serve the base with it, and add to the row what each took."""
    data, folder = model.parent / "rows.jsonl", model.parent / row["precision"]
    base = [word for name, value in base_of(model, row["precision"]).items() for word in (f"--{name}", value)]
    train = [*base, *train_words(data, folder / "adapter", arguments)]
    row["foretold"] = foretell(train, arguments)
    row["trained"] = trained = run([ROOT / "glm_peft" / "train.py", *train], folder / "trained.log", arguments.limit)
    if "failed" not in trained:
        base += ["--adapter_name_or_path", folder / "adapter"]
        trained["results"] = read(folder / "adapter" / "all_results.json")
        took = trained["results"]["train_runtime"]
        trained |= {"start": trained["seconds"] - took, "step": took / arguments.steps}
    row["answered"] = answer(base, data, folder, arguments)
    attend = partial(
        ask_server,
        model="base" if "failed" in trained else "adapter",
        questions=[row["content"] for row in product_rows(2, seed=0)],
        answer_tokens=arguments.answer_tokens,
    )
    serve = ["-m", "glm_peft.serve", *base, "--port", "0"]
    row["served"] = run(serve, folder / "served.log", arguments.limit, attend)


def train_words(data: Path, adapter: Path, arguments: argparse.Namespace) -> list[object]:
    """Return the flags of a training of a few steps."""
    words = ["--do_train", "--train_file", data, "--output_dir", adapter, "--max_steps", arguments.steps]
    words += ["--per_device_train_batch_size", arguments.batch_size, "--save_strategy", "no"]
    words += ["--max_source_length", arguments.max_length, "--max_target_length", arguments.max_length]
    return [*words, "--num_virtual_tokens", arguments.num_virtual_tokens]


def foretell(words: list[object], arguments: argparse.Namespace) -> Figures:
    """Return the bytes that the doctor foretells of a training, and the precision that is resolved."""
    try:
        args = parse_train_arguments([*map(str, words), "--use_cpu", "true"])
    except UserError as error:  # which the training will say too
        return {"failed": f"failed: {error}"}
    config = load_config(args.model)
    settings = describe_settings(*args, (2 * arguments.max_length, arguments.max_length), config)
    return {"total": estimate_memory(config, settings).total, "dtype": settings.dtype}


def answer(base: list[object], data: Path, folder: Path, arguments: argparse.Namespace) -> Figures:
    """Answer one prompt."""
    words = ["-m", "glm_peft.predict", *base, "--test_file", data, "--max_predict_samples", "1"]
    words += ["--max_new_tokens", arguments.answer_tokens, "--output_dir", folder / "answers"]
    figures = run(words, folder / "answered.log", arguments.limit)
    if "failed" not in figures:
        figures["results"] = read(folder / "answers" / "predict_results.json")
        took = figures["results"]["predict_runtime"]
        figures |= {"start": figures["seconds"] - took, "rate": figures["results"]["predict_tokens_per_second"]}
    return figures


def read(file: Path) -> Figures:
    return json.loads(file.read_text(encoding="utf-8"))


def write(row: Figures, arguments: argparse.Namespace) -> None:
    """Add the row to `rows.jsonl` and to the table."""
    with (arguments.output_dir / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"| {' | '.join(format_cells(row, arguments.formats))} |", flush=True)


def format_cells(row: Figures, formats: list[str]) -> list[str]:
    """Return a row's cells; what failed stands in the first cell of its part that has no figure."""
    dtype = row.get("foretold", {}).get("dtype", "")
    cells, told = [row["generation"], f"{row['precision']} ({dtype})" if dtype else row["precision"]], set()
    for title, part, name in columns_of(formats):
        number, failed = row.get(part, {}).get(name), row.get(part, {}).get("failed", "")
        if number is None:
            cells.append("" if part in told else failed.replace("|", "\\|"))
            told.add(part)
        else:
            number /= 1e9 if title.endswith("GB") else 1
            cells.append(f"{number:,.0f}" if number >= 100 else f"{number:.3g}")
    return cells


if __name__ == "__main__":
    main()
