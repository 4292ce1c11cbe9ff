"""README and documentation: links lead somewhere, and the site builds without a warning."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.documentation import PAGES, REASONS, ROOT, read_blocks

LINK = re.compile(r"""(?:\]\(|src=")(?!https?://|#)([^)"#\s]+)""")


def name(page):
    return str(page.relative_to(ROOT))


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
    assert (tmp_path / "site" / "index.html").exists()
