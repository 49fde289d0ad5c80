"""
Distils fact sheets into prefixes of several lengths, and asks for every fact: a table and a picture.

    python scripts/distil_curve.py --model output/reading_model --output_dir output/curve --seeds 1 2

For each seed a new sheet is drawn (`reading_sheets.py`), which the reading model has never seen. Its prefix is made
from questions that the model asks itself, and from a user's; the facts are asked for in a wording that stands in
neither, as the model was never taught to write it. As long as the sheet a prefix is the sheet itself, so that is what
the sheet in context gives.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure
from reading_sheets import Sheet, draw_sheet
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
WHOLE, NEITHER = 9999, 0  # virtual tokens: as many as the sheet has, none at all
OWN, USERS = "self-study", "user's questions"
Scores = dict[str, dict[int, float]]


def main() -> None:
    """Measure every seed, and write `curve.json` and `curve.png`."""
    arguments = parse_arguments()
    runs = [(way, length) for way in (OWN, USERS) for length in arguments.lengths]
    measured: list[Scores] = []
    with tqdm(total=len(arguments.seeds) * (len(runs) + 2), desc="Prefixes", unit="run") as progress:
        for seed in arguments.seeds:
            folder = arguments.output_dir / f"sheet_{seed}"
            write_sheet(folder, draw_sheet(random.Random(seed), arguments.num_facts, held_out=True))
            scores: Scores = {OWN: {}, USERS: {}}
            for way, length in [("whole", WHOLE), ("neither", NEITHER), *runs]:
                score = measure(folder, way, length, arguments, seed)
                for name in (way,) if way in scores else scores:
                    scores[name][length] = score
                progress.update()
            measured.append(scores)
    tokens = [tokens_of(arguments.output_dir / f"sheet_{seed}") for seed in arguments.seeds]
    result = {"tokens": tokens, "scores": measured}
    (arguments.output_dir / "curve.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(format_table(measured))
    plot(measured, statistics.mean(tokens), arguments.output_dir / "curve.png")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the lengths and seeds, and how much is trained."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--model", required=True, help="Folder of a model that reads.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="Of the sheets. Default: 1.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256], help="Default: 32 64 128 256.")
    parser.add_argument("--num_facts", type=int, default=55, help="Of a sheet. Default: 55.")
    parser.add_argument("--num_conversations", type=int, default=3072, help="Of self-study. Default: 3072.")
    parser.add_argument("--max_steps", type=int, default=400, help="Of each training. Default: 400.")
    parser.add_argument("--flags", nargs="*", default=[], help="More flags of glm_peft.distil, without their --.")
    return parser.parse_args(argv)


def write_sheet(folder: Path, sheet: Sheet) -> None:
    """Write a sheet, a user's questions about it, and the same facts asked for in other words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sheet.md").write_text(sheet.text, encoding="utf-8")
    for name, wording in (("questions", 0), ("test", -1)):
        rows = [{"prompt": fact.questions[wording], "response": fact.answer} for fact in sheet.facts]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def measure(folder: Path, way: str, length: int, arguments: argparse.Namespace, seed: int) -> float:
    """Return the percentage of facts that are told exactly."""
    output, adapter = folder / f"{way.split()[0]}_{length}", []
    if length != NEITHER:
        distil(folder, output / "adapter", way, length, arguments, seed)
        adapter = ["--adapter_name_or_path", str(output / "adapter")]
    words = ["--model_name_or_path", arguments.model, *adapter, "--test_file", str(folder / "test.jsonl")]
    run("predict", [*words, "--output_dir", str(output / "answers"), "--max_new_tokens", "16"])
    results = json.loads((output / "answers" / "predict_results.json").read_text(encoding="utf-8"))
    return results["predict_exact_match"]


def distil(folder: Path, output: Path, way: str, length: int, arguments: argparse.Namespace, seed: int) -> None:
    """Make a prefix of so many virtual tokens."""
    words = ["--model_name_or_path", arguments.model, "--document", str(folder / "sheet.md")]
    words += ["--num_virtual_tokens", str(length), "--output_dir", str(output), "--seed", str(seed)]
    words += ["--max_steps", str(arguments.max_steps), "--max_target_length", "24", "--save_strategy", "no"]
    words += ["--learning_rate", "0.05"]  # for so small a model
    words += ["--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "32", "--num_held_out", "4"]
    words += ["--num_conversations", str(64 if length == WHOLE else arguments.num_conversations)]
    words += ["--train_file", str(folder / "questions.jsonl")] if way == USERS else []
    words += [word if index % 2 else f"--{word}" for index, word in enumerate(arguments.flags)]
    run("distil", words)


def run(command: str, words: list[str]) -> None:
    """Run a command of glm_peft, and show what it said where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", f"glm_peft.{command}", *words], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)


def tokens_of(folder: Path) -> int:
    """Return how many tokens a sheet has in context."""
    config = (folder / f"whole_{WHOLE}" / "adapter" / "adapter_config.json").read_text(encoding="utf-8")
    return json.loads(config)["num_virtual_tokens"]


def format_table(measured: list[Scores]) -> str:
    """Format the means over all seeds as a Markdown table."""
    lengths = sorted({length for scores in measured for length in scores[OWN]})
    rows = [f"| virtual tokens | {OWN} | {USERS} |", "|---|---:|---:|"]
    for length in lengths:
        cells = [f"{statistics.mean(scores[way][length] for scores in measured):.1f}" for way in (OWN, USERS)]
        name = {WHOLE: "the sheet in context", NEITHER: "neither"}.get(length, str(length))
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(measured: list[Scores], tokens: float, path: Path) -> None:
    """Draw the share of facts against the length of the prefix."""
    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    lengths = [length for length in sorted(measured[0][OWN]) if length not in (WHOLE, NEITHER)]
    for way, style in ((OWN, "o-"), (USERS, "s--")):
        means = [statistics.mean(scores[way][length] for scores in measured) for length in lengths]
        axes.plot(lengths, means, style, label=f"prefix, {way}")
    for length, label, style in (
        (WHOLE, f"the sheet in context, {tokens:.0f} tokens", "-"),
        (NEITHER, "neither", ":"),
    ):
        axes.axhline(statistics.mean(scores[OWN][length] for scores in measured), color="0.4", ls=style, label=label)
    axes.set(xlabel="virtual tokens", ylabel="facts answered exactly, %", ylim=(0, 103), xscale="log")
    axes.set_xticks(lengths, labels=map(str, lengths))
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
