"""
Writes a ChatGLM model of any generation and any size, with random weights, in the published layout.

    python scripts/make_tiny_model.py --output_dir output/tiny --generation chatglm3 --hidden_size 64 --num_layers 2

The folder has what a published repository has: configuration, weights under the published names, and a tokenizer: a
small one trained on made-up text, or a published one copied from `--tokenizer_dir`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from make_demo_data import product_rows
from tiny_configs import chatglm2_config, chatglm_config, glm4_0414_config
from tiny_options import ModelOptions, require
from tiny_tokenizers import PUBLISHED_VOCAB, TokenizerFacts, copy_tokenizer, read_tokenizer, write_tokenizer
from tiny_weights import Shape, chatglm2_shapes, chatglm_shapes, write_weights
from transformers import Glm4ForCausalLM, HfArgumentParser

from glm_peft.errors import UserError

TRAINED_TOKENS = 1024
SENTENCES = (
    "今天天气很好，我们去公园散步吧。",
    "请问从这里到火车站要走多久？",
    "她把写好的信放进抽屉，关上了灯。",
    "一个问题常常有不止一个答案。",
    "问：你会做什么？答：我会写一点文字。",
    "The morning train was late, so we walked along the river.",
    "Please write a short description of this product.",
    "People often ask the same question in many different ways.",
    "def add(left, right): return left + right",
    "0 1 2 3 4 5 6 7 8 9, 3.14 and 2025",
)


def make_tiny_model(output_dir: str | Path, generation: str, **options: Any) -> Path:
    """
    Writes a model with random weights in the published layout.

    Args:
        output_dir: Folder to write to; new or empty.
        generation: `chatglm`, `chatglm2`, `chatglm3`, `glm4` or `glm4_0414`.
        **options: The other fields of `ModelOptions`.

    Returns:
        The folder.

    Raises:
        UserError: If sizes do not fit each other, the folder is not empty, or the tokenizer does not fit the table.
    """
    return write_model(ModelOptions(str(output_dir), generation, **options))


def write_model(options: ModelOptions) -> Path:
    """Writes what `options` describe (see `make_tiny_model`) and returns the folder."""
    folder = Path(options.output_dir)
    require(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"--output_dir {folder} is not an empty folder; remove it or give another one.",
    )
    folder.mkdir(parents=True, exist_ok=True)
    facts, vocab_size = _make_tokenizer(options, folder)
    write_weights(
        folder,
        _write_config(folder, options, facts, vocab_size),
        std=options.std,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        file_format=options.format,
        max_shard_size=options.max_shard_size,
    )
    return folder


def _make_tokenizer(options: ModelOptions, folder: Path) -> tuple[TokenizerFacts, int]:
    """The tokenizer's facts and the rows of the embedding table, which is larger than the tokenizer, as published."""
    generation = options.generation
    if options.tokenizer_dir:
        facts = read_tokenizer(Path(options.tokenizer_dir), generation)
        vocab_size = options.vocab_size or PUBLISHED_VOCAB[generation] + facts.shift
        require(
            vocab_size >= facts.size,
            f"--vocab_size {vocab_size} is less than the {facts.size} ids of the tokenizer in "
            f"{options.tokenizer_dir}; leave it out or give a larger one.",
        )
        copy_tokenizer(Path(options.tokenizer_dir), folder, generation)
        return facts, vocab_size
    max_tokens = min(options.vocab_size or TRAINED_TOKENS, PUBLISHED_VOCAB[generation])
    facts = write_tokenizer(folder, generation, _training_text(options.tokenizer_text), max_tokens)
    return facts, options.vocab_size or -(-facts.size // 64) * 64


def _training_text(path: str | None) -> list[str]:
    if path is None:
        return [text for row in product_rows(100, seed=0) for text in row.values()] + list(SENTENCES)
    require(Path(path).is_file(), f"--tokenizer_text {path} is not a file; give a UTF-8 text file.")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    require(bool(lines), f"--tokenizer_text {path} has no text in it; give a UTF-8 text file with some.")
    return lines


def _write_config(folder: Path, options: ModelOptions, facts: TokenizerFacts, vocab_size: int) -> dict[str, Shape]:
    """Writes `config.json` and returns the shapes of the tensors that go with it."""
    sizes = (vocab_size, options.hidden_size, options.ffn_size, options.num_layers, options.num_heads)
    if options.generation == "glm4_0414":
        stock = glm4_0414_config(options, facts, vocab_size)
        stock.save_pretrained(folder)
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in Glm4ForCausalLM(stock).state_dict().items()}
    if options.generation == "chatglm":
        config, shapes = chatglm_config(options, facts, vocab_size), chatglm_shapes(*sizes)
    else:
        config = chatglm2_config(options, facts, vocab_size)
        shapes = chatglm2_shapes(*sizes, options.num_kv_heads, options.head_dim)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    return shapes


def main() -> None:
    try:
        # Options of the wrong sizes are refused while they are parsed.
        (options,) = HfArgumentParser(ModelOptions).parse_args_into_dataclasses()
        print(write_model(options))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
