"""The public names: found on demand, functions rather than the modules of the same name, and light to import."""

import ast
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import diagnostics

LAZY = ["cutoffs", "diagnosis", "evaluate", "finetune", "generation", "models", "policies", "prompts", "runs"]

PACKAGES = [diagnostics, *map(import_module, (f"diagnostics.{name}" for name in LAZY))]


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


def test_no_module_has_the_name_of_a_public_function():
    """Importing such a module would put it where the function belongs."""
    for package in PACKAGES:
        beside = {module.name for module in pkgutil.iter_modules(package.__path__)}
        assert not beside & set(package.__all__) - {package.__name__.rpartition(".")[2]}


@pytest.mark.parametrize(
    "module", ["cli", "runs.run", "cutoffs.recommendation", "figures", "evaluate", "evaluate.score_table"]
)
def test_what_only_reads_runs_does_not_load_torch(module):
    code = f"import diagnostics.{module}, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert in_a_new_process(code) == ["False", "False"]
