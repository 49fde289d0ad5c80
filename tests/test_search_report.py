"""What a search tells of its trials: order, table, picture, configuration of the best; and what is tried next."""

import optuna
import pytest
import yaml

from glm_peft.arguments.command_line import read_config
from glm_peft.trials.plot import _label_choices, find_limits, plot_search
from glm_peft.trials.report import (
    COMPLETE,
    FAILED,
    PRUNED,
    TrialRecord,
    find_best,
    format_trials,
    rank_trials,
    write_best,
)
from glm_peft.trials.space import Parameter
from glm_peft.trials.study import RepeatableSampler


def trial(number: int, value: float | None, state: str = COMPLETE, **values: object) -> TrialRecord:
    reason = "out of memory" if state == FAILED else None
    return TrialRecord(number, state, value, values, {10: value} if value else {}, {}, 1.0, reason)


TRIALS = [
    trial(0, 3.0, rate=0.1),
    trial(1, 2.0, rate=0.2),
    trial(2, None, FAILED, rate=9.0),
    trial(3, 1.0, PRUNED, rate=0.3),
]
TRIALS += [trial(4, 2.0, rate=0.4, text="很长" * 20)]


def test_the_complete_trials_stand_first_and_the_earlier_of_equal_ones():
    assert [record.trial for record in rank_trials(TRIALS, minimize=True)] == [1, 4, 0, 3, 2]
    assert [record.trial for record in rank_trials(TRIALS, minimize=False)] == [0, 1, 4, 3, 2]
    assert find_best(TRIALS, minimize=True).trial == 1 and find_best(TRIALS[2:4], minimize=True) is None


def test_the_table_has_a_line_for_each_trial_and_the_reason_of_a_failure():
    lines = format_trials(rank_trials(TRIALS, minimize=True), "eval_loss", ["rate", "text"]).splitlines()
    assert lines[0].split() == ["trial", "eval_loss", "rate", "text", "end"]
    assert [line.split()[0] for line in lines[1:6]] == ["1", "4", "0", "3", "2"]
    assert lines[4].endswith("ended early at step 10") and lines[5].split() == ["2", "9", "failed"]
    assert lines[2].split()[3] == "很长" * 5 + "很…"
    assert lines[2].index("complete") + 11 == lines[0].index("end")  # a Chinese character takes two columns
    assert lines[6] == "  trial 2 failed: out of memory"


@pytest.mark.parametrize(
    "words",
    [
        ["no"],
        ["null"],
        [""],
        ["1e-3"],
        ["true"],
        ["a, b"],
        ["a: b"],
        ["#a"],
        ["写广告：短"],
        ['{"a": 1}'],
        ["a", "no", "1"],
        ["-1"],
    ],
)
def test_the_configuration_of_the_best_is_read_as_it_was_given(tmp_path, words):
    path = write_best(tmp_path, TRIALS[1], "eval_loss", {"run_name": words}, "train it")
    settings = {setting.name: setting.values for setting in read_config(str(path))}
    assert settings["run_name"] == words and settings["output_dir"] == [str(tmp_path / "best")]
    assert yaml.safe_load(path.read_text(encoding="utf-8"))["do_train"] is True


def test_the_picture_is_drawn_of_trials_with_a_result_only(tmp_path):
    space = [Parameter("rate", "", low=0.1, high=1.0, log=True), Parameter("text", "", choices=("a", "很长" * 20))]
    assert plot_search(TRIALS[2:3], space, "eval_loss", True, tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()
    path = plot_search(TRIALS, space, "eval_loss", True, tmp_path / "search.png")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_results_that_are_far_off_do_not_press_the_others_together():
    low, high = find_limits([2.0, 2.1, 2.2, 2.3, 900.0], minimize=True)
    assert low < 2.0 and 2.3 < high < 3.5
    low, high = find_limits([60.0, 58.0, 55.0, 0.0], minimize=False)
    assert 40 < low < 55 and high > 60
    low, high = find_limits([2.0], minimize=True)
    assert low < 2.0 < high


@pytest.mark.parametrize(
    ("choices", "labels"),
    [
        ((2, 4, None), ["2", "4", "not given"]),
        (("写广告", "short"), ["1", "2"]),
        (("a text that is long", "b"), ["1", "2"]),
        (tuple(range(20)), ["1", "4", "7", "10", "13", "16", "19"]),
    ],
)
def test_labels_of_choices_have_room(choices, labels):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    _label_choices(axes, Parameter("name", "", choices=choices))
    assert [label.get_text() for label in axes.get_xticklabels()] == labels
    assert axes.get_xlabel().endswith("(number in the list)") == (labels[0] == "1")


def values_of(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


def test_values_depend_on_the_seed_and_the_trials_before_and_not_on_the_process():
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("n", 1, 9)

    studies = [optuna.create_study(sampler=RepeatableSampler(seed, 3, lambda *args: None)) for seed in (0, 0, 1)]
    for study in studies:
        study.optimize(objective, n_trials=4)
    studies[0].optimize(objective, n_trials=4)
    studies[1].sampler = RepeatableSampler(0, 3, lambda *args: None)  # as another process would
    studies[1].optimize(objective, n_trials=4)
    assert values_of(studies[0]) == values_of(studies[1])
    assert len({values["x"] for values in values_of(studies[0])}) == 8
    assert values_of(studies[2])[0] != values_of(studies[0])[0]
