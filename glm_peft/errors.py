"""Errors that a user can mend: one sentence that says what is wrong, where, what was found, what to do."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in an argument, a file or a combination of them; commands print it without a traceback."""


@contextmanager
def exit_with_user_errors() -> Iterator[None]:
    """
    Around (or, as a decorator, on) a command: a `UserError` becomes one line on stderr, without a traceback.

    Raises:
        SystemExit: with 2 after a `UserError`, with 130 (a shell's number for it) after Ctrl-C.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
