"""The files of a prediction run: the finished one, and the one that a stopped run goes on from."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_peft.errors import UserError
from glm_peft.prediction.prediction_files import (
    PARTIAL_NAME,
    PartialPredictions,
    check_resumable,
    keep_predictions,
    partial_files,
    write_predictions,
)
from glm_peft.reporting.files import make_output_dir, write_atomically

RUN = {"base": "base", "max_new_tokens": 8, "top_p": 0.7}


def stopped_run(folder: Path, run: dict[str, Any] | None = None) -> Path:
    """The file of a run that was stopped after two batches."""
    with PartialPredictions(folder, run or RUN, resume=False) as partial:
        partial.add([3, 1], ["third\nline", "第一\u2028"])
        partial.add([0], [""])
    return folder / PARTIAL_NAME


def test_predictions_are_one_object_a_line_in_order_with_null_for_no_reference(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ["问\n题", "b"], ["答案", None], ["好", ""], [{}, {"row": 3}])
    lines = path.read_bytes().decode().split("\n")
    assert lines[0] == '{"prompt": "问\\n题", "labels": "答案", "predict": "好"}'
    assert json.loads(lines[1]) == {"prompt": "b", "labels": None, "predict": "", "row": 3}
    assert lines[2:] == [""]


def test_a_file_that_cannot_be_finished_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_stopped_run_has_its_answers_again(tmp_path: Path) -> None:
    stopped_run(tmp_path)
    with PartialPredictions(tmp_path, RUN, resume=True) as partial:
        assert partial.answers == {3: "third\nline", 1: "第一\u2028", 0: ""}
        partial.add([2], ["second"])
    assert PartialPredictions(tmp_path, RUN, resume=True).answers[2] == "second"


@pytest.mark.parametrize("torn", [1, 7, 20])
def test_a_torn_last_line_is_dropped_and_written_over(
    tmp_path: Path, torn: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = stopped_run(tmp_path)
    path.write_bytes(path.read_bytes()[:-torn])
    with PartialPredictions(tmp_path, RUN, resume=True) as partial:
        assert partial.answers.keys() == {3, 1}
        partial.add([0], ["again"])
    assert "incomplete: their rows are answered again" in caplog.text
    assert PartialPredictions(tmp_path, RUN, resume=True).answers[0] == "again"
    assert [json.loads(line).get("row") for line in path.read_bytes().split(b"\n")[:-1]] == [None, 3, 1, 0]


def test_a_file_with_a_torn_first_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / PARTIAL_NAME).write_bytes(b'{"run": {"ba')
    with PartialPredictions(tmp_path, RUN, resume=True) as partial:
        assert partial.answers == {}
        partial.add([0], ["first"])
    assert PartialPredictions(tmp_path, RUN, resume=True).answers == {0: "first"}


def test_a_stopped_run_is_not_overwritten(tmp_path: Path) -> None:
    path = stopped_run(tmp_path)
    content = path.read_bytes()
    with pytest.raises(UserError, match="has the answers of a stopped run: add --resume to go on with it, or remove"):
        PartialPredictions(tmp_path, RUN, resume=False)
    assert path.read_bytes() == content


@pytest.mark.parametrize("changes", [{"max_new_tokens": 9}, {"adapter": "other"}])
def test_the_file_of_another_run_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = stopped_run(tmp_path)
    content = path.read_bytes()
    ((name, value),) = changes.items()
    with pytest.raises(
        UserError, match=rf"is of another run, with {name} {RUN.get(name)!r} where this one has {value!r}"
    ):
        PartialPredictions(tmp_path, RUN | changes, resume=True)
    assert path.read_bytes() == content


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / PARTIAL_NAME).write_text('{"other": 1}\n')
    with pytest.raises(UserError, match="is of another run, with base None where this one has 'base'"):
        PartialPredictions(tmp_path, RUN, resume=True)


def test_before_the_first_answer_and_after_the_last_there_is_no_file(tmp_path: Path) -> None:
    with PartialPredictions(tmp_path, RUN, resume=False) as partial:
        assert not list(tmp_path.iterdir())
        partial.add([0], ["only"])
        assert [file.name for file in tmp_path.iterdir()] == [PARTIAL_NAME]
        partial.remove()
    assert not list(tmp_path.iterdir())


def test_an_error_on_the_way_tells_what_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(KeyboardInterrupt),
        PartialPredictions(tmp_path, RUN, resume=False) as partial,
    ):
        partial.add([0, 1], ["a", "b"])
        raise KeyboardInterrupt
    assert f"Stopped: 2 answers are in {tmp_path / PARTIAL_NAME}; the same command with --resume" in caplog.text


def test_an_output_folder_that_is_a_file_or_in_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(UserError, match=rf"--output_dir {folder} cannot be written to \(.+\): give a folder"):
            make_output_dir(folder)
    assert make_output_dir(tmp_path / "new" / "folder").is_dir()
    assert not list((tmp_path / "new" / "folder").iterdir())


def as_process(patch: pytest.MonkeyPatch, number: int) -> None:
    """Lets this process be one of three, which are told apart by their number."""
    state = SimpleNamespace(process_index=number, wait_for_everyone=lambda: None)
    patch.setattr("glm_peft.prediction.prediction_files.PartialState", lambda: state)


def stopped_runs(folder: Path, patch: pytest.MonkeyPatch) -> list[Path]:
    """The files of three processes that were stopped."""
    for number in (2, 0, 1):
        as_process(patch, number)
        partial = PartialPredictions(folder, RUN, resume=True)
        partial.add([number, number + 3], [f"{number}", f"{number + 3}"])
    return partial_files(folder)


def test_each_process_has_a_file_and_any_number_of_them_goes_on_with_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = stopped_runs(tmp_path, monkeypatch)
    before = [file.read_bytes() for file in files]
    assert {file.name for file in files} == {PARTIAL_NAME, *(f"generated_predictions.partial.{n}.jsonl" for n in "12")}
    for number in (0, 4):
        as_process(monkeypatch, number)
        assert PartialPredictions(tmp_path, RUN, resume=True).answers == {row: f"{row}" for row in range(6)}
    with PartialPredictions(tmp_path, RUN, resume=True) as partial:
        partial.add([9], ["nine"])
        assert [file.read_bytes() for file in files] == before
        partial.remove()
    assert not list(tmp_path.iterdir())


def test_a_stopped_run_of_several_processes_is_not_overwritten(tmp_path: Path, monkeypatch) -> None:
    first = stopped_runs(tmp_path, monkeypatch)[-1]
    for file in partial_files(tmp_path):
        if file != first:
            file.unlink()
    with pytest.raises(UserError, match=rf"{first} has the answers of a stopped run: add --resume"):
        check_resumable(tmp_path, resume=False)


def test_an_error_in_one_of_several_processes_tells_where_the_answers_of_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = stopped_runs(tmp_path, monkeypatch)
    with pytest.raises(KeyboardInterrupt), PartialPredictions(tmp_path, RUN, resume=True):
        raise KeyboardInterrupt
    assert f"Stopped: answers are in {files[0]} and 2 more such files; the same command with" in caplog.text


def test_after_training_files_of_another_run_are_put_aside_and_those_of_this_one_are_kept(tmp_path: Path) -> None:
    path = stopped_run(tmp_path)
    other = path.with_name("generated_predictions.partial.1.jsonl")
    content = path.read_bytes().replace(b'"max_new_tokens": 8', b'"max_new_tokens": 9')
    other.write_bytes(content)
    with keep_predictions(tmp_path, RUN) as partial:
        assert partial.answers.keys() == {3, 1, 0}
    (left,) = tmp_path.iterdir()
    assert (left.name, left.read_bytes()) == ("generated_predictions.other_run.1.jsonl", content)
