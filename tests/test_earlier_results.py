"""Results of an earlier version load with the same numbers: see `tests.fixtures.write_results`."""

import json
import shutil

import pytest

from tests.fixtures.write_results import read
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = ROOT / "tests" / "fixtures" / "results"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = shutil.copytree(FOLDER, tmp_path_factory.mktemp("earlier") / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return json.loads(json.dumps(read(folder)))


@pytest.mark.parametrize("kind", EXPECTED)
def test_numbers_are_the_same(found, kind):
    if kind in ("cache", "adapter"):  # a model computes on from what is read, on another processor
        assert found[kind] == pytest.approx(EXPECTED[kind], rel=1e-4, abs=1e-5)
    elif kind == "run":
        for table, means in EXPECTED[kind].items():
            assert found[kind][table] == pytest.approx(means, rel=1e-12)
    else:
        assert found[kind] == EXPECTED[kind]
