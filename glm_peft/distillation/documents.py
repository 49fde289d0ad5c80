"""Read the documents that are to become a prefix: text, Markdown, JSON lines, PDF and DOCX."""

import io
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from glm_peft.errors import UserError
from glm_peft.preprocessing.json_values import json_values
from glm_peft.preprocessing.records import describe_value
from glm_peft.reporting.files import digest_file
from glm_peft.reporting.text_files import read_text

# Radicals that look like a character, compatibility characters and ligatures, as PDF fonts name them.
_LOOKALIKES = re.compile("[\u2f00-\u2fdf\uf900-\ufaff\ufb00-\ufb06]")


@dataclass(frozen=True)
class DocumentPart:
    """One file of a document: its name without folders, the sha256 of its bytes, and its text."""

    name: str
    digest: str
    text: str


@dataclass(frozen=True)
class Document:
    """A text that was read from files, between which it has a blank line."""

    text: str
    parts: tuple[DocumentPart, ...]

    def describe(self, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
        """Return what a record tells of the files: names, digests and tokens, never their text."""
        return [
            {
                "file": part.name,
                "sha256": part.digest,
                "tokens": len(tokenizer(part.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]),
            }
            for part in self.parts
        ]


def read_documents(paths: list[str]) -> Document:
    """
    Read files as one document, in their order.

    Args:
        paths: of files that end in .txt, .md, .jsonl (texts, or objects with a `text` or `content`), .pdf or .docx.

    Raises:
        UserError: a file is not there, of another kind, not readable as what it is called, or has no text.
    """
    texts = [_read(path) for path in paths]
    parts = [DocumentPart(Path(path).name, digest_file(path), text) for path, text in zip(paths, texts, strict=True)]
    return Document("\n\n".join(texts), tuple(parts))


def _read(file: str) -> str:
    path = Path(file)
    if path.is_dir():
        raise UserError(f"--document {file} is a folder: give each file that is to be read.")
    if not path.is_file():
        raise UserError(f"--document {file}: there is no such file.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--document {file}: give a file that ends in {', '.join(_READERS)}, or save it as one.")
    text = reader(file).replace("\r\n", "\n").strip()
    if not text:
        raise UserError(f"--document {file} has no text, as a scanned page has none: give a file that has its text.")
    # Halves of characters, which PDF and JSON can hold: pairs become what they mean, and no tokenizer encodes others.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_plain(file: str) -> str:
    data = Path(file).read_bytes()
    # UTF-16 is full of them, and has an error of its own that says how it becomes UTF-8.
    if b"\0" in data and not data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file} is no text but a binary file, with a NUL at byte {data.index(0) + 1}: give its text.")
    return read_text(file)


def _read_lines(file: str) -> str:
    return "\n".join(_texts_of_lines(file))


def _texts_of_lines(file: str) -> Iterator[str]:
    for line, value, problem in json_values(file, io.StringIO(_read_plain(file))):
        if problem:
            raise UserError(f"{file}, line {line}, {problem}.")
        found = value.get("text", value.get("content")) if isinstance(value, dict) else value
        if not isinstance(found, str):
            found = describe_value(value)
            raise UserError(
                f"{file}, line {line}: give a text, or an object with a 'text' or 'content'; found {found}."
            )
        yield found


def _read_pdf(file: str) -> str:
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, FileNotDecryptedError
    except ImportError as error:
        raise _missing_package(file, "pypdf") from error
    try:
        text = "\n".join(page.extract_text() for page in PdfReader(file).pages)
    except (FileNotDecryptedError, DependencyError) as error:
        raise UserError(f"--document {file} is encrypted: save it without a password, and give that file.") from error
    except Exception as error:  # whatever a damaged file makes the library stumble over
        raise _damaged(file, "PDF", error) from error
    return _LOOKALIKES.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)


def _read_docx(file: str) -> str:
    try:
        import docx
    except ImportError as error:
        raise _missing_package(file, "python-docx") from error
    try:
        return "\n".join(map(_text_of_block, docx.Document(file).iter_inner_content()))
    except Exception as error:
        raise _damaged(file, "DOCX", error) from error


def _text_of_block(block: Any) -> str:
    """Return a paragraph's text, or that of a table with a line for each row."""
    if not hasattr(block, "rows"):
        return block.text
    # dict.fromkeys: a cell that spans several columns comes once for each of them.
    return "\n".join(" | ".join(cell.text for cell in dict.fromkeys(row.cells)) for row in block.rows)


def _missing_package(file: str, package: str) -> UserError:
    return UserError(
        f"--document {file} needs the package {package}, which is not installed: `pip install -e '.[documents]'` "
        "installs it."
    )


def _damaged(file: str, kind: str, error: Exception) -> UserError:
    reason = str(error).split("\n")[0] or type(error).__name__
    return UserError(
        f"--document {file} cannot be read as {kind} ({reason}): give a whole file of that kind, or its text."
    )


_READERS = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".jsonl": _read_lines,
    ".pdf": _read_pdf,
    ".docx": _read_docx,
}
