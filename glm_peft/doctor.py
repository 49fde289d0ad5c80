"""
Examine a training run before it is started: rows, lengths, duplicates, characters, the first example, memory.

    python -m glm_peft.doctor --train_file train.json --model_name_or_path BASE
    python -m glm_peft.doctor configs/adgen_chatglm.yaml

Nothing is trained or written, and no weights are loaded. Exit code 1 where training would fail.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, islice
from typing import Any

import datasets
from transformers import PreTrainedConfig

from glm_peft.arguments import DataArguments, ModelArguments, TrainingArguments
from glm_peft.base_model import check_pair, load_config, load_tokenizer
from glm_peft.chat_formats import get_chat_format
from glm_peft.collators import IGNORED_LABEL
from glm_peft.conversations import Conversation, Split, load_splits
from glm_peft.data import build_generation_features, build_training_features, describe_example
from glm_peft.data_checks import check_split, find_overlap
from glm_peft.doctor_arguments import parse_doctor_arguments, wanted_splits
from glm_peft.doctor_report import (
    colour_example,
    format_findings,
    format_histogram,
    format_memory,
    format_problems,
    format_suggestion,
)
from glm_peft.errors import UserError, exit_with_user_errors
from glm_peft.memory_estimate import Settings, measure_base
from glm_peft.reporting import set_up_logging

MOST_PROBLEMS = 50  # bad rows that are listed, of each split

_UNLIMITED = sys.maxsize


@exit_with_user_errors()
def main() -> None:
    """Prints the report; leaves with 1 where training would fail."""
    model_args, data_args, training_args = parse_doctor_arguments()
    set_up_logging()
    datasets.disable_progress_bars()
    problems = Examination(model_args, data_args, training_args).run()
    if problems:
        print(f"\nTraining would fail: {problems} {'problem' if problems == 1 else 'problems'}, see above.")
        sys.exit(1)
    print("\nTraining can start.")


class Examination:
    """One visit: each step prints its part of the report, and counts what would make training fail."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        self.problems = 0
        self.splits: dict[str, Split] = {}
        self.features: dict[str, Any] = {}
        self.encoding: tuple[Any, ...] | None = None
        self.config: PreTrainedConfig | None = None

    def run(self) -> int:
        """Everything; how many problems would make training fail."""
        self.examine_model()
        for name in wanted_splits(self.data_args):
            self.examine_split(name)
        for name, other in combinations(self.splits, 2):
            finding = find_overlap(self.splits[name], self.splits[other])
            print_section(f"Overlap of {name} and {other}", format_findings([finding] if finding.rows else []))
        if "train" in self.features:
            self.show_example()
        if self.config is not None:
            self.show_memory()
        return self.problems

    def examine_model(self) -> None:
        """Tokenizer and config can be read and belong together."""
        try:
            tokenizer, config = load_tokenizer(self.model_args), load_config(self.model_args)
            self.config = config
            check_pair(tokenizer, config)
            chat_format = get_chat_format(tokenizer, self.model_args.chat_format)
        except UserError as error:
            self.report("Model", [str(error)])
            return
        self.encoding = (chat_format, tokenizer)
        name = self.model_args.model_name_or_path
        print_section("Model", f"  {name}: {config.model_type}, prompts of {chat_format.name}")

    def examine_split(self, name: str) -> None:
        """The rows of a split: which cannot be used, how long they are, what is odd about them."""
        try:
            # Bad rows are left out here whatever the flags say, so that all of them are found.
            split = load_splits(replace(self.data_args, skip_bad_rows=True), [name])[name]
        except UserError as error:
            self.report(f"Rows of {name}", [str(error)])
            return
        if split.left_out and self.data_args.skip_bad_rows:
            print_section(
                f"Rows of {name} that are left out", format_problems(list(map(str, split.left_out)), MOST_PROBLEMS)
            )
        elif split.left_out:
            self.report(f"Rows of {name} that cannot be used", list(map(str, split.left_out)))
        self.splits[name] = split
        if self.encoding:
            self.examine_lengths(split)
        print_section(f"Remarks on {name}", format_findings(check_split(split)))

    def examine_lengths(self, split: Split) -> None:
        """Lengths in tokens, or the rows that the chat format refuses."""
        try:
            dataset, report = self.encode(split, self.data_args)
        except UserError:
            refused = list(islice(self.refused_rows(split, split.conversations), MOST_PROBLEMS))
            self.report(f"Rows of {split.name} that have no prompt or answer within these lengths", refused)
            return
        self.features[split.name] = dataset
        whole = replace(self.data_args, **dict.fromkeys(_LENGTH_FLAGS, _UNLIMITED))
        lengths = measure_lengths(
            self.encode(split, whole)[0] if any(x.truncated for x in report.lengths) else dataset
        )
        histograms = [
            format_histogram(measured.name, values, measured.limit)
            for measured, values in zip(report.lengths, lengths, strict=False)
        ]
        print_section(f"Rows and lengths of {split.name}", "\n\n".join([f"  {report}", *histograms]))
        print_section(f"Suggested flags for {split.name}", format_suggestion(report))

    def encode(self, split: Split, data_args: DataArguments) -> tuple[Any, Any]:
        """The split's data set, as training would have it, and the report on its lengths."""
        if split.name != "test":
            return build_training_features(split, *self.encoding, data_args)
        features = build_generation_features(split, *self.encoding, data_args)
        return features.dataset, features.report

    def refused_rows(self, split: Split, conversations: Sequence[Conversation]) -> Iterator[str]:
        """What is wrong with each row that cannot be encoded, found by halving."""
        try:
            self.encode(replace(split, conversations=list(conversations)), self.data_args)
        except UserError as error:
            if len(conversations) == 1:
                yield str(error)
                return
            middle = len(conversations) // 2
            yield from self.refused_rows(split, conversations[:middle])
            yield from self.refused_rows(split, conversations[middle:])

    def show_example(self) -> None:
        """The first example of training, by what carries loss."""
        description = describe_example(self.encoding[1], self.features["train"][0])
        text = colour_example(description) if sys.stdout.isatty() else description
        print_section("The first example", text)

    def show_memory(self) -> None:
        """What training would take, and what to do about it."""
        settings = describe_settings(
            self.model_args, self.data_args, self.training_args, self.features.get("train"), self.config
        )
        print_section(
            "Memory of training (an estimate)", format_memory(self.config, settings, measure_base(self.config))
        )

    def report(self, title: str, problems: list[str]) -> None:
        """Print and count what would make training fail."""
        self.problems += len(problems)
        print_section(f"PROBLEM: {title}", format_problems(problems, MOST_PROBLEMS))


_LENGTH_FLAGS = ("max_source_length", "max_target_length", "val_max_target_length")


def measure_lengths(dataset: Any) -> list[list[int]]:
    """Tokens of each prompt, and of each answer where there are labels."""
    totals = dataset["length"][:]
    if "labels" not in dataset.column_names:
        return [totals]
    answers = [sum(label != IGNORED_LABEL for label in labels) for labels in dataset["labels"]]
    return [[total - answer for total, answer in zip(totals, answers, strict=True)], answers]


def describe_settings(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
    dataset: Any | None,
    config: PreTrainedConfig,
) -> Settings:
    """What decides the memory of the run; the longest rows are those of the data, or what the flags allow."""
    tokens, labels = data_args.max_source_length + data_args.max_target_length, data_args.max_target_length
    if dataset is not None:
        tokens, labels = max(dataset["length"][:]), max(measure_lengths(dataset)[1])
    inner = model_args.encoder_hidden_size or config.hidden_size
    return Settings(
        dtype=model_args.dtype,
        quantization_bit=model_args.quantization_bit,
        num_virtual_tokens=model_args.num_virtual_tokens,
        encoder_hidden_size=inner if model_args.prefix_projection else None,
        batch_size=training_args.per_device_train_batch_size,
        tokens=tokens,
        labels=labels,
        activation_checkpointing=training_args.activation_checkpointing,
        eager_attention=model_args.attn_implementation == "eager",
    )


def print_section(title: str, body: str) -> None:
    """A part of the report."""
    print(f"\n{title}\n{body}", flush=True)


if __name__ == "__main__":
    main()
