"""Errors that a user can mend: one sentence that says what is wrong, where, what was found, what to do."""


class UserError(ValueError):
    """A mistake in an argument, a file or a combination of them; commands print it without a traceback."""
