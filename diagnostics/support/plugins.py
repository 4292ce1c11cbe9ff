"""Parts that other distributions add through entry points, and one line that names a part which cannot be used."""

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diagnostics.support.errors import UserError, one_line


def plugins(group: str) -> Iterator[EntryPoint]:
    """Entry points of a group, such as ``speed_diagnostics.probes``, in the order of their names."""
    yield from sorted(entry_points(group=group), key=lambda point: point.name)


def load_plugin(point: EntryPoint) -> Any:
    """Return what an entry point names; raise UserError, which names the plugin, where its code fails."""
    try:
        return point.load()
    except Exception as error:  # the plugin's own code
        raise unusable(point, f"{type(error).__name__}: {one_line(error)}") from error


def unusable(point: EntryPoint, reason: str) -> UserError:
    """Return the error that names a plugin and its distribution, and what is wrong with it."""
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return UserError(
        f"plugin {point.name!r} ({point.group}){distribution} cannot be used: {reason}; mend or uninstall it"
    )
