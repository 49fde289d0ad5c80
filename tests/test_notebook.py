"""The notebook runs from its top to its end, and what it keeps is what a reader's own run shows."""

import base64
import re

import nbformat
import pytest
from launches import PROJECT
from run_notebook import run_notebook

NOTEBOOK = PROJECT / "examples" / "first_prefix.ipynb"


@pytest.fixture(scope="module")
def kept() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def outputs_by_kind(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell shows: the name of its stream, or the kinds of its data."""
    cells = [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]
    return [[output.get("name") or ", ".join(sorted(output.data)) for output in outputs] for outputs in cells]


def test_the_notebook_runs_from_its_top_to_its_end(kept, tmp_path, monkeypatch):
    monkeypatch.setenv("FIRST_PREFIX_STEPS", "10")
    monkeypatch.setenv("FIRST_PREFIX_OUTPUT", str(tmp_path))
    run = run_notebook(NOTEBOOK)
    assert outputs_by_kind(run) == outputs_by_kind(kept)
    base, prefix = (notebook.cells[-2].outputs[0].text.splitlines()[0] for notebook in (run, kept))
    assert base == prefix and base.startswith("base")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_the_kept_outputs_are_small_and_belong_to_no_machine(kept):
    cells = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert set(kept.metadata) == {"kernelspec", "language_info"} and not any(cell.metadata for cell in kept.cells)
    shown = [output for cell in cells for output in cell.outputs]
    pictures = [output.data["image/png"] for output in shown if "image/png" in output.get("data", {})]
    assert len(pictures) == 3 and all(len(base64.b64decode(picture)) <= 60_000 for picture in pictures)
    text = "".join(output.get("text", "") for output in shown)
    assert text and not re.search(r"[\r\x1b]|\d\d:\d\d|(?<![\w./])/\w|Traceback", text)


def test_the_links_of_the_notebook_lead_to_files(kept):
    targets = re.findall(r"\]\(([^)]+)\)", "".join(cell.source for cell in kept.cells if cell.cell_type == "markdown"))
    assert len(targets) == 12 and [name for name in targets if not (NOTEBOOK.parent / name).is_file()] == []
