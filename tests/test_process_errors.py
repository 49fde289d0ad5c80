"""Of several processes that fail, the first says why; what comes of it takes a line, or nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from warm_starts import warm_python

from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors
from glm_peft.reporting.process_errors import someone_failed
from glm_peft.training.interruptions import Interruption

LOST = "[…/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:40374: Connection reset by peer. This is typical"


class Processes:
    """Lets this process be one of two that torchrun started, one after the other."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, capfd: pytest.CaptureFixture) -> None:
        self.patch, self.folder, self.capfd = patch, folder, capfd
        patch.setenv("WORLD_SIZE", "2")
        for rank in (0, 1):
            (folder / str(rank)).mkdir()

    def be(self, rank: int) -> None:
        self.patch.setenv("RANK", str(rank))
        self.patch.setenv("TORCHELASTIC_ERROR_FILE", str(self.folder / str(rank) / "error.json"))

    def fail(self, rank: int, error: BaseException) -> tuple[object, str]:
        """What a process ends with, and what it says."""
        self.be(rank)
        with pytest.raises(BaseException) as end, exit_with_user_errors():
            raise error
        return getattr(end.value, "code", type(end.value)), self.capfd.readouterr().err


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture) -> Processes:
    return Processes(monkeypatch, tmp_path, capfd)


def test_the_same_mistake_is_told_once(processes):
    assert processes.fail(1, UserError("Row 3 is wrong.")) == (2, "error: Row 3 is wrong.\n")
    assert processes.fail(0, UserError("Row 3 is wrong.")) == (2, "")


def test_what_follows_another_error_takes_one_line(processes):
    assert processes.fail(0, UserError("The disk is full.")) == (2, "error: The disk is full.\n")
    assert processes.fail(1, UserError("Row 3 is wrong.")) == (2, "then process 1 ended: error: Row 3 is wrong.\n")
    assert processes.fail(1, KeyError("a\nb")) == (1, "then process 1 ended: KeyError: 'a\\nb'\n")


def test_the_first_of_our_mistakes_keeps_its_traceback(processes):
    assert processes.fail(1, KeyError("a")) == (KeyError, "")
    assert processes.fail(0, KeyError("a")) == (1, "")


def test_a_lost_process_is_told_in_one_sentence_but_not_after_its_own_error(processes):
    code, said = processes.fail(0, RuntimeError(LOST))
    assert code == 1
    assert said.startswith("error: Another process of this run has ended without a word")
    assert len(said.splitlines()) == 1
    assert processes.fail(1, RuntimeError(LOST)) == (1, "")


def test_nothing_is_told_of_a_process_that_said_why_it_ended(processes):
    processes.fail(1, UserError("Row 3 is wrong."))
    assert processes.fail(0, RuntimeError(LOST)) == (1, "")


def test_other_errors_are_not_taken_for_a_lost_process(processes):
    assert processes.fail(0, RuntimeError("shapes cannot be multiplied")) == (RuntimeError, "")


def test_one_process_alone_is_as_ever(monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="reset by peer"), exit_with_user_errors():
        raise RuntimeError(LOST)
    for _ in range(2):
        with pytest.raises(SystemExit), exit_with_user_errors():
            raise UserError("Row 3 is wrong.")
    assert capfd.readouterr().err == "error: Row 3 is wrong.\n" * 2
    assert not list(tmp_path.iterdir())


def test_processes_without_torchrun_each_say_what_is_wrong(processes):
    for rank in (0, 1):
        processes.patch.setenv("TORCHELASTIC_ERROR_FILE", "")
        processes.patch.setenv("RANK", str(rank))
        with pytest.raises(SystemExit), exit_with_user_errors():
            raise UserError("Row 3 is wrong.")
    assert processes.capfd.readouterr().err == "error: Row 3 is wrong.\n" * 2


def test_the_launchers_sigterm_ends_a_process_in_good_order(processes):
    processes.be(0)
    before, ended = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as end, exit_with_user_errors():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("SIGTERM changed nothing")
        finally:
            ended.append(True)
    assert (end.value.code, ended) == (143, [True])
    assert signal.getsignal(signal.SIGTERM) == before
    assert "or the launcher was told to stop" in processes.capfd.readouterr().err


def test_training_does_not_wait_for_a_step_that_another_process_will_not_finish(processes):
    processes.be(0)
    with Interruption(has_launcher=True, speaks=False) as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.signal_number == signal.SIGTERM
        interruption.signal_number = 0
        assert not someone_failed()
        processes.fail(1, UserError("Row 3 is wrong."))
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)


def test_tracebacks_of_several_processes_are_not_hidden_by_a_folder_that_cannot_be_written(processes, tmp_path):
    processes.patch.setenv("RANK", "0")
    processes.patch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "0" / "error.json"))
    for _ in range(2):
        with pytest.raises(KeyError), exit_with_user_errors():
            raise KeyError("a")
    sys.stderr.flush()


LEAVING = """
import atexit, os, sys
atexit.register(os.abort)
from glm_peft.errors import UserError
from glm_peft.reporting.exits import exit_with_user_errors

@exit_with_user_errors()
def command(word):
    if word == "bad":
        raise UserError("It is bad.")

for word in sys.argv[1:]:
    command(word)
"""


def leave(rank: str, *words: str) -> tuple[int, str]:
    """The exit code of one of two processes that would be aborted while Python ends, and what it says on stderr."""
    command = [warm_python(), "-c", LEAVING, *words]
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": rank}
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    return done.returncode, done.stderr


def test_what_aborts_python_s_end_spoils_no_good_run_of_a_process_beside_the_first():
    assert leave("1", "good") == (0, "")
    assert leave("1", "good", "bad")[0] == -signal.SIGABRT == leave("0", "good")[0]
