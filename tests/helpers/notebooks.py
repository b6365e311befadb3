"""Notebooks of the documentation, executed as a reader would."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def execute(path: Path, folder: Path, timeout_s: int = 900) -> Any:
    """Run all cells in a folder, with the package of this repository; return the executed notebook.

    ``python tests/helpers/notebooks.py docs/notebook.ipynb`` writes the outputs into the notebook itself.
    """
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    path_before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [path_before])])
    try:
        NotebookClient(
            book, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        ).execute()
    finally:
        if path_before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = path_before
    return book


def printed(book: Any) -> str:
    """Return what the cells wrote to standard output."""
    return "".join(
        output["text"]
        for cell in book.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    )


def store(path: Path, book: Any) -> None:
    """Write an executed notebook, without what differs from run to run: times, and bars of progress."""
    import nbformat

    for cell in book.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = [
                output for output in cell.outputs if output["output_type"] != "stream" or output["name"] == "stdout"
            ]
            cell.outputs = [output for output in cell.outputs if output["output_type"] != "display_data"]
    nbformat.write(book, path)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        store(Path(sys.argv[1]), execute(Path(sys.argv[1]), Path(scratch)))
