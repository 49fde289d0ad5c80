"""Note Ctrl-C and SIGTERM when they come during training, and act on them between two steps."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from glm_peft.reporting.process_errors import someone_failed

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ECHO = 1.0  # seconds: a terminal sends Ctrl-C to all processes, and the launcher then sends it to them again


class StoppedAtOnce(KeyboardInterrupt):
    """Give up what need not be finished, such as an evaluation."""


class Interruption:
    """
    Note the first Ctrl-C or SIGTERM within this context in `signal_number` (0: none); a second Ctrl-C stops at once.

    With `signals` emptied before, every signal does what it does by default.

    Args:
        has_launcher: whether several processes were started, whose launcher hands signals on.
        speaks: whether to say on stderr that the signal was noted.
    """

    def __init__(self, has_launcher: bool, speaks: bool = True) -> None:
        self.signal_number, self.has_launcher, self.speaks = 0, has_launcher, speaks
        self._came_at, self._at_once, self._is_agreed = 0.0, False, False
        self.signals: tuple[signal.Signals, ...] = SIGNALS
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        self.signal_number, self._is_agreed = 0, False
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so: a shell ignores Ctrl-C for what it runs in the background.
            heard = [number for number in self.signals if signal.getsignal(number) != signal.SIG_IGN]
            self._former = {number: signal.signal(number, self._note) for number in heard}
            _follow_launcher()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self.signal_number in self._former and error_type is None:
            os.kill(os.getpid(), self.signal_number)  # it came too late to be acted on
        self._former = {}

    @property
    def is_due(self) -> bool:
        """Return whether all processes know of a signal, and so may act on it at the same step."""
        return self._is_agreed if self.has_launcher else self.signal_number != 0

    def agree(self, signal_number: int) -> None:
        """Take over the signal that came to any of several processes (0: none); all call this at the same step."""
        self._is_agreed = signal_number != 0
        self.signal_number = signal_number or self.signal_number

    @contextmanager
    def stops_at_once(self) -> Iterator[None]:
        """
        Let a signal stop what runs in this context at once.

        Raises:
            StoppedAtOnce: the signal is there, or comes; of several processes none stops while others wait for it.
        """
        self._at_once = not self.has_launcher  # one that left alone would let the others wait in a collective
        try:
            if self.is_due:
                raise StoppedAtOnce
            yield
        finally:
            self._at_once = False

    @property
    def exit_code(self) -> int:
        """Return the exit code that a shell gives a process that the signal ended."""
        return 128 + self.signal_number

    @property
    def name(self) -> str:
        """Return the name of the signal, such as SIGTERM."""
        return signal.Signals(self.signal_number).name

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.has_launcher and someone_failed():
            sys.exit(128 + number)  # there will be no step that all finish
        if self.signal_number:
            is_echo = self.has_launcher and time.monotonic() - self._came_at < _ECHO
            if number == signal.SIGINT and not is_echo:
                signal.default_int_handler(number, frame)
            return
        self.signal_number, self._came_at = number, time.monotonic()
        if self.speaks:
            # Not by print or a logger, whose buffer this may have interrupted.
            os.write(2, b"\nstopping after this step, with a checkpoint; a second Ctrl-C stops at once\n")
        if self._at_once:
            raise StoppedAtOnce


def _follow_launcher() -> None:
    """Ask the kernel for SIGTERM when `accelerate launch` ends, as it passes none on to a single process."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        launcher = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
        if b"accelerate" in launcher or b"glm-peft" in launcher:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
