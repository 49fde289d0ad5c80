"""Draw what a prefix keeps of a document, and what it saves."""

from pathlib import Path
from typing import Any

from glm_peft.distillation.comparison import DOCUMENT, NEITHER, PREFIX, Comparison

_SIZE = (12.6, 3.4)  # inches
_DOTS_PER_INCH = 120
_COLOURS = {DOCUMENT: "0.25", PREFIX: "tab:blue", NEITHER: "#ffbb78"}  # told apart in print without colours, too
_LABELS = {DOCUMENT: "document in context", PREFIX: "prefix", NEITHER: "neither"}
_SHARES = {"same_answers": "equal to those with\nthe document", "exact_match": "equal to\nthe references"}
_COSTS = {"context_tokens": "tokens of context", "first_token_seconds": "time to the first token"}
_FORMATS = {
    **dict.fromkeys(_SHARES, "{:.0%}"),
    **{"context_tokens": "{:,}", "first_token_seconds": "{:.3g} s"},
}
_WIDTH = 0.26  # of a bar, where there is one for each way at every place


def plot_comparison(comparison: Comparison, path: str | Path) -> Path:
    """
    Draw divergence, equal answers and cost of the three ways side by side.

    Args:
        path: where the PNG goes; its folder must be there.
    """
    # Not pyplot, which looks for a display. Late, as its import takes time in every command.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    divergence, answers, cost = figure.subplots(1, 3, width_ratios=(2, 3, 3))
    _draw_divergence(divergence, comparison)
    shares = _SHARES if comparison.references else {"same_answers": _SHARES["same_answers"]}
    _draw_groups(answers, comparison, shares, "greedy answers (%)", [1] * len(shares))
    wholes = [getattr(comparison.ways[DOCUMENT], field) for field in _COSTS]
    _draw_groups(cost, comparison, _COSTS, "cost (% of the document in context)", wholes)
    figure.legend(*answers.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    return Path(path)


def _draw_divergence(axes: Any, comparison: Comparison) -> None:
    values = {way: comparison.ways[way].divergence for way in (PREFIX, NEITHER)}
    bars = axes.bar([_LABELS[way] for way in values], values.values(), 0.5, color=[_COLOURS[way] for way in values])
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], padding=2)
    axes.set_title("divergence from the document\nin context (nats per token)", fontsize=10)
    axes.set_ylim(0, 1.15 * max(*values.values(), 1e-12))


def _draw_groups(axes: Any, comparison: Comparison, fields: dict[str, str], title: str, wholes: list[float]) -> None:
    """
    Draw a group of bars for each field, in it one for each way, with its value over it.

    Args:
        fields: of `Measures`, with their titles.
        wholes: the values of 100 %, one for each field.
    """
    for number, way in enumerate(_COLOURS):
        places = [place + (number - 1) * (_WIDTH + 0.03) for place in range(len(fields))]
        values = [getattr(comparison.ways[way], field) for field in fields]
        heights = [100 * value / whole for value, whole in zip(values, wholes, strict=True)]
        bars = axes.bar(places, heights, _WIDTH, color=_COLOURS[way], label=_LABELS[way])
        shown = [_FORMATS[field].format(value) for field, value in zip(fields, values, strict=True)]
        axes.bar_label(bars, shown, padding=2, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.set_xticks(range(len(fields)), fields.values())
    axes.set_xlim(-0.6, len(fields) - 0.4)
    axes.set_ylim(0, 1.15 * axes.dataLim.y1)
