"""Test modules share nothing but `tests.support`: each can be run, moved and deleted alone."""

import ast

import pytest

from tests.support.paths import ROOT

MODULES = sorted((ROOT / "tests").rglob("test_*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def is_test_module(name):
    return name.startswith((".", "tests.")) and any(part.startswith("test_") for part in name.split("."))


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("from tests.app.test_pages import calm", True),
        ("from tests.app import test_pages", True),
        ("import tests.app.test_pages", True),
        ("from .test_pages import calm", True),
        ("from tests.support.pages import calm", False),
        ("from diagnostics import self_test", False),
    ],
)
def test_the_rule_knows_a_test_module(tmp_path, source, refused):
    path = tmp_path / "module.py"
    path.write_text(source)
    assert any(map(is_test_module, imported(path))) == refused


def test_no_test_module_imports_another():
    assert MODULES
    everything = [*MODULES, *(ROOT / "tests").rglob("conftest.py"), *(ROOT / "tests" / "support").rglob("*.py")]
    wrong = [
        f"{path.relative_to(ROOT)}: {name}" for path in everything for name in imported(path) if is_test_module(name)
    ]
    assert not wrong
