"""Every notebook runs from top to bottom, and its committed outputs are there, small, and of that one run."""

import re

import nbformat
import pytest

from run_notebooks import execute, notebooks

MAX_BYTES = 250_000
# A folder of somebody's machine, on any system.
ABSOLUTE = re.compile(r"(?<![\w.:/~-])/(?:root|home|work|tmp|usr|opt|var|mnt|private|Users)/|\b[A-Z]:\\")

every_notebook = pytest.mark.parametrize("path", notebooks(), ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert len(notebooks()) >= 4


@pytest.mark.notebooks
@every_notebook
def test_it_runs(path):
    before = path.read_bytes()
    made = execute(path)
    outputs = [output for cell in made.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.read_bytes() == before


@every_notebook
def test_what_is_committed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert path.stat().st_size <= MAX_BYTES
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not of one run, top to bottom"
    outputs = [output for cell in code for output in cell.outputs]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "image/png" in kinds or "application/vnd.plotly.v1+json" in kinds
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    for output in outputs:
        output.get("data", {}).pop("image/png", None)  # letters of base64 mean nothing
    for text in strings(notebook):
        assert "Traceback (most recent call last)" not in text
        assert not ABSOLUTE.search(text), text


def strings(node):
    """Every string of a notebook, wherever it stands."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from strings(part)
