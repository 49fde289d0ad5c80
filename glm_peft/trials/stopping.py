"""Stop a search at Ctrl-C and SIGTERM; nothing is kept of the trial that runs, which is done again."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


# A KeyboardInterrupt, which no `except Exception` on its way holds up, and at which Optuna sets the trial to failed.
class StoppedBySignal(KeyboardInterrupt):
    """
    Raised by a signal, to end a search at once.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number
        """The exit code that shells give to a process which the signal ended."""


def raise_at_signals() -> None:
    """Let Ctrl-C and SIGTERM raise `StoppedBySignal` from now on."""
    for number in SIGNALS:
        # A shell ignores Ctrl-C for what it runs in the background, which is to stay so.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


@contextmanager
def raising_at_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise `StoppedBySignal` inside, and put the former handlers back afterwards."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    raise_at_signals()
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _raise(number: int, frame: FrameType | None) -> None:
    raise StoppedBySignal(number)
