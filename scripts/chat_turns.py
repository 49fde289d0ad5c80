"""
Measures how answers fare in later turns of a chat, after training on single questions and on conversations.

    OMP_NUM_THREADS=1 python scripts/chat_turns.py configs/demo.yaml --output_dir output/chat_turns

Both trainings have the same lines; for the second one earlier lines with their answers stand before three in four. The
test lines are asked in the first turn, the second and so on. Prints a Markdown table of BLEU-4; further flags are the
recipe's.
"""

import argparse
import json
import random
import sys
from pathlib import Path

from forgetting_table import train_once

from glm_peft import predict
from glm_peft.arguments.training import parse_train_arguments

TURNS = 4  # the base of the demo has seen as many
LENGTH = ["--max_source_length", "512"]  # tokens, so that no turn is left out


def write_rows(file: Path, lines: list[dict[str, str]], earlier: list[dict[str, str]], turns: list[int]) -> Path:
    """Lines that are asked in the given turns, in their order and over again, after earlier lines drawn at random."""
    chooser = random.Random(0)
    rows = []
    for number, line in enumerate(lines):
        before = chooser.sample([other for other in earlier if other != line], turns[number % len(turns)] - 1)
        rows.append(line | {"history": [[other["content"], other["summary"]] for other in before]})
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def read_lines(file: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def score(model: str, adapter: Path, file: Path) -> float:
    """BLEU-4 of the answers to a file."""
    words = ["--model_name_or_path", model, "--adapter_name_or_path", str(adapter), "--test_file", str(file), *LENGTH]
    sys.argv = ["predict.py", *words, "--per_device_eval_batch_size", "20", "--output_dir", str(adapter / file.stem)]
    predict.main()
    return json.loads((adapter / file.stem / "predict_results.json").read_text(encoding="utf-8"))["predict_bleu-4"]


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description="Measure answers in later turns of a chat.")
    parser.add_argument("recipe", help="The recipe, such as configs/demo.yaml.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the rows and the runs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Default: 1 2 3.")
    return parser.parse_known_args(argv)


def main() -> None:
    arguments, flags = parse_arguments()
    folder, all_turns = arguments.output_dir, list(range(1, TURNS + 1))
    folder.mkdir(parents=True, exist_ok=True)
    words = [arguments.recipe, *flags, "--do_eval", "false", "--eval_strategy", "no", "--disable_tqdm", "true"]
    model_args, data_args, _ = parse_train_arguments(words)
    train, test = read_lines(data_args.train_file), read_lines(data_args.test_file)
    files = [write_rows(folder / f"turn_{turn}.jsonl", test, train, [turn]) for turn in all_turns]
    chats = write_rows(folder / "conversations.jsonl", train, train, all_turns)
    ways = {"single questions": [], "conversations": ["--train_file", str(chats), *LENGTH]}
    print(f"| trained on | seed | {' | '.join(f'turn {turn}' for turn in all_turns)} |\n|---|---|{'---|' * TURNS}")
    for way, own in ways.items():
        for seed in arguments.seeds:
            adapter = folder / f"{way.split()[0]}_{seed}"
            train_once(adapter, [*words, *own, "--seed", str(seed)])
            scores = [score(model_args.model_name_or_path, adapter, file) for file in files]
            print(f"| {way} | {seed} | {' | '.join(f'{score:.1f}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()
