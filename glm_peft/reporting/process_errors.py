"""
How several processes of one run report an error: the first to fail prints its message, the others a line or nothing.

torchrun makes a folder for the processes of a machine and names a file in it to each (`TORCHELASTIC_ERROR_FILE`). The
first process that fails writes its message there, so that the others know that they fail because of it.
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

# What torch's gloo backend says where the process at the other end of a connection is gone.
_LOST_CONNECTIONS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection was likely closed",
)
_SENTENCE = (
    "Another process of this run has ended without a word, or the launcher was told to stop: see its report "
    "below, where SIGKILL of a process means most likely that the machine's memory was full; --resume_from_checkpoint "
    "last, or --resume of a prediction, goes on from what was kept."
)
_LOST = f"error: {_SENTENCE}"


def tell(message: str) -> None:
    """
    Print an error message on stderr, unless another process of this machine has printed the same one.

    Where another process was first with another message, print one line, as this error most likely follows from it.

    Args:
        message: what one process alone would print.
    """
    first = _claim(message)
    if first is None:
        print(message, file=sys.stderr, flush=True)
    elif message not in (first, _LOST):
        line = message.partition("\n")[0]
        print(f"then process {os.environ['RANK']} ended: {line}", file=sys.stderr, flush=True)


def needs_traceback(error: Exception) -> bool:
    """
    Return whether an unexpected error is to be raised with its traceback; otherwise print the line that says it.

    It is in a single process, and in the first of several to fail, unless its error is that another one is gone.

    Args:
        error: any but a `UserError`.
    """
    if _is_alone():
        return True
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST_CONNECTIONS):
        tell(_LOST)
        return False
    message = f"{type(error).__name__}: {error}"
    if someone_failed():
        tell(message)
        return False
    return _claim(message) is None


def someone_failed() -> bool:
    """Return whether a process of this run on this machine has failed with a message."""
    file = _message_file()
    return file is not None and file.exists()


@contextmanager
def heed_launcher() -> Iterator[None]:
    """
    In one of several processes, exit through Python's own cleanup at SIGTERM, which torchrun sends after a failure.

    Raises:
        SystemExit: with 143 (a shell's number for it) at SIGTERM.
    """
    if _is_alone() or threading.current_thread() is not threading.main_thread():
        yield
        return
    atexit.unregister(_shut_down)  # registered by an earlier command of this process, which this one may not follow
    former = signal.signal(signal.SIGTERM, _exit_at_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def leave_in_order() -> None:
    """After a run of several processes without an error, have Python close their connections when it exits."""
    if not _is_alone():
        atexit.register(_shut_down)


def _shut_down() -> None:
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
    if os.environ.get("RANK", "0") != "0":
        # Everything is written. Skip the rest of Python's exit, where torch's threads aborted such a process at times.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _exit_at_sigterm(number: int, frame: FrameType | None) -> None:
    tell(_LOST)
    sys.exit(128 + number)


def _is_alone() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def _claim(message: str) -> str | None:
    """Record a message as that of the first process to fail; return the one recorded before, or `None`."""
    file = _message_file()
    if file is None:
        return None
    draft = file.with_name(f"told.{os.getpid()}")
    try:
        draft.write_text(message, encoding="utf-8")
        # Unlike opening with "x", a link shows up with all of the text at once; like it, for one process only.
        os.link(draft, file)
    except FileExistsError:
        return file.read_text(encoding="utf-8")
    except OSError:  # such as a file system without links: each process speaks for itself
        return None
    finally:
        draft.unlink(missing_ok=True)
    return None


def _message_file() -> Path | None:
    """Return the file of the first error's message, beside the folders that torchrun made; `None` without torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(file).parents[1] / "told" if file else None
