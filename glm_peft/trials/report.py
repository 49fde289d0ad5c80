"""Report on a search: the table of its trials, two plots, and the configuration of the best."""

import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import pandas
import yaml
from optuna.trial import FrozenTrial, TrialState

from glm_peft.arguments.search import Settings
from glm_peft.reporting.files import write_atomically
from glm_peft.trials.study import REASON, counted_trials

BEST_NAME, CSV_NAME = "best.yaml", "trials.csv"
HISTORY_NAME, PARAMETERS_NAME = "history.png", "parameters.png"

_ATTRIBUTES = ("number", "state", "value", "params", "intermediate_values", "user_attrs", "duration")
_STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed"}
_FAR = 2.0  # times the distance from the best to the median of the others: what is farther is drawn at the edge
_DOTS_PER_INCH = 120
_WIDEST = 24  # characters of a value in the table
# Without exponents: YAML takes 1e-4 for text, and so it is written as text, which training reads as a number.
_is_number = re.compile(r"-?\d+(\.\d+)?").fullmatch


def tabulate_trials(study: optuna.Study) -> pandas.DataFrame:
    """
    Return Optuna's table of the trials that count, a row for each.

    Returns:
        `number`, `state`, `value`, the arguments by their names, `intermediate_values_STEP`, the scores and the
        `reason` of a failure, and `duration` in seconds.
    """
    table = study.trials_dataframe(attrs=_ATTRIBUTES)
    # A trial that was stopped is done again under a new number: it is no row.
    table = table[table["number"].isin([trial.number for trial in counted_trials(study)])]
    table.columns = [name.removeprefix("params_").removeprefix("user_attrs_") for name in table.columns]
    table["state"], table["duration"] = table["state"].map(_STATES), table["duration"].dt.total_seconds()
    return table


def rank_trials(table: pandas.DataFrame, minimize: bool) -> pandas.DataFrame:
    """Return the complete trials, the best first and the earlier first of equal ones, and then the others."""
    # By the alphabet: complete, ended early, failed.
    return table.sort_values(["state", "value", "number"], ascending=[True, minimize, True])


def find_best(study: optuna.Study, ranked: pandas.DataFrame) -> FrozenTrial | None:
    """Return the best of the complete trials, if there are any."""
    is_there = len(ranked) > 0 and ranked["state"].iloc[0] == _STATES["COMPLETE"]
    return study.trials[int(ranked["number"].iloc[0])] if is_there else None


def format_trials(ranked: pandas.DataFrame, metric: str, names: Sequence[str]) -> str:
    """
    Format a table with one trial in a line, and the reasons of failures.

    Args:
        ranked: the trials, in the order of the lines.
        metric: heading of the results that trials are compared by.
        names: of the arguments that are searched.
    """
    shown = ranked[["number", "value", *(name for name in names if name in ranked), "state"]]
    shown = shown.rename(columns={"number": "trial", "value": metric, "state": "end"})
    # A failed trial has no result, and its cell stays empty.
    shown[metric] = shown[metric].map("{:.4f}".format, na_action="ignore")
    with pandas.option_context("display.unicode.east_asian_width", True):  # a Chinese character takes two columns
        table = shown.to_string(index=False, na_rep="", float_format="{:.4g}".format, max_colwidth=_WIDEST)
    failed = ranked.dropna(subset=[REASON]) if REASON in ranked else ranked[:0]
    reasons = [f"trial {trial.number} failed: {trial.reason}" for trial in failed.itertuples()]
    return "\n".join([table, *reasons])


def plot_search(study: optuna.Study, metric: str, folder: Path) -> list[Path]:
    """
    Draw the results of the complete trials, by their number and by the value of each argument.

    Args:
        study: with at least one complete trial.
        metric: name of the result that trials are compared by.
        folder: where the plots are written.
    """
    import matplotlib

    matplotlib.use("agg")  # no window is wanted
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_optimization_history, plot_slice

    limits = _find_limits(study)
    plots = {
        HISTORY_NAME: partial(plot_optimization_history, study),
        PARAMETERS_NAME: partial(plot_slice, study, target=lambda trial: float(np.clip(trial.value, *limits))),
    }
    with warnings.catch_warnings(), pyplot.rc_context():
        # These plots are experimental by Optuna's word, and fonts may lack the characters of a choice.
        warnings.simplefilter("ignore")
        for name, plot in plots.items():
            # One axis of the history, and of the other plot one for each argument, which share the vertical axis.
            axes = np.ravel(plot(target_name=metric))
            margin = 0.05 * (limits[1] - limits[0] or 1.0)
            axes[0].set_ylim(limits[0] - margin, limits[1] + margin)
            axes[0].figure.set_size_inches(max(8, 3.6 * len(axes)), 4)
            axes[0].figure.savefig(folder / name, bbox_inches="tight", dpi=_DOTS_PER_INCH)
            pyplot.close(axes[0].figure)
    return [folder / name for name in plots]


def _find_limits(study: optuna.Study) -> tuple[float, float]:
    """Return the lowest and highest result drawn at its place; one far off would press the others together."""
    values = [trial.value for trial in study.get_trials(states=(TrialState.COMPLETE,))]
    best = study.best_value
    far = best + _FAR * (median({*values} - {best} or {best}) - best)
    return min(best, max(far, min(values))), max(best, min(far, max(values)))


def write_best(folder: Path, best: FrozenTrial, metric: str, settings: Settings, command: str) -> None:
    """
    Write `best.yaml`: the configuration of the best trial, which `glm_peft/train.py` runs.

    Args:
        settings: the settings of training with the values of the trial.
        command: the command that trains with it, for the header.
    """
    # As in a trial, which trains and evaluates whatever the settings say of it.
    own = {"output_dir": [str(folder / "best")], "do_train": ["true"], "do_eval": ["true"]}
    config = {name: _as_yaml(words) for name, words in (settings | own).items()}
    head = f"# Trial {best.number} of a search, {metric} {best.value!r}. Train it with\n#   {command}\n"
    write_atomically(folder / BEST_NAME, head + yaml.safe_dump(config, allow_unicode=True, sort_keys=False))


def describe_values(trial: FrozenTrial | optuna.Trial, names: Sequence[str]) -> str:
    """Return such as `learning_rate 0.01, num_virtual_tokens 16`."""
    return ", ".join(f"{name} {_format_value(trial.params[name])}" for name in names if name in trial.params)


def _format_value(value: Any) -> str:
    if value is None:
        return "not given"
    return (
        str(value).lower() if isinstance(value, bool) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _as_yaml(words: Sequence[str]) -> Any:
    """Return words as YAML's own values where a person would write them so; others are quoted where needed."""
    values = [yaml.safe_load(word) if _is_number(word) or word in ("true", "false") else word for word in words]
    return values[0] if len(values) == 1 else values
