"""What a search tells of its trials: order, table, pictures, configuration of the best; and what is tried next."""

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from glm_peft.arguments.settings import read_config
from glm_peft.trials.report import (
    format_trials,
    plot_search,
    tabulate_trials,
    write_best,
)
from glm_peft.trials.study import reseed

LONG = "很长" * 20
DISTRIBUTIONS = {"rate": FloatDistribution(0.1, 10.0, log=True), "text": CategoricalDistribution(["a", LONG])}
COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def study_of(*trials: tuple[TrialState, float | None, dict[str, object]], direction: str = "minimize") -> optuna.Study:
    """A study with these ends, results and values; those without a reason to fail were stopped."""
    study = optuna.create_study(direction=direction)
    for state, value, values in trials:
        reason = {"reason": values["reason"]} if "reason" in values else {}
        params = {name: values[name] for name in DISTRIBUTIONS if name in values}
        distributions = {name: DISTRIBUTIONS[name] for name in params}
        steps = {} if value is None else {10: value}
        trial = create_trial(
            state=state,
            value=value,
            params=params,
            distributions=distributions,
            user_attrs=reason,
            intermediate_values=steps,
        )
        study.add_trial(trial)
    return study


TRIALS = [(COMPLETE, 3.0, {"rate": 0.1}), (COMPLETE, 2.0, {"rate": 0.2})]
TRIALS += [(FAIL, None, {"rate": 9.0, "reason": "out of memory"}), (PRUNED, 1.0, {"rate": 0.3})]
TRIALS += [(FAIL, None, {"rate": 0.5}), (COMPLETE, 2.0, {"rate": 0.4, "text": LONG})]


def test_the_table_has_a_line_for_each_trial_and_the_reason_of_a_failure():
    table = tabulate_trials(study_of(*TRIALS))
    lines = format_trials(table, "eval_loss", ["rate", "text", "never"], minimize=True).splitlines()
    assert lines[0].split() == ["trial", "eval_loss", "rate", "text", "end"]
    # The complete trials stand first, and the earlier of equal ones.
    assert [line.split()[0] for line in lines[1:6]] == ["1", "5", "0", "3", "2"]
    assert lines[4].split() == ["3", "1.0000", "0.3", "ended", "early"] and lines[5].split() == ["2", "9", "failed"]
    assert lines[2].split()[3].startswith("很长" * 5) and LONG not in lines[2]
    wide = sum(character in LONG for character in lines[2])  # a Chinese character takes two columns
    assert len(lines[2]) + wide == len(lines[0])
    assert lines[6] == "trial 2 failed: out of memory"
    lines = format_trials(table, "eval_loss", ["rate"], minimize=False).splitlines()
    assert [line.split()[0] for line in lines[1:6]] == ["0", "1", "5", "3", "2"]


@pytest.mark.parametrize(
    "words",
    [
        ["no"],
        ["null"],
        [""],
        ["1e-3"],
        ["0.004841234567890123"],
        ["true"],
        ["a, b"],
        ["a: b"],
        ["#a"],
        ["写广告：短"],
        ['{"a": 1}'],
        ["a", "no", "1"],
        ["-1"],
        [LONG * 9],
    ],
)
def test_the_configuration_of_the_best_is_read_as_it_was_given(tmp_path, words):
    write_best(tmp_path, study_of(*TRIALS).best_trial, "eval_loss", {"run_name": words}, "train it")
    settings = {setting.name: setting.values for setting in read_config(str(tmp_path / "best.yaml"))}
    assert settings["run_name"] == words and settings["output_dir"] == [str(tmp_path / "best")]
    assert yaml.safe_load((tmp_path / "best.yaml").read_text(encoding="utf-8"))["do_train"] is True


@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1]])
def test_pictures_are_drawn_however_few_trials_there_are(tmp_path, trials, recwarn):
    for path in plot_search(study_of(*trials), "eval_loss", tmp_path):
        assert path.read_bytes()[:4] == b"\x89PNG"
    assert {path.name for path in tmp_path.iterdir()} == {"history.png", "parameters.png"} and not recwarn.list


def values_of(study: optuna.Study) -> list[dict[str, float]]:
    return [trial.params for trial in study.trials]


def test_values_depend_on_the_seed_and_the_trials_before_and_not_on_the_process():
    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_int("n", 1, 9)

    def go_on(study: optuna.Study, seed: int, trials: int) -> None:
        reseed(study, seed, 3)
        study.optimize(objective, n_trials=trials, callbacks=[lambda study, trial: reseed(study, seed, 3)])

    studies = [optuna.create_study() for _ in range(3)]
    go_on(studies[0], 0, 8)
    go_on(studies[1], 0, 4)
    go_on(studies[1], 0, 4)  # as another process would
    go_on(studies[2], 1, 1)
    assert values_of(studies[0]) == values_of(studies[1])
    assert len({values["x"] for values in values_of(studies[0])}) == 8
    assert values_of(studies[2])[0] != values_of(studies[0])[0]
