"""Read the rows of data that a model card shows: answers, and questions of a comparison."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_peft.distillation.comparison import DOCUMENT, NEITHER, PREFIX
from glm_peft.provenance.ownership import find_foreign
from glm_peft.publishing.card.values import read_messages
from glm_peft.reporting.file_names import (
    COMPARISON_ANSWERS_NAME,
    COMPARISON_NAME,
    PREDICTIONS_NAME,
    PROVENANCE_NAME,
)
from glm_peft.reporting.files import read_json

_TEXTS = ("prompt", "labels", "predict", "scored_labels", "scored_predict")
_ANSWERS = (DOCUMENT, PREFIX, NEITHER)
_EXAMPLES = 3  # of adapters of earlier versions, where nobody said how many


def count_examples(folder: Path, examples: int | None) -> int:
    """Return how many rows of data the card of a folder shows, see `read_facts`."""
    record = read_json(folder / PROVENANCE_NAME)
    number, foreign = number_of_examples(record, examples), find_foreign(folder)
    return sum(len(read(folder, foreign)[:number]) for read in (read_predictions, read_compared))


def number_of_examples(record: Mapping[str, Any], asked: int | None) -> int:
    """Return how many are shown: as many as asked for, or as the run was told; 3 where neither says."""
    told = record.get("card_examples")
    return asked if asked is not None else told if isinstance(told, int) and told >= 0 else _EXAMPLES


def read_predictions(folder: Path, foreign: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the predictions; none where they are of other weights."""
    return [] if PREDICTIONS_NAME in foreign else _read_rows(folder / PREDICTIONS_NAME, _TEXTS, ("predict", "prompt"))


def read_compared(folder: Path, foreign: list[str]) -> list[dict[str, Any]]:
    """Return the questions of the comparison with their answers; none where they are of other weights."""
    return [] if COMPARISON_NAME in foreign else _read_rows(folder / COMPARISON_ANSWERS_NAME, _ANSWERS, _ANSWERS)


def _read_rows(file: Path, names: Sequence[str], needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return the messages and the named texts of every row; none where one of them has another form."""
    try:
        # Not `splitlines`, which also ends a line at characters that JSON leaves as they are, such as U+2028.
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        rows = [{name: row.get(name) for name in names} | {"messages": read_messages(row)} for row in rows]
    except (OSError, ValueError, AttributeError, KeyError):
        return []
    return rows if all(isinstance(row[name], str) for row in rows for name in needed) else []
