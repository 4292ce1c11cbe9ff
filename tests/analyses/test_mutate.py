"""`make mutate`: the kinds of verdict are told from each other, and the checkout is left alone."""

import pytest

import mutate

CODE = "def double(x):\n    return 2 * x\n\n\ndef half(x):\n    return x / 2\n"
TESTS = """
import time
from code_under_test import double, half

def test_double():
    assert double(3) == 6

def test_red():
    assert half(1) == 3

def test_slow():
    time.sleep(half(0.2))
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "code_under_test.py").write_text(CODE)
    (tmp_path / "test_it.py").write_text(TESTS)
    return tmp_path


def fault(old, new, tests, file="code_under_test.py"):
    return mutate.Fault("a fault", file, old, new, f"test_it.py -k '{tests}'")


@pytest.mark.parametrize(
    ("seeded", "result"),
    [
        (fault("2 * x", "3 * x", "double"), mutate.KILLED),
        (fault("x / 2", "x / 3", "double"), mutate.SURVIVED),
        (fault("x / 5", "x / 3", "double"), mutate.STALE),
        (fault("return", "pass", "double"), mutate.STALE),
        (fault("2 * x", "3 * x", "double", "nothing.py"), mutate.STALE),
        (fault("2 * x", "(", "double"), mutate.UNCLEAR),
        (fault("2 * x", "3 * x", "of_another_name"), mutate.UNCLEAR),
        (fault("x / 2", "x * 200", "slow"), mutate.UNCLEAR),
        (fault("x / 2", "x / 3", "red"), mutate.UNCLEAR),
    ],
)
def test_what_becomes_of_a_fault(tree, seeded, result):
    (verdict,) = mutate.without_red_ones(tree, [mutate.judge(tree, seeded, 10)], 60)
    assert verdict.result == result, verdict
    assert (tree / "code_under_test.py").read_text() == CODE


def test_the_faults_are_well_formed():
    """Whether they still apply is for the script to say: code that changes shall not fail these tests for it."""
    faults = mutate.read_faults()
    assert len(faults) >= 60
    for seeded in faults:
        files = seeded.tests.split(" -k")[0].split()
        assert seeded.new != seeded.old
        assert all((mutate.ROOT / file).is_file() for file in files), seeded.name


def test_a_copy_is_made_of_the_tree_and_its_own_code_is_tested(tmp_path):
    tree = mutate.copy_tree(tmp_path.resolve())
    assert (tree / "analyses" / "seeded_faults.toml").read_bytes() == mutate.FAULTS.read_bytes()
    assert not (tree / ".git").exists()
