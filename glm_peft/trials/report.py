"""What a search tells: the table of its trials, their files, and the configuration of the best."""

import csv
import io
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from glm_peft.arguments.search import Settings
from glm_peft.reporting.files import write_atomically

BEST_NAME, JSON_NAME, CSV_NAME = "best.yaml", "trials.json", "trials.csv"
COMPLETE, PRUNED, FAILED, STOPPED = "complete", "ended early", "failed", "stopped"

_WIDEST = 24  # columns of a value in the table


@dataclass(frozen=True)
class TrialRecord:
    """
    One trial: its values by argument, what it is judged by (of the last evaluation, if it ended early), and its end.

    `evaluations` are by step of the optimizer, `seconds` None where it was killed, `reason` says why it failed.
    """

    trial: int
    state: str
    value: float | None
    values: dict[str, Any]
    evaluations: dict[int, float]
    metrics: dict[str, float]
    seconds: float | None
    reason: str | None = None


def record_trial(trial: Any) -> TrialRecord:
    """What Optuna has of a trial."""
    states = {"COMPLETE": COMPLETE, "PRUNED": PRUNED, "FAIL": FAILED if "reason" in trial.user_attrs else STOPPED}
    evaluations = dict(sorted(trial.intermediate_values.items()))
    seconds = trial.duration.total_seconds() if trial.duration else None
    return TrialRecord(
        trial.number,
        states.get(trial.state.name, STOPPED),
        trial.value if trial.state.name in ("COMPLETE", "PRUNED") else None,
        dict(trial.params),
        evaluations,
        trial.user_attrs.get("metrics", {}),
        seconds,
        trial.user_attrs.get("reason"),
    )


def rank_trials(records: Sequence[TrialRecord], minimize: bool) -> list[TrialRecord]:
    """The complete ones, the best first and the earlier first where two are equal; then those that ended early."""
    states = (COMPLETE, PRUNED, FAILED, STOPPED)

    def key(record: TrialRecord) -> tuple[int, float, int]:
        value = record.value if record.value is not None else 0.0
        return states.index(record.state), value if minimize else -value, record.trial

    return sorted(records, key=key)


def find_best(records: Sequence[TrialRecord], minimize: bool) -> TrialRecord | None:
    """The best of the complete ones."""
    ranked = rank_trials(records, minimize)
    return ranked[0] if ranked and ranked[0].state == COMPLETE else None


def format_trials(ranked: Sequence[TrialRecord], metric: str, names: Sequence[str]) -> str:
    """
    The table, one trial in a line.

    Args:
        ranked: in the order of the lines.
        metric: heading of what they are judged by.
        names: of the arguments that are searched.
    """
    rows = [["trial", metric, *names, "end"]]
    for record in ranked:
        cells = [format_value(record.values[name]) if name in record.values else "" for name in names]
        rows.append([str(record.trial), _number(record.value), *cells, _describe_end(record)])
    widths = [max(_width(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = ["  ".join([*map(_pad, row[:-1], widths), row[-1]]).rstrip() for row in rows]
    reasons = [f"  trial {record.trial} failed: {record.reason}" for record in ranked if record.state == FAILED]
    return "\n".join([*(f"  {line}" for line in lines), *reasons])


def format_value(value: Any) -> str:
    """A value for a table or a picture: numbers with four digits, long texts cut."""
    if value is None:
        return "not given"
    if isinstance(value, bool):
        return str(value).lower()
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if _width(text) <= _WIDEST:
        return text
    kept = next(length for length in range(len(text), 0, -1) if _width(text[:length]) < _WIDEST)
    return f"{text[:kept]}…"


def write_trials(folder: Path, records: Sequence[TrialRecord], metric: str, names: Sequence[str]) -> None:
    """`trials.json` with everything, and `trials.csv` with a column for each argument, both in order of the trials."""
    text = json.dumps(
        {"metric": metric, "trials": [asdict(record) for record in records]}, ensure_ascii=False, indent=2
    )
    write_atomically(folder / JSON_NAME, text + "\n")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["trial", "state", metric, *names, "steps_evaluated", "seconds", "reason"])
    for record in records:
        values = [_cell(record.values[name]) if name in record.values else "" for name in names]
        steps = max(record.evaluations, default="")
        writer.writerow(
            [
                record.trial,
                record.state,
                _cell(record.value),
                *values,
                steps,
                _cell(record.seconds),
                record.reason or "",
            ]
        )
    write_atomically(folder / CSV_NAME, table.getvalue())


def write_best(folder: Path, best: TrialRecord, metric: str, settings: Settings, command: str) -> Path:
    """
    `best.yaml`: the configuration of the best trial, which `glm_peft/train.py` runs.

    Args:
        settings: of training, with the values of the trial.
        command: that trains it, for the header.
    """
    path = folder / BEST_NAME
    own = {"output_dir": [str(folder / "best")], "do_train": ["true"], "do_eval": ["true"]}
    head = f"# Trial {best.trial} of a search, {metric} {best.value!r}. Train it with\n#   {command}\n"
    lines = [f"{name}: {_as_yaml(words)}\n" for name, words in (settings | own).items()]
    write_atomically(path, head + "".join(lines))
    return path


def _width(text: str) -> int:
    """Columns of a terminal: a Chinese character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _width(text))


def _as_yaml(words: Sequence[str]) -> str:
    """As the configuration of training is read: word by word, so that numbers stay as they were written."""
    scalars = [_as_scalar(word) for word in words]
    return scalars[0] if len(scalars) == 1 else f"[{', '.join(scalars)}]"


def _as_scalar(word: str) -> str:
    try:
        float(word)
        return word
    except ValueError:
        if word in ("true", "false"):
            return word
        return json.dumps(word, ensure_ascii=False) if _needs_quotes(word) else word


def _needs_quotes(word: str) -> bool:
    """Whether YAML would read something else than this word, alone or in a list."""
    try:
        return yaml.safe_load(f"[{word}]") != [word]
    except yaml.YAMLError:
        return True


def _describe_end(record: TrialRecord) -> str:
    steps = f" at step {max(record.evaluations)}" if record.state == PRUNED and record.evaluations else ""
    return f"{record.state}{steps}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _cell(value: Any) -> str:
    """JSON's words where a value is no text, so that a value that is not given differs from none."""
    return value if isinstance(value, str) else json.dumps(value)


def describe_values(values: Mapping[str, Any]) -> str:
    """Such as `learning_rate 0.01, num_virtual_tokens 16`."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in values.items())
