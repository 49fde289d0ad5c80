"""The picture of a search: how far it came, and what each argument had to do with it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_peft.trials.report import COMPLETE, PRUNED, TrialRecord, format_value
from glm_peft.trials.space import Parameter

PLOT_NAME = "search.png"

_COLUMNS = 3
_PANEL = (4.2, 3.3)  # inches
_DOTS_PER_INCH = 120
_COLOURS = {COMPLETE: "tab:blue", PRUNED: "tab:orange"}
_MARKS = {COMPLETE: "o", PRUNED: "x"}
_FAR = 4.0  # times the spread of the better half: what is farther off is drawn at the edge
_LONGEST = 10  # characters of a choice's label
_MOST_LABELS = 8


def plot_search(
    records: Sequence[TrialRecord], space: Sequence[Parameter], metric: str, minimize: bool, path: str | Path
) -> Path | None:
    """
    Draw each trial's result by its number, and by the value of each argument.

    Results that are far off are drawn as triangles at the edge, so that the others can be told apart.

    Args:
        space: the arguments that were searched, with their scales.
        metric: name of what trials are judged by.
        path: where the PNG goes.

    Returns:
        The path, or `None` where there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [record for record in records if record.value is not None and record.state in _COLOURS]
    used = [parameter for parameter in space if any(parameter.name in record.values for record in drawn)]
    if not drawn:
        return None
    rows = 1 + -(-len(used) // _COLUMNS)
    figure = Figure((_PANEL[0] * _COLUMNS, _PANEL[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(rows, _COLUMNS)
    limits = find_limits([record.value for record in drawn], minimize)
    history = figure.add_subplot(grid[0, :])
    _draw_history(history, drawn, metric, minimize, limits)
    for number, parameter in enumerate(used, _COLUMNS):
        axes = figure.add_subplot(grid[divmod(number, _COLUMNS)])
        _draw_parameter(axes, parameter, drawn, metric, limits)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    return Path(path)


def find_limits(values: Sequence[float], minimize: bool) -> tuple[float, float]:
    """The lowest and highest result to draw at its place: all of them but those far from the better half."""
    ordered = sorted(values, reverse=not minimize)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    reach = _FAR * abs(middle - best) or abs(best) or 1.0
    near = [value for value in ordered if abs(value - best) <= reach]
    low, high = min(near), max(near)
    margin = 0.08 * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def _draw_history(
    axes: Any, drawn: Sequence[TrialRecord], metric: str, minimize: bool, limits: tuple[float, float]
) -> None:
    from matplotlib.ticker import MaxNLocator

    _scatter(axes, [(float(record.trial), record) for record in drawn], limits)
    complete = [record for record in drawn if record.state == COMPLETE]
    best = [(min if minimize else max)(each.value for each in complete[: n + 1]) for n in range(len(complete))]
    last = max(record.trial for record in drawn)
    if complete:
        steps = [*(record.trial for record in complete), last]
        axes.step(steps, [*best, best[-1]], where="post", color="tab:green", linewidth=1.5, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel(metric)
    axes.set_xlim(-0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, steps=[1, 2, 5, 10]))
    # Above the axes, where it can cover no trial.
    if any(not limits[0] <= record.value <= limits[1] for record in drawn):
        axes.scatter([], [], c="grey", marker="^", s=30, label="far beyond the edge")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)


def _draw_parameter(
    axes: Any, parameter: Parameter, drawn: Sequence[TrialRecord], metric: str, limits: tuple[float, float]
) -> None:
    having = [record for record in drawn if parameter.name in record.values]
    axes.set_xlabel(parameter.name)
    axes.set_ylabel(metric)
    if parameter.choices:
        places = {repr(choice): place for place, choice in enumerate(parameter.choices)}
        points = [(float(places[repr(record.values[parameter.name])]), record) for record in having]
        _label_choices(axes, parameter)
    else:
        points = [(float(record.values[parameter.name]), record) for record in having]
        _scale_range(axes, parameter)
    _scatter(axes, points, limits)


def _scale_range(axes: Any, parameter: Parameter) -> None:
    """The whole range, whatever of it was tried."""
    from matplotlib.ticker import MaxNLocator

    if parameter.log:
        axes.set_xscale("log")
        margin = (parameter.high / parameter.low) ** 0.04
        axes.set_xlim(parameter.low / margin, parameter.high * margin)
        return
    margin = 0.04 * (parameter.high - parameter.low)
    axes.set_xlim(parameter.low - margin, parameter.high + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=parameter.kind is int, steps=[1, 2, 5, 10]))


def _label_choices(axes: Any, parameter: Parameter) -> None:
    """Short labels as they are; others by their number in the list, as fonts and room may lack for them."""
    labels = [format_value(choice) for choice in parameter.choices]
    if len(labels) > _MOST_LABELS or any(len(label) > _LONGEST or not label.isascii() for label in labels):
        labels = [str(number + 1) for number in range(len(labels))]
        axes.set_xlabel(f"{parameter.name} (number in the list)")
    every = -(-len(labels) // _MOST_LABELS)
    turned = sum(map(len, labels[::every])) > 28
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=30 if turned else 0)
    axes.set_xlim(-0.5, len(labels) - 0.5)


def _scatter(axes: Any, points: Sequence[tuple[float, TrialRecord]], limits: tuple[float, float]) -> None:
    low, high = limits
    for state, colour in _COLOURS.items():
        marked: dict[str, list[tuple[float, float]]] = {_MARKS[state]: [], "^": [], "v": []}
        for place, record in points:
            if record.state == state:
                mark = "^" if record.value > high else "v" if record.value < low else _MARKS[state]
                marked[mark].append((place, min(max(record.value, low), high)))
        for mark, spots in marked.items():
            label = state if mark == _MARKS[state] else None
            if spots:
                axes.scatter(
                    *zip(*spots, strict=True), c=colour, marker=mark, s=30, label=label, zorder=3, clip_on=False
                )
    axes.set_ylim(low, high)
    axes.grid(alpha=0.3)
