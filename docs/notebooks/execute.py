"""Execute the notebooks of this folder and store their outputs, without the state of widgets.

python docs/notebooks/execute.py
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
WIDGET = "application/vnd.jupyter.widget-view+json"
SECONDS = 900
"""Longest time of a cell, on a busy machine."""


def execute(path: Path) -> NotebookNode:
    """Execute a notebook in a kernel of this Python, in its own folder.

    Raises:
        CellExecutionError: A cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", store_widget_state=False)
    client.execute(cwd=str(path.parent))
    return notebook


def without_widgets(notebook: NotebookNode) -> NotebookNode:
    """Remove what only a running kernel can show, where a static picture stands beside it, and times of execution."""
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data.pop(WIDGET, None)
    return notebook


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        nbformat.write(without_widgets(execute(path)), path)
        print(f"{path}: {path.stat().st_size // 1024} kB")
