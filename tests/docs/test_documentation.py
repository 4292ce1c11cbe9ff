"""README and documentation: every block runs as pasted, links lead somewhere, and the site builds without a warning."""

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, REASONS, ROOT, continued, read_blocks

RUNNABLE = [page for page in PAGES if any(not block.reason for block in read_blocks(page))]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)[^)]*\)")


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
            [sys.executable, ROOT / "tests" / "support" / "documentation.py", page],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return folder

    return run


@pytest.mark.parametrize("page", RUNNABLE, ids=name)
def test_every_block_runs_as_pasted(page, finished):
    finished(page)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_block_that_is_not_run_says_why(page):
    for block in read_blocks(page):
        assert block.reason is None or block.reason in REASONS, f"line {block.line}: {block.reason}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "analyses" / "README.md"], ids=name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)):
        assert (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "index.html").exists()
