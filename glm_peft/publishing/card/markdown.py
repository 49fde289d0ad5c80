"""Markdown that shows a text as it is, whatever is in it."""

import re
from collections.abc import Iterable, Sequence

_LINE_ENDS = re.compile(r"\r\n|[\r\n\v\f\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# An underscore inside a word is none.
_SPECIAL = re.compile(r"[&<>|\\`$*\[\]~]|(?<![^\W_])_|_(?![^\W_])")
_BY_NUMBER = "&<>|\\`$"  # some readers of Markdown see these in spite of a backslash


def escape(text: str) -> str:
    """A text for a paragraph or a cell of a table, in one line: nothing in it is Markdown, HTML or a formula."""
    return _SPECIAL.sub(_escaped, _CONTROL.sub(" ", _LINE_ENDS.sub(" ", text)))


def _escaped(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};" if found[0] in _BY_NUMBER else f"\\{found[0]}"


def escape_cell(text: str) -> str:
    """The same with its line ends kept."""
    return "<br>".join(escape(line) for line in _LINE_ENDS.sub("\n", text).split("\n"))


def shorten(text: str, limit: int) -> str:
    """At most so many characters, the last one "…" where there were more."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def inline_code(text: str) -> str:
    """A name in backticks, or escaped where these would not hold it."""
    return escape(text) if re.search(r"[`|\s\\]", text) or not text else f"`{text}`"


def fence(code: str, language: str) -> str:
    """A block of code in more backticks than there are in it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{code.rstrip()}\n{ticks}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
