"""The public names: found on demand, functions rather than the modules of the same name, and light to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diagnostics
import diagnostics.evaluate

PACKAGES = [diagnostics, diagnostics.evaluate]


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_said_the_same_everywhere(package):
    tree = ast.parse(Path(package.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    inside = f"{package.__name__}."
    shown = {alias.name: node.module.removeprefix(inside) for node in block.body for alias in node.names}
    assert shown == package.HOME_OF
    assert sorted(shown) == sorted(package.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_name_is_what_its_module_defines(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert value.__module__.startswith(package.__name__)
        assert value.__name__ == name
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def in_a_new_process(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_functions_are_not_lost_to_modules_of_their_name():
    code = (
        "import diagnostics.recommend, diagnostics.diagnose, diagnostics.generate, diagnostics as d\n"
        "import diagnostics.evaluate.fidelity\n"
        "from diagnostics import diagnose\n"
        "functions = d.recommend, d.diagnose, d.generate, diagnose, d.evaluate.fidelity\n"
        "print(all(map(callable, functions)), d.generate.__name__)"
    )
    assert in_a_new_process(code) == ["True", "generate"]


@pytest.mark.parametrize("module", ["cli", "results", "recommend", "figures", "evaluate", "evaluate.summary"])
def test_what_only_reads_runs_does_not_load_torch(module):
    code = f"import diagnostics.{module}, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert in_a_new_process(code) == ["False", "False"]
