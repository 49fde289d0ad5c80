"""
What several processes of one run say when it fails: the first error, once, and little of what comes of it.

The first to fail leaves its message in the folder that torchrun made for the processes of this machine.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed")
_SENTENCE = (
    "Another process of this run has ended without a word, or the launcher was told to stop: see its report below, "
    "where SIGKILL of a process means most likely that the machine's memory was full; --resume_from_checkpoint last, "
    "or --resume of a prediction, goes on from what was kept."
)
_LOST = f"error: {_SENTENCE}"


def tell(message: str) -> None:
    """
    Print a message on stderr; where another process was first with the same one, nothing.

    After another message it follows in one line, as it most likely comes of that.
    """
    first = _claim(message)
    if first is None:
        print(message, file=sys.stderr, flush=True)
    elif message not in (first, _LOST):
        line = message.partition("\n")[0]
        print(f"then process {os.environ['RANK']} ended: {line}", file=sys.stderr, flush=True)


def needs_traceback(error: Exception) -> bool:
    """
    Whether to go on with an error as Python does.

    Otherwise all is said: it is about a process that is gone, or another process was first with an error.
    """
    if _is_alone():
        return True
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS):
        tell(_LOST)
        return False
    message = f"{type(error).__name__}: {error}"
    if someone_failed():
        tell(message)
        return False
    return _claim(message) is None


def someone_failed() -> bool:
    """Whether a process on this machine has left the message of an error."""
    told = _place()
    return told is not None and told.exists()


@contextmanager
def heed_launcher() -> Iterator[None]:
    """
    Of several processes, one ends in good order at SIGTERM, by which the launcher ends those that are left.

    Raises:
        SystemExit: with 143 at SIGTERM.
    """
    if _is_alone() or threading.current_thread() is not threading.main_thread():
        yield
        return
    atexit.unregister(_leave)  # of a command before this one
    former = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def leave_in_order() -> None:
    """After a good run of several processes: take leave of the others before Python ends."""
    if not _is_alone():
        atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if not _is_alone() and os.environ.get("RANK", "0") != "0":
        # All is written: now and then such a process was aborted among torch's threads while Python ended.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end(number: int, frame: FrameType | None) -> None:
    tell(_LOST)
    sys.exit(128 + number)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _claim(message: str) -> str | None:
    """The first message that a process on this machine left; `None` where it is this one."""
    told = _place()
    if told is None:
        return None
    draft = told.with_name(f"told.{os.getpid()}")
    try:
        draft.write_text(message, encoding="utf-8")
        os.link(draft, told)  # with all of its text at once, and for one process only
    except FileExistsError:
        return told.read_text(encoding="utf-8")
    except OSError:
        return None
    finally:
        draft.unlink(missing_ok=True)
    return None


def _place() -> Path | None:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parents[1] / "told" if file else None
