"""The notebooks, and small ones for tests of the runner and the Makefile."""

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from nemolib import paths

PARAMETERS = 'profile = "tiny"\nsamples = 2'


def notebooks(name: str = "[0-9]*") -> list[Path]:
    """Return the notebooks of a name, in order of their names; not those that JupyterLab keeps beside them."""
    found = paths.NOTEBOOKS.rglob(f"{name}.ipynb")
    return sorted((path for path in found if path.parent.name != ".ipynb_checkpoints"), key=lambda path: path.name)


def save_notebook(path: Path, *code: str, parameters: str | None = PARAMETERS) -> Path:
    """Write a notebook with a title, a parameters cell (unless None) and the code cells."""
    cells = [new_markdown_cell("# Does it run?")]
    if parameters is not None:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook = new_notebook(cells=[*cells, *map(new_code_cell, code)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, path)
    return path
