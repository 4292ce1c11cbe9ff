"""The one exception that means *the input is at fault, not the program*, and other errors as one line."""

import re
from collections.abc import Callable

MESSAGE_LENGTH = 240
# An argument that a message names, as it stands in a call: `out`, `resume=True`, `dtype="bfloat16"`.
_ARGUMENT = re.compile(r"`(?P<name>[a-z_][a-z0-9_]*)(?:=(?P<value>[^`]+))?`")


class UserError(Exception):
    """Bad input: its message is one line that says what is wrong and what to do.

    A message names arguments as a call has them, in backticks: `out`, `resume=True`; ``arguments`` are their names.
    The command replaces them by its flags, prints the line and ends with exit status 2; in Python it is an ordinary
    exception.
    """

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments that the message is about, in its order."""
        return tuple(match["name"] for match in _ARGUMENT.finditer(str(self)))


def rename_arguments(message: str, name: Callable[[str, str | None], str | None]) -> str:
    """Return a message with other names for its arguments.

    ``name`` gets an argument and the value that goes with it, without quotes, or None; where it returns None the
    message stays as it is.
    """

    def renamed(match: re.Match[str]) -> str:
        value = match["value"] and match["value"].strip("\"'")
        return name(match["name"], value) or match[0]

    return _ARGUMENT.sub(renamed, message)


def one_line(error: BaseException) -> str:
    """Return the error of a library as one line; its own text may be a page, or only a missing key."""
    text = " ".join(str(error).split()).rstrip(".")
    if not text or isinstance(error, KeyError):
        text = f"{type(error).__name__} {text}".strip()
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."


def require_integer(name: str, value: object, least: int) -> None:
    """Raise UserError unless ``value`` is an integer of at least ``least``."""
    integer = isinstance(value, int) and not isinstance(value, bool)
    require(integer and value >= least, f"{name} is {value}: give {least} or more")  # type: ignore[operator]


def require(condition: bool, message: str) -> None:
    """Raise UserError unless ``condition``."""
    if not condition:
        raise UserError(message)
