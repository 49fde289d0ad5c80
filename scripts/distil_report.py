"""
The end of `make demo-distil`: what the model knows with the sheet in context, with the prefix, and with neither.

    python scripts/distil_report.py --folder output/demo_distil
"""

import argparse
import json
from pathlib import Path

from glm_peft.reporting.file_names import COMPARISON_NAME, PREDICT_RESULTS_NAME, PREDICTIONS_NAME

WAYS = {"document": "the sheet in context", "prefix": "the prefix", "neither": "neither"}  # folders of predictions
SHOWN = 5
NEXT = """What to type next
  ask it yourself:
    {bin}python -m glm_peft.chat --model_name_or_path {base} --adapter_name_or_path {folder}/adapter
  see the two beside each other: {folder}/adapter/comparison.png
  distil a text of your own, with a real model, on a GPU:
    {bin}python -m glm_peft.distil --model_name_or_path THUDM/chatglm3-6b --document handbook.md \\
        --num_virtual_tokens 256 --output_dir output/handbook"""


def answers_side_by_side(folder: Path) -> str:
    """Return the first questions and their answers, a line each."""
    rows = [_read_rows(folder / way / PREDICTIONS_NAME)[:SHOWN] for way in WAYS]
    lines = [f"{'question':<24}" + "".join(f"{title:<22}" for title in WAYS.values()) + "in the sheet"]
    for answers in zip(*rows, strict=True):
        cells = [answers[0]["prompt"], *(row["predict"] for row in answers), answers[0]["labels"]]
        widths = (24, 22, 22, 22, 0)
        lines.append("".join(_pad(cell, width) for cell, width in zip(cells, widths, strict=True)))
    return "\n".join(lines)


def score_table(folder: Path) -> str:
    """Return for each way its tokens of context, and the share of facts that it tells exactly."""
    compared = json.loads((folder / "adapter" / COMPARISON_NAME).read_text(encoding="utf-8"))["ways"]
    lines = [f"{'':<24}{'tokens before the question':>28}{'facts told exactly':>22}"]
    for way, title in WAYS.items():
        results = json.loads((folder / way / PREDICT_RESULTS_NAME).read_text(encoding="utf-8"))
        share = f"{results['predict_exact_match']:.1f} %"
        lines.append(f"{title:<24}{compared[way]['context_tokens']:>28}{share:>22}")
    return "\n".join(lines)


def _read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _pad(text: str, width: int) -> str:
    """Fill a cell of a terminal, in which a Chinese character is two columns wide."""
    return text + " " * (width - sum(2 if ord(char) > 0x2E80 else 1 for char in text))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what a sheet's prefix knows of it.")
    parser.add_argument("--folder", type=Path, required=True, help="Folder of the adapter and of all answers.")
    parser.add_argument("--base", default="examples/reading/model", help="Folder of the model. Default: %(default)s.")
    parser.add_argument("--bin", default="", help="What stands before python in the commands to type: .venv/bin/")
    arguments = parser.parse_args()
    print("", answers_side_by_side(arguments.folder), sep="\n", end="\n\n")
    print(score_table(arguments.folder), end="\n\n")
    print(NEXT.format(bin=arguments.bin, base=arguments.base, folder=arguments.folder))


if __name__ == "__main__":
    main()
