"""Read a text file as UTF-8, or say in one sentence what else it is and how it becomes text."""

import codecs
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from glm_peft.errors import UserError

_SAMPLE = 1 << 16  # bytes from which the encoding is guessed
_AS_TEXT = "save the sheet in Excel as 'CSV UTF-8', and give that file"
_KINDS = {
    b"PK\x03\x04": f"an Excel workbook or another zip archive; {_AS_TEXT}",
    b"\xd0\xcf\x11\xe0": f"an Excel workbook of the old kind; {_AS_TEXT}",
    b"\x1f\x8b": "packed by gzip; unpack it with gunzip",
    b"PAR1": "a Parquet file; give it the ending .parquet",
    b"%PDF": "a PDF document, which has no rows",
    b"version https://git-lfs": "a pointer of git-lfs instead of the data; fetch them with `git lfs pull`",
    b"<!DOCTYPE": "a web page; download the file itself",
    b"<html": "a web page; download the file itself",
}  # by the first bytes


def refuse_other_kinds(file: str) -> None:
    """
    Refuse a file whose first bytes are those of a known kind that is no text of rows, whatever its name says.

    Raises:
        UserError: it is one of them; the sentence says how its rows can be read.
    """
    with open(file, "rb") as stream:
        head = stream.read(64).lstrip()
    kind = next((kind for first, kind in _KINDS.items() if head.lower().startswith(first.lower())), None)
    if kind:
        raise UserError(f"{file} is {kind}.")


def read_text(file: str) -> str:
    """
    Read a UTF-8 file, with or without a byte order mark.

    Raises:
        UserError: it is empty, or has bytes that are not UTF-8; the sentence names the first, and a likelier encoding.
    """
    data = Path(file).read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")  # Windows editors begin UTF-8 files with it
    except UnicodeDecodeError as error:
        raise UserError(_encoding_problem(file)) from error
    if not text.strip():
        raise UserError(f"{file} is empty ({len(data)} bytes): there is nothing to read in it.")
    return text


@contextmanager
def open_text(file: str, is_streamed: bool = False) -> Iterator[TextIO]:
    """
    Open a UTF-8 file, with line ends as they are: read at once as `read_text` does, or, streamed, a part at a time.

    Raises:
        UserError: it is empty, where it is read at once, or has bytes that are not UTF-8.
    """
    if not is_streamed:
        yield io.StringIO(read_text(file), newline="")
        return
    with open(file, encoding="utf-8-sig", newline="") as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise UserError(_encoding_problem(file)) from error


def _encoding_problem(file: str) -> str:
    with open(file, "rb") as stream:
        is_utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        stream.seek(0)
        number, line, offset = next(_lines_not_utf8(stream))
        sample = (line + stream.read(_SAMPLE))[:_SAMPLE]
    found = f"{file}, line {number}, byte {offset + 1}: 0x{line[offset]:02x} is not UTF-8"
    if is_utf16:
        return f"{found} (the file looks like UTF-16); save the file as UTF-8."
    # From the line's first byte, not from the bad one, which may be the second of a character.
    if _looks_like_gbk(sample):
        return f"{found} (the file looks like GBK): convert it with `iconv -f GB18030 -t UTF-8 {file} > NEW_FILE`."
    return f"{found}; save the file as UTF-8."


def _lines_not_utf8(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes, int]]:
    """Yield number, bytes and the offset of the first bad byte of each line that is not UTF-8."""
    for number, line in enumerate(lines, 1):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield number, line, error.start


def _looks_like_gbk(data: bytes) -> bool:
    """Whether the bytes are GB18030, and most of what is not ASCII is common Chinese."""
    # Nearly all bytes are some GB18030, most of it rare characters where the encoding is another one.
    try:
        text = codecs.getincrementaldecoder("gb18030")().decode(data)  # incremental: a sample may end in a character
    except UnicodeDecodeError:
        return False
    other = [character for character in text if not character.isascii()]
    common = sum(_is_common(character) for character in other)
    return 10 * common > 9 * len(other)


def _is_common(character: str) -> bool:
    """Whether a character is of GB 2312's first level, or one of its signs and full-width letters."""
    try:
        lead = character.encode("gb2312")[0]
    except UnicodeEncodeError:
        return False
    return lead <= 0xD7  # the second level, of rarer characters, follows
