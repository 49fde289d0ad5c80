"""Documents become one text, and what is none is refused in a sentence."""

import hashlib
import json
import sys
from pathlib import Path

import docx
import pypdf
import pytest
from matplotlib.figure import Figure

from glm_peft.distillation.documents import DocumentPart, read_documents
from glm_peft.errors import UserError


def write_pdf(path: Path, *pages: str, password: str | None = None) -> None:
    """A PDF document with a line of text on each page."""
    writer = pypdf.PdfWriter()
    for text in pages:
        figure = Figure()
        figure.text(0.1, 0.5, text)
        figure.savefig(path)
        writer.append(path)
    if password is not None:
        writer.encrypt(password, "owner", algorithm="RC4-128")
    writer.write(path)


def write_docx(path: Path) -> None:
    """A DOCX document with a table between two paragraphs, whose first row is one cell."""
    document = docx.Document()
    document.add_heading("价格")
    table = document.add_table(2, 3)
    table.cell(0, 0).merge(table.cell(0, 2)).text = "2026"
    for cell, text in zip(table.rows[1].cells, ("茶", "绿", "12元"), strict=True):
        cell.text = text
    document.add_paragraph("含税。")
    document.save(path)


def test_documents_of_every_kind_are_joined_with_a_blank_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "第一行\r\n第二行\n\n".encode())
    (tmp_path / "b.MD").write_text("# Title\n", encoding="utf-8")
    lines = ["plain", {"text": "of text"}, {"content": "of content", "id": 1}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_pdf(tmp_path / "d.pdf", "page one", "page \ufb01ve", password="")
    write_docx(tmp_path / "e.docx")
    texts = ["第一行\n第二行", "# Title", "plain\nof text\nof content", "page one\npage five"]
    texts += ["价格\n2026\n茶 | 绿 | 12元\n含税。"]
    files = sorted(tmp_path.iterdir())
    document = read_documents(list(map(str, files)))
    assert document.text == "\n\n".join(texts)
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert document.parts == tuple(
        DocumentPart(file.name, digest, text) for file, digest, text in zip(files, digests, texts, strict=True)
    )


def test_halves_of_characters_are_joined_or_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('"\\ud83d\\ude00 \\ud83d"')
    assert read_documents([str(tmp_path / "a.jsonl")]).text == "😀 \ufffd"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: there is no such file."),
        ("empty.md", b" \n", "empty.md is empty"),
        ("noise.txt", b"ab\0c", "noise.txt is no text but a binary file, with a NUL at byte 3"),
        ("latin.txt", b"ok\nna\xefve", "latin.txt, line 2, byte 3: 0xef is not UTF-8"),
        ("utf16.txt", "文".encode("utf-16"), "the file looks like UTF-16"),
        ("sheet.xlsx", b"PK", "sheet.xlsx: give a file that ends in .txt, .md, .jsonl, .pdf, .docx, or save"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', "a.jsonl, line 2: give a text, or an object with a 'text'"),
        ("a.jsonl", b'"a"\nb', "a.jsonl, line 2, column 1: this is not JSON"),
        ("a.jsonl", b'""', "a.jsonl has no text"),
        ("a.pdf", b"hello", "a.pdf cannot be read as PDF"),
        ("a.docx", b"hello", "a.docx cannot be read as DOCX"),
    ],
)
def test_what_is_no_document_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        read_documents([str(tmp_path / name)])
    assert message in str(error.value) and str(error.value).count("\n") == 0


def test_folders_scanned_and_encrypted_documents_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pdf"
    with pytest.raises(UserError, match="is a folder: give each file"):
        read_documents([str(tmp_path)])
    write_pdf(file, "")
    with pytest.raises(UserError, match=r"a.pdf has no text, as a scanned page has none"):
        read_documents([str(file)])
    write_pdf(file, "secret", password="word")
    with pytest.raises(UserError, match=r"a.pdf is encrypted: save it without a password"):
        read_documents([str(file)])


@pytest.mark.parametrize(
    ("module", "package", "name"), [("pypdf", "pypdf", "a.pdf"), ("docx", "python-docx", "a.docx")]
)
def test_a_package_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, package: str, name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the package {package}, .*pip install -e '.\[documents\]'"):
        read_documents([str(tmp_path / name)])
