"""Every command and Python block of README and documentation runs as pasted. `make test-docs` runs this, in minutes."""

import os
import shutil
import subprocess
import sys
from functools import cache

import pytest

from tests.support.documentation import PAGES, ROOT, continued, read_blocks

pytestmark = pytest.mark.docs
RUNNABLE = [page for page in PAGES if any(not block.reason for block in read_blocks(page))]


def name(page):
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return a function from a page to the folder that it leaves; a page runs once, others continue in a copy."""

    @cache
    def run(page):
        folder = tmp_path_factory.mktemp("page") / "checkout"
        before = continued(page)
        if before is None:
            (folder / "tests").mkdir(parents=True)
            (folder / "README.md").symlink_to(ROOT / "README.md")
            (folder / "tests" / "tasks").symlink_to(ROOT / "tests" / "tasks")
        else:
            shutil.copytree(run(before), folder, symlinks=True)
        done = subprocess.run(
            [sys.executable, "-P", ROOT / "tests" / "support" / "documentation.py", page],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
        )
        print(done.stdout)
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return folder

    return run


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_every_block_runs_as_pasted(page, finished):
    finished(page)
