"""Run every command and Python block of a Markdown page, in order, as a reader would paste them.

    python -P tests/support/documentation.py PAGE.md     # in the current folder, which should be a scratch one
    python -P tests/support/documentation.py --skipped   # the blocks that no test runs, with the reason

-P keeps this folder, with its module `tokenizers`, off the path.
A page's blocks share the folder and the Python names. A block below a comment `<!-- not run: REASON -->` is left out.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Why a block may be left out.
REASONS = (
    "installs packages",
    "needs a GPU",
    "needs a model of yours",
    "needs a model hub",
    "needs Docker",
    "runs until Ctrl-C",
    "takes minutes",
    "takes hours",
    "a file, not a program",
)
FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>.*?) -->\n+)?```(?P<language>bash|python)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
CONTINUES = re.compile(r"^<!-- continues: (?P<page>\S+) -->$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block: ``bash`` or ``python``, the line of its code in the page, and why it is not run, if it is not."""

    language: str
    line: int
    code: str
    reason: str | None


def read_blocks(page: Path) -> list[Block]:
    """Return the commands and Python blocks of a page, in order."""
    text = page.read_text()
    return [
        Block(m["language"], text.count("\n", 0, m.start("code")) + 1, m["code"], m["reason"])
        for m in FENCE.finditer(text)
    ]


def continued(page: Path) -> Path | None:
    """Return the page whose results this one starts from, if it names one."""
    named = CONTINUES.search(page.read_text())
    return (page.parent / named["page"]).resolve() if named else None


def run_page(page: Path) -> None:
    """Run the blocks of a page in this process and folder; raise at the first that fails."""
    names: dict[str, object] = {"__name__": "__main__"}
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for block in read_blocks(page):
        if block.reason:
            continue
        where, start = f"{page.name}:{block.line}", sum(os.times()[:4])
        print(f"--- {where}", flush=True)
        if block.language == "bash":
            subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=True, env=environment)
        else:
            # As many lines down as on the page, so that a traceback names the line there.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
        print(f"--- {where} took {sum(os.times()[:4]) - start:.1f} s of processor time", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--skipped":
        for page in PAGES:
            for block in read_blocks(page):
                if block.reason:
                    print(f"{page.relative_to(ROOT)}:{block.line}: {block.reason}")
    else:
        run_page(Path(sys.argv[1]).resolve())
