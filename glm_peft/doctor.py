"""
Examine a training run before it is started: rows, lengths, duplicates, characters, the first example, memory.

    python -m glm_peft.doctor --train_file train.json --model_name_or_path BASE
    python -m glm_peft.doctor configs/adgen_chatglm.yaml

Nothing is trained or written, and no weights are loaded. Exit code 1 where training would fail.
"""

import io
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from typing import Any

from glm_peft.adapters.assembly import OpenedBase, open_base
from glm_peft.arguments.data import DataArguments
from glm_peft.arguments.doctor import parse_doctor_arguments, wanted_splits
from glm_peft.arguments.methods import PREFIX_TUNING
from glm_peft.arguments.model import ModelArguments
from glm_peft.arguments.training import TrainArguments, TrainingArguments
from glm_peft.data import build_generation_features, build_training_features
from glm_peft.errors import UserError
from glm_peft.examination.data_checks import check_overlaps, check_split
from glm_peft.examination.doctor_report import (
    colour_example,
    format_findings,
    format_histogram,
    format_memory,
    format_problems,
    format_suggestion,
    shows_colour,
)
from glm_peft.examination.memory_estimate import describe_settings, measure_base, measure_longest
from glm_peft.examination.run_checks import check_positions, describe_steps
from glm_peft.examination.tool_checks import check_tools
from glm_peft.models.loading import check_base_weights, choose_dtype, choose_kept_dtype
from glm_peft.preprocessing.batching import plan_batching
from glm_peft.preprocessing.collators import TrainingCollator
from glm_peft.preprocessing.conversations import Conversation, Split, open_rows, read_conversations
from glm_peft.preprocessing.example_description import describe_example
from glm_peft.preprocessing.lengths import limit_report, measure_lengths
from glm_peft.preprocessing.mixing import mix_sources
from glm_peft.preprocessing.split_loading import load_splits
from glm_peft.provenance.record import describe_data
from glm_peft.provenance.stretches import check_same_rows
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.log import set_up_logging
from glm_peft.reporting.results import describe_dtype, print_section
from glm_peft.training.checkpoints import choose_checkpoint, complete_checkpoints
from glm_peft.training.keeping import read_general_prompts

MOST_PROBLEMS = 50  # bad rows that are listed, of each split
MOST_REFUSED = 10  # rows that the lengths cannot hold: each takes several looks to find

_UNLIMITED = sys.maxsize


@exit_with_user_errors()
def main() -> None:
    """Print the report; exit with 1 where training would fail."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not have the bars of a histogram
    model_args, data_args, training_args = parse_doctor_arguments()
    set_up_logging()
    examination = Examination(model_args, data_args, training_args)
    problems = examination.run()
    if problems:
        found = f"{problems}{' or more' if examination.has_more else ''} problem{'s' if problems > 1 else ''}"
        print(f"\nTraining would fail: {found}, see above.")
        sys.exit(1)
    print("\nTraining can start.")


class Examination:
    """One examination of a run: each step prints its part of the report and counts what would make training fail."""

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, training_args: TrainingArguments) -> None:
        self.model_args, self.data_args, self.training_args = model_args, data_args, training_args
        self.problems = 0
        self.has_more = False  # not all problems were looked for
        self.shows_progress = sys.stderr.isatty()  # in a file each step of a bar would be a line
        self.splits: dict[str, Split] = {}
        self.features: dict[str, Any] = {}
        self.base: OpenedBase | None = None
        self.longest: tuple[int, int] | None = None

    def run(self) -> int:
        """Run every step, and return how many problems would make training fail."""
        self.examine_model()
        self.examine_start()
        wanted = wanted_splits(self.data_args, self.training_args)
        # Rows that are held out are read together with those of training.
        is_divided = self.data_args.validation_split is not None
        for _, names in groupby(wanted, lambda name: name == "test" if is_divided else name):
            self.examine_splits(list(names))
        # Rows of training among those for validation make its scores measure memory.
        parts = [part for split in self.splits.values() for part in split.parts or [split]]
        for title, findings in check_overlaps(parts):
            print_section(title, format_findings(findings))
        if "train" in self.splits:
            self.examine_resumption()
        if "train" in self.features:
            self.examine_batches()
            self.show_example()
        if self.base:
            self.show_memory()
        return self.problems

    def examine_model(self) -> None:
        """Check that tokenizer, config and adapter can be read and belong together, as training checks it."""
        try:
            self.base = open_base(self.model_args, self.data_args, is_trainable=True)
            arguments = TrainArguments(self.model_args, self.data_args, self.training_args)
            arguments = arguments.resolve(self.base.model_args, self.base.data_args)
            self.model_args, self.data_args, self.training_args = arguments
        except UserError as error:
            self.report("Model", [str(error)])
            return  # rows can be examined without a tokenizer, their lengths and the memory cannot
        name, config = self.model_args.model_name_or_path, self.base.config
        dtype, reason = choose_dtype(self.model_args.dtype, self.training_args.device, config.dtype)
        kept = choose_kept_dtype(self.model_args, self.training_args.device, config)
        model = f"{name}: {config.model_type}, prompts of {self.base.chat_format.name}"
        print_section("Model", f"  {model}\n  Precision of the base here: {describe_dtype(dtype, kept)}, {reason}")

    def examine_start(self) -> None:
        """Check what training would stop at before its first step: weight files, general prompts, the checkpoint."""
        given = self.training_args.resume_from_checkpoint
        checks = [partial(check_base_weights, self.model_args)] if self.base else []
        keeps = self.training_args.keep_file, self.training_args.max_keep_samples
        checks += [partial(read_general_prompts, self.base, *keeps)] if self.base else []
        # Only a checkpoint that is named must be there already; the newest is chosen when training starts.
        if given not in _NEWEST_OR_NONE:
            checks.append(partial(choose_checkpoint, given, self.training_args.output_dir))
        problems = []
        for check in checks:
            try:
                check()
            except UserError as error:
                problems.append(str(error))
        if problems:
            self.report("Start of training", problems)

    def examine_resumption(self) -> None:
        """Check that the checkpoint to resume from was trained on the same rows."""
        given = self.training_args.resume_from_checkpoint
        checkpoint = None if given in _NEWEST_OR_NONE else given
        if given in ("last", "true"):
            checkpoint = next(reversed(complete_checkpoints(self.training_args.output_dir)), None)
        try:
            check_same_rows(checkpoint, describe_data(self.data_args, {"train": self.splits["train"]}))
        except UserError as error:
            self.report("Rows of the run to resume", [str(error)])

    def examine_splits(self, names: list[str]) -> None:
        """Examine the rows of splits: which cannot be used, how long they are, what is odd about them."""
        try:
            # Bad rows are left out here whatever the flags say, so that all of them are found.
            found = load_splits(replace(self.data_args, skip_bad_rows=True), names)
            if self.data_args.streaming and "train" in found:
                found["train"] = self.read_on(found["train"])
        except UserError as error:
            self.report(f"Rows of {' and '.join(names)}", [str(error)])
            return
        self.splits |= found
        for name, split in found.items():
            for part in split.parts or [split]:
                self.examine_rows(part)
            if split.parts and all(part.name in self.features for part in split.parts):
                encoded = [self.features[part.name] for part in split.parts]
                self.features[name], report = mix_sources(split.parts, encoded, self.data_args)
                print_section(f"Sources of {name}", f"  {report}".replace("\n", "\n  "))

    def read_on(self, split: Split) -> Split:
        """Return the first rows of a stream, with what cannot be used in all of them, unless they are on the Hub."""
        if split.parts:
            return replace(split, parts=tuple(map(self.read_on, split.parts)))
        title, told = f"Stream of {split.name}", f"the first {len(split):,} are examined here"
        if not self.data_args.train_file:
            print_section(title, f"  {split.source}: {told}, the others are fetched while it trains")
            return split
        whole = replace(split, left_out=[], without_loss=[], unoffered=[], unread=Counter())
        data_args = replace(self.data_args, skip_bad_rows=True)
        rows = read_conversations(open_rows(data_args, split.name, split.source), whole, data_args)
        used = sum(1 for _ in islice(rows, data_args.max_train_samples))
        print_section(title, f"  {split.source}: all rows are read, {used:,} can be used, and {told} more closely")
        return whole

    def examine_rows(self, split: Split) -> None:
        """Examine the rows of a split, or of one of the sources of training."""
        name = split.name
        if split.left_out and self.data_args.skip_bad_rows:
            print_section(
                f"Rows of {name} that are left out", format_problems(list(map(str, split.left_out)), MOST_PROBLEMS)
            )
        elif split.left_out:
            self.report(f"Rows of {name} that cannot be used", list(map(str, split.left_out)))
        # The rows that can be used are examined in any case.
        if self.base:
            self.examine_lengths(split)
        findings = check_split(split)
        if self.base:
            findings += check_tools(split, self.base.chat_format, self.data_args.train_on)
        print_section(f"Remarks on {name}", format_findings(findings))

    def examine_lengths(self, split: Split) -> None:
        """Measure lengths in tokens, and find the rows that the chat format or the limits refuse."""
        # Encoded without limits first, as a text that was cut does not tell how long it was.
        unlimited = replace(self.data_args, **dict.fromkeys(_LENGTHS, _UNLIMITED))
        try:
            dataset, report = self.encode(split, unlimited)
        except UserError:
            self.report_refused(split, unlimited, f"Rows of {split.name} that have no prompt or answer")
            return
        lengths = measure_lengths(dataset)
        report = limit_report(report, lengths, self.data_args)
        if any(measured.truncated for measured in report.lengths):
            dataset = self.encode_within_limits(split)
        if dataset is not None:
            self.features[split.name] = dataset
        histograms = [
            format_histogram(measured.name, values, measured.limit)
            for measured, values in zip(report.lengths, lengths, strict=True)
        ]
        print_section(f"Rows and lengths of {split.name}", "\n\n".join([f"  {report}", *histograms]))
        print_section(f"Suggested flags for {split.name}", format_suggestion(report))
        if dataset is not None:
            self.examine_positions(split.name, dataset)

    def examine_positions(self, name: str, dataset: Any) -> None:
        """Say which rows are longer than the base was made for."""
        answer = (self.training_args.max_new_tokens or self.data_args.val_max_target_length) * (name == "test")
        beside = (self.model_args.num_virtual_tokens or 0) + answer
        remarks = check_positions(dataset["length"][:], beside, self.base.config)
        if remarks:
            print_section(f"Length of {name}", format_problems(remarks, MOST_PROBLEMS))

    def encode_within_limits(self, split: Split) -> Any | None:
        """Return the dataset as the flags cut it, or `None` where they leave nothing of some rows."""
        try:
            return self.encode(split, self.data_args)[0]
        except UserError:
            title = f"Rows of {split.name} that have no prompt or answer within these lengths"
            self.report_refused(split, self.data_args, title)
            return None

    def report_refused(self, split: Split, data_args: DataArguments, title: str) -> None:
        """Print and count the first rows that cannot be encoded."""
        self.shows_progress = False  # many small encodings follow, each with a bar of its own
        refused = list(islice(self.refused_rows(split, split.conversations, data_args), MOST_REFUSED))
        self.has_more |= len(refused) == MOST_REFUSED < len(split)
        self.report(title, refused)

    def encode(self, split: Split, data_args: DataArguments) -> tuple[Any, Any]:
        """Encode a split as training would, and return the dataset and the report on its lengths."""
        import datasets  # here, as a base that cannot be read is told without it

        if not self.shows_progress:
            datasets.disable_progress_bars()
        if split.name != "test":
            return build_training_features(split, self.base.chat_format, self.base.tokenizer, data_args)
        features = build_generation_features(split, self.base.chat_format, self.base.tokenizer, data_args)
        return features.dataset, features.report

    def refused_rows(
        self, split: Split, conversations: Sequence[Conversation], data_args: DataArguments
    ) -> Iterator[str]:
        """Yield what is wrong with each row that cannot be encoded."""
        # By halving, as encoding stops at the first bad row: few bad rows among n take some log n passes each.
        try:
            self.encode(replace(split, conversations=list(conversations)), data_args)
        except UserError as error:
            if len(conversations) == 1:
                yield str(error)
                return
            middle = len(conversations) // 2
            yield from self.refused_rows(split, conversations[:middle], data_args)
            yield from self.refused_rows(split, conversations[middle:], data_args)

    def examine_batches(self) -> None:
        """Plan the batches as training would, and note how long their longest row is."""
        arguments = TrainArguments(self.model_args, self.data_args, self.training_args)
        collator = TrainingCollator(self.base.tokenizer, self.data_args.ignore_pad_token_for_loss)
        try:
            batching = plan_batching(self.features["train"], collator, self.base.config, arguments)
        except UserError as error:
            self.report("Batches", [str(error)])
            return
        if not self.data_args.streaming:  # of which a row that comes later may be longer
            self.longest = measure_longest(batching.examples)
        print_section("Batches", f"  {batching.reason}")
        print_section("Steps", format_problems(describe_steps(arguments, len(batching.examples)), MOST_PROBLEMS))

    def show_example(self) -> None:
        """Print the first example of training, by what carries loss."""
        description = describe_example(self.base.tokenizer, self.features["train"][0])
        text = colour_example(description) if shows_colour(sys.stdout) else description
        print_section("The first example", text)

    def show_memory(self) -> None:
        """Print an estimate of training's memory, and the flags that make it fit."""
        if self.model_args.peft_type != PREFIX_TUNING:
            print_section("Memory of training", f"  It is not estimated for --peft_type {self.model_args.peft_type}.")
            return
        config = self.base.config
        settings = describe_settings(self.model_args, self.data_args, self.training_args, self.longest, config)
        print_section("Memory of training (an estimate)", format_memory(config, settings, measure_base(config)))

    def report(self, title: str, problems: list[str]) -> None:
        """Print and count what would make training fail."""
        self.problems += len(problems)
        print_section(f"PROBLEM: {title}", format_problems(problems, MOST_PROBLEMS))


_NEWEST_OR_NONE = (None, "last", "true", "false")
_LENGTHS = ("max_source_length", "max_target_length", "val_max_target_length")


if __name__ == "__main__":
    main()
