"""Read what is typed into a terminal, or comes from a pipe, question by question."""

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress


def read_questions(prompt: Callable[[], str], is_typed: bool) -> Iterator[str]:
    """
    Yield each question until the input ends; blank ones are left out.

    In a terminal a line that ends in a backslash goes on in the next, a pasted text of several lines is one question,
    and Ctrl-C throws away what is typed. From a pipe each line is a question.

    Args:
        prompt: returns what stands before the cursor.
        is_typed: whether the input is a terminal.
    """
    if not is_typed:
        yield from (line.rstrip("\r\n") for line in sys.stdin if line.strip())
        return
    with suppress(ImportError):
        import readline  # lets `input` edit a line, recall earlier ones and take a pasted text as one

        readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            question = _read_lines(prompt())
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question.strip():
            yield question


def _read_lines(prompt: str) -> str:
    lines = [input(prompt)]
    while lines[-1].endswith("\\"):
        lines.append(input(" " * (len(prompt) - 2) + "… "))
    *continued, last = lines
    return "\n".join([*(line.removesuffix("\\") for line in continued), last])
