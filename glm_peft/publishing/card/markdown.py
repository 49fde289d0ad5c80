"""Write Markdown that shows a text as it is, whatever is in it; the card's templates call these functions."""

import re
from typing import Any

# All that `str.splitlines` takes for one, as a reader of Markdown may.
_LINE_ENDS = re.compile(r"\r\n|[\r\n\v\f\x85\u2028\u2029]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# An underscore inside a word is none.
_SPECIAL = re.compile(r"[&<>|\\`$*\[\]~]|(?<![^\W_])_|_(?![^\W_])")
_BY_NUMBER = "&<>|\\`$"  # some readers of Markdown see these in spite of a backslash


def escape(text: str) -> str:
    """Escape a text for a paragraph or a cell, in one line: nothing in it is Markdown, HTML or a formula."""
    return _SPECIAL.sub(_escaped, _CONTROL.sub(" ", _LINE_ENDS.sub(" ", text)))


def _escaped(found: re.Match[str]) -> str:
    return f"&#{ord(found[0])};" if found[0] in _BY_NUMBER else f"\\{found[0]}"


def escape_cell(text: str | None, limit: int) -> str:
    """Escape a text for a cell, cut to `limit` characters, with its line ends kept; a dash where there is no text."""
    if text is None:
        return "–"
    # A line end would end the row of the table.
    return "<br>".join(escape(line) for line in _LINE_ENDS.sub("\n", shorten(text, limit)).split("\n"))


def escape_messages(messages: list[dict[str, str]], limit: int) -> str:
    """Escape a conversation for a cell, each message cut to `limit` characters, with its role where there are more."""
    texts = [escape_cell(message["content"], limit) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "<br>".join(f"{escape(message['role'])}: {text}" for message, text in zip(messages, texts, strict=True))


def shorten(text: str, limit: int) -> str:
    """Cut a text to `limit` characters, the last one "…" where there were more."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def inline_code(text: str) -> str:
    """Put a name in backticks, or escape it where these would not hold it."""
    return escape(text) if re.search(r"[`|\s\\]", text) or not text else f"`{text}`"


def fence(code: str, language: str) -> str:
    """Put a block of code in more backticks than there are in it."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    ticks = "`" * max(3, longest + 1)
    return f"{ticks}{language}\n{code.rstrip()}\n{ticks}"


def show_count(value: Any) -> str:
    """Return a number with its thousands set apart, and "?" where it is not known."""
    return "?" if value is None else f"{value:,}"


def show_setting(value: Any) -> str:
    """Return the value of a flag for a cell of a table."""
    if isinstance(value, str):
        return inline_code(value)
    return f"{value:.6g}" if isinstance(value, float) else escape(str(value))
