"""Every page has its other language: the same sections, commands, tables, names, figures and links in both."""

import os
import re
from typing import Any

import pytest
from test_documents import ROOT, anchors, blocks, text_of

PAGES, CHINESE_PAGES = (sorted(path.name for path in (ROOT / folder).glob("*.md")) for folder in ("docs", "docs/zh"))


def test_every_page_has_its_other_language_and_links_it():
    assert CHINESE_PAGES == PAGES
    for name in PAGES:
        assert text_of(f"docs/{name}").splitlines()[2] == f"[中文](zh/{name})"
        assert text_of(f"docs/zh/{name}").splitlines()[2] == f"[English](../{name})"


def code_of(document: str) -> list[tuple[str, list[str]]]:
    """Language and lines of every block, without what may be in the reader's language: comments and docstrings."""
    return [
        (language, re.sub(r'(^| +)#.*$|^ +""".*"""$', "", content, flags=re.MULTILINE).split("\n"))
        for language, content in blocks(document)
    ]


@pytest.mark.parametrize("name", CHINESE_PAGES)
def test_both_languages_show_the_same_commands_and_code(name):
    assert code_of(f"docs/zh/{name}") == code_of(f"docs/{name}")


def names(text: str) -> list[str]:
    return sorted({" ".join(name.split()) for name in re.findall("`([^`]+)`", text)})


def figures(text: str) -> list[str]:
    return sorted(re.findall(r"\d+(?:[.,]\d+)*", text))


def place(document: str, target: str) -> tuple[str, int]:
    """The page or file that a link leads to, in whichever language, and the number of the heading."""
    name, _, anchor = target.partition("#")
    file = os.path.normpath(os.path.join(os.path.dirname(document), name)) if name else document
    return file.replace("docs/zh/", "docs/"), anchors(ROOT / file).index(anchor) if anchor else 0


def sections(document: str) -> list[str]:
    """The text of each section, without its blocks and the line that links the other language."""
    text = re.sub(r"^(```.*?^```|\[(English|中文)\]\([^)]+\))$", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    return re.split(r"^(?=#)", text, flags=re.MULTILINE)[1:]


def structure(document: str, section: str) -> dict[str, Any]:
    """What must be the same in both languages, in the same order; of links, where they lead."""
    lines = section.splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("|")]
    links = [target for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", section) if ":" not in target]
    return {
        "level": lines[0].split()[0],
        "quotes": [line for line in lines if line.startswith("> ")],
        "table": [[(figures(cell), names(cell)) for cell in row] for row in rows],
        "links": sorted({place(document, target) for target in links}),
    }


def lacking(section: str, other: str) -> list[str]:
    """The names and the figures of a section that its other language has nowhere."""
    prose, other = re.sub(r"`[^`]+`|\]\(.+?\)", "", section), " ".join(other.split())
    return [name for name in names(section) if name not in other] + sorted({*figures(prose)} - {*figures(other)})


@pytest.mark.parametrize("name", CHINESE_PAGES)
def test_both_languages_have_the_same_sections_tables_names_figures_and_links(name):
    pages = (f"docs/{name}", f"docs/zh/{name}")
    for english, chinese in zip(*map(sections, pages), strict=True):
        assert structure(pages[1], chinese) == structure(pages[0], english)
        assert lacking(chinese, english) + lacking(english, chinese) == []
