"""Ctrl-C and SIGTERM during a search, of which nothing of the trial that runs is kept."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedBySignal(KeyboardInterrupt):
    """
    Ends a search at once.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """A shell's number for a process that the signal ended."""


def raise_at_signals() -> None:
    """Let Ctrl-C and SIGTERM raise `StoppedBySignal` from now on."""
    for number in SIGNALS:
        # A shell ignores Ctrl-C for what it runs in the background, which is to stay so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


@contextmanager
def raising_at_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise `StoppedBySignal` inside, and do afterwards what they did before."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    raise_at_signals()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise StoppedBySignal(number)
