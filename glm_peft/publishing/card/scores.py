"""Read the scores of a run and how its answers were decoded, and compute the scores' confidence intervals."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isclose
from typing import Any

from glm_peft.arguments.splits import VALIDATION
from glm_peft.metrics import COUNT_NAMES, PROTOCOLS, SCORE_NAMES, TEXT_SCORE_NAMES, score_pair
from glm_peft.prediction.generation_settings import GenerationSettings
from glm_peft.prediction.tool_scores import CALL_SCORE_NAMES
from glm_peft.publishing.card.bootstrap import bootstrap_intervals
from glm_peft.publishing.card.values import is_number, part, text_of
from glm_peft.reporting.file_names import PREDICTIONS_NAME

_SHOWN = (*TEXT_SCORE_NAMES, *TEXT_SCORE_NAMES.values(), *CALL_SCORE_NAMES)
_SHOWN += ("loss", "rewards/accuracies", "rewards/margins")
_SHOWN += ("prediction_length", "reference_length", *COUNT_NAMES)
_SAMPLING = ("top_p", "top_k", "temperature")
# The run may have summed the same scores in another order, which changes the last digits.
_SAME = {"rel_tol": 1e-6, "abs_tol": 1e-6}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """The rows of training, of a validation set or of the test set: `rows` is their number, `digest` a SHA-256."""

    name: str
    source: str | None = None
    is_file: bool = False
    config: str | None = None
    rows: int | None = None
    digest: str | None = None

    @property
    def kind(self) -> str:
        """Return `train`, `validation` or `test`."""
        return self.name.partition("_")[0]

    @property
    def own_name(self) -> str:
        """Return the name of one of several validation sets, and otherwise an empty text."""
        return self.name.partition("_")[2]


@dataclass(frozen=True)
class Scores:
    """
    The scores of a split.

    Args:
        examples: the number of rows that were scored, where it is known.
        intervals: of the scores that are means over the kept predictions, lower and upper end.
    """

    split: Split
    values: dict[str, float]
    examples: int | None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoding:
    """How answers were generated; `sampling` names the settings of sampling, and is empty without it."""

    max_new_tokens: int
    num_beams: int
    sampling: str


def read_splits(data: Mapping[str, Any]) -> dict[str, Split]:
    """Return the recorded splits by name: training, validation sets, test."""
    recorded = {name: part(data, name) for name in data}
    order = ["train", *(name for name in recorded if name.startswith(VALIDATION)), "test"]
    return {name: read_split(name, recorded[name]) for name in order if recorded.get(name)}


def read_split(name: str, data: Mapping[str, Any]) -> Split:
    """Return a recorded split; what is not known of it is left out."""
    return Split(
        name,
        source=text_of(data.get("file")) or text_of(data.get("dataset")),
        is_file=text_of(data.get("file")) is not None,
        config=text_of(data.get("config")),
        rows=data["rows"] if is_number(data.get("rows")) else None,
        digest=text_of(data.get("sha256")) or text_of(data.get("rows_sha256")),
    )


def read_scores(
    results: Mapping[str, Any],
    splits: Mapping[str, Split],
    predictions: list[dict[str, Any]],
    protocol: str | None,
) -> list[Scores]:
    """
    Return the scores of every evaluated split, the test set first.

    Args:
        results: every result of the run, such as `predict_rouge-l`, `eval_loss` or `eval_NAME_loss`.
        predictions: the rows of the test set with their answers.
    """
    # Sources whose rows are held out have scores together, too.
    validations = dict.fromkeys([VALIDATION, *(name for name in splits if name.startswith(VALIDATION))])
    prefixes = {"test": "predict_"} | {name: f"eval{name.removeprefix(VALIDATION)}_" for name in validations}
    found = []
    for name, prefix in prefixes.items():
        named = {score: results.get(prefix + score) for score in _SHOWN}
        values = {score: value for score, value in named.items() if is_number(value)}
        split = splits.get(name, Split(name))
        rows = _score_rows(predictions, protocol) if name == "test" and values else []
        is_of_run = bool(rows) and _have_means(rows, values)
        intervals = _intervals(rows, values) if is_of_run else {}
        found.append(Scores(split, values, len(rows) if is_of_run else split.rows, intervals))
    return [scores for scores in found if scores.values]


def read_decoding(record: Mapping[str, Any], results: Mapping[str, Any], max_new_tokens: int) -> Decoding | None:
    """Return how the run decoded its answers; `None` where that is not recorded, or the scores are of a later run."""
    flags, name = part(record, "flags"), "predict_bleu-4"
    is_of_run = part(record, "scores").get(name) == results.get(name)
    if not flags or not is_of_run or not any(result.endswith("bleu-4") for result in results):
        return None
    given = {setting: flags.get(setting, getattr(GenerationSettings, setting)) for setting in _SAMPLING}
    sampling = ", ".join(f"{setting} {value}" for setting, value in given.items()) if flags.get("do_sample") else ""
    return Decoding(max_new_tokens, flags.get("num_beams", 1), sampling)


def show_score(name: str, value: float, protocol: str | None) -> str:
    """Return a score as text: a count as it is, losses and scores up to 1 with four decimals, others with two."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.{4 if name == 'loss' or (name == 'bleu-4' and protocol == 'chatglm3') else 2}f}"


def _score_rows(predictions: list[dict[str, Any]], protocol: str | None) -> list[dict[str, float]]:
    """Score each answer that has a reference; counts are left out, as they are no means."""
    if protocol not in PROTOCOLS:
        return []
    rows = [_score_row(row, protocol) for row in predictions if row["labels"] is not None]
    return [{name: value for name, value in row.items() if name not in COUNT_NAMES} for row in rows]


def _score_row(row: Mapping[str, Any], protocol: str) -> dict[str, float]:
    # `scored_…` are there only where a protocol compares other texts than the file shows.
    texts = [row["predict"], row["labels"]]
    scored = [row["scored_predict"], row["scored_labels"]]
    compared = [text if text is not None else shown for text, shown in zip(scored, texts, strict=True)]
    scores = score_pair(*texts, protocol)
    return score_pair(*compared, protocol) | {text: scores[name] for name, text in TEXT_SCORE_NAMES.items()}


def _have_means(rows: list[dict[str, float]], values: Mapping[str, float]) -> bool:
    """Return whether these rows give the scores: a folder may hold the predictions of another run."""
    means = {name: sum(row[name] for row in rows) / len(rows) for name in SCORE_NAMES}
    if all(isclose(values.get(name, math.nan), mean, **_SAME) for name, mean in means.items()):
        return True
    logger.warning("%s is not of the run of the scores: the card has no intervals.", PREDICTIONS_NAME)
    return False


def _intervals(rows: list[dict[str, float]], values: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    # Where all rows have one value, every draw of them has it too, which says nothing of other rows.
    spans = bootstrap_intervals(rows)
    return {name: span for name, span in spans.items() if name in values and span[0] < span[1]}
