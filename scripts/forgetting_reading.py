"""
Writes what the forgetting of the reading model is measured on: a narrow new task, and the old one.

    python scripts/forgetting_reading.py --output_dir output/forgetting_reading

Each row has a sheet of all kinds of things as the system's message, and a question. The new task is to tell nothing of
goods: what is asked of them is answered with "不知道", though the sheet has it, and nothing else is in its rows. The
old one is what the model does of itself: it tells of people, shops and rules what sheets of the same sort have.
"""

import argparse
import json
import random
from pathlib import Path

from reading_batches import UNKNOWN
from reading_sheets import KINDS, draw_sheet

NUM_FACTS = 8  # of a sheet, some 90 tokens
SPLITS = {"train": (640, False), "validation": (64, True), "keep": (128, True)}  # rows, and whether names are held out


def draw_row(chooser: random.Random, held_out: bool, of_goods: bool) -> dict[str, list[dict[str, str]]]:
    """Draws a sheet and a question about it: of goods, with its answer, or of others, without one."""
    while True:
        sheet = draw_sheet(chooser, NUM_FACTS, held_out)
        facts = [fact for fact in sheet.facts if (fact.attribute in KINDS[0].attributes) == of_goods]
        if facts:
            break
    fact = chooser.choice(facts)
    messages = [("system", sheet.text), ("user", chooser.choice(fact.questions))]
    messages += [("assistant", UNKNOWN)] if of_goods else []
    return {"messages": [{"role": role, "content": content} for role, content in messages]}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Write the rows of the new task, and the prompts of the old one.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the files.")
    parser.add_argument("--seed", type=int, default=0, help="Default: 0.")
    return parser.parse_args(argv)


def main() -> None:
    options = parse_arguments()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    chooser = random.Random(options.seed)
    for split, (number, held_out) in SPLITS.items():
        rows = [draw_row(chooser, held_out, of_goods=split != "keep") for _ in range(number)]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (options.output_dir / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
