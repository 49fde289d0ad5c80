"""
Run a notebook and keep what it shows, without what belongs to the moment and the machine.

    python scripts/run_notebook.py examples/first_prefix.ipynb
"""

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

_COLOURS = 48  # of a picture that is kept, which makes it a third of its size


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """
    Run the cells of a notebook from its own folder.

    Args:
        path: the file, which is left as it is.

    Returns:
        The notebook with its outputs: pictures of few colours, no progress bars, no times and versions.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    folder = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, resources=folder, record_timing=False, coalesce_streams=True).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Progress bars write to stderr; an error has ended the run.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for picture in (output.data for output in cell.get("outputs", []) if "image/png" in output.get("data", {})):
            picture["image/png"] = _with_few_colours(picture["image/png"])
    return notebook


def _with_few_colours(picture: str) -> str:
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    nbformat.write(run_notebook(Path(sys.argv[1])), sys.argv[1])
