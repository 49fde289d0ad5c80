"""Draw the curves of a training run from the trainer's log."""

import logging
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from glm_peft.reporting.file_names import CURVES_NAME

Points = list[tuple[float, float]]

_EVAL = "eval_"
_KEPT = {"eval_keep_divergence": "divergence", "eval_keep_loss_rise": "rise of loss"}
_KEPT_ANSWERS = {"eval_keep_same_answers": "equal answers"}
_REWARDS = {
    f"{kind}rewards/{name}": f"{name}{told}"
    for kind, told in (("", ""), (_EVAL, ", evaluation"))
    for name in ("chosen", "rejected")
}
_PREFERRED = {"rewards/accuracies": "training", "eval_rewards/accuracies": "evaluation"}
_COLUMN_WIDTH, _ROW_HEIGHT = 5.6, 3.4  # inches
_DOTS_PER_INCH = 120
_MARKED_POINTS = 30  # more points than these make a line that needs no marks

logger = logging.getLogger(__name__)


class TrainingCurves(TrainerCallback):
    """
    Write `training_curves.png` into `output_dir` when training ends, from the main process alone.

    Args:
        protocol: of the scores, which decides the range of BLEU-4.
    """

    def __init__(self, output_dir: str | Path, protocol: str | None = None) -> None:
        self.output_dir, self.protocol = Path(output_dir), protocol

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw what was logged so far."""
        if not state.is_world_process_zero:
            return
        try:
            (self.output_dir / CURVES_NAME).unlink(missing_ok=True)  # an earlier run's would be taken for this one's
            path = plot_training_curves(state.log_history, self.output_dir / CURVES_NAME, self.protocol)
        except (OSError, ImportError) as error:
            # No more than a warning: the adapter is still to be saved.
            logger.warning("The training curves could not be drawn (%s).", error)
            return
        if path:
            logger.info("Training curves: %s", path)
        else:
            nothing = "No training curves: nothing was logged in %d steps (--logging_steps %g)."
            logger.info(nothing, state.global_step, args.logging_steps)


def plot_training_curves(
    log_history: list[dict[str, Any]], path: str | Path, protocol: str | None = None
) -> Path | None:
    """
    Draw loss, learning rate, gradient norm and evaluation scores over the optimizer's steps.

    Args:
        log_history: `trainer.state.log_history`: dictionaries with `step` and what was logged there.
        path: where the PNG goes; folders are made. A panel without finite numbers is left out.
        protocol: of the scores, where it is known.

    Returns:
        The path, or `None` where there is nothing to draw.
    """
    panels = {title: curves for title, curves in _panels(log_history, protocol).items() if curves}
    if not panels:
        return None
    # Not pyplot, which looks for a display and keeps figures open. Late, as its import takes time in every command.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    figure = Figure((_COLUMN_WIDTH * columns, _ROW_HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    steps = [step for curves in panels.values() for points in curves.values() for step, _ in points]
    grid, empty = figure.add_gridspec(rows, columns), rows * columns - len(panels)
    for number, (title, curves) in enumerate(panels.items(), empty):
        # The first is as wide as two where a place would be left.
        place = grid[0, :] if number == empty else grid[divmod(number, columns)]
        _draw_panel(figure.add_subplot(place), title, curves, (min(steps), max(steps)))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, format="png")
    return path


def _panels(log_history: list[dict[str, Any]], protocol: str | None) -> dict[str, dict[str, Points]]:
    """Return the curves of each panel by its title, which has the unit; a curve without points is left out."""
    rewards = _curves(log_history, _REWARDS)
    bleu = {"thudm": " (0 to 100)", "chatglm3": " (0 to 1)"}.get(protocol, "")
    return {
        f"loss (nats per {'pair of answers' if rewards else 'token'})": _curves(
            log_history, {"loss": "training", **_evaluation_losses(log_history)}
        ),
        "learning rate": _curves(log_history, {"learning_rate": "learning rate"}),
        "gradient norm (before clipping)": _curves(log_history, {"grad_norm": "gradient norm"}),
        # Apart, as one protocol has BLEU-4 from 0 to 100 and the other from 0 to 1.
        "ROUGE F of generated answers (0 to 100)": _curves(log_history, _score_names(log_history, "rouge")),
        f"BLEU-4 of generated answers{bleu}": _curves(log_history, _score_names(log_history, "bleu")),
        "rewards of answers (nats)": rewards,
        "share of pairs with the chosen answer's reward higher (0 to 1)": _curves(log_history, _PREFERRED),
        "kept of the base: general prompts (nats per token)": _curves(log_history, _KEPT),
        "kept of the base: share of equal answers (0 to 1)": _curves(log_history, _KEPT_ANSWERS),
    }


def _score_names(log_history: list[dict[str, Any]], family: str) -> dict[str, str]:
    keys = {key for entry in log_history for key in entry if re.match(rf"{_EVAL}(.+_)?{family}", key)}
    return {key: key.removeprefix(_EVAL).replace("_", " ").upper() for key in sorted(keys)}


def _evaluation_losses(log_history: list[dict[str, Any]]) -> dict[str, str]:
    """Return the log's keys of evaluation losses, one for each named dataset, and their labels."""
    keys = {key for entry in log_history for key in entry if re.fullmatch(rf"{_EVAL}(.+_)?loss", key)}
    return {key: f"evaluation {key[len(_EVAL) : -len('_loss')]}".rstrip() for key in sorted(keys)}


def _curves(log_history: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Points]:
    curves = {name: _points(log_history, key) for key, name in names.items()}
    return {name: points for name, points in curves.items() if points}


def _points(log_history: Iterable[dict[str, Any]], key: str) -> Points:
    """Return the last finite value that was logged at each step."""
    by_step = {}  # a resumed run may evaluate a step a second time
    for entry in log_history:
        value = entry.get(key)
        if isinstance(value, int | float) and math.isfinite(value) and "step" in entry:
            by_step[entry["step"]] = float(value)
    return sorted(by_step.items())


def _draw_panel(axes: Any, title: str, curves: dict[str, Points], span: tuple[float, float]) -> None:
    from matplotlib.ticker import MaxNLocator

    for name, points in curves.items():
        mark = "o" if len(points) <= _MARKED_POINTS else None
        axes.plot(*zip(*points, strict=True), label=name, marker=mark, markersize=4, linewidth=1.5, clip_on=False)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("optimizer step")
    margin = max((span[1] - span[0]) * 0.03, 0.4)  # the same steps under every panel
    axes.set_xlim(span[0] - margin, span[1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    _scale_values(axes, curves)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        # Beside the axes, where it can cover no curve.
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=min(len(curves), 4), frameon=False)


def _scale_values(axes: Any, curves: dict[str, Points]) -> None:
    """Start the axis at zero where no value is negative, so that a small change looks small."""
    values = [value for points in curves.values() for _, value in points]
    # One power of ten in the corner: a learning rate of 2e-5 would need wide labels.
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useMathText=True)
    if min(values) >= 0:
        top = max(values) or 1
        axes.set_ylim(-0.04 * top, 1.08 * top)  # a curve at zero is not to lie on the axis
