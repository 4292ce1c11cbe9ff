"""What is said of the package in several files is the same in all of them."""

import importlib.util
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import diagnostics
from diagnostics.support.moved import MOVED
from tests.support.documentation import ROOT

MOVES = re.findall(
    r"^\| `(diagnostics\.\S+)`( \*)? \| `(diagnostics\.\S+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M
)


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == diagnostics.__version__
    assert f"## [{diagnostics.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    command = [sys.executable, "-m", "diagnostics.cli", "--version"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert shown == f"speed-diagnostics {diagnostics.__version__}\n"


def test_the_citation_has_what_the_format_requires():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


@pytest.mark.parametrize(("old", "mark", "new"), MOVES)
def test_a_moved_module_is_where_the_changelog_says(old, mark, new):
    path = ROOT.joinpath(*new.split("."))
    assert path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    assert bool(mark) == (old in MOVED)


def test_old_paths_that_still_work_lead_where_the_changelog_says():
    assert {(old, new) for old, homes in MOVED.items() for new in homes} <= {(old, new) for old, _, new in MOVES}
    with pytest.warns(DeprecationWarning, match=r"diagnostics.prompts.encoding and diagnostics.generation.inputs"):
        import diagnostics.encoding as old
    from diagnostics.generation.inputs import encode_input
    from diagnostics.prompts.encoding import encode_prompts

    assert (old.encode_input, old.encode_prompts) == (encode_input, encode_prompts)


def test_extras_of_the_readme_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = (ROOT / "README.md").read_text() + (ROOT / "docs" / "install.md").read_text()
    named = {name for names in re.findall(r"'\.\[([\w,-]+)\]'", pages) for name in names.split(",")}
    assert named
    assert named <= extras.keys()


@pytest.mark.parametrize("path", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda path: path.name)
def test_workflows_call_targets_of_the_makefile(path):
    text = path.read_text()
    assert yaml.safe_load(text)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"run: make ([\w-]+)", text)) <= targets


def test_the_index_of_analyses_names_every_script_and_notebook():
    index = (ROOT / "analyses" / "README.md").read_text()
    for path in (ROOT / "analyses").iterdir():
        if path.suffix in (".py", ".ipynb") and path.stem != "__init__":
            assert path.name in index or path.stem in index, path.name


def test_both_packages_are_typed():
    assert (ROOT / "diagnostics" / "py.typed").exists()
    assert (ROOT / "app" / "py.typed").exists()
    assert importlib.util.find_spec("diagnostics").origin == str(Path(ROOT, "diagnostics", "__init__.py"))
