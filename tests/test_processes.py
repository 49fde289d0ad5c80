"""Several real processes do what one does, and end together when one of them does."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from closeness import ROUNDING
from fail_in_one import SIGN
from launches import (
    CONFIGS,
    TRAIN,
    TRAINING,
    end,
    kill,
    launch,
    make_adapter,
    make_rows,
    on_two_machines,
    read_lines,
    run_commands,
    run_launch,
)
from safetensors.torch import load_file

from glm_peft import predict
from glm_peft.prediction.prediction_files import partial_files
from glm_peft.reporting.file_names import PREDICTIONS_NAME
from glm_peft.training.checkpoints import find_fault

TESTS = Path(__file__).parent
SIZES = (1, 5, 7, 100)
SEVERAL = (2, 3)
MINUTE = 60  # seconds that the others may take to end
TIMES = re.compile("runtime|per_second|preparation_time")


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter"))


# Evaluation and prediction


@pytest.fixture(scope="module")
def runs(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of evaluations and predictions of all sizes, by the number of processes, which each tells itself."""
    folders = {}
    for processes in (1, *SEVERAL):
        folder = folders[processes] = tmp_path_factory.mktemp(f"processes_{processes}")
        for size in SIZES:
            make_rows(folder / f"rows_{size}.json", size)
        words = [str(base), str(adapter), str(folder), *map(str, SIZES)]
        run_launch(folder / "log", TESTS / "run_sizes.py", words, "--num_processes", str(processes))
        said = [json.loads(file.read_text()) for file in folder.glob("process_*.json")]
        assert said == [{"processes": processes, "group": processes}] * processes
    return folders


@pytest.mark.parametrize("processes", (1, *SEVERAL))
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", ["train", "predict", "drawn"])
def test_every_example_is_answered_once_in_order_and_as_by_one_process(runs, task, size, processes):
    lines = read_lines(runs[processes] / str(size) / task / PREDICTIONS_NAME)
    rows = read_lines(runs[processes] / f"rows_{size}.json")
    assert [(line["prompt"], line["labels"]) for line in lines] == [(row["content"], row["summary"]) for row in rows]
    assert lines == read_lines(runs[1] / str(size) / task / PREDICTIONS_NAME)
    assert len({line["predict"] for line in lines}) > size // 2


@pytest.mark.parametrize("processes", SEVERAL)
@pytest.mark.parametrize("size", SIZES)
def test_scores_and_the_loss_are_those_of_one_process(runs, size, processes):
    found, expected = (
        json.loads((runs[number] / str(size) / "train" / "all_results.json").read_text()) for number in (processes, 1)
    )
    assert found.keys() == expected.keys()
    assert {"eval_loss", "eval_rouge-l", "predict_rouge-l", "predict_bleu-4"} <= found.keys()
    names = [name for name in expected if not TIMES.search(name)]
    texts = [name for name in names if not isinstance(expected[name], int | float)]
    assert [found[name] for name in texts] == [expected[name] for name in texts]
    numbers = [name for name in names if name not in texts]
    close = pytest.approx([expected[name] for name in numbers], rel=ROUNDING)
    assert [found[name] for name in numbers] == close


# Processes that end


def end_within_a_minute(process: subprocess.Popen, log: Path) -> list[str]:
    """What a launch says, in lines, from the moment on in which one of its processes ends."""
    try:
        while process.poll() is None and SIGN not in log.read_text():
            time.sleep(0.1)
        code, said = end(process, log, MINUTE)
    finally:
        kill(process)
    assert code == 1
    return said.split(SIGN, 1)[-1].splitlines()


@pytest.mark.parametrize(
    ("way", "ranks", "first", "told"),
    [
        ("train kill", "1", "error: Another process of this run has ended without a word", "SIGKILL"),
        ("train crash", "1", "[rank1]: Traceback", "[rank1]: ZeroDivisionError: made up"),
        ("train refuse", "1", "error: Row 3 is made up: leave it out.", "exitcode  : 2"),
        ("train refuse", "0,1", "error: Row 3 is made up: leave it out.", "exitcode  : 2"),
        ("evaluate kill", "1", "error: Another process of this run has ended without a word", "SIGKILL"),
        ("evaluate refuse", "0", "error: Row 3 is made up: leave it out.", "exitcode  : 2"),
    ],
)
def test_a_process_that_ends_ends_all_with_its_error_first_and_once(base, tmp_path, way, ranks, first, told):
    rows = str(make_rows(tmp_path / "rows.json", 12))
    words = ["--model_name_or_path", str(base), "--train_file", rows, "--output_dir", str(tmp_path / "out")]
    words += [*TRAINING.split(), "--max_steps", "9", "--save_steps", "2"]
    words += ["--validation_file", rows, "--eval_strategy", "steps", "--eval_steps", "3", "--do_eval"]
    words += ["--predict_with_generate", "--max_new_tokens", "4"]
    process = launch(tmp_path / "log", TESTS / "fail_in_one.py", [*way.split(), ranks, *words])
    lines = end_within_a_minute(process, tmp_path / "log")
    assert_told_once(lines, first)
    assert any(told in line for line in lines)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    assert find_fault(tmp_path / "out" / "checkpoint-2") is None


def assert_told_once(lines: list[str], first: str) -> None:
    errors = [line for line in lines if re.match(r"error: |then process|(\[rank\d\]: )?Traceback", line)]
    assert errors[0].startswith(first)
    assert errors[1:] == ["Traceback (most recent call last):"]  # the launcher's, with the report


def prediction(base: Path, adapter: Path, rows: Path, output_dir: Path, *more: str) -> list[str]:
    words = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter), "--test_file", str(rows)]
    words += ["--max_new_tokens", "6", "--per_device_eval_batch_size", "2", "--output_dir", str(output_dir)]
    return [*words, *more]


def kept_rows(output_dir: Path) -> list[int]:
    """Those that two processes had answered when one of them was killed after its first batch."""
    kept = [line["row"] for file in partial_files(output_dir) for line in read_lines(file)[1:]]
    assert len(partial_files(output_dir)) == 2
    assert len(set(kept)) == len(kept) >= 4
    assert not (output_dir / PREDICTIONS_NAME).exists()
    return kept


def predict_here(monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    """In this process."""
    monkeypatch.setattr(sys, "argv", ["predict", *words])
    predict.main()


def test_what_was_answered_when_a_process_was_killed_is_kept_for_any_number_of_them(
    base, adapter, tmp_path, monkeypatch
):
    rows, out = make_rows(tmp_path / "rows.json", 14), tmp_path / "out"
    words = prediction(base, adapter, rows, out)
    process = launch(tmp_path / "log", TESTS / "fail_in_one.py", ["predict", "kill", "1", *words])
    assert "SIGKILL" in "".join(end_within_a_minute(process, tmp_path / "log"))
    kept = kept_rows(out)
    shutil.copytree(out, tmp_path / "by_one")
    predict_here(monkeypatch, prediction(base, adapter, rows, tmp_path / "whole"))
    predict_here(monkeypatch, prediction(base, adapter, rows, tmp_path / "by_one", "--resume"))
    run_launch(tmp_path / "log", "glm_peft.predict", [*words, "--resume"], "--num_processes", "3", knows="torch")
    for folder in (out, tmp_path / "by_one"):
        assert read_lines(folder / PREDICTIONS_NAME) == read_lines(tmp_path / "whole" / PREDICTIONS_NAME)
        assert sorted(file.name for file in folder.iterdir()) == [PREDICTIONS_NAME, "predict_results.json"]
        results = json.loads((folder / "predict_results.json").read_text())
        assert results["predict_resumed_samples"] == len(kept)


def test_what_train_py_had_answered_when_a_process_was_killed_is_kept(base, tmp_path):
    rows, out = str(make_rows(tmp_path / "rows.json", 14)), tmp_path / "out"
    words = ["--model_name_or_path", str(base), "--train_file", rows, "--test_file", rows, "--max_new_tokens", "6"]
    words += [*TRAINING.split(), "--learning_rate", "0.3", "--max_steps", "2", "--save_steps", "2", "--do_predict"]
    words += ["--per_device_eval_batch_size", "2", "--output_dir"]
    process = launch(tmp_path / "log", TESTS / "fail_in_one.py", ["do_predict", "kill", "1", *words, str(out)])
    lines = end_within_a_minute(process, tmp_path / "log")
    assert_told_once(lines, "error: Another process of this run has ended without a word")
    assert any("SIGKILL" in line for line in lines)
    kept = kept_rows(out)
    assert find_fault(out / "checkpoint-2") is None
    again = [[*words, str(out), "--resume_from_checkpoint", "last"], [*words, str(tmp_path / "whole")]]
    run_commands(tmp_path, again, CONFIGS / "multi_gpu.yaml")
    assert read_lines(out / PREDICTIONS_NAME) == read_lines(tmp_path / "whole" / PREDICTIONS_NAME)
    assert json.loads((out / "all_results.json").read_text())["predict_resumed_samples"] == len(kept)


# Resuming


def test_two_processes_go_on_in_the_second_epoch_with_the_very_order_of_the_unbroken_run(base, tmp_path):
    rows = str(make_rows(tmp_path / "rows.json", 14))  # four steps an epoch, the last with two examples
    words = ["--model_name_or_path", str(base), "--train_file", rows, *TRAINING.split(), "--max_steps", "12"]
    words += ["--train_sampling_strategy", "random", "--learning_rate", "0.1", "--logging_steps", "1"]
    run_launch(tmp_path / "log", TRAIN, [*words, "--save_steps", "6", "--output_dir", str(tmp_path / "whole")])
    words += ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-6"), "--save_steps", "12"]
    run_launch(tmp_path / "log", TRAIN, [*words, "--output_dir", str(tmp_path / "resumed")])
    whole, resumed = (tmp_path / name / "checkpoint-12" for name in ("whole", "resumed"))
    losses = [
        [entry["loss"] for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]]
        for folder in (whole, resumed)
    ]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 12
    weights = [load_file(folder / "adapter_model.safetensors")["prompt_embeddings"] for folder in (whole, resumed)]
    assert torch.equal(*weights)


# Two machines


def test_two_machines_train_what_two_processes_of_one_do(base, tmp_path):
    words = ["--model_name_or_path", str(base), "--train_file", str(make_rows(tmp_path / "rows.json", 12))]
    words += [*TRAINING.split(), "--learning_rate", "0.1", "--max_steps", "3", "--save_strategy", "no", "--output_dir"]
    run_launch(tmp_path / "log", TRAIN, [*words, str(tmp_path / "one")])
    first, other = on_two_machines(tmp_path, [*words, str(tmp_path / "two")])
    assert (first[0], other[0]) == (0, 0), first[1] + other[1]
    assert "2 process(es)" in first[1]
    names = [tmp_path / folder / "adapter_model.safetensors" for folder in ("one", "two")]
    one, two = (load_file(name)["prompt_embeddings"] for name in names)
    assert torch.equal(one, two)


@pytest.mark.parametrize("asked_for", ["last", "folder"])
def test_two_machines_that_would_go_on_from_different_steps_are_refused(base, tmp_path, asked_for):
    words = ["--model_name_or_path", str(base), "--train_file", str(make_rows(tmp_path / "rows.json", 12))]
    words += [*TRAINING.split(), "--save_steps", "2"]
    run_launch(tmp_path / "log", TRAIN, [*words, "--max_steps", "2", "--output_dir", str(tmp_path / "0")])
    own = [
        [*words, "--max_steps", "4", "--output_dir", str(tmp_path / machine), "--resume_from_checkpoint", given]
        for machine in "01"
        for given in ["last" if asked_for == "last" else str(tmp_path / machine / "checkpoint-2")]
    ]
    for code, said in on_two_machines(tmp_path, *own):
        assert code == 1
        errors = [line for line in said.splitlines() if line.startswith(("error: ", "then process"))]
        assert len(errors) == 1
        assert "process 0 found step 2 and process 1 no complete checkpoint" in errors[0]
    assert sorted(path.name for path in (tmp_path / "0").glob("checkpoint-*")) == ["checkpoint-2"]
