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
from fail_in_one import SIGN
from launches import (
    LONGEST,
    PROJECT,
    TRAINING,
    free_port,
    launch,
    make_adapter,
    make_rows,
    read_lines,
    run_launch,
)
from safetensors.torch import load_file

from glm_peft import predict
from glm_peft.prediction.prediction_files import PREDICTIONS_NAME, partial_files
from glm_peft.training.checkpoints import find_fault

TESTS = Path(__file__).parent
TWO_MACHINES = PROJECT / "accelerate_configs" / "two_machines.yaml"
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
    assert {name: found[name] for name in names} == pytest.approx({name: expected[name] for name in names}, abs=1e-6)


# Processes that end


def end_within_a_minute(process: subprocess.Popen, log: Path) -> list[str]:
    """What a launch says, in lines, from the moment on in which one of its processes ends."""
    try:
        while process.poll() is None and SIGN not in log.read_text():
            time.sleep(0.1)
        assert process.wait(timeout=MINUTE) == 1
    finally:
        process.terminate()
    return log.read_text().split(SIGN, 1)[-1].splitlines()


@pytest.mark.parametrize(
    ("way", "ranks", "first", "told"),
    [
        ("kill", "1", "error: Another process of this run has ended without a word", "SIGKILL"),
        ("crash", "1", "[rank1]: Traceback", "[rank1]: ZeroDivisionError: made up"),
        ("refuse", "1", "error: Row 3 is made up: leave it out.", "exitcode  : 2"),
        ("refuse", "0,1", "error: Row 3 is made up: leave it out.", "exitcode  : 2"),
    ],
)
def test_a_process_that_ends_ends_all_with_its_error_first_and_once(base, tmp_path, way, ranks, first, told):
    rows = str(make_rows(tmp_path / "rows.json", 12))
    words = ["--model_name_or_path", str(base), "--train_file", rows, "--output_dir", str(tmp_path / "out")]
    words += [*TRAINING.split(), "--max_steps", "9", "--save_steps", "2"]
    process = launch(tmp_path / "log", TESTS / "fail_in_one.py", ["train", way, ranks, *words])
    lines = end_within_a_minute(process, tmp_path / "log")
    errors = [line for line in lines if re.match(r"error: |then process|(\[rank\d\]: )?Traceback", line)]
    assert errors[0].startswith(first)
    assert errors[1:] == ["Traceback (most recent call last):"]  # the launcher's, with the report
    assert any(told in line for line in lines)
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
    assert find_fault(tmp_path / "out" / "checkpoint-2") is None


def prediction(base: Path, adapter: Path, rows: Path, output_dir: Path, *more: str) -> list[str]:
    words = ["--model_name_or_path", str(base), "--adapter_name_or_path", str(adapter), "--test_file", str(rows)]
    words += ["--max_new_tokens", "6", "--per_device_eval_batch_size", "2", "--output_dir", str(output_dir)]
    return [*words, *more]


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
    kept = [line["row"] for file in partial_files(out) for line in read_lines(file)[1:]]
    assert len(partial_files(out)) == 2
    assert len(set(kept)) == len(kept) >= 4
    assert not (out / PREDICTIONS_NAME).exists()
    shutil.copytree(out, tmp_path / "by_one")
    predict_here(monkeypatch, prediction(base, adapter, rows, tmp_path / "whole"))
    predict_here(monkeypatch, prediction(base, adapter, rows, tmp_path / "by_one", "--resume"))
    run_launch(tmp_path / "log", "glm_peft.predict", [*words, "--resume"], "--num_processes", "3")
    for folder in (out, tmp_path / "by_one"):
        assert read_lines(folder / PREDICTIONS_NAME) == read_lines(tmp_path / "whole" / PREDICTIONS_NAME)
        assert sorted(file.name for file in folder.iterdir()) == [PREDICTIONS_NAME, "predict_results.json"]
        results = json.loads((folder / "predict_results.json").read_text())
        assert results["predict_resumed_samples"] == len(kept)


# Two machines


def test_two_machines_train_what_two_processes_of_one_do(base, tmp_path):
    words = ["--model_name_or_path", str(base), "--train_file", str(make_rows(tmp_path / "rows.json", 12))]
    words += [*TRAINING.split(), "--learning_rate", "0.1", "--max_steps", "3", "--save_strategy", "no", "--output_dir"]
    train = PROJECT / "glm_peft" / "train.py"
    run_launch(tmp_path / "log", train, [*words, str(tmp_path / "one")])
    port = str(free_port())
    options = ["--main_process_ip", "127.0.0.1", "--main_process_port", port, "--machine_rank"]
    other = launch(tmp_path / "other", train, [*words, str(tmp_path / "two")], *options, "1", config=TWO_MACHINES)
    try:
        said = run_launch(tmp_path / "log", train, [*words, str(tmp_path / "two")], *options, "0", config=TWO_MACHINES)
        assert other.wait(timeout=LONGEST) == 0, (tmp_path / "other").read_text()
    finally:
        other.terminate()
    assert "2 process(es)" in said
    names = [tmp_path / folder / "adapter_model.safetensors" for folder in ("one", "two")]
    one, two = (load_file(name)["prompt_embeddings"] for name in names)
    assert torch.equal(one, two)
