"""The picture of a training run: what is drawn, and what is left out."""

import math
import struct
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glm_peft.reporting.file_names import CURVES_NAME
from glm_peft.training.curves import TrainingCurves, plot_training_curves

TRAINING = [{"loss": 5.0 - step, "learning_rate": 0.02, "grad_norm": 0.5, "epoch": 1, "step": step} for step in (1, 2)]
EVALUATION = {"eval_loss": 3.5, "eval_rouge-1": 30.0, "eval_rouge-l": 24.0, "eval_bleu-4": 8.0, "eval_runtime": 1.0}
END = {"train_loss": 3.5, "train_runtime": 2.0, "step": 2}
FULL = [*TRAINING, EVALUATION | {"step": 2}, END]


@pytest.fixture
def draw(tmp_path: Path):
    """Draws a log; gives the curves of each panel by its title, as they were handed to matplotlib."""

    def draw(log_history: list[dict]) -> dict[str, dict[str, list[tuple]]]:
        panels, current, plot = {}, [], Axes.plot

        def note_plot(axes: Axes, xs: tuple, ys: tuple, **kwargs: object):
            current.append((kwargs["label"], list(zip(xs, ys, strict=True))))
            return plot(axes, xs, ys, **kwargs)

        def note_title(axes: Axes, title: str, **kwargs: object) -> None:
            panels[title] = dict(current)
            current.clear()

        with mock.patch.object(Axes, "plot", note_plot), mock.patch.object(Axes, "set_title", note_title):
            plot_training_curves(log_history, tmp_path / "curves.png")
        return panels

    return draw


@pytest.fixture
def axes():
    """The panels of every picture that is drawn, in their order."""
    drawn, add = [], Figure.add_subplot

    def note(figure: Figure, *args: object) -> Axes:
        drawn.append(add(figure, *args))
        return drawn[-1]

    with mock.patch.object(Figure, "add_subplot", note):
        yield drawn


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, in pixels."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_a_run_with_evaluation_has_five_panels_with_the_logged_numbers(draw):
    panels = draw(FULL)
    assert panels["loss (nats per token)"] == {"training": [(1, 4.0), (2, 3.0)], "evaluation": [(2, 3.5)]}
    assert panels["learning rate"] == {"learning rate": [(1, 0.02), (2, 0.02)]}
    assert panels["gradient norm (before clipping)"] == {"gradient norm": [(1, 0.5), (2, 0.5)]}
    assert panels["ROUGE F of generated answers (0 to 100)"] == {"ROUGE-1": [(2, 30.0)], "ROUGE-L": [(2, 24.0)]}
    assert panels["BLEU-4 of generated answers"] == {"BLEU-4": [(2, 8.0)]}


def test_what_is_kept_of_the_base_has_panels_of_its_own(draw):
    kept = {"eval_keep_divergence": 0.1, "eval_keep_loss_rise": 0.05, "eval_keep_same_answers": 0.9, "step": 0}
    panels = draw([kept, *FULL])
    found = panels["kept of the base: general prompts (nats per token)"]
    assert found == {"divergence": [(0, 0.1)], "rise of loss": [(0, 0.05)]}
    assert panels["kept of the base: share of equal answers (0 to 1)"] == {"equal answers": [(0, 0.9)]}


def test_a_run_without_evaluation_has_no_panel_for_scores(draw):
    assert list(draw(TRAINING)) == ["loss (nats per token)", "learning rate", "gradient norm (before clipping)"]


def test_numbers_that_are_not_finite_are_left_out(draw):
    first, second = TRAINING
    panels = draw([first | {"grad_norm": math.nan}, second | {"grad_norm": math.inf, "loss": math.nan}])
    assert list(panels) == ["loss (nats per token)", "learning rate"]
    assert panels["loss (nats per token)"]["training"] == [(1, 4.0)]


def test_a_step_that_was_evaluated_twice_has_its_last_value(draw):
    panels = draw([*FULL, {"eval_loss": 3.25, "step": 2}])
    assert panels["loss (nats per token)"]["evaluation"] == [(2, 3.25)]


def test_the_picture_grows_with_its_panels(tmp_path: Path):
    small = plot_training_curves([{"loss": 1.0, "step": 1}], tmp_path / "small.png")
    full = plot_training_curves(FULL, tmp_path / "new folder" / "full.png")
    (small_width, small_height), (full_width, full_height) = size_of(small), size_of(full)
    assert (full_width, full_height) == (2 * small_width, 3 * small_height)


@pytest.mark.parametrize(("protocol", "span"), [("thudm", "0 to 100"), ("chatglm3", "0 to 1")])
def test_the_title_of_bleu_tells_its_range(tmp_path: Path, axes: list[Axes], protocol: str, span: str):
    plot_training_curves(FULL, tmp_path / "curves.png", protocol)
    assert axes[-1].get_title() == f"BLEU-4 of generated answers ({span})"


def test_the_axes_end_with_the_steps_and_leave_room_below_zero(tmp_path: Path, axes: list[Axes]):
    plot_training_curves([*FULL, {"eval_loss": 0.0, "eval_bleu-4": 0.0, "step": 6}], tmp_path / "curves.png")
    for panel in axes:
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        assert 0 < left < 1 and 6 < right < 7
        assert -0.1 * top < bottom < 0
        ticks = [tick for tick in panel.get_xticks() if left <= tick <= right]
        assert ticks and all(1 <= tick <= 6 for tick in ticks)


@pytest.mark.parametrize("log_history", [TRAINING, TRAINING[:1], FULL, [{"loss": 1.0, "step": 1}], FULL[:3]])
def test_no_place_of_the_picture_is_empty(tmp_path: Path, axes: list[Axes], log_history: list):
    plot_training_curves(log_history, tmp_path / "curves.png")
    specs = [panel.get_subplotspec() for panel in axes]
    taken = [(row, column) for spec in specs for row in spec.rowspan for column in spec.colspan]
    rows, columns = specs[0].get_gridspec().get_geometry()
    assert sorted(taken) == [(row, column) for row in range(rows) for column in range(columns)]


def test_a_run_that_logged_nothing_says_why_there_is_no_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    state = SimpleNamespace(is_world_process_zero=True, log_history=[], global_step=3)
    with caplog.at_level("INFO", "glm_peft"):
        TrainingCurves(tmp_path).on_train_end(SimpleNamespace(logging_steps=10), state, None)
    assert "No training curves: nothing was logged in 3 steps (--logging_steps 10)." in caplog.text
    assert not list(tmp_path.iterdir())


def test_nothing_to_draw_writes_nothing(tmp_path: Path):
    assert plot_training_curves([{"train_runtime": 1.0, "step": 3}], tmp_path / "curves.png") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("is_main_process", "files"), [(True, [CURVES_NAME]), (False, [])])
def test_only_the_main_process_writes_the_picture(tmp_path: Path, is_main_process: bool, files: list[str]):
    state = SimpleNamespace(is_world_process_zero=is_main_process, log_history=FULL)
    TrainingCurves(tmp_path).on_train_end(None, state, None)
    assert [file.name for file in tmp_path.iterdir()] == files


def test_a_picture_that_cannot_be_written_is_only_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "file").touch()
    state = SimpleNamespace(is_world_process_zero=True, log_history=FULL)
    TrainingCurves(tmp_path / "file").on_train_end(None, state, None)
    assert "The training curves could not be drawn" in caplog.text
