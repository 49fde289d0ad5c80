"""The site of `make docs`: strictly built, every link and anchor of both languages leads somewhere, without a host."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from launches import PROJECT


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[Path, str]:
    """The built pages and what is in them; but for that of a host's errors, whose links begin at the host."""
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(site)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"}


def page(pages: dict[Path, str], end: str) -> str:
    (found,) = [text for path, text in pages.items() if path.as_posix().endswith(end)]
    return found


def is_there(pages: dict[Path, str], path: Path, target: str) -> bool:
    name, _, anchor = unquote(target).partition("#")
    file = (path.parent / name).resolve() if name else path
    return file.exists() and (not anchor or f'id="{anchor}"' in pages[file])


def test_every_link_and_anchor_of_the_site_leads_somewhere_and_nothing_is_loaded_from_a_host(pages):
    broken = []
    for path, text in pages.items():
        links = set(re.findall(r'(?:href|src)="([^"]*)"', text))
        broken += [
            (path.name, link) for link in links if not re.match(r"\w+:", link) and not is_there(pages, path, link)
        ]
        broken += re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?:[^"]*"', text)
    assert broken == []


@pytest.mark.parametrize(
    ("first", "folder", "word"), [("/index.html", "docs", "Search"), ("/zh/index.html", "docs/zh", "搜索")]
)
def test_each_language_lists_all_its_pages_in_the_order_of_the_readme(pages, first, folder, word):
    root = min(len(path.parts) for path in pages)
    (text,) = [text for path, text in pages.items() if f"/{'/'.join(path.parts[root - 1 :])}" == first]
    listed = re.findall(r'<a href="(?:\./)?([\w/]+)\.html" class="md-nav__link', text)
    names = ["index", *(path.stem for path in (PROJECT / folder).glob("*.md"))]
    assert sorted(listed) == sorted(names) and listed[:3] == ["index", "demo", "data_formats"]
    assert f'placeholder="{word}"' in text


def test_the_notebook_is_a_page_with_its_pictures_answers_and_links(pages):
    text = page(pages, "source/examples/first_prefix.ipynb.html")
    assert text.count('src="data:image/png;base64,') == 3
    assert 'href="../../zh/demo.html"' in text and "<table>" in text and "君若披之" in text
