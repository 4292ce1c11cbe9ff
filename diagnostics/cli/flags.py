"""Messages of the library name arguments, such as `resume=True`; here they get the command's flags: --resume."""

from functools import cache
from typing import Any

import typer

from diagnostics.support.errors import rename_arguments

# Arguments of the library that the command has under another name; the flag says the opposite.
OPPOSITES = {"self_test": "skip_self_test", "sweep": "without_sweep"}

_apps: list[typer.Typer] = []


def use_flags_of(app: typer.Typer) -> None:
    """Have messages name the flags of this app's commands."""
    _apps.append(app)


def with_flags(message: str) -> str:
    """Return a message of the library with flags in place of the arguments it names, where a command has them."""
    return rename_arguments(message, _flag)


def _flag(argument: str, value: str | None) -> str | None:
    opposite = argument in OPPOSITES
    option = _options().get(OPPOSITES.get(argument, argument))
    if option is None or (opposite and value != "False"):
        return None
    if value == "False" and not opposite:
        return option.secondary_opts[0] if option.secondary_opts else None
    return option.opts[0] if option.is_flag or value is None else f"{option.opts[0]} {value}"


@cache
def _options() -> dict[str, Any]:
    """Options of all commands by their name; what several commands share is the same in each."""
    groups: list[Any] = [typer.main.get_command(app) for app in _apps]
    commands = [command for group in groups for command in group.commands.values()]
    return {one.name: one for command in commands for one in command.params if one.opts[0].startswith("--")}
