"""Where the checkout and its task pack are."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "tests" / "tasks"
