"""`python -m glm_peft.search`, typed: what it leaves, that it goes on, and that its best trial is a training run."""

import csv
import gc
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from short_runs import PROJECT, run, training_words

from glm_peft import search
from glm_peft.adapters import assembly
from glm_peft.arguments.training import TrainingArguments
from glm_peft.models.loading import load_config
from glm_peft.trials import trial as search_trial
from glm_peft.trials.study import hold_folder
from glm_peft.trials.trial import TrialTrainer, Workbench, parse_trial, settle_trial, share_weights

SPACE = """\
learning_rate: {low: 1e-4, high: 1, log: true}
num_virtual_tokens: [2, 4]
prefix_dropout: {low: 0, high: 0.3, step: 0.1}
prefix_projection: [true, false]
"""
STEPS = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2"]
TRIALS = 4


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    """Stock collects garbage after every trial: here among all that the libraries ever made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture takes longer than trials of a tiny model; that of the fixture `whole` is drawn."""
    monkeypatch.setattr(search, "plot_search", lambda *args: None)


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


def search_words(base: Path, folder: Path, *more: str, space: str = SPACE, steps: list[str] = STEPS) -> list[str]:
    """The words of a command that searches with short runs; `--seed` and the like may follow."""
    words = training_words(base, folder, *steps)
    at = words.index("--num_virtual_tokens")
    (folder.parent / "space.yaml").write_text(space, encoding="utf-8")
    return [*words[:at], *words[at + 2 :], "--space", str(folder.parent / "space.yaml"), "--random_trials", "2", *more]


def trials_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "trials.json").read_text(encoding="utf-8"))["trials"]


def without_times(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What does not differ between two searches, of the trials that count."""
    kept = ("state", "value", "values", "evaluations", "metrics", "reason")
    return [{name: trial[name] for name in kept} for trial in trials if trial["state"] != "stopped"]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "search"
    search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    return folder


def test_a_search_leaves_its_files_and_no_checkpoint(whole):
    files = {path.name for path in whole.iterdir() if not path.name.startswith(".")}
    assert files == {"best.yaml", "search.db", "search.png", "trials.csv", "trials.json"}
    assert (whole / "search.png").read_bytes()[:4] == b"\x89PNG"


def test_every_trial_is_recorded_with_values_of_the_space(whole):
    trials = trials_of(whole)
    assert [trial["trial"] for trial in trials] == list(range(TRIALS))
    assert len({json.dumps(trial["values"]) for trial in trials}) == TRIALS
    for trial in trials:
        values = trial["values"]
        assert 1e-4 <= values["learning_rate"] <= 1 and values["num_virtual_tokens"] in (2, 4)
        assert values["prefix_projection"] in (True, False) and 0 <= values["prefix_dropout"] <= 0.3
        last = list(trial["evaluations"])[-1]
        assert last == "4" if trial["state"] == "complete" else trial["state"] == "ended early"
        assert trial["value"] == trial["evaluations"][last]


def test_the_table_of_trials_has_the_numbers_of_the_json(whole):
    with (whole / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, trial in zip(rows, trials_of(whole), strict=True):
        assert (int(row["trial"]), row["state"], float(row["eval_loss"])) == tuple(
            trial[name] for name in ("trial", "state", "value")
        )
        assert {name: json.loads(row[name]) for name in trial["values"]} == trial["values"]


def best_of(folder: Path, better: Callable = min) -> dict[str, Any]:
    return better(
        (trial for trial in trials_of(folder) if trial["state"] == "complete"), key=lambda each: each["value"]
    )


def train_best(folder: Path) -> dict[str, Any]:
    """The results of training by `best.yaml`."""
    run([str(folder / "best.yaml")])
    return json.loads((folder / "best" / "all_results.json").read_text(encoding="utf-8"))


def test_training_by_the_best_configuration_gives_the_loss_of_the_trial(whole):
    best = best_of(whole)
    assert (whole / "best.yaml").read_text(encoding="utf-8").startswith(f"# Trial {best['trial']} of a search")
    assert train_best(whole)["eval_loss"] == best["value"]
    assert (whole / "best" / "adapter_model.safetensors").is_file()


def test_the_same_seed_tries_the_same_values_and_another_one_others(base, whole, tmp_path):
    search.main(search_words(base, tmp_path / "again", "--n_trials", "3"))
    assert without_times(trials_of(tmp_path / "again")) == without_times(trials_of(whole))[:3]
    search.main(search_words(base, tmp_path / "other", "--n_trials", "1", "--sampler_seed", "1"))
    assert trials_of(tmp_path / "other")[0]["values"] != trials_of(whole)[0]["values"]


def test_a_search_goes_on_to_as_many_trials_in_all_and_loads_nothing_when_it_is_done(
    base, whole, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "search"
    search.main(search_words(base, folder, "--n_trials", "2"))
    search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    assert without_times(trials_of(folder)) == without_times(trials_of(whole))
    (folder / "best.yaml").unlink()
    monkeypatch.setattr(search, "Workbench", None)
    capsys.readouterr()
    search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    assert (folder / "best.yaml").is_file() and f"{TRIALS} trials, the best first" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_with_what_is_known_and_the_trial_is_done_again(
    base, whole, tmp_path, monkeypatch, capfd, number, code
):
    folder, former = tmp_path / "search", signal.signal(signal.SIGINT, signal.default_int_handler)
    step = TrialTrainer.training_step

    def signalled(trainer: TrialTrainer, *args: Any) -> torch.Tensor:
        if Path(trainer.args.output_dir).name == "2" and trainer.state.global_step == 1:
            os.kill(os.getpid(), number)
        return step(trainer, *args)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(TrialTrainer, "training_step", signalled)
        search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    signal.signal(signal.SIGINT, former)
    captured = capfd.readouterr()
    assert end.value.code == code and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert captured.err.splitlines()[-1].startswith(f"stopped: 2 of {TRIALS} trials are in {folder}; the same command")
    assert "2 trials, the best first" in captured.out
    assert [trial["state"] for trial in trials_of(folder)] == ["complete", "complete", "stopped"]
    assert not list(folder.glob("trials/*"))
    search.main(search_words(base, folder, "--n_trials", str(TRIALS)))
    assert without_times(trials_of(folder)) == without_times(trials_of(whole))


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    return subprocess.Popen(
        [sys.executable, "-m", "glm_peft.search", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def read_database(folder: Path, query: str) -> list[Any]:
    """The first column of what a search's file holds, while another process may write it."""
    try:
        with sqlite3.connect(f"file:{folder / 'search.db'}?mode=ro", uri=True, timeout=10) as database:
            return [row[0] for row in database.execute(query)]
    except sqlite3.OperationalError:
        return []


def states_of(folder: Path) -> list[str]:
    """Optuna's words for the trials."""
    return read_database(folder, "SELECT state FROM trials ORDER BY number")


def test_a_killed_trial_is_not_counted_and_does_not_stay_running(base, tmp_path):
    folder = tmp_path / "search"
    words = search_words(base, folder, "--n_trials", "3", steps=["--max_steps", "60"])
    process = start(words)
    try:
        drawn = "SELECT param_name FROM trial_params"
        while len(read_database(folder, drawn)) < 2 * SPACE.count("\n") and process.poll() is None:
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    assert states_of(folder) == ["COMPLETE", "RUNNING"]
    search.main(words)
    assert [trial["state"] for trial in trials_of(folder)] == ["complete", "stopped", "complete", "complete"]
    assert trials_of(folder)[1]["values"] == trials_of(folder)[2]["values"]
    assert "RUNNING" not in states_of(folder)


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
    assert "is of another search, with num_virtual_tokens in the space [2, 4] where this one has [2, 8]" in said
    said = refusal(search_words(base, whole, "--n_trials", "9", "--weight_decay", "0.1"), capsys)
    assert 'with --weight_decay not given where this one has "0.1"' in said
    said = refusal(search_words(base, whole, "--n_trials", "9", "--sampler_seed", "7"), capsys)
    assert "with --sampler_seed 0 where this one has 7" in said
    assert states_of(whole) == before
    search_words(base, whole)  # the space is as it was


def test_rows_that_changed_make_another_search(base, tmp_path, capsys):
    words = search_words(base, tmp_path / "search", "--n_trials", "1")
    search.main(words)
    rows = tmp_path / "rows.json"
    rows.write_text(rows.read_text(encoding="utf-8").replace("裤", "裙"), encoding="utf-8")
    assert "with train rows of sha256" in refusal(words, capsys)


def test_a_search_that_tried_nothing_yet_may_still_change(base, tmp_path, capsys):
    words = search_words(base, tmp_path / "search", "--n_trials", "1")
    rows = (tmp_path / "rows.json").read_text(encoding="utf-8")
    (tmp_path / "rows.json").write_text(rows.replace("summary", "summry"), encoding="utf-8")
    assert "summary" in refusal(words, capsys)
    (tmp_path / "rows.json").write_text(rows, encoding="utf-8")
    search.main([*words, "--weight_decay", "0.1"])
    assert len(trials_of(tmp_path / "search")) == 1


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


def test_a_trial_whose_loss_is_not_finite_fails_and_the_search_goes_on(base, tmp_path, capsys):
    space = "learning_rate: [1e30, 0.1]\nweight_decay: [0.0, 0.1]"
    search.main(search_words(base, tmp_path / "search", "--n_trials", "4", "--max_grad_norm", "0", space=space))
    trials = trials_of(tmp_path / "search")
    ends = {(trial["values"]["learning_rate"], trial["state"]) for trial in trials}
    assert ends == {(1e30, "failed"), (0.1, "complete")}
    reasons = [trial["reason"] for trial in trials if trial["state"] == "failed"]
    assert reasons and all("is not finite" in reason for reason in reasons)
    assert f"failed: {reasons[0]}" in capsys.readouterr().out
    search.main(search_words(base, tmp_path / "search", "--n_trials", "4", "--max_grad_norm", "0", space=space))
    assert trials_of(tmp_path / "search") == trials  # failed trials count


def test_where_every_trial_fails_the_search_says_so(base, tmp_path, capsys):
    words = search_words(
        base, tmp_path / "search", "--n_trials", "2", "--max_grad_norm", "0", space="learning_rate: [1e30]"
    )
    assert "None of 2 trials came to its end, for the reasons above" in refusal(words, capsys)
    assert not (tmp_path / "search" / "best.yaml").exists()


def failing_trial(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """The first trial ends with this error."""
    step = TrialTrainer.training_step

    def failing(trainer: TrialTrainer, *args: Any) -> torch.Tensor:
        if Path(trainer.args.output_dir).name == "0":
            raise error
        return step(trainer, *args)

    patch.setattr(TrialTrainer, "training_step", failing)


def test_a_trial_that_lacks_memory_fails_and_the_search_goes_on(base, tmp_path, monkeypatch):
    failing_trial(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    search.main(search_words(base, tmp_path / "search", "--n_trials", "2"))
    trials = trials_of(tmp_path / "search")
    assert [(trial["state"], trial["reason"]) for trial in trials] == [("failed", "out of memory"), ("complete", None)]


def test_an_error_of_this_program_is_no_failed_trial(base, tmp_path, monkeypatch):
    failing_trial(monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        search.main(search_words(base, tmp_path / "search", "--n_trials", "2"))
    failing_trial(monkeypatch, ValueError("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        search.main(search_words(base, tmp_path / "search", "--n_trials", "2"))


def test_a_trial_that_is_behind_ends_early_unless_that_is_switched_off(base, tmp_path):
    space = "learning_rate: [0.3, 1e-9]\nadam_beta1: {low: 0.8, high: 0.9}"
    words = search_words(base, tmp_path / "search", "--n_trials", "7", "--sampler_seed", "3", space=space)
    search.main(words)
    trials = trials_of(tmp_path / "search")
    early = [trial for trial in trials if trial["state"] == "ended early"]
    assert early and all(list(trial["evaluations"]) == ["2"] for trial in early)
    for trial in early:
        before = [each["evaluations"]["2"] for each in trials[: trial["trial"]] if each["state"] == "complete"]
        assert len(before) >= 2 and trial["value"] > statistics.median(before)
    search.main(
        [word.replace(str(tmp_path / "search"), str(tmp_path / "whole")) for word in words] + ["--no_stop_early"]
    )
    assert {trial["state"] for trial in trials_of(tmp_path / "whole")} == {"complete"}


def test_a_score_is_searched_for_its_highest_value(base, tmp_path):
    words = search_words(
        base, tmp_path / "search", "--n_trials", "3", "--metric", "rouge-l", "--predict_with_generate"
    )
    search.main([*words, "--no_stop_early"])
    best = best_of(tmp_path / "search", max)
    assert train_best(tmp_path / "search")["eval_rouge-l"] == best["value"] == best["metrics"]["eval_rouge-l"]


def test_several_sets_of_rows_are_judged_by_their_mean(base, tmp_path):
    words = search_words(base, tmp_path / "search", "--n_trials", "2", "--no_stop_early")
    rows = (tmp_path / "rows.json").read_text(encoding="utf-8").splitlines()
    for name, part in {"easy": rows[:5], "hard": rows[5:]}.items():
        (tmp_path / f"{name}.json").write_text("\n".join(part), encoding="utf-8")
    files = f"easy={tmp_path / 'easy.json'},hard={tmp_path / 'hard.json'}"
    search.main([*words, "--validation_file", files])
    best = best_of(tmp_path / "search")
    losses = [best["metrics"][f"eval_{name}_loss"] for name in ("easy", "hard")]
    assert best["value"] == statistics.fmean(losses) and losses[0] != losses[1]
    results = train_best(tmp_path / "search")
    assert [results[f"eval_{name}_loss"] for name in ("easy", "hard")] == losses


def test_checkpoints_are_kept_only_if_asked_and_the_best_one_of_a_trial_counts(base, tmp_path):
    more = ["--load_best_model_at_end", "--save_strategy", "steps", "--save_steps", "2", "--n_trials", "2"]
    space = "learning_rate: [0.5, 5.0]"
    words = search_words(base, tmp_path / "search", *more, "--no_stop_early", space=space)
    search.main(words)
    assert not list((tmp_path / "search").rglob("checkpoint-*"))
    for trial in trials_of(tmp_path / "search"):
        assert trial["value"] == min(trial["evaluations"].values())
    assert train_best(tmp_path / "search")["eval_loss"] == best_of(tmp_path / "search")["value"]
    search.main(
        [word.replace(str(tmp_path / "search"), str(tmp_path / "kept")) for word in words] + ["--keep_checkpoints"]
    )
    kept = sorted(path.relative_to(tmp_path / "kept").as_posix() for path in (tmp_path / "kept").rglob("checkpoint-*"))
    assert kept == [f"trials/{trial}/checkpoint-{step}" for trial in (0, 1) for step in (2, 4)]


def test_the_base_is_loaded_once_and_the_rows_are_encoded_once(base, tmp_path, monkeypatch):
    calls: list[str] = []

    def count(module: ModuleType, name: str) -> None:
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1])

    count(assembly, "load_base_model")
    count(search_trial, "encode_splits")
    search.main(search_words(base, tmp_path / "search", "--n_trials", "3"))
    assert sorted(calls) == ["encode_splits", "load_base_model"]


def test_lengths_may_be_searched_and_rows_are_encoded_for_each(base, tmp_path):
    space = "max_source_length: [8, 64]\nsource_prefix: [null, 写广告：]"
    search.main(search_words(base, tmp_path / "search", "--n_trials", "4", space=space))
    found = {json.dumps(trial["values"]): trial["value"] for trial in trials_of(tmp_path / "search")}
    assert len(set(found.values())) == len(found) >= 2
    assert train_best(tmp_path / "search")["eval_loss"] == min(found.values())


def test_methods_may_be_searched_and_each_has_its_own_arguments(base, tmp_path):
    space = "peft_type: [prefix_tuning, lora, none]\nnum_virtual_tokens: [2]\nlora_rank: [2, 4]"
    words = search_words(base, tmp_path / "search", "--n_trials", "8", "--random_trials", "8", space=space)
    at = words.index("--learning_rate")
    search.main([*words[:at], *words[at + 2 :]])
    trials = trials_of(tmp_path / "search")
    names = {trial["values"]["peft_type"]: set(trial["values"]) - {"peft_type"} for trial in trials}
    assert names == {"prefix_tuning": {"num_virtual_tokens"}, "lora": {"lora_rank"}, "none": set()}
    equal: dict[str, set[float]] = {}
    for trial in trials:
        equal.setdefault(json.dumps(trial["values"]), set()).add(trial["value"])
    assert all(len(values) == 1 for values in equal.values())  # no trial left anything on the base
    assert train_best(tmp_path / "search")["eval_loss"] == best_of(tmp_path / "search")["value"]


@pytest.mark.parametrize("bits", ["0", "4", "8"])
def test_trials_share_the_weights_of_the_base_and_leave_it_as_it_was(base, tmp_path, bits):
    words = training_words(
        base, tmp_path / "run", "--max_steps", "2", "--eval_strategy", "no", "--quantization_bit", bits
    )
    settings = {word[2:]: [words[number + 1]] for number, word in enumerate(words[:-1]) if word.startswith("--")}
    arguments = parse_trial(settings, tmp_path / "trial")
    config = load_config(arguments.model)
    bench = Workbench(settle_trial(arguments, config))
    before = {name: value.clone() for name, value in bench.base.state_dict().items()}
    losses = []
    for _ in range(2):
        trainer = bench.make_trainer(settle_trial(parse_trial(settings, tmp_path / "trial"), config))
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    copied = dict(share_weights(bench.base).named_parameters())
    assert all(copied[name] is value for name, value in bench.base.named_parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in bench.base.modules())
    if bits != "8":  # bitsandbytes lays 8-bit numbers out anew in the first call
        assert all(torch.equal(value, before[name]) for name, value in bench.base.state_dict().items())


def test_a_search_without_optuna_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(search, "find_spec", lambda name: None)
    assert "`pip install -e '.[search]'` installs it" in refusal(["--space", "space.yaml"], capsys)


def test_a_search_in_several_processes_is_refused(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda arguments: 2))
    assert "A search runs in one process without DeepSpeed or FSDP, and this is one of 2" in refusal(
        search_words(base, tmp_path / "s"), capsys
    )
