"""
What answering costs with a document in context and with a prefix in its place, in one run side by side.

    python scripts/distil_cost.py --model_name_or_path MODEL --document_tokens 4000 --num_virtual_tokens 128 512

The document and the prefixes are random numbers: what they say takes as long. Rounds are interleaved; the table has
the medians. "As prompt" is who sends the document's tokens with every question, "computed once" who keeps its keys and
values; both hold them for every row.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel

from glm_peft.adapters.assembly import OpenedBase, open_base
from glm_peft.adapters.loading import put_prefix_on
from glm_peft.adapters.prefix_initialization import keys_and_values
from glm_peft.arguments.model import ModelArguments
from glm_peft.distillation.reading import encode_text
from glm_peft.prediction.evaluation import Answering
from glm_peft.prediction.generation_settings import GenerationSettings, token_bytes

QUESTION = "这件商品的价格是多少？请只写出数字。"


@dataclass(frozen=True)
class Way:
    """A model, the ids that stand before a question in its prompt, and the tokens whose keys and values are held."""

    model: PreTrainedModel | PeftModel
    before: list[int]
    context_tokens: int


def main() -> None:
    """Measure every way at every number of rows, and print the medians."""
    arguments = parse_arguments()
    base = open_base(ModelArguments(model_name_or_path=arguments.model_name_or_path, dtype=arguments.dtype))
    ways = ways_of(base, arguments)
    measures = {
        (name, rows): measurer(base, way, rows, arguments) for name, way in ways.items() for rows in arguments.rows
    }
    rounds = []
    with tqdm(total=arguments.rounds * len(measures), desc="Measuring", unit="run") as progress:
        for _ in range(arguments.rounds):
            rounds.append({})
            for key, measure in measures.items():
                rounds[-1][key] = measure()
                progress.update()
    medians = {key: [statistics.median(run[key][place] for run in rounds) for place in (0, 1)] for key in measures}
    rows = [
        {"way": name, "rows": number, "tokens_per_second": speed, "first_token_seconds": first, "context_bytes": size}
        for (name, number), (speed, first) in medians.items()
        for size in [number * ways[name].context_tokens * token_bytes(ways[name].model)]
    ]
    settings = vars(arguments) | {"threads": torch.get_num_threads()}
    Path(arguments.output_file).write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(format_table(rows))


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the base, the lengths, and how often each is measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder or Hub id of a base")
    parser.add_argument("--output_file", default="distil_cost.json", help="default: distil_cost.json")
    parser.add_argument("--document_tokens", type=int, default=2000, help="default: 2000")
    parser.add_argument("--num_virtual_tokens", type=int, nargs="+", default=[128, 512], help="default: 128 512")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16], help="questions at once; default: 1 16")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="tokens of each answer; default: 32")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--dtype", default="auto", help="precision of the base; default: auto")
    return parser.parse_args(argv)


def ways_of(base: OpenedBase, arguments: argparse.Namespace) -> dict[str, Way]:
    """Return the document as prompt, its keys and values computed once, prefixes, and nothing."""
    model, draw = base.load_model(), torch.Generator().manual_seed(0)
    frame = encode_text(base, "")
    drawn = torch.randint(300, base.config.vocab_size // 2, (arguments.document_tokens - len(frame),), generator=draw)
    ids = frame + drawn.tolist()
    exact = keys_and_values(model, torch.tensor([ids], device=model.device))
    ways = {
        "document as prompt": Way(model, ids, len(ids)),
        "document computed once": Way(put_prefix_on(model, exact), [], len(ids)),
    }
    for length in arguments.num_virtual_tokens:
        ways[f"prefix of {length}"] = Way(put_prefix_on(model, exact[:length]), [], length)
    return ways | {"neither": Way(model, [], 0)}


def measurer(
    base: OpenedBase, way: Way, rows: int, arguments: argparse.Namespace
) -> Callable[[], tuple[float, float]]:
    """Return a function that measures tokens a second, and seconds to the first tokens of all rows."""
    question = base.chat_format.encode_prompt(base.tokenizer, [{"role": "user", "content": QUESTION}]).ids
    features = {"input_ids": [way.before + question] * rows}
    answering = Answering(way.model, base.tokenizer, base.chat_format)

    def answer(length: int) -> tuple[float, int]:
        settings = GenerationSettings(max_new_tokens=length, batch_size=rows)
        tokens: list[int] = []
        start = time.perf_counter()
        answering.generate(
            features, settings, on_batch=lambda batch: tokens.extend(batch.num_tokens), shows_progress=False
        )
        return time.perf_counter() - start, sum(tokens)

    def measure() -> tuple[float, float]:
        first, _ = answer(1)
        seconds, tokens = answer(arguments.max_new_tokens)
        return tokens / seconds, first

    return measure


def format_table(rows: list[dict]) -> str:
    """Format the results as a Markdown table, beside the document as prompt."""
    lines = [
        "| | rows | tokens/s | × document as prompt | first tokens, s | keys and values before the questions, MiB |"
    ]
    lines.append("|---|" + "---:|" * 5)
    for row in rows:
        (whole,) = (other for other in rows if other["rows"] == row["rows"] and other["way"] == "document as prompt")
        gain = row["tokens_per_second"] / whole["tokens_per_second"]
        cells = [
            f"{row['rows']}",
            f"{row['tokens_per_second']:.3g}",
            f"{gain:.1f}",
            f"{row['first_token_seconds']:.3g}",
        ]
        lines.append(f"| {row['way']} | {' | '.join(cells)} | {row['context_bytes'] / 2**20:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
