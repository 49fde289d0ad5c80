"""
Trains the demo model: a small ChatGLM-6B, from scratch, on made-up product texts in several manners.

    OMP_NUM_THREADS=1 python scripts/train_demo_model.py --output_dir output/demo_model

Every text is in a manner drawn at random, of which the prompt says nothing; in a tenth of the batches earlier rounds
stand before the prompt, each in a manner of its own. So the model learns to state a product's attributes, and cannot
know which manner is wanted. The products of the demo data (`is_held_out`) are left out. The folder is in the
published layout, in float16; the one in `glm_peft/assets` was made by this command.
"""

import argparse
import logging
import random
import re
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import jieba
import torch
from demo_manners import MANNERS
from make_demo_data import Product, all_words, draw_products, is_held_out, write_content, write_summary
from make_tiny_model import make_tiny_model
from safetensors.torch import load_file, save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    get_cosine_schedule_with_warmup,
)

import glm_peft  # noqa: F401  (registers the generations)
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.preprocessing.collators import TrainingCollator

jieba.setLogLevel(logging.WARNING)  # it reports the loading of its dictionary on stderr

VOCABULARY = 1024
TOKENIZER_TEXTS = 300
SHARE_WITH_ROUNDS = 0.1
MOST_ROUNDS = 3
FULL_WIDTH = str.maketrans(",:;!?", "，：；！？")


@dataclass
class TrainingOptions:
    """What is trained, and for how long."""

    output_dir: Path
    hidden_size: int = 128
    num_layers: int = 4
    steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    seed: int = 0


def main() -> None:
    options = parse_arguments()
    make_fresh_model(options)
    tokenizer = AutoTokenizer.from_pretrained(options.output_dir)
    model = AutoModelForCausalLM.from_pretrained(options.output_dir, dtype=torch.float32)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, options)
    save_weights(model, options.output_dir)


def parse_arguments(argv: list[str] | None = None) -> TrainingOptions:
    parser = argparse.ArgumentParser(description="Train the demo model from scratch, on CPUs.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder to write to; it must be new or empty.")
    for name, field in TrainingOptions.__dataclass_fields__.items():
        if name != "output_dir":
            parser.add_argument(f"--{name}", type=field.type, default=field.default, help=f"Default: {field.default}.")
    return TrainingOptions(**vars(parser.parse_args(argv)))


def make_fresh_model(options: TrainingOptions) -> None:
    """Writes random weights and a tokenizer of whole words to the folder."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "words.txt"
        text.write_text("\n".join(tokenizer_lines(options.seed)), encoding="utf-8")
        make_tiny_model(
            options.output_dir,
            "chatglm",
            hidden_size=options.hidden_size,
            num_layers=options.num_layers,
            vocab_size=VOCABULARY,
            dtype="float16",
            seed=options.seed,
            tokenizer_text=str(text),
        )
    keep_full_width_punctuation(options.output_dir / "ice_text.model")


def tokenizer_lines(seed: int) -> list[str]:
    """Words by turns with `#`, which no piece of a tokenizer contains beside letters: so attributes stay one piece."""
    chooser = random.Random(seed)
    lines = [f"[Round {number}]*问：答：" for number in range(MOST_ROUNDS + 1)] * TOKENIZER_TEXTS
    for product in islice(draw_products(chooser, lambda product: not is_held_out(product)), TOKENIZER_TEXTS):
        lines.append(write_content(product))
        for manner in MANNERS.values():
            wordings = (chooser.choice(part) for part in manner)
            lines.append("#" + "#".join(split_words("".join(wordings), all_words(product))))
    return lines


def split_words(wording: str, values: dict[str, str]) -> list[str]:
    """The words of a wording, each value one word."""
    parts = re.split(r"\{(\w+)\}", wording)
    return [word for i, part in enumerate(parts) for word in ([values[part]] if i % 2 else jieba.lcut(part))]


def keep_full_width_punctuation(model_file: Path) -> None:
    """
    Takes the normaliser out, and gives the pieces their full-width punctuation back.

    The published normaliser makes it half-width, and the answers of the demo would not read as its data does.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(model_file.read_bytes())
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.precompiled_charsmap = b""
    for piece in model.pieces:
        if piece.type == piece.NORMAL:
            piece.piece = piece.piece.translate(FULL_WIDTH)
    model_file.write_bytes(model.SerializeToString())


class TrainingText:
    """Batches of texts without end: products that are not held out, each told in a manner drawn at random."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions) -> None:
        self.tokenizer, self.batch_size = tokenizer, options.batch_size
        self.chooser = random.Random(options.seed)
        self.products = draw_products(self.chooser, lambda product: not is_held_out(product))
        self.chat_format = get_chat_format(tokenizer)
        self.collate = TrainingCollator(tokenizer)

    def draw_batch(self) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask`, `position_ids` and `labels`; rows with rounds are longer, fewer fit."""
        rounds = self.chooser.randint(1, MOST_ROUNDS) if self.chooser.random() < SHARE_WITH_ROUNDS else 0
        return self.collate([self._draw_row(rounds) for _ in range(max(self.batch_size // (rounds + 1), 1))])

    def _draw_row(self, rounds: int) -> dict[str, list[int]]:
        messages = []
        for product in (next(self.products) for _ in range(rounds + 1)):
            messages.append({"role": "user", "content": write_content(product)})
            messages.append({"role": "assistant", "content": self._tell(product)})
        prompt = self.chat_format.encode_prompt(self.tokenizer, messages[:-1]).ids
        answer = self.chat_format.encode_answer(self.tokenizer, messages[-1]["content"]).ids
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def _tell(self, product: Product) -> str:
        return write_summary(product, self.chooser.choice(sorted(MANNERS)), self.chooser)


def train(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: TrainingOptions) -> None:
    """Trains every weight; the loss is on the answers only."""
    text = TrainingText(tokenizer, options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    model.train()
    start, losses = time.monotonic(), []
    for step in range(1, options.steps + 1):
        loss = model(**text.draw_batch()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == options.steps:
            print(f"step {step}  loss {sum(losses) / len(losses):.4f}  {time.monotonic() - start:.0f} s", flush=True)
            losses.clear()


def save_weights(model: PreTrainedModel, folder: Path) -> None:
    """Puts the weights, in float16, in the place of the random ones of the same published names."""
    path = folder / "model.safetensors"
    trained = model.state_dict()
    weights = {name: trained.get(name, tensor).half().clone() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
