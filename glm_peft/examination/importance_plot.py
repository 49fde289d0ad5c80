"""Draw what a base does with a prefix: attention by layer, loss by virtual token."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from glm_peft.examination.prefix_importance import Importance

PLOT_NAME = "prefix_importance.png"

_SIZE = (11.2, 3.8)  # inches
_DOTS_PER_INCH = 120
_KEPT, _OTHER = "tab:blue", "tab:orange"


def plot_importance(importance: Importance, path: str | Path, kept: Collection[int] = ()) -> Path:
    """
    Draw the share of attention that each layer gives to the prefix, and the change of loss without each virtual token.

    Args:
        path: where the PNG goes; folders are made.
        kept: the virtual tokens that pruning keeps, which have a colour of their own; empty without pruning.
    """
    from matplotlib.figure import Figure  # late, as it takes a second that most inspections do without

    figure = Figure(_SIZE, layout="constrained")
    attention, changes = figure.subplots(1, 2)
    _draw_bars(attention, [100 * share for share in importance.attention], "layer", "% of attention")
    attention.set_title("attention on the prefix (mean over heads and answer tokens)", fontsize=10)
    attention.set_ylim(0, 100)  # the same for every prefix, so that two pictures can be compared
    colours = [_KEPT if token in kept or not kept else _OTHER for token in range(len(importance.changes))]
    which = f"virtual token that is taken away{' (blue: kept, orange: left out)' if kept else ''}"
    _draw_bars(changes, importance.changes, which, "nats per answer token", colours)
    changes.set_title(f"change of the loss, which is {importance.loss:.4f} with all", fontsize=10)
    changes.axhline(0, color="black", linewidth=0.8)  # below it the loss is lower without the token
    changes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    return path


def _draw_bars(
    axes: Any, heights: Sequence[float], x_label: str, y_label: str, colours: Sequence[str] | str = _KEPT
) -> None:
    axes.bar(range(len(heights)), heights, color=colours)
    axes.set(xlabel=x_label, ylabel=y_label, xlim=(-0.6, len(heights) - 0.4))
    axes.xaxis.get_major_locator().set_params(integer=True)
