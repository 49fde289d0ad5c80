"""Report how long prompts and answers are in tokens, what was cut off, and which limits would hold them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from glm_peft.arguments.data import DataArguments
from glm_peft.preprocessing.collators import IGNORED_LABEL
from glm_peft.preprocessing.conversations import Split

_PERCENTILES = (50, 90, 99, 100)
_SHOWN_ROWS = 5


@dataclass(frozen=True)
class Lengths:
    """
    Lengths in tokens, special tokens included, as they were before anything was cut.

    `percentiles` are the lengths that hold 50, 90, 99 and 100 % of the texts; `limit` is the value of `flag`, and
    `truncated` the number of texts that are longer.
    """

    name: str
    flag: str
    limit: int
    percentiles: tuple[int, ...]
    truncated: int

    @property
    def suggestion(self) -> int:
        """Return the smallest limit that holds 99 % of the texts."""
        return self.percentiles[2]  # not the longest: one outlier would set the memory that all of a run needs


@dataclass(frozen=True)
class LengthReport:
    """Report on what became of the rows of a split; `str()` writes it as a block of text for the log."""

    split: Split
    examples: int
    lengths: tuple[Lengths, ...]

    def __str__(self) -> str:
        lines = [self._headline(), *_left_out_lines(self.split)]
        lines.append(f"  {'tokens':<8}{'50 %':>8}{'90 %':>8}{'99 %':>8}{'max':>8}  {'limit':<30}truncated")
        lines += [_table_line(lengths, self.examples) for lengths in self.lengths]
        fitting = " ".join(f"{lengths.flag} {lengths.suggestion}" for lengths in self.lengths)
        lines.append(f"  99 % of the texts fit within {fitting}")
        return "\n".join(lines)

    def _headline(self) -> str:
        split = self.split
        stopped = f" (reading stopped at {split.limit})" if split.limit else ""
        unanswered = sum(conversation.answer is None for conversation in split)
        without = f", {unanswered} rows without an answer to compare with" if unanswered else ""
        return (
            f"{split.name}: {split.rows_read} rows read from {split.source}{stopped}, "
            f"{split.rows_read - len(split)} left out, {self.examples} examples{without}"
        )


def summarize_lengths(name: str, flag: str, limit: int, lengths: list[int]) -> Lengths:
    """Summarize lengths in tokens: their percentiles, and how many are above `limit`."""
    array = np.asarray(lengths)
    # By nearest rank, so that each percentile is a length that occurs, and a limit that holds its share exactly.
    percentiles = np.percentile(array, _PERCENTILES, method="inverted_cdf")
    return Lengths(name, flag, limit, tuple(int(value) for value in percentiles), int((array > limit).sum()))


def measure_lengths(dataset: Any) -> list[list[int]]:
    """Count the tokens of each prompt, and of each answer where there are labels, of a pair both."""
    if "labels" not in dataset.column_names:
        return [dataset["length"][:]]
    labels = list(each_example(dataset))
    answers = [sum(label != IGNORED_LABEL for label in own) for own in labels]
    prompts = [len(own) - answer for own, answer in zip(labels, answers, strict=True)]
    return [prompts[:: len(labels) // len(dataset)], answers]


def each_example(dataset: Any) -> Iterator[list[int]]:
    """Yield the labels of every example of a dataset, of pairs both."""
    for batch in dataset.select_columns("labels").iter(1000):  # one by one takes ten times as long
        for value in batch["labels"]:
            yield from value if isinstance(value[0], list) else [value]


def limit_report(report: LengthReport, lengths: list[list[int]], data_args: DataArguments) -> LengthReport:
    """Compare a report on uncut texts with the limits of the flags."""
    # The doctor encodes every text uncut to measure it, but reports what the run's own limits would cut off.
    limits = [getattr(data_args, measured.flag.removeprefix("--")) for measured in report.lengths]
    measured = zip(report.lengths, limits, lengths, strict=True)
    return replace(report, lengths=tuple(summarize_lengths(x.name, x.flag, limit, own) for x, limit, own in measured))


def _left_out_lines(split: Split) -> list[str]:
    lines = [f"  left out, no answer carries loss: {len(split.without_loss)}"] if split.without_loss else []
    # groupby joins neighbours only, hence the sorting; it keeps the rows of a kind in the order of the file.
    for kind, group in groupby(sorted(split.left_out, key=lambda bad_row: bad_row.kind), lambda bad_row: bad_row.kind):
        numbers = [bad_row.row.number for bad_row in group]
        more = ", …" if len(numbers) > _SHOWN_ROWS else ""
        unit = split.left_out[0].row.unit + ("s" if len(numbers) > 1 else "")
        first = ", ".join(str(number) for number in numbers[:_SHOWN_ROWS])
        lines.append(f"  left out, {kind}: {len(numbers)} ({unit} {first}{more})")
    return lines


def _table_line(lengths: Lengths, examples: int) -> str:
    counts = "".join(f"{value:>8}" for value in lengths.percentiles)
    share = f" ({100 * lengths.truncated / examples:.1f} %)" if lengths.truncated else ""
    return f"  {lengths.name:<8}{counts}  {f'{lengths.flag} {lengths.limit}':<30}{lengths.truncated}{share}"
