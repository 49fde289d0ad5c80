"""
The end of `make demo`: what the prefix changed, from the predictions of the base alone and with the adapter.

    python scripts/demo_report.py --base glm_peft/assets --adapter output/demo/adapter \
        --before output/demo/before --after output/demo/after
"""

import argparse
import json
from pathlib import Path

from glm_peft.reporting.file_names import PREDICT_RESULTS_NAME as RESULTS_NAME
from glm_peft.reporting.file_names import PREDICTIONS_NAME

SCORES = {"BLEU-4": "bleu-4", "ROUGE-1": "rouge-1", "ROUGE-2": "rouge-2", "ROUGE-L": "rouge-l"}
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
NEXT = """What to type next
  ask it yourself:
    {bin}python -m glm_peft.predict --model_name_or_path {base} --adapter_name_or_path {adapter} --prompt "{prompt}"
  see how the training went: {adapter}/training_curves.png
  tune a real model, on a GPU, on your own lines (configs/ has a recipe for each generation):
    {bin}accelerate launch --quiet --config_file accelerate_configs/single_gpu.yaml glm_peft/train.py \\
        configs/adgen_chatglm.yaml --train_file train.json --test_file test.json"""


def score_table(before: Path, after: Path) -> str:
    """The scores of both on the same lines."""
    results = [json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8")) for folder in (before, after)]
    samples = f"{results[0]['predict_samples']} test lines"
    lines = [f"{samples:<16}{'base':>8}{'with the prefix':>18}{'gain':>9}"]
    for title, name in SCORES.items():
        base, tuned = (result[f"predict_{name}"] for result in results)
        lines.append(f"  {title:<14}{base:>8.2f}{tuned:>18.2f}{tuned - base:>+9.2f}")
    return "\n".join(lines)


def size_line(base: Path, adapter: Path) -> str:
    """The sizes of both files of weights."""
    whole, part = (path.stat().st_size for path in (base / WEIGHTS, adapter / ADAPTER_WEIGHTS))
    return f"The adapter has {part / 1000:,.0f} kB, its base {whole / 1000:,.0f} kB: {100 * part / whole:.1f} %."


def answers_side_by_side(before: Path, after: Path, count: int) -> str:
    """The first answers of both, under their prompts and above what was wanted."""
    rows = [_read_rows(folder / PREDICTIONS_NAME)[:count] for folder in (before, after)]
    blocks = []
    for base, tuned in zip(*rows, strict=True):
        texts = {"base": base["predict"], "prefix": tuned["predict"], "wanted": tuned["labels"]}
        lines = [f"  {name:<8}{_on_one_line(text)}" for name, text in texts.items()]
        blocks.append("\n".join([base["prompt"], *lines]))
    return "\n\n".join(blocks)


def _read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _on_one_line(text: str) -> str:
    return " / ".join(text.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description="Print what the demo's prefix changed.")
    for name in ("base", "adapter", "before", "after"):
        parser.add_argument(f"--{name}", type=Path, required=True, help=f"Folder of the {name}.")
    parser.add_argument("--bin", default="", help="What stands before python in the commands to type: .venv/bin/")
    arguments = parser.parse_args()
    prompt = _read_rows(arguments.before / PREDICTIONS_NAME)[0]["prompt"]
    print("", answers_side_by_side(arguments.before, arguments.after, count=5), sep="\n", end="\n\n")
    print(score_table(arguments.before, arguments.after), end="\n\n")
    print(size_line(arguments.base, arguments.adapter), end="\n\n")
    print(NEXT.format(bin=arguments.bin, base=arguments.base, adapter=arguments.adapter, prompt=prompt))


if __name__ == "__main__":
    main()
