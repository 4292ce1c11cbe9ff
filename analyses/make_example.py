"""Makes the example that ships with the package, with the commands that a user has: about an hour on one core.

python analyses/make_example.py [PART ...]    # smollm2-135m-instruct, benchmark, quality, finetuned; by default all

Every part is made in a scratch folder, and replaces the old one when it is finished. What pages can do without is left
out: the adapter with its rows and checkpoints, and the single tokens of the runs before and after the training.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from diagnostics.runs.example import BENCHMARK, EVALUATION, FINETUNING, RUN, example_folder
from diagnostics.runs.places import table_file
from diagnostics.runs.schema import DETAIL_TABLES

MOST_BYTES = 1_500_000
TASKS = "tests/tasks/common_knowledge.jsonl,needle@1K,needle@2K"
COMMANDS = {
    RUN: ["recommend", "--max-prompts", "21", "--context-length", "512", "--detail-prompts", "1"],
    BENCHMARK: [
        *("bench", "--lengths", "512,1K,2K,4K", "--policies", "full,speed:25,projected:25,fastkv"),
        *("--repeats", "3", "--new-tokens", "32"),
    ],
    EVALUATION: [
        *("evaluate", "--tasks", TASKS, "--policies", "full,speed:25,speed:24,speed:22,speed:24:anchors=0"),
        *("--limit", "40", "--margin", "0.05"),
    ],
    FINETUNING: ["finetune", "--cutoff", "20", "--max-kl", "0.5", "--held-out-prompts", "12"],
}
KEPT = (".json", ".parquet")
LEFT_OUT = {"checkpoints", "adapter_config.json", "examples.parquet"} | {table_file(name) for name in DETAIL_TABLES}


def main(parts: list[str]) -> None:
    for part in parts or COMMANDS:
        with tempfile.TemporaryDirectory() as scratch:
            made = Path(scratch) / part
            make(part, made)
            target = example_folder() / part
            shutil.rmtree(target, ignore_errors=True)
            keep(made, target)
    size = sum(file.stat().st_size for file in example_folder().rglob("*") if file.is_file())
    print(f"{example_folder()}: {size:,} bytes")
    if size > MOST_BYTES:
        sys.exit(f"error: the example is larger than {MOST_BYTES:,} bytes")


def make(part: str, made: Path) -> None:
    """Run the command of a part; it is given relative paths, since a manifest keeps the arguments."""
    out = os.path.join("runs", part)
    (made.parent / "tests").symlink_to(Path("tests").absolute())
    command = [sys.executable, "-m", "diagnostics.cli", *COMMANDS[part], "--out", out]
    subprocess.run(command, cwd=made.parent, check=True)
    (made.parent / out).rename(made)


def keep(made: Path, target: Path) -> None:
    """Copy what pages read."""
    left_out = LEFT_OUT if target.name == FINETUNING else set()
    for file in sorted(made.rglob("*")):
        if file.suffix in KEPT and not left_out & set(file.relative_to(made).parts):
            place = target / file.relative_to(made)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


if __name__ == "__main__":
    main(sys.argv[1:])
