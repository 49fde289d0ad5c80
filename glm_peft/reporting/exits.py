"""How a command ends: a mistake of the user becomes one sentence and an exit code."""

import io
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from glm_peft.errors import UserError
from glm_peft.reporting.process_errors import heed_launcher, leave_in_order, needs_traceback, tell

_PIPE_CLOSED = 141  # a shell's number for a process that SIGPIPE ended


@contextmanager
def exit_with_user_errors() -> Iterator[None]:
    """
    Around (or, as a decorator, on) a command: a `UserError` becomes one line on stderr, without a traceback.

    Of several processes the first to fail has its say; the others, which fail because of it, add a line or nothing.

    Raises:
        SystemExit: with 2 after a `UserError`, with 130 (a shell's number for it) after Ctrl-C, with 141 where the
            reader of stdout or stderr, such as `head`, has read enough, with 1 or 143 where another process ended.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # As Python does for stderr: an answer is not lost because the console has no emoji, or no Chinese.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            with heed_launcher():
                yield
            leave_in_order()
        except UserError as error:
            tell(f"error: {error}")
            sys.exit(2)
        except KeyboardInterrupt:
            tell("interrupted")
            sys.exit(130)
        except BrokenPipeError:
            raise
        except Exception as error:
            if needs_traceback(error):
                raise
            sys.exit(1)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        closed = [stream for stream in (sys.stdout, sys.stderr) if not _has_reader(stream)]
        if not closed:
            raise  # of another pipe or connection
        for stream in closed:  # what is still in the buffer would fail again when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(_PIPE_CLOSED)


def _has_reader(stream: TextIO) -> bool:
    """Return whether a pipe is still read from at its other end; a file or a terminal cannot lose its reader."""
    if not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
        return True
    try:
        # Nothing ever comes out of the end that is written to: it is "readable" once the other end is closed.
        return not select.select([stream], [], [], 0)[0]
    except OSError:  # Windows asks this of sockets only; of the pipes, stdout or stderr is the likeliest
        return False
