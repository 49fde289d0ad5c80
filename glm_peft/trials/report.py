"""Report on a search: the table of its trials, two plots, and the configuration of the best."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas
import yaml
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from glm_peft.arguments.search import Settings
from glm_peft.reporting.files import write_atomically
from glm_peft.trials.study import REASON, counted_trials

BEST_NAME, CSV_NAME = "best.yaml", "trials.csv"
HISTORY_NAME, PARAMETERS_NAME = "history.png", "parameters.png"

_ATTRIBUTES = ("number", "state", "value", "params", "intermediate_values", "user_attrs", "duration")
STATES = {"COMPLETE": "complete", "PRUNED": "ended early", "FAIL": "failed"}
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
    table["state"], table["duration"] = table["state"].map(STATES), table["duration"].dt.total_seconds()
    return table


def format_trials(table: pandas.DataFrame, metric: str, names: Sequence[str], minimize: bool) -> str:
    """
    Format a table with one trial in a line, the best first, and the reasons of failures.

    Args:
        table: the trials.
        metric: heading of the results that trials are compared by.
        names: of the arguments that are searched.
        minimize: whether lower results are better.
    """
    # The states by the alphabet: complete, ended early, failed.
    ranked = table.sort_values(["state", "value", "number"], ascending=[True, minimize, True])
    shown = ranked[["number", "value", *(name for name in names if name in ranked), "state"]]
    shown = shown.rename(columns={"number": "trial", "value": metric, "state": "end"})
    # A failed trial has no result, and its cell stays empty.
    shown[metric] = shown[metric].map("{:.4f}".format, na_action="ignore")
    with pandas.option_context("display.unicode.east_asian_width", True):  # a Chinese character takes two columns
        lines = [shown.to_string(index=False, na_rep="", float_format="{:.4g}".format, max_colwidth=_WIDEST)]
    failed = ranked.dropna(subset=[REASON]) if REASON in ranked else ranked[:0]
    lines += [f"trial {trial.number} failed: {trial.reason}" for trial in failed.itertuples()]
    return "\n".join(lines)


def plot_search(study: optuna.Study, metric: str, folder: Path) -> list[Path]:
    """
    Draw Optuna's plots of the complete trials, by their number and by the value of each argument.

    Args:
        study: with at least one complete trial.
        metric: name of the result that trials are compared by.
        folder: where the plots are written.
    """
    import matplotlib

    matplotlib.use("agg")  # no window is wanted
    from matplotlib import pyplot
    from optuna.visualization.matplotlib import plot_optimization_history, plot_slice

    plots = {HISTORY_NAME: plot_optimization_history, PARAMETERS_NAME: plot_slice}
    with warnings.catch_warnings(), pyplot.rc_context():
        # These plots are experimental by Optuna's word, and fonts may lack the characters of a choice.
        warnings.simplefilter("ignore")
        for name, plot in plots.items():
            # One axis of the history, and of the other plot one for each argument, which share the vertical axis.
            axes = np.ravel(plot(study, target_name=metric))
            if study.direction == StudyDirection.MINIMIZE:
                axes[0].set_yscale("log")  # or a loss that is far off would press the others together
            axes[0].figure.set_size_inches(max(8, 3.6 * len(axes)), 4)
            axes[0].figure.savefig(folder / name, bbox_inches="tight", dpi=_DOTS_PER_INCH)
            pyplot.close(axes[0].figure)
    return [folder / name for name in plots]


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
    values = {name: trial.params[name] for name in names if name in trial.params}
    return ", ".join(
        f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in values.items()
    )


def _as_yaml(words: Sequence[str]) -> Any:
    """Return words as YAML's own values where a person would write them so; others are quoted where needed."""
    values = [yaml.safe_load(word) if _is_number(word) or word in ("true", "false") else word for word in words]
    return values[0] if len(values) == 1 else values
