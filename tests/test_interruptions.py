"""Ctrl-C and SIGTERM: the step is finished, a checkpoint written and named; the run then goes on to the same end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from short_runs import PROJECT, assert_same_end, run, training_words
from warm_starts import warm_python

from glm_peft.__main__ import launch as launch_command
from glm_peft.__main__ import main
from glm_peft.provenance.stretches import can_be_repeated
from glm_peft.training.interruptions import Interruption, StoppedAtOnce
from glm_peft.training.trainer import PrefixTrainer

WORDS = ["--max_steps", "5", "--save_strategy", "steps", "--save_steps", "100", "--prefix_dropout", "0.3"]
SCORED = ["--eval_strategy", "steps", "--eval_steps", "2", "--predict_with_generate"]


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """Ctrl-C is heard, also where a shell runs these tests in the background and ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def base(tiny_model_dirs: dict[str, Path]) -> Path:
    return tiny_model_dirs["chatglm3"]


def signal_in(patch: pytest.MonkeyPatch, method: str, step: int, *numbers: int) -> None:
    """This process gets signals at the beginning of a method of the trainer, once that many steps are done."""
    original = getattr(PrefixTrainer, method)

    def signalled(trainer: PrefixTrainer, *args: object, **kwargs: object) -> object:
        if trainer.state.global_step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(trainer, *args, **kwargs)

    patch.setattr(PrefixTrainer, method, signalled)


def stopped_run(words: list[str], method: str, step: int, *numbers: int) -> int:
    """The exit code of a run that is stopped in this way."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        signal_in(patch, method, step, *numbers)
        run(words)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == [
        signal.default_int_handler,
        signal.SIG_DFL,
    ]
    return end.value.code


def last_line(capfd: pytest.CaptureFixture) -> str:
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("number", "exit_code", "more"), [(signal.SIGINT, 130, []), (signal.SIGTERM, 143, ["--save_strategy", "no"])]
)
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(base, tmp_path, capfd, number, exit_code, more):
    words = training_words(base, tmp_path / "out", *WORDS, *more)
    assert stopped_run(words, "training_step", 2, number) == exit_code
    line = last_line(capfd)
    assert f"stopped by {number.name} at step 3" in line
    assert line.endswith(str(tmp_path / "out" / "checkpoint-3"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-3", "training_curves.png"}


def test_a_run_that_was_stopped_goes_on_to_the_same_end(base, tmp_path):
    run(training_words(base, tmp_path / "whole", *WORDS))
    for step in (0, 2, 3):
        words = training_words(base, tmp_path / "out", *WORDS, "--resume_from_checkpoint", "last")
        assert stopped_run(words, "training_step", step, signal.SIGTERM) == 143
        assert (tmp_path / "out" / f"checkpoint-{step + 1}").is_dir()
    run(words)
    assert_same_end(tmp_path / "out", tmp_path / "whole", "checkpoint-5")
    record = json.loads((tmp_path / "out" / "provenance.json").read_text(encoding="utf-8"))
    assert [stretch["steps"] for stretch in record["stretches"]] == [[0, 1], [1, 3], [3, 4], [4, 5]]
    seconds = [stretch["seconds"] for stretch in record["stretches"]]
    assert record["measured"]["seconds"]["train"] == pytest.approx(sum(seconds)) and min(seconds) > 0
    assert can_be_repeated(record)


@pytest.mark.parametrize("where", ["_evaluate", "_determine_best_metric"])
def test_an_evaluation_is_given_up_and_done_when_the_run_goes_on(base, tmp_path, where):
    run(training_words(base, tmp_path / "whole", *WORDS, *SCORED))
    words = training_words(base, tmp_path / "out", *WORDS, *SCORED, "--resume_from_checkpoint", "last")
    for step in (2, 5):
        assert stopped_run(words, where, step, signal.SIGINT) == 130
    run(words)
    assert_same_end(tmp_path / "out", tmp_path / "whole", "checkpoint-5")


def test_an_evaluation_that_is_given_up_gives_no_answer_more(base, tmp_path, monkeypatch):
    """Here by a signal in the middle of its answers."""
    answered = []

    def answer(*args: object, **options: object) -> list[str]:
        os.kill(os.getpid(), signal.SIGTERM)
        answered.append(args)
        return []

    monkeypatch.setattr("glm_peft.prediction.evaluation.Answering.generate", answer)
    with pytest.raises(SystemExit):
        run(training_words(base, tmp_path / "out", *WORDS, *SCORED))
    assert answered == []
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_second_ctrl_c_stops_at_once(base, tmp_path):
    words = training_words(base, tmp_path / "out", *WORDS)
    assert stopped_run(words, "training_step", 1, signal.SIGINT, signal.SIGINT) == 130
    assert not list((tmp_path / "out").iterdir())


def test_a_second_sigterm_changes_nothing(base, tmp_path):
    words = training_words(base, tmp_path / "out", *WORDS)
    assert stopped_run(words, "training_step", 1, signal.SIGTERM, signal.SIGTERM) == 143
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_what_a_launcher_hands_on_is_no_second_ctrl_c():
    """And none of several processes acts on a signal before all know of it."""
    with Interruption(has_launcher=True, speaks=False) as interruption, interruption.stops_at_once():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (interruption.signal_number, interruption.is_due) == (signal.SIGINT, False)
        interruption.agree(signal.SIGTERM)
        assert (interruption.exit_code, interruption.name, interruption.is_due) == (143, "SIGTERM", True)
        with pytest.raises(StoppedAtOnce), interruption.stops_at_once():
            pass
        interruption.signal_number = 0  # acted on


def test_a_signal_that_nothing_acted_on_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Interruption(has_launcher=False, speaks=False):
        os.kill(os.getpid(), signal.SIGINT)


def launch(words: list[str], *options: str) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(PROJECT / "glm_peft" / "train.py")]
    return subprocess.Popen(
        [*command, *words], env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def wait_for(condition: Callable[[], bool], seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_end_of_the_launcher_ends_the_run_with_a_checkpoint(base, tmp_path):
    """To a single process accelerate hands on no signal: without more, training would go on behind its back."""
    words = training_words(
        base, tmp_path / "out", "--max_steps", "100000", "--save_steps", "5", "--save_total_limit", "1"
    )
    process = launch(words, "--config_file", str(PROJECT / "accelerate_configs" / "cpu.yaml"))
    wait_for(lambda: any((tmp_path / "out").glob("checkpoint-?*")))
    process.terminate()
    error = process.communicate()[1].splitlines()[-1]  # which the run has open until its end
    assert "stopped by SIGTERM at step" in error
    assert Path(error.split()[-1]).is_dir()


def test_ctrl_c_leaves_the_last_line_and_the_exit_code_to_a_launched_command(base, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "executable", warm_python())
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[0])

    def press_ctrl_c() -> None:  # a terminal sends it to all
        wait_for(lambda: any((tmp_path / "out").glob("checkpoint-?*")))
        for pid in (os.getpid(), started[0].pid):
            os.kill(pid, signal.SIGINT)

    words = training_words(base, tmp_path / "out", "--max_steps", "100000", "--save_steps", "5")
    thread = threading.Thread(target=press_ctrl_c)
    thread.start()
    with pytest.raises(SystemExit) as end:
        launch_command(["--config_file", str(PROJECT / "accelerate_configs" / "cpu.yaml"), "train", *words])
    thread.join()
    assert end.value.code == 130
    assert last_line(capfd).startswith("stopped by SIGINT at step")


def test_a_command_may_be_misspelt_to_the_console_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["glm-peft", "trian"])
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (
        2,
        "error: glm-peft has no command 'trian'; the nearest is 'train'.\n",
    )


def test_what_a_shell_ignores_in_the_background_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Interruption(has_launcher=False) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert not interruption.is_due
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
