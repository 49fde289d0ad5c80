"""A training run that was started from the page: it goes on when the page is closed, and is found again."""

import json
import os
import re
import shlex
import signal
import subprocess
from ast import literal_eval
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from glm_peft.errors import UserError
from glm_peft.page.commands import ENVIRONMENT, command_line
from glm_peft.reporting.files import make_output_dir, read_json, write_atomically

LOG_NAME = "train.log"
_RUN_NAME = "training.json"
LOG_LINES = 18
"""How many lines of a log are shown."""
_FINISHED, _STOPPED = re.compile(r"^results: ", re.MULTILINE), re.compile(r"^(stopped by|interrupted)", re.MULTILINE)
_END = 2000  # characters of a log in which its end is told
_PLAN = re.compile(r"^ +training: ([\d,]+) steps, ([\d.e+]+) epochs", re.MULTILINE)  # of the run's own log
_MOVES = re.compile(r"\x1b\[[\d;]*[A-Za-z]")  # of a terminal's cursor
_LOGGED = re.compile(r"\{'.+?\}")  # what the Trainer prints at --logging_steps


@dataclass(frozen=True)
class Run:
    """A process that trains: its number, when it began (seconds since 1970), and where its results go."""

    pid: int
    began: float
    output_dir: str

    @property
    def log(self) -> str:
        """Return all that it has said so far."""
        with suppress(OSError):
            # Not as text, in which a bar's carriage returns would be ends of lines.
            return (Path(self.output_dir) / LOG_NAME).read_bytes().decode(errors="replace")
        return ""

    @property
    def process(self) -> psutil.Process | None:
        """Return the process, `None` where it has ended."""
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            # A number is given again: by the time that it began, the process is known.
            if process.create_time() == self.began and process.status() != psutil.STATUS_ZOMBIE:
                return process
        return None


@dataclass(frozen=True)
class Progress:
    """
    How far a run is, as its log tells.

    Args:
        step: of the optimizer; 0 before the first.
        steps: how many there will be; 0 while model and data are loaded.
        points: what was logged, with `step`.
    """

    step: int
    steps: int
    points: list[dict[str, float]]


class Trainings:
    """The run that was started last; one at a time, as each loads the base once more."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / _RUN_NAME

    @property
    def last(self) -> Run | None:
        """Return the run that was started last, by this process or one before it."""
        found = read_json(self._file)
        return Run(**found) if found else None

    def start(self, words: Sequence[str], output_dir: str) -> None:
        """
        Start the training in a process of its own, which ends neither with the page nor with this process.

        Args:
            words: of the command.

        Raises:
            UserError: one is running already, or the folder cannot be written to.
        """
        if self.last and self.last.process:
            raise UserError(f"A training into {self.last.output_dir} is running: wait for its end, or stop it first.")
        log = make_output_dir(output_dir) / LOG_NAME
        with log.open("wb") as file:
            file.write(f"$ {shlex.join(['python', '-m', 'glm_peft', *words])}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command_line(words),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # Ctrl-C in the terminal of the page is not meant for it
            )
        run = Run(process.pid, psutil.Process(process.pid).create_time(), output_dir)
        write_atomically(self._file, json.dumps(asdict(run)))

    def stop(self) -> None:
        """Let the run write a checkpoint and end."""
        if self.last and (process := self.last.process):
            process.send_signal(signal.SIGINT)


def was_stopped(log: str) -> bool:
    """Return whether a signal ended the run."""
    return bool(_STOPPED.search(log[-_END:]))


def has_finished(log: str) -> bool:
    """Return whether the run came to its end."""
    return bool(_FINISHED.search(log[-_END:]))


def shorten_log(log: str) -> str:
    """Return the last lines of a log, of a progress bar only how it looks now."""
    lines = (_MOVES.sub("", line).rstrip("\r").rsplit("\r", 1)[-1] for line in log.split("\n"))
    return "\n".join([line for line in lines if line.strip()][-LOG_LINES:])


def read_progress(log: str) -> Progress:
    """Read from a run's log how far it is and what it has logged."""
    plan = _PLAN.search(log)
    if not plan:
        return Progress(0, 0, [])
    steps, epochs = int(plan[1].replace(",", "")), float(plan[2])
    told = log[plan.end() :]
    points = [{"step": round(one["epoch"] * steps / epochs), **one} for one in _logged(told)]
    bars = re.findall(rf"(\d+)/{steps} \[", told)
    step = max([int(bar) for bar in bars] + [int(point["step"]) for point in points], default=0)
    return Progress(min(step, steps), steps, points)


def _logged(log: str) -> Iterator[dict[str, float]]:
    for found in _LOGGED.findall(log):
        with suppress(ValueError, SyntaxError):
            logged: dict[str, Any] = {name: float(value) for name, value in literal_eval(found).items()}
            if "epoch" in logged:
                yield logged
