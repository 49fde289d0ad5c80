"""What an output folder tells of its run: the facts of a model card, whatever its language."""

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Any

from glm_peft.arguments.methods import FULL
from glm_peft.arguments.splits import VALIDATION
from glm_peft.errors import UserError
from glm_peft.metrics import COUNT_NAMES, PROTOCOLS, SCORE_NAMES, score_pair
from glm_peft.prediction.prediction_files import RESULTS_NAME as PREDICTION_RESULTS_NAME
from glm_peft.provenance.data_language import detect_languages
from glm_peft.provenance.hardware import RUNTIMES
from glm_peft.provenance.recipe import public_name
from glm_peft.provenance.record import read_provenance
from glm_peft.publishing.card.bootstrap import bootstrap_intervals
from glm_peft.reporting.file_names import CURVES_NAME, PREDICTIONS_NAME, RESULTS_NAME

SHOWN_SCORES = (*SCORE_NAMES, "exact_match", "loss", "prediction_length", "reference_length", *COUNT_NAMES)

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILE, _LINK = re.compile(r"[\w.-]+"), re.compile(r"https?://[^\s()<>]+")
_TEXT = ("prompt", "labels", "predict")
_SAME = {"rel_tol": 1e-6, "abs_tol": 1e-6}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """
    The scores of a split.

    `examples` is the number of rows that were scored, where it is known; `intervals` are those of the means that can
    be had again from the rows of the predictions, empty where there are none or they are of another run.
    """

    split: str
    values: dict[str, float]
    examples: int | None
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """
    What is known; everything but `adapter` may be empty.

    `adapter` is the adapter's config, or empty for a model that was trained as a whole; `base` is a Hub id or the
    name of a folder, `record` the provenance, `results` every number of the run, `predictions` the rows that were
    answered.
    """

    adapter: Mapping[str, Any]
    base: str
    record: Mapping[str, Any]
    results: Mapping[str, Any]
    predictions: list[dict[str, Any]]
    weights_bytes: int
    has_curves: bool

    @property
    def method(self) -> str:
        """The value of `--peft_type`."""
        return str(self.adapter.get("peft_type", FULL)).lower()

    @property
    def base_is_on_hub(self) -> bool:
        """Whether others can load the base by its name."""
        return is_hub_id(self.base)

    @property
    def protocol(self) -> str | None:
        """Of the scores; that of the predictions where they have another."""
        return self.results.get("predict_metric_protocol") or _text(self.record.get("metric_protocol"))

    @cached_property
    def languages(self) -> list[str]:
        """Of the rows, by their codes."""
        recorded = self.record.get("languages")
        if isinstance(recorded, list):
            return [name for name in recorded if isinstance(name, str)]
        return detect_languages(str(row[name] or "") for row in self.predictions for name in ("prompt", "labels"))

    @property
    def licence(self) -> dict[str, str]:
        """Of the base, in the Hub's names; empty where it is not known."""
        recorded = {name: value for name, value in self.part("base", "licence").items() if _text(value)}
        if "license" not in recorded:
            return {}
        found = {name: recorded[name].lower() for name in ("license", "license_name") if name in recorded}
        if found["license"] == "other":
            found.setdefault("license_name", f"{self.base.rsplit('/', 1)[-1].lower()}-license")
        link = (recorded.get("license_link") or recorded.get("license_file") or "").removeprefix("./")
        if link and self.base_is_on_hub and _FILE.fullmatch(link):
            link = f"https://huggingface.co/{self.base}/blob/main/{link}"
        return found | ({"license_link": link} if link and _LINK.fullmatch(link) else {})

    @property
    def seconds(self) -> dict[str, float]:
        """Of each task of the run."""
        measured = self.part("measured", "seconds")
        found = {task: measured.get(task, self.results.get(name)) for name, task in RUNTIMES.items()}
        return {task: value for task, value in found.items() if is_number(value)}

    @cached_property
    def scores(self) -> list[Scores]:
        """Of every split that was evaluated."""
        found = [self._scores_of(split) for split in ("test", *self.validations)]
        return [scores for scores in found if scores.values]

    @property
    def validations(self) -> list[str]:
        """The splits for evaluation: `validation`, or `validation_NAME` for each name."""
        return [name for name in self.part("data") if name.startswith(VALIDATION)] or [VALIDATION]

    def part(self, *names: str) -> Mapping[str, Any]:
        """A mapping inside the record, or nothing."""
        value: Any = self.record
        for name in names:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value if isinstance(value, Mapping) else {}

    def source(self, split: str) -> str | None:
        """The file or data set of a split."""
        data = self.part("data", split)
        return _text(data.get("file") or data.get("dataset"))

    def _scores_of(self, split: str) -> Scores:
        prefix = "predict_" if split == "test" else f"eval{split.removeprefix(VALIDATION)}_"
        found = {name: self.results.get(prefix + name) for name in SHOWN_SCORES}
        values = {name: value for name, value in found.items() if is_number(value)}
        rows = self.part("data", split).get("rows")
        if split != "test" or not self._scored_rows:
            return Scores(split, values, rows)
        means = {name: sum(row[name] for row in self._scored_rows) / len(self._scored_rows) for name in SCORE_NAMES}
        if not all(isclose(values.get(name, math.nan), mean, **_SAME) for name, mean in means.items()):
            logger.warning("%s is not of the run of the scores: the card has no intervals.", PREDICTIONS_NAME)
            return Scores(split, values, rows)
        spans = bootstrap_intervals(self._scored_rows)
        # Where all rows have one value, other draws of them have it too, which says nothing of other rows.
        intervals = {name: span for name, span in spans.items() if name in values and span[0] < span[1]}
        return Scores(split, values, len(self._scored_rows), intervals)

    @cached_property
    def _scored_rows(self) -> list[dict[str, float]]:
        """The scores of each answer that has a reference, without the numbers that are no means."""
        if self.protocol not in PROTOCOLS:
            return []
        pairs = [(row["predict"], row["labels"]) for row in self.predictions if row["labels"] is not None]
        rows = [score_pair(*pair, self.protocol) for pair in pairs]
        return [{name: value for name, value in row.items() if name not in COUNT_NAMES} for row in rows]


def read_facts(folder: str | Path, base_model_id: str | None = None) -> Facts:
    """
    What a folder that a training run left tells.

    Args:
        base_model_id: the base's id on the Hub, where the run had it from a folder.

    Raises:
        UserError: there is no adapter and no model in the folder, or `base_model_id` is no id.
    """
    folder = Path(folder)
    if base_model_id is not None and not is_hub_id(base_model_id):
        raise UserError(f"--base_model_id {base_model_id} is no id on the Hub: give it as OWNER/NAME.")
    adapter, is_model = read_json(folder / "adapter_config.json"), (folder / "config.json").is_file()
    if not adapter and not is_model:
        raise UserError(
            f"{folder} has neither adapter_config.json nor config.json, so there is nothing to write a card of: give "
            "the folder that a training run or PEFT saved an adapter in."
        )
    record = read_provenance(str(folder)) if (folder / "provenance.json").is_file() else {}
    results: dict[str, Any] = dict(record.get("scores") or {}) if isinstance(record.get("scores"), dict) else {}
    for name in (RESULTS_NAME, PREDICTION_RESULTS_NAME):
        results |= read_json(folder / name)
    return Facts(
        adapter=adapter,
        base=base_model_id or _find_base(adapter, record),
        record=record,
        results=results,
        predictions=_read_predictions(folder / PREDICTIONS_NAME),
        weights_bytes=sum(file.stat().st_size for file in folder.glob("adapter_model.safetensors")),
        has_curves=(folder / CURVES_NAME).is_file(),
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is an owner's and a repository's."""
    return bool(_HUB_ID.fullmatch(name)) and ".." not in name and "--" not in name


def is_number(value: Any) -> bool:
    """A finite number, which alone a card can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _find_base(adapter: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """By the record, which tells a folder from an id; what PEFT wrote down may be either."""
    base = record.get("base")
    base = base if isinstance(base, dict) else {}
    recorded = _text(base.get("hub_id")) or _text(base.get("name"))
    return recorded or public_name(_text(adapter.get("base_model_name_or_path")) or "")


def read_json(file: Path) -> dict[str, Any]:
    """What a file records; nothing where it is not there, or holds something else."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_predictions(file: Path) -> list[dict[str, Any]]:
    """The rows, or none where one of them is of another form."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        rows = [{name: row.get(name) for name in _TEXT} for row in rows]
    except (OSError, ValueError, AttributeError):
        return []
    return rows if all(isinstance(row["predict"], str) and isinstance(row["prompt"], str) for row in rows) else []


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None
