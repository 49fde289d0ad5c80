"""
What `make docs` shows beside docs/: both READMEs as first pages, and every file of the repository that a page links.

MkDocs calls these functions, which are named as it names its events; see mkdocs.yml.
"""

import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jieba
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
FIRST_PAGES = {"README.md": "index.md", "README_zh.md": "zh/index.md"}
LANGUAGES = {"en": "English", "zh": "中文"}
_LINK = re.compile(r"\]\(([^)\s#]+)(#[^)\s]*)?\)")


def place_of(file: str) -> str:
    """Return where a file or folder of the repository stands in the site."""
    if file in FIRST_PAGES or file.startswith("docs/"):
        return FIRST_PAGES.get(file, file.removeprefix("docs/"))
    return f"source/{file.removesuffix('.md')}.md"


def linked(file: str, target: str) -> str | None:
    """Return the file or folder of the repository that a link in a file leads to, if it is one."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(file), target))
    return path if ":" not in target and not path.startswith("..") and (ROOT / path).exists() else None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Order the pages of each language as the README's last table does."""
    jieba.setLogLevel("WARNING")
    rows = re.findall(r"^\| \[docs/.*", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    order = re.findall(r"\]\(docs/(\w+\.md)", "\n".join(rows)) + sorted(path.name for path in ROOT.glob("docs/*.md"))
    pages = ["index.md", *dict.fromkeys(order)]
    config.nav = [{LANGUAGES["en"]: pages}, {LANGUAGES["zh"]: [f"zh/{page}" for page in pages]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the READMEs and what the pages link outside docs/, and lead the links there."""
    found = [*FIRST_PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]
    for file in found:  # grows by what is linked
        text = _content(file)
        if file.endswith((".md", ".ipynb")):
            found += [target for target in _targets(file, text) if target not in found]
            text = _LINK.sub(lambda link, file=file: _relink(link, file), text)
        if known := files.get_file_from_path(place_of(file)):
            files.remove(known)
        files.append(File.generated(config, place_of(file), content=text))
    script = str(ROOT / "scripts" / "iframe-worker.js")
    files.append(File.generated(config, "assets/iframe-worker.js", abs_src_path=script))
    return files


def on_page_context(context: dict[str, Any], page: Page, config: MkDocsConfig, nav: Navigation) -> dict[str, Any]:
    """Give a page the words and the list of pages of its language."""
    language = "zh" if page.file.src_uri.startswith("zh/") else "en"
    config.theme["language"] = language
    config.extra["homepage"] = "zh/index.html" if language == "zh" else "index.html"
    items = next(section.children for section in nav.items if section.title == LANGUAGES[language])
    return context | {"nav": Navigation(items, nav.pages)}


def on_page_content(html: str, **_: Any) -> str:
    """Keep names such as --keep_weight on one line, and show no blank where a Chinese line ends in a mark."""
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    for place in range(0, len(parts), 2):  # between the blocks of code
        short = re.sub(r"<code>(?=[^<]{1,30}</code>)", '<code style="white-space: nowrap">', parts[place])
        parts[place] = re.sub(r"(?<=[，。；：、！？（）])\n", "", short)
    return "".join(parts)


def _content(file: str) -> str:
    path = ROOT / file
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "\n\n".join(_parts(json.loads(path.read_text(encoding="utf-8"))))
    if path.is_dir():
        body = "\n".join(f"- {entry.name}, {entry.stat().st_size:,} bytes" for entry in sorted(path.iterdir()))
    else:
        body = _block(path.suffix[1:], path.read_text(encoding="utf-8"))
    return f"---\nsearch:\n  exclude: true\n---\n\n# {file}\n\n{body}\n"


def _block(language: str, text: str) -> str:
    return f"~~~~{language}\n{text}\n~~~~"


def _parts(notebook: dict[str, Any]) -> Iterator[str]:
    """Yield what the cells of a notebook say and show, as Markdown."""
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        yield _block("python", source) if cell["cell_type"] == "code" else source
        for output in cell.get("outputs", ()):
            shown = {"text": output.get("text")} | output.get("data", {})
            if "image/png" in shown:
                yield f"![](data:image/png;base64,{''.join(shown['image/png'].split())})"
            else:
                yield "".join(shown.get("text/markdown") or _block("text", "".join(shown["text"])))


def _targets(file: str, text: str) -> Iterator[str]:
    for name, _ in _LINK.findall(text):
        target = linked(file, name)
        if target and not target.startswith("docs/"):
            yield target


def _relink(link: re.Match, file: str) -> str:
    target = linked(file, link[1])
    if not target:
        return link[0]
    return f"]({posixpath.relpath(place_of(target), posixpath.dirname(place_of(file)))}{link[2] or ''})"
