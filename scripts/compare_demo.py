"""
Measures the demo: the base, the base with three examples in its prompt, prefixes, and LoRA of the same size.

    OMP_NUM_THREADS=1 python scripts/compare_demo.py configs/demo.yaml

Every adapter is trained by the recipe that is given, but for the seed, the prefix's length and, for LoRA, the learning
rate; the scores are those of the test lines. Prints a Markdown table: the mean over the seeds, with the standard
deviation, and the lowest BLEU-4. Further flags are the recipe's, such as `--max_steps 20` for a quick look.
"""

import argparse
import random
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

import torch
from demo_manners import WANTED_MANNER
from make_demo_data import read_content, write_summary
from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedModel, PrinterCallback, Trainer, set_seed

from glm_peft.adapters.label_loss import attach_label_loss
from glm_peft.adapters.loading import create_adapter
from glm_peft.adapters.prefix_attention import attach_prefix_attention
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.models.chat_formats import get_chat_format
from glm_peft.models.loading import load_base_model, load_tokenizer
from glm_peft.prediction.evaluation import choose_protocol, score_answers
from glm_peft.prediction.generation import generate_answers
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import Split
from glm_peft.preprocessing.split_loading import load_splits

LORA_TARGETS = ("query_key_value", "dense")
EXAMPLES = 3
SCORES = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
TABLE_HEAD = """\
| | trained numbers | BLEU-4 | ROUGE-1 | ROUGE-2 | ROUGE-L | lowest BLEU-4 |
|---|---|---|---|---|---|---|"""
Scores = dict[str, float]


class Demo:
    """The recipe's data, encoded, and what a run with one seed does with it."""

    def __init__(self, recipe: list[str], split: str) -> None:
        # Only the last model is scored, and stdout is for the table.
        self.recipe = [*recipe, *("--eval_strategy", "no", "--disable_tqdm", "true")]
        self.model_args, self.data_args, training_args = parse_train_arguments(self.recipe)
        self.tokenizer = load_tokenizer(self.model_args)
        self.chat_format = get_chat_format(self.tokenizer, self.model_args.chat_format)
        splits = load_splits(self.data_args, ["train", split])
        encode = (self.chat_format, self.tokenizer, self.data_args)
        self.train_rows, self.test_rows = splits["train"], splits[split]
        self.examples = build_training_features(self.train_rows, *encode)[0]
        self.prompts = build_generation_features(self.test_rows, *encode)
        self.settings = GenerationSettings.from_arguments(training_args, self.data_args)
        self.protocol = choose_protocol(self.chat_format, self.data_args.metric_protocol)

    def score(self, model: PreTrainedModel, prompts: list[list[int]] | None = None) -> Scores:
        """The scores of the model's answers to the test lines, or to these prompts in their place."""
        prompts = prompts or self.prompts.dataset["input_ids"][:]
        answering = (model, self.tokenizer, self.chat_format)
        answers = generate_answers(*answering, {"input_ids": prompts}, self.settings, keep_white_space=True)
        return score_answers(self.prompts, answers, self.protocol)

    def score_rewriting(self, seed: int) -> tuple[int, Scores]:
        """What the script that wrote the lines gets when it writes them again, with other wordings: about the best."""
        chooser = random.Random(seed)
        answers = [write_summary(read_content(prompt), WANTED_MANNER, chooser) for prompt in self.prompts.prompts]
        return 0, score_answers(self.prompts, answers, self.protocol)

    def score_base(self, seed: int) -> tuple[int, Scores]:
        """The base alone, which no seed changes."""
        return 0, self.score(load_base_model(self.model_args, "cpu"))

    def score_examples(self, seed: int) -> tuple[int, Scores]:
        """The base with examples drawn from the training lines as earlier rounds, others for each test line."""
        prompts = prompts_with_examples(self.train_rows, self.test_rows, seed)
        ids = [self.chat_format.encode_prompt(self.tokenizer, messages).ids for messages in prompts]
        return 0, self.score(load_base_model(self.model_args, "cpu"), ids)

    def score_prefix(self, seed: int, length: int) -> tuple[int, Scores]:
        """A prefix trained by the recipe, in another length."""
        model_args, _, training_args = self.parse_arguments(seed, "--num_virtual_tokens", str(length))
        model = create_adapter(load_base_model(model_args, "cpu"), model_args)
        attach_prefix_attention(model)
        return self._train(model, training_args)

    def score_lora(self, seed: int, length: int, learning_rate: float) -> tuple[int, Scores]:
        """LoRA with about as many numbers as a prefix of this length, trained on the same lines as many times."""
        model_args, _, training_args = self.parse_arguments(seed, "--learning_rate", str(learning_rate))
        base = load_base_model(model_args, "cpu")
        rank = lora_rank(base, length)
        config = LoraConfig(TaskType.CAUSAL_LM, r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS))
        return self._train(get_peft_model(base, config), training_args)

    def parse_arguments(self, seed: int, *flags: str) -> tuple[Any, Any, Any]:
        """The recipe's arguments with this seed and these flags; every random number from here on is the seed's."""
        set_seed(seed)
        return parse_train_arguments([*self.recipe, "--seed", str(seed), *flags])

    def _train(self, model: Any, training_args: Any) -> tuple[int, Scores]:
        attach_label_loss(model.get_base_model())
        collator = TrainingCollator(self.tokenizer, self.data_args.ignore_pad_token_for_loss)
        trainer = Trainer(model, training_args, data_collator=collator, train_dataset=self.examples)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return model.get_nb_trainable_parameters()[0], self.score(model)


def prompts_with_examples(train_rows: Split, test_rows: Split, seed: int) -> list[list[dict[str, str]]]:
    """The test lines' messages, each behind `EXAMPLES` training lines with their answers."""
    chooser = random.Random(seed)
    lines = [conversation.messages for conversation in train_rows]
    drawn = (chooser.sample(lines, EXAMPLES) for _ in range(len(test_rows)))
    prompts = (conversation.prompt for conversation in test_rows)
    return [
        [*(message for line in examples for message in line), *prompt]
        for examples, prompt in zip(drawn, prompts, strict=True)
    ]


def lora_rank(base: PreTrainedModel, length: int) -> int:
    """The rank whose adapter has about as many numbers as a prefix of `length` virtual tokens."""
    linear = [layer for name, layer in base.named_modules() if name.rpartition(".")[2] in LORA_TARGETS]
    numbers_a_rank = sum(layer.in_features + layer.out_features for layer in linear)
    config = base.config
    return max(round(length * 2 * config.num_hidden_layers * config.hidden_size / numbers_a_rank), 1)


def measure(name: str, run: Callable[[int], tuple[int, Scores]], seeds: list[int]) -> str:
    """A row of the table."""
    sizes, scores = zip(*(run(seed) for seed in seeds), strict=True)
    cells = [spread([each[score] for each in scores]) for score in SCORES]
    lowest = min(each["bleu-4"] for each in scores)
    return f"| {name} | {sizes[0]:,} | {' | '.join(cells)} | {lowest:.1f} |"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """What is compared, and further flags of the recipe."""
    parser = argparse.ArgumentParser(
        description="Compare the demo's base, prefixes and LoRA on its test lines; further flags are the recipe's."
    )
    parser.add_argument("recipe", help="The recipe, such as configs/demo.yaml.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="Default: 1 2 3.")
    parser.add_argument("--lengths", type=int, nargs="*", default=[4, 16, 64], help="Of prefixes; default: 4 16 64.")
    parser.add_argument("--lora_learning_rate", type=float, default=1e-2, help="Default: 0.01.")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="What is scored.")
    return parser.parse_known_args(argv)


def main() -> None:
    arguments, flags = parse_arguments()
    torch.set_num_threads(1)
    demo, seeds = Demo([arguments.recipe, *flags], arguments.split), arguments.seeds
    print(TABLE_HEAD)
    print(measure("base", demo.score_base, seeds[:1]), flush=True)
    print(measure(f"base, {EXAMPLES} examples in the prompt", demo.score_examples, seeds), flush=True)
    for length in arguments.lengths:
        print(measure(f"prefix of {length}", lambda seed, n=length: demo.score_prefix(seed, n), seeds), flush=True)
    for length in arguments.lengths:
        rate = arguments.lora_learning_rate
        name = f"LoRA, the size of a prefix of {length}"
        print(measure(name, lambda seed, n=length, r=rate: demo.score_lora(seed, n, r), seeds), flush=True)
    print(measure("the ceiling (the lines written again)", demo.score_rewriting, seeds), flush=True)


if __name__ == "__main__":
    main()
