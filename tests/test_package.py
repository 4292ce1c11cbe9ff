"""The public names: found on demand, functions rather than the modules of the same name, and light to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diagnostics


def test_names_are_said_the_same_everywhere():
    tree = ast.parse(Path(diagnostics.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {alias.name: node.module.removeprefix("diagnostics.") for node in block.body for alias in node.names}
    assert shown == diagnostics._HOME_OF
    assert sorted(shown) == sorted(diagnostics.__all__)


def test_every_name_is_what_its_module_defines():
    for name in diagnostics.__all__:
        value = getattr(diagnostics, name)
        assert value.__module__.startswith("diagnostics.")
        assert value.__name__ == name
        assert name in dir(diagnostics)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diagnostics.nothing


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_functions_are_not_lost_to_modules_of_their_name():
    code = (
        "import diagnostics.recommend, diagnostics.diagnose, diagnostics.generate, diagnostics as d\n"
        "from diagnostics import diagnose\n"
        "print(all(callable(f) for f in (d.recommend, d.diagnose, d.generate, diagnose)), d.generate.__name__)"
    )
    assert in_a_new_process(code) == ["True", "generate"]


@pytest.mark.parametrize("module", ["cli", "results", "recommend", "figures"])
def test_what_only_reads_runs_does_not_load_torch(module):
    code = f"import diagnostics.{module}, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert in_a_new_process(code) == ["False", "False"]
