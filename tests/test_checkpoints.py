"""Runs that are killed, cut short, spoilt or out of room go on from what is whole, and end as if nothing had been."""

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from make_tiny_model import make_tiny_model
from short_runs import ROWS, assert_same_end, log_of, run, training_words

from glm_peft.adapters.trained_state import ENCODER_NAME
from glm_peft.arguments.training import parse_train_arguments
from glm_peft.errors import UserError
from glm_peft.provenance.stretches import check_same_rows
from glm_peft.training.checkpoints import (
    RECORD_NAME,
    UNFINISHED,
    choose_checkpoint,
    complete_checkpoints,
    explain_failed_writing,
    find_fault,
    publish_checkpoint,
    read_record,
    rotate_checkpoints,
)
from glm_peft.training.resumption import check_learning_rate
from glm_peft.training.trainer import PrefixTrainer

STEPS = ["--max_steps", "5", "--save_steps", "1"]
BY_LOSS = ["--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model", "loss"]
WORST_FIRST = [*BY_LOSS, "--greater_is_better", "true"]  # the loss falls, so that the first is the best


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A copy of this process has no threads but its own, and some processors round otherwise with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm2"]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    """The folder of a run that nothing stopped: with dropout, and losses that are logged between the checkpoints."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(training_words(base, folder, *STEPS, "--prefix_dropout", "0.3", "--save_total_limit", "3"))
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """A folder with the checkpoints 3, 4 and 5 of that run, and no adapter."""
    for checkpoint in complete_checkpoints(whole):
        shutil.copytree(checkpoint, tmp_path / "out" / checkpoint.name)
    return tmp_path / "out"


def resume(base: Path, folder: Path, *more: str) -> None:
    run(training_words(base, folder, *STEPS, "--prefix_dropout", "0.3", *more, "--resume_from_checkpoint", "last"))


# Bit for bit

GROUPED = "--train_sampling_strategy group_by_length --per_device_train_batch_size 2 --gradient_accumulation_steps 4"
EVALUATED = "--eval_strategy steps --eval_steps 2 --predict_with_generate --do_sample --full_determinism"


@pytest.mark.parametrize(
    ("generation", "more"),
    [
        ("chatglm", f"{GROUPED} --warmup_steps 2 --logging_steps 3"),
        ("glm4_0414", f"{EVALUATED} --prefix_projection --encoder_hidden_size 8"),
        ("chatglm2", "--streaming --shuffle_buffer_size 5 --dataloader_num_workers 2"),
        ("chatglm3", "--packing --max_length 100 --per_device_train_batch_size 2 --lr_scheduler_type cosine"),
    ],
)
def test_a_run_goes_on_to_the_same_end_from_the_middle_of_an_epoch(tiny_model_dirs, tmp_path, generation, more):
    words = ["--max_steps", "5", "--save_steps", "2", "--prefix_dropout", "0.3", *more.split()]
    run(training_words(tiny_model_dirs[generation], tmp_path / "whole", *words))
    for step in (2, 4):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        folder = tmp_path / f"from-{step}"
        run(training_words(tiny_model_dirs[generation], folder, *words, "--resume_from_checkpoint", checkpoint))
        assert_same_end(folder, tmp_path / "whole", "checkpoint-5")


def test_a_run_that_was_at_its_end_takes_no_further_step(base, whole, copy, caplog):
    """Five steps are no whole number of epochs."""
    resume(base, copy)
    assert_same_end(copy, whole, "checkpoint-5")
    assert not (copy / "checkpoint-6").exists()
    assert "All 5 steps of " in caplog.text and "none is taken now: raise --max_steps to train on." in caplog.text
    record = (copy / "provenance.json").read_bytes()
    (stretch,) = json.loads(record)["stretches"]
    assert (stretch["start"], stretch["steps"]) == ("new", [0, 5])
    assert "train_runtime" not in json.loads((copy / "all_results.json").read_text())
    resume(base, copy, "--max_grad_norm", "0.5")
    assert (copy / "provenance.json").read_bytes() == record


def test_another_learning_rate_is_refused_as_the_optimizer_goes_on_with_its_own(tmp_path):
    torch.save({"base_lrs": [0.1]}, tmp_path / "scheduler.pt")
    check_learning_rate(tmp_path, 0.1)
    with pytest.raises(UserError, match="--learning_rate 0.05 has no effect on .*, whose optimizer goes on with 0.1"):
        check_learning_rate(tmp_path, 0.05)


def test_other_rows_are_refused_with_the_way_out_and_the_same_in_another_form_are_not(base, copy, capfd, caplog):
    rows = json.dumps(ROWS[::-1], ensure_ascii=False)
    (copy.parent / "rows.json").write_text(rows, encoding="utf-8")
    with pytest.raises(SystemExit):
        resume(base, copy)
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "goes on with the rows that it was trained on, and these are others (12 of rows.json, sha256 " in error
    assert error.endswith(f"start on these from its adapter with --adapter_name_or_path {copy / 'checkpoint-5'}.")
    (copy.parent / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8")
    resume(base, copy, "--system_text", "短")
    assert "was trained with no --system_text, and this run goes on with --system_text '短'" in caplog.text


def test_rows_are_compared_as_far_as_an_earlier_version_recorded_them(tmp_path):
    def check(before: dict, now: dict) -> None:
        (tmp_path / "provenance.json").write_text(json.dumps({"data": {"train": before}}))
        check_same_rows(str(tmp_path), {"train": now})

    now = {"file": "b.json", "sha256": "2", "rows": 3, "rows_sha256": "3"}
    for before in ({}, {"sha256": "2", "rows": 3}, {"file": "a.json", "sha256": "1", "rows_sha256": "3"}):
        check(before, now)
    for before in ({"sha256": "1"}, {"sha256": "2", "rows": 2}, {"sha256": "2", "rows_sha256": "4"}):
        with pytest.raises(UserError, match="goes on with the rows"):
            check(before, now)


def test_a_resume_on_another_base_is_refused(tmp_path, copy, capfd):
    other = make_tiny_model(tmp_path / "other", "chatglm2", seed=1, hidden_size=32)
    with pytest.raises(SystemExit):
        resume(other, copy)
    assert "has other weights (such as" in capfd.readouterr().err


@contextmanager
def killed(at_event: int, folder: Path) -> Iterator[None]:
    """In this process: the end, without any warning, at a certain opening, moving or removing of a file below."""
    left = iter(range(at_event, -1, -1))

    def count(event: str, arguments: tuple) -> None:
        is_write = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") or (
            event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wa+x")
        )
        if is_write and str(arguments[0]).startswith(str(folder)) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)  # which nothing can take away again
    yield


def run_in_child(words: list[str], at_event: int, folder: Path) -> int:
    """The command in a copy of this process, which needs no imports; returns the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            with killed(at_event, folder):
                run(words)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("at_event", random.Random(5).sample(range(10, 90), 3))
def test_a_run_that_is_killed_at_a_write_ends_the_same(base, whole, tmp_path, at_event):
    words = training_words(base, tmp_path / "out", *STEPS, "--prefix_dropout", "0.3", "--save_total_limit", "1")
    assert run_in_child(words, at_event, tmp_path / "out") == -signal.SIGKILL
    run([*words, "--resume_from_checkpoint", "last"])
    assert_same_end(tmp_path / "out", whole, "checkpoint-5")
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-5"]


# Incomplete checkpoints


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def spoil(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, empty, spoil, Path.unlink])
def test_whatever_befalls_a_file_of_a_checkpoint_the_one_before_is_taken(copy, caplog, damage):
    files = [*read_record(copy / "checkpoint-5")["files"], RECORD_NAME]
    kept = shutil.copytree(copy / "checkpoint-5", copy.parent / "kept")
    assert {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", ENCODER_NAME} < set(files)
    for name in files:
        if (name, damage) == (RECORD_NAME, spoil):
            continue  # a changed time is a changed time
        shutil.copytree(kept, copy / "checkpoint-5", dirs_exist_ok=True)
        damage(copy / "checkpoint-5" / name)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "glm_peft"):
            assert choose_checkpoint("last", copy) == str(copy / "checkpoint-4")
        (message,) = caplog.messages
        assert message.startswith(f"{copy / 'checkpoint-5'} is incomplete (") and name in message
        assert message.endswith(f"going on from {copy / 'checkpoint-4'}")


def test_a_named_checkpoint_that_is_incomplete_is_refused(copy):
    cut(copy / "checkpoint-4" / "optimizer.pt")
    with pytest.raises(UserError, match=r"checkpoint-4 is no complete checkpoint \(optimizer.pt has \d+ of \d+ bytes"):
        choose_checkpoint(str(copy / "checkpoint-4"), copy)


def test_a_checkpoint_without_the_optimizer_is_not_gone_on_from(base, tmp_path):
    run(training_words(base, tmp_path / "out", "--max_steps", "1", "--save_only_model"))
    assert "--save_only_model" in find_fault(tmp_path / "out" / "checkpoint-1")


def test_the_newest_is_what_was_written_last_not_what_came_furthest(copy):
    """A shorter run was begun afresh in the folder of a longer one."""
    make_checkpoint(copy, 2)
    assert choose_checkpoint("last", copy) == str(copy / "checkpoint-2")


def make_checkpoint(output_dir: Path, step: int) -> None:
    folder = output_dir / UNFINISHED / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    publish_checkpoint(folder, processes=1, resumable=True)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_a_kill_left_between_two_moves_is_put_back(tmp_path):
    make_checkpoint(tmp_path, 1)
    aside = tmp_path / UNFINISHED / "former"
    aside.mkdir(parents=True)
    (tmp_path / "checkpoint-1").rename(aside / "checkpoint-1")
    assert choose_checkpoint("last", tmp_path) == str(tmp_path / "checkpoint-1")


@pytest.mark.parametrize(("limit", "kept"), [(None, {1, 2, 3, 4}), (1, {2, 4}), (2, {2, 4}), (3, {2, 3, 4})])
def test_the_newest_and_the_best_are_kept_and_incomplete_ones_not_counted(tmp_path, limit, kept):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-9").mkdir()
    rotate_checkpoints(tmp_path, limit, str(tmp_path / "checkpoint-2"))
    assert names(tmp_path) == {f"checkpoint-{step}" for step in kept | {9}}


# A full disk


def fill_disk(monkeypatch: pytest.MonkeyPatch, method: str, at_step: int) -> None:
    """In a method of the trainer, at a step, no file can grow beyond 300 bytes."""
    original = getattr(PrefixTrainer, method)

    def limited(trainer: PrefixTrainer, *args: object, **kwargs: object) -> object:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if trainer.state.global_step == at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            return original(trainer, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(PrefixTrainer, method, limited)


@pytest.mark.parametrize("method", ["_save", "_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_full_disk_ends_the_run_in_a_sentence_and_leaves_the_last_checkpoint(
    base, whole, tmp_path, monkeypatch, capfd, method
):
    words = training_words(base, tmp_path / "out", *STEPS, "--prefix_dropout", "0.3", "--save_total_limit", "1")
    with monkeypatch.context() as patch:
        fill_disk(patch, method, at_step=3)
        with pytest.raises(SystemExit) as end:
            run(words)
    assert end.value.code == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert f"The checkpoint of step 3 cannot be written to {tmp_path / 'out'} (" in error
    assert error.endswith(f"the last good checkpoint is {tmp_path / 'out' / 'checkpoint-2'}.")
    assert names(tmp_path / "out") == {"checkpoint-2"}
    run([*words, "--resume_from_checkpoint", "last"])
    assert_same_end(tmp_path / "out", whole, "checkpoint-5")


def test_a_file_where_the_checkpoints_go_is_told_in_a_sentence(base, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / UNFINISHED).write_text("in the way")
    with pytest.raises(SystemExit):
        run(training_words(base, tmp_path / "out", "--max_steps", "1"))
    assert "error: The checkpoint of step 1 cannot be written to" in capfd.readouterr().err


def test_errors_that_are_none_of_the_disk_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="^shapes differ$"), explain_failed_writing("It", tmp_path):
        raise RuntimeError("shapes differ")


# The best model and early stopping


@pytest.mark.parametrize("projection", ["false", "true"])
def test_a_run_stops_early_with_the_best_prefix(base, tmp_path, projection):
    words = ["--max_steps", "9", "--save_steps", "1", *WORST_FIRST, "--prefix_projection", projection]
    words += ["--early_stopping_patience", "2", "--load_best_model_at_end", "--save_total_limit", "2"]
    run(training_words(base, tmp_path / "out", *words))
    adapters = [tmp_path / "out" / name / "adapter_model.safetensors" for name in ("", "checkpoint-1", "checkpoint-3")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes() != adapters[2].read_bytes()
    assert {name for name in names(tmp_path / "out") if name.startswith("checkpoint")} == {
        "checkpoint-1",
        "checkpoint-3",
    }


def test_the_best_is_none_of_an_earlier_run_in_the_folder(base, copy, caplog):
    (copy / "checkpoint-3").rename(copy / "checkpoint-1")
    run(training_words(base, copy, "--max_steps", "2", "--save_steps", "2", *WORST_FIRST, "--load_best_model_at_end"))
    adapters = [folder / "adapter_model.safetensors" for folder in (copy, copy / "checkpoint-2")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert f"{copy} has what a run before left, and this one starts afresh: --resume_from" in caplog.text


def test_patience_and_the_best_outlive_a_stop_and_a_new_place(base, tmp_path):
    words = ["--max_steps", "9", "--save_steps", "1", *WORST_FIRST]
    words += ["--early_stopping_patience", "2", "--load_best_model_at_end"]
    run(training_words(base, tmp_path / "whole", *words))
    (tmp_path / "moved").mkdir()
    for step in (1, 2):
        (tmp_path / "whole" / f"checkpoint-{step}").rename(tmp_path / "moved" / f"checkpoint-{step}")
    run(training_words(base, tmp_path / "moved", *words, "--resume_from_checkpoint", "last"))
    assert_same_end(tmp_path / "moved", tmp_path / "whole", "checkpoint-3")
    assert not (tmp_path / "moved" / "checkpoint-4").exists()
    state = json.loads((tmp_path / "moved" / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / "checkpoint-1")


def test_patience_can_be_added_when_going_on(base, whole, copy):
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(copy / name)
    resume(base, copy, *BY_LOSS, "--early_stopping_patience", "9")
    losses = [[entry["loss"] for entry in log_of(run / "checkpoint-5") if "loss" in entry] for run in (copy, whole)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ("--early_stopping_patience 0 --eval_strategy epoch", "--early_stopping_patience must be 1 or more, found 0"),
        (
            "--early_stopping_patience 2",
            "--early_stopping_patience 2 counts evaluations during training, but there are",
        ),
        ("--early_stopping_threshold 0.1", "--early_stopping_threshold has no effect alone"),
        (
            "--early_stopping_patience 2 --eval_strategy epoch --metric_for_best_model rouge-l",
            "--metric_for_best_model rouge-l is a score of generated answers: give --predict_with_generate too",
        ),
    ],
)
def test_early_stopping_that_cannot_work_is_refused(base, tmp_path, more, expected):
    with pytest.raises(UserError, match=expected):
        parse_train_arguments(training_words(base, tmp_path / "out", *more.split()))


def test_a_score_that_is_not_there_is_named(base, tmp_path, capfd):
    more = "--max_steps 1 --eval_strategy steps --eval_steps 1 --metric_for_best_model rouge-x --predict_with_generate"
    with pytest.raises(SystemExit):
        run(training_words(base, tmp_path / "out", *more.split()))
    assert (
        "error: --metric_for_best_model rouge-x is no score of this evaluation: give one of loss"
        in capfd.readouterr().err
    )


def test_another_number_of_processes_is_said(base, copy, caplog):
    for checkpoint in complete_checkpoints(copy):
        record = json.loads((checkpoint / RECORD_NAME).read_text())
        (checkpoint / RECORD_NAME).write_text(json.dumps(record | {"processes": 2}))
    resume(base, copy)
    assert "was written by 2 process(es), and this run has 1" in caplog.text
