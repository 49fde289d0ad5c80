"""`python -m glm_peft.search`, typed: what it leaves, that it goes on, and that its best trial is a training run."""

import csv
import gc
import json
import os
import signal
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import FrozenTrial
from short_runs import PROJECT, run, training_words
from warm_starts import warm_python

from glm_peft import search
from glm_peft.adapters import assembly
from glm_peft.arguments.search import parse_search_arguments
from glm_peft.arguments.training import TrainingArguments
from glm_peft.errors import UserError
from glm_peft.models.loading import load_config
from glm_peft.training.trainer import PrefixTrainer
from glm_peft.trials import search as trials_search
from glm_peft.trials import trial as search_trial
from glm_peft.trials.study import counted_trials, hold_folder
from glm_peft.trials.trial import Workbench, parse_trial, resolve_trial, share_weights

SPACE = """\
learning_rate: {low: 1e-4, high: 1, log: true}
num_virtual_tokens: [2, 4]
prefix_dropout: {low: 0, high: 0.3, step: 0.1}
prefix_projection: [true, false]
"""
STEPS = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2"]
FEW_STEPS = ["--max_steps", "2"]
TRIALS = 4


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """A search collects garbage after every trial: here among all that the libraries ever made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than trials of a tiny model; those of the fixture `whole` are drawn."""
    monkeypatch.setattr(trials_search, "plot_search", lambda *args: [])


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


def search_words(base: Path, folder: Path, *more: str, space: str = SPACE, steps: list[str] = STEPS) -> list[str]:
    """The words of a command that searches with short runs; `--seed` and the like may follow."""
    words = training_words(base, folder, *steps)
    at = words.index("--num_virtual_tokens")
    (folder.parent / "space.yaml").write_text(space, encoding="utf-8")
    return [*words[:at], *words[at + 2 :], "--space", str(folder.parent / "space.yaml"), "--random_trials", "2", *more]


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'search.db'}")


def trials_of(folder: Path) -> list[FrozenTrial]:
    """Those that count."""
    return counted_trials(study_of(folder))


def without_times(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    """What does not differ between two searches."""
    return [(each.state, each.value, each.params, each.intermediate_values, each.user_attrs) for each in trials]


def states_of(folder: Path) -> list[str]:
    """Optuna's words for the ends of all trials."""
    return [trial.state.name for trial in study_of(folder).trials]


@pytest.fixture(scope="module")
def calls() -> list[str]:
    """What `whole` took long for."""
    return []


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory, calls: list[str]) -> Path:
    """The folder of a search that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    with pytest.MonkeyPatch.context() as patch:
        for room, name in ((assembly, "load_base_model"), (search_trial, "encode_splits")):
            patch.setattr(room, name, counted(getattr(room, name), calls))
        search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    return folder


def counted(function: Callable, calls: list[str]) -> Callable:
    """The function, which leaves its name in `calls`."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return call


def test_the_base_is_loaded_once_and_the_rows_are_encoded_once(whole, calls):
    assert sorted(calls) == ["encode_splits", "load_base_model"]


def test_a_search_leaves_its_files_and_no_checkpoint(whole):
    files = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert files == {"best.yaml", "search.db", "history.png", "parameters.png", "trials.csv"}
    assert all((whole / name).read_bytes()[:4] == b"\x89PNG" for name in ("history.png", "parameters.png"))


def test_every_trial_is_recorded_with_values_of_the_space(whole):
    trials = trials_of(whole)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert len({json.dumps(trial.params) for trial in trials}) == TRIALS
    for trial in trials:
        values = trial.params
        assert 1e-4 <= values["learning_rate"] <= 1 and values["num_virtual_tokens"] in (2, 4)
        assert values["prefix_projection"] in (True, False) and 0 <= values["prefix_dropout"] <= 0.3
        assert trial.last_step == 4 if trial.state.name == "COMPLETE" else trial.state.name == "PRUNED"
        assert trial.value == trial.intermediate_values[trial.last_step]


def test_the_table_has_what_optuna_has(whole):
    with (whole / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, trials_of(whole), strict=True):
        state = {"COMPLETE": "complete", "PRUNED": "ended early"}[trial.state.name]
        assert (int(row["number"]), row["state"], float(row["value"])) == (trial.number, state, trial.value)
        assert {name: row[name] for name in trial.params} == {name: str(value) for name, value in trial.params.items()}
        assert float(row["intermediate_values_2"]) == trial.intermediate_values[2]
        assert row["eval_loss"] == str(trial.user_attrs.get("eval_loss", ""))


def best_of(folder: Path, better: Callable = min) -> FrozenTrial:
    complete = [trial for trial in trials_of(folder) if trial.state.name == "COMPLETE"]
    return better(complete, key=lambda trial: trial.value)


def train_best(folder: Path) -> dict[str, Any]:
    """The results of training by `best.yaml`."""
    run([str(folder / "best.yaml")])
    return json.loads((folder / "best" / "all_results.json").read_text(encoding="utf-8"))


def test_training_by_the_best_configuration_gives_the_loss_of_the_trial(whole):
    best = best_of(whole)
    assert (whole / "best.yaml").read_text(encoding="utf-8").startswith(f"# Trial {best.number} of a search")
    assert train_best(whole)["eval_loss"] == best.value
    assert (whole / "best" / "adapter_model.safetensors").is_file()


def test_a_search_that_is_done_loads_nothing_and_tells_all_again(base, whole, monkeypatch, capsys):
    (whole / "best.yaml").unlink()
    monkeypatch.setattr(trials_search, "Workbench", None)
    search.main(search_words(base, whole, "--n_trials", str(TRIALS)))
    assert (whole / "best.yaml").is_file() and f"{TRIALS} trials, the best first" in capsys.readouterr().out


def test_trials_may_be_shorter_than_training_by_the_best(base, tmp_path):
    words = search_words(base, tmp_path / "search", "--trial_steps", "1")
    found = trials_search.Search(*parse_search_arguments(words))
    assert (found.arguments.training.max_steps, found.settings["max_steps"]) == (1, ["4"])
    (tmp_path / "space.yaml").write_text("max_steps: [1, 2]")
    with pytest.raises(UserError, match="--trial_steps gives all trials one length"):
        trials_search.Search(*parse_search_arguments(words))


def in_trial(patch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Let the second step of a trial begin with this."""
    step = PrefixTrainer.training_step

    def acting(trainer: PrefixTrainer, *args: Any) -> torch.Tensor:
        if Path(trainer.args.output_dir).name == str(number) and trainer.state.global_step == 1:
            act()
        return step(trainer, *args)

    patch.setattr(PrefixTrainer, "training_step", acting)


@pytest.fixture
def usual_ctrl_c() -> Iterator[None]:
    """Ctrl-C as it is in a terminal, wherever the tests run."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, former) == signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_ends_it_with_what_is_known_and_the_trial_is_done_again(
    base, whole, tmp_path, monkeypatch, capfd, usual_ctrl_c
):
    folder = tmp_path / "search"
    words = search_words(base, folder, "--n_trials", str(TRIALS))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        in_trial(patch, 2, partial(os.kill, os.getpid(), signal.SIGINT))
        search.main(words)
    captured = capfd.readouterr()
    assert end.value.code == 130 and "interrupted" in captured.err
    assert "checkpoint" not in captured.err and "2 trials, the best first" in captured.out
    assert states_of(folder)[2] == "FAIL" and len(trials_of(folder)) == 2
    assert (folder / "best.yaml").is_file() and not list(folder.glob("trials/*"))
    search.main(words)
    assert without_times(trials_of(folder)) == without_times(trials_of(whole))


KILLED = """\
import os, signal, sys
from glm_peft import search
from glm_peft.training.trainer import PrefixTrainer

step = PrefixTrainer.training_step
def training_step(trainer, *args):
    if trainer.args.output_dir.endswith("1") and trainer.state.global_step == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *args)
PrefixTrainer.training_step = training_step
search.main(sys.argv[1:])
"""


def test_a_killed_trial_is_not_counted_and_does_not_stay_running(base, whole, tmp_path):
    folder = tmp_path / "search"
    words = search_words(base, folder, "--n_trials", "2")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    killed = subprocess.run([warm_python(), "-c", KILLED, *words], env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL and states_of(folder) == ["COMPLETE", "RUNNING"]
    assert (folder / "trials.csv").read_text().count("\n") == 2 and (folder / "best.yaml").is_file()
    search.main(words)
    assert states_of(folder) == ["COMPLETE", "FAIL", "COMPLETE"] and not (folder / "trials").exists()
    assert without_times(trials_of(folder)) == without_times(trials_of(whole))[:2]


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line of a command that is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        search.main(words)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert end.value.code == 2 and len(lines) == 1
    return lines[0]


def test_the_file_of_another_search_is_refused(base, whole, capsys):
    before = states_of(whole)
    other_space = search_words(base, whole, "--n_trials", "9", space=SPACE.replace("[2, 4]", "[2, 8]"))
    said = refusal(other_space, capsys)
    assert 'with num_virtual_tokens in the space {"choices": [2, 4]} where this one has {"choices": [2, 8]}' in said
    said = refusal(search_words(base, whole, "--n_trials", "9", "--weight_decay", "0.1"), capsys)
    assert 'with --weight_decay not given where this one has "0.1"' in said
    said = refusal(search_words(base, whole, "--n_trials", "9", "--sampler_seed", "7"), capsys)
    assert "with --sampler_seed 0 where this one has 7" in said
    assert states_of(whole) == before
    search_words(base, whole)  # the space is as it was


def test_a_search_that_tried_nothing_yet_may_still_change_and_another_seed_tries_other_values(
    base, whole, tmp_path, capsys
):
    words = search_words(base, tmp_path / "search", "--n_trials", "1", steps=FEW_STEPS)
    file = tmp_path / "rows.json"
    rows = file.read_text(encoding="utf-8")
    file.write_text(rows.replace("summary", "summry"), encoding="utf-8")
    assert "summary" in refusal(words, capsys)
    file.write_text(rows, encoding="utf-8")
    other = [*words, "--sampler_seed", "1"]
    search.main(other)
    (trial,) = trials_of(tmp_path / "search")
    assert trial.params != trials_of(whole)[0].params
    file.write_text(rows.replace("裤", "裙"), encoding="utf-8")
    assert "with train rows of sha256" in refusal(other, capsys)  # what was tried is of other rows


def test_a_file_that_is_none_of_a_search_is_refused(base, tmp_path, capsys):
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "search.db").write_text("no database")
    said = refusal(search_words(base, tmp_path / "search"), capsys)
    assert "search.db cannot be used as the file of a search (" in said


def test_a_file_of_rows_that_is_not_there_is_told_as_in_training(base, tmp_path, capsys):
    words = search_words(base, tmp_path / "search", "--train_file", "nowhere.json")
    assert "nowhere.json" in refusal(words, capsys)


def test_two_searches_at_once_in_a_folder_are_refused(base, whole, capsys):
    with hold_folder(whole):
        assert "Another search is running in" in refusal(search_words(base, whole), capsys)


def test_a_trial_that_fails_for_a_reason_counts_and_the_search_goes_on(base, tmp_path, monkeypatch, capsys):
    def lack_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    space = "learning_rate: [1e30, 0.1]\nweight_decay: [0.0, 0.1]"
    words = search_words(base, tmp_path / "search", "--n_trials", "4", "--max_grad_norm", "0", space=space)
    with monkeypatch.context() as patch:
        in_trial(patch, 0, lack_memory)
        search.main(words)
    first, *trials = trials_of(tmp_path / "search")
    assert (first.state.name, first.user_attrs["reason"]) == ("FAIL", "out of memory")
    ends = {(trial.params["learning_rate"], trial.state.name) for trial in trials}
    assert ends == {(1e30, "FAIL"), (0.1, "COMPLETE")}
    failed = [trial for trial in trials if trial.state.name == "FAIL"]
    assert all("is not finite" in trial.user_attrs["reason"] for trial in failed)
    assert f"trial {failed[0].number} failed: {failed[0].user_attrs['reason']}" in capsys.readouterr().out
    search.main(words)
    assert without_times(trials_of(tmp_path / "search")) == without_times([first, *trials])


def test_where_every_trial_fails_the_search_says_so(base, tmp_path, capsys):
    words = search_words(
        base, tmp_path / "search", "--n_trials", "2", "--max_grad_norm", "0", space="learning_rate: [1e30]"
    )
    assert "None of 2 trials came to its end, for the reasons above" in refusal(words, capsys)
    assert not (tmp_path / "search" / "best.yaml").exists()


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("a bug")])
def test_an_error_of_this_program_is_no_failed_trial(base, tmp_path, monkeypatch, error):
    def fail() -> None:
        raise error

    in_trial(monkeypatch, 0, fail)
    with pytest.raises(type(error), match=str(error)):
        search.main(search_words(base, tmp_path / "search", "--n_trials", "2"))


def test_a_trial_that_is_behind_ends_early_unless_that_is_switched_off(base, tmp_path):
    space = "learning_rate: {low: 1e-9, high: 0.3, log: true}"
    words = ["--n_trials", "4"]
    search.main(search_words(base, tmp_path / "search", *words, space=space))
    trials = trials_of(tmp_path / "search")
    early = [trial for trial in trials if trial.state.name == "PRUNED"]
    assert early and all(list(trial.intermediate_values) == [2] for trial in early)
    for trial in early:
        before = [each.intermediate_values[2] for each in trials[: trial.number] if each.state.name == "COMPLETE"]
        assert len(before) >= 2 and trial.value > statistics.median(before)
    search.main(search_words(base, tmp_path / "whole", *words, "--no_stop_early", space=space))
    assert states_of(tmp_path / "whole") == ["COMPLETE"] * 4


def test_a_score_is_searched_for_its_highest_mean_of_several_sets_of_rows(base, tmp_path):
    words = search_words(
        base, tmp_path / "search", "--n_trials", "3", "--metric", "rouge-l", "--predict_with_generate"
    )
    rows = (tmp_path / "rows.json").read_text(encoding="utf-8").splitlines()
    for name, part in {"easy": rows[:5], "hard": rows[5:]}.items():
        (tmp_path / f"{name}.json").write_text("\n".join(part), encoding="utf-8")
    files = f"easy={tmp_path / 'easy.json'},hard={tmp_path / 'hard.json'}"
    search.main([*words, "--validation_file", files])
    best = best_of(tmp_path / "search", max)
    scores = [best.user_attrs[f"eval_{name}_rouge-l"] for name in ("easy", "hard")]
    assert best.value == statistics.fmean(scores) and scores[0] != scores[1]
    assert list(best.intermediate_values) == [2, 4]
    results = train_best(tmp_path / "search")
    assert [results[f"eval_{name}_rouge-l"] for name in ("easy", "hard")] == scores


def test_checkpoints_are_kept_only_if_asked_and_the_best_one_of_a_trial_counts(base, tmp_path):
    more = ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "2", "--no_stop_early"]
    space = "learning_rate: [0.5, 5.0]"
    search.main(search_words(base, tmp_path / "search", *more, "--n_trials", "2", space=space))
    assert not list((tmp_path / "search").rglob("checkpoint-*"))
    for trial in trials_of(tmp_path / "search"):
        assert trial.value == min(trial.intermediate_values.values())
    assert train_best(tmp_path / "search")["eval_loss"] == best_of(tmp_path / "search").value
    search.main(search_words(base, tmp_path / "kept", *more, "--n_trials", "1", "--keep_checkpoints", space=space))
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("checkpoint-*"))
    assert kept == ["trials/0/checkpoint-2", "trials/0/checkpoint-4"]


def test_lengths_may_be_searched_and_rows_are_encoded_for_each(base, tmp_path):
    space = "max_source_length: [8, 64]\nsource_prefix: [null, 写广告：]"
    search.main(search_words(base, tmp_path / "search", "--n_trials", "3", space=space, steps=FEW_STEPS))
    found = {json.dumps(trial.params): trial.value for trial in trials_of(tmp_path / "search")}
    assert len(set(found.values())) == len(found) >= 2
    assert train_best(tmp_path / "search")["eval_loss"] == min(found.values())


def test_methods_may_be_searched_and_each_has_its_own_arguments(base, tmp_path):
    space = "peft_type: [prefix_tuning, lora, none]\nnum_virtual_tokens: [2]\nlora_rank: [2, 4]"
    more = ["--n_trials", "4", "--random_trials", "4", "--sampler_seed", "3"]
    words = search_words(base, tmp_path / "search", *more, space=space, steps=FEW_STEPS)
    at = words.index("--learning_rate")
    search.main([*words[:at], *words[at + 2 :]])
    trials = trials_of(tmp_path / "search")
    names = {trial.params["peft_type"]: set(trial.params) - {"peft_type"} for trial in trials}
    assert names == {"prefix_tuning": {"num_virtual_tokens"}, "lora": {"lora_rank"}, "none": set()}
    equal: dict[str, set[float]] = {}
    for trial in trials:
        equal.setdefault(json.dumps(trial.params), set()).add(trial.value)
    assert len(equal) < len(trials) and all(
        len(values) == 1 for values in equal.values()
    )  # no trial left anything on the base
    assert train_best(tmp_path / "search")["eval_loss"] == best_of(tmp_path / "search").value


def hooks_of(model: torch.nn.Module) -> list[object]:
    """What runs before and after the modules of a model."""
    modules = list(model.modules())
    return [hook for each in modules for hook in (*each._forward_pre_hooks.values(), *each._forward_hooks.values())]


@pytest.mark.parametrize("bits", ["0", "4", "8"])
def test_trials_share_the_weights_of_the_base_and_leave_it_as_it_was(base, tmp_path, bits):
    words = training_words(
        base, tmp_path / "run", "--max_steps", "2", "--eval_strategy", "no", "--quantization_bit", bits
    )
    settings = {word[2:]: [words[number + 1]] for number, word in enumerate(words[:-1]) if word.startswith("--")}
    arguments = parse_trial(settings, tmp_path / "trial")
    config = load_config(arguments.model)
    bench = Workbench(resolve_trial(arguments, config))
    before = {name: value.clone() for name, value in bench.model.state_dict().items()}
    hooks = hooks_of(bench.model)
    losses = []
    for _ in range(2):
        trainer = bench.make_trainer(resolve_trial(parse_trial(settings, tmp_path / "trial"), config))
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    copied = dict(share_weights(bench.model).named_parameters())
    assert all(copied[name] is value for name, value in bench.model.named_parameters())
    assert hooks_of(bench.model) == hooks
    if bits != "8":  # bitsandbytes lays 8-bit numbers out anew in the first call
        assert all(torch.equal(value, before[name]) for name, value in bench.model.state_dict().items())


def test_a_search_without_optuna_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    assert "`pip install -e '.[search]'` installs it" in refusal(["--space", "space.yaml"], capsys)


def test_a_search_in_several_processes_is_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda arguments: 2))
    assert "A search runs in one process without DeepSpeed or FSDP, and this is one of 2" in refusal(
        search_words(base, tmp_path / "s"), capsys
    )
