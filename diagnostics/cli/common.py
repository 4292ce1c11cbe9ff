"""What all commands do: load the model, show progress, keep libraries quiet, and end with one line."""

import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

RUNS = Path("runs")
INTERRUPTED = 130  # exit status, as shells have it for SIGINT
TERMINATED = 143  # and for SIGTERM
# What a command holds until it ends: folders that no other process may write.
HELD = ExitStack()


def new_folder(model: str, suffix: str = "", parent: Path = RUNS) -> Path:
    """Name a folder for what a command leaves behind, by the model and the time."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name)[:150].strip("-.") or "model"
    return parent / f"{slug}{suffix}_{datetime.now():%Y-%m-%dT%H-%M-%S}"


def claim(out: Path) -> None:
    """Hold the folder that a command writes until it ends; raise UserError that names the process that has it."""
    from diagnostics.support.locks import hold_folder

    HELD.enter_context(hold_folder(out))


def load(arguments: dict[str, Any]) -> Any:
    """Load the model that the common options name."""
    quiet()
    from diagnostics.models.loading import load_model
    from diagnostics.self_test import switch

    switch(not arguments["skip_self_test"])
    names = ("device", "dtype", "revision", "trust_remote_code")
    return load_model(arguments["model"], **{name: arguments[name] for name in names})


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}


@contextmanager
def progress(title: str) -> Iterator[Any]:
    """Yield a `diagnostics.diagnosis.diagnosis.Progress` callback that draws a bar on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, prompt_id: bar.update(
            task, completed=done, total=total, description=f"{title} {prompt_id}"
        )


def quiet() -> None:
    """Keep the libraries' own progress bars and advice out of what the user reads."""
    warnings.filterwarnings("ignore", module="transformers|torch|peft")
    # Their environment variables would be too late: both are imported by now.
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    hub_logging.set_verbosity_error()


def warn(message: str) -> None:
    """Say in one line on stderr what did not work, though the command did."""
    print(f"warning: {' '.join(message.split())}", file=sys.stderr)


def fail(message: str, status: int = 2) -> NoReturn:
    """End with one line on stderr and an exit status."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
