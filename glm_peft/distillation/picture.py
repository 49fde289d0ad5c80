"""Draw what a prefix keeps of a document, and what it saves."""

from pathlib import Path
from typing import Any

from glm_peft.distillation.comparison import DOCUMENT, NEITHER, PREFIX, Comparison

_SIZE = (12.6, 3.4)  # inches
_DOTS_PER_INCH = 120
_COLOURS = {DOCUMENT: "0.25", PREFIX: "tab:blue", NEITHER: "#ffbb78"}  # told apart in print without colours, too
_LABELS = {DOCUMENT: "document in context", PREFIX: "prefix", NEITHER: "neither"}
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
    _draw_answers(answers, comparison)
    _draw_cost(cost, comparison)
    figure.legend(*answers.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    return Path(path)


def _draw_divergence(axes: Any, comparison: Comparison) -> None:
    values = {way: comparison.ways[way].divergence for way in (PREFIX, NEITHER)}
    bars = axes.bar([_LABELS[way] for way in values], values.values(), 0.5, color=[_COLOURS[way] for way in values])
    axes.bar_label(bars, [f"{value:.3g}" for value in values.values()], padding=2)
    axes.set_title("divergence from the document\nin context (nats per token)", fontsize=10)
    axes.set_ylim(0, 1.15 * max(*values.values(), 1e-12))


def _draw_answers(axes: Any, comparison: Comparison) -> None:
    rows = {"equal to those with\nthe document": {way: one.same_answers for way, one in comparison.ways.items()}}
    if comparison.references:
        rows["equal to\nthe references"] = {way: one.exact_match for way, one in comparison.ways.items()}
    percents = {title: {way: 100 * share for way, share in row.items()} for title, row in rows.items()}
    _draw_groups(axes, percents, {title: {way: f"{row[way]:.0f}" for way in row} for title, row in percents.items()})
    axes.set_title("greedy answers (%)", fontsize=10)


def _draw_cost(axes: Any, comparison: Comparison) -> None:
    """Draw tokens and seconds, each as a part of the document's, with the numbers themselves over the bars."""
    tokens = {way: one.context_tokens for way, one in comparison.ways.items()}
    seconds = {way: one.first_token_seconds for way, one in comparison.ways.items()}
    rows = {"tokens of context": tokens, "time to the first token": seconds}
    percents = {
        title: {way: 100 * value / (row[DOCUMENT] or 1) for way, value in row.items()} for title, row in rows.items()
    }
    shown = {"tokens of context": {way: f"{value:,}" for way, value in tokens.items()}}
    shown["time to the first token"] = {way: f"{value:.3g} s" for way, value in seconds.items()}
    _draw_groups(axes, percents, shown)
    axes.set_title("cost (% of the document in context)", fontsize=10)


def _draw_groups(axes: Any, rows: dict[str, dict[str, float]], shown: dict[str, dict[str, str]]) -> None:
    """Draw a group of bars for each row, in it one for each way, with a text over it."""
    for number, way in enumerate(_COLOURS):
        places = [place + (number - 1) * (_WIDTH + 0.03) for place in range(len(rows))]
        heights = [row[way] for row in rows.values()]
        bars = axes.bar(places, heights, _WIDTH, color=_COLOURS[way], label=_LABELS[way])
        axes.bar_label(bars, [row[way] for row in shown.values()], padding=2, fontsize=9)
    axes.set_xticks(range(len(rows)), rows)
    axes.set_xlim(-0.6, len(rows) - 0.4)
    axes.set_ylim(0, 1.15 * max(100, *(height for row in rows.values() for height in row.values())))
