"""Steps that all commands share: they name and hold their folder, and load the model."""

import re
from collections.abc import Iterable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from diagnostics.support.console import INTERRUPTED as INTERRUPTED
from diagnostics.support.console import fail as fail
from diagnostics.support.console import quiet
from diagnostics.support.console import warn as warn
from diagnostics.support.signs_of_life import announce as announce
from diagnostics.support.signs_of_life import progress as progress

RUNS = Path("runs")
TERMINATED = 143  # exit status, as shells have it for SIGTERM
# What a command holds until it ends: folders that no other process may write.
HELD = ExitStack()


def new_folder(model: str, suffix: str = "", parent: Path = RUNS) -> Path:
    """Name a folder for the results of a command after the model and the time."""
    slug = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name)[:150].strip("-.") or "model"
    return parent / f"{slug}{suffix}_{datetime.now():%Y-%m-%dT%H-%M-%S}"


def claim(out: Path) -> None:
    """Hold the folder that a command writes until it ends; raise UserError that names the process that has it."""
    from diagnostics.support.locks import hold_folder

    HELD.enter_context(hold_folder(out))


def load(arguments: dict[str, Any], policies: Iterable[Any] = ()) -> Any:
    """Load the model that the common options name, with a sign of life, once these policies are known to fit it."""
    quiet()
    from diagnostics.models.embedded import EMBEDDED_MODEL, find_embedded_model
    from diagnostics.models.loading import check_model, load_model
    from diagnostics.self_test import switch

    switch(not arguments["skip_self_test"])
    options = {name: arguments[name] for name in ("device", "dtype", "revision", "trust_remote_code")}
    if policies:
        check_model(arguments["model"], **options).require(policies)
    loading = f"loading {arguments['model']}"
    if arguments["model"] == EMBEDDED_MODEL and find_embedded_model() is None:
        loading += "; at its first use it is converted, which takes 0.5 GB and about 15 seconds"
    with progress(loading, first=loading, quiet=arguments["quiet"]):
        return load_model(arguments["model"], **options)


def plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a command as JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in arguments.items()}
