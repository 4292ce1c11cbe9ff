"""Parts that other distributions add through entry points, and one line that names a part which cannot be used."""

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from diagnostics.support.errors import UserError, one_line

GROUPS = "speed_diagnostics."  # what the names of all groups begin with


def plugins(group: str) -> list[EntryPoint]:
    """Return the entry points of a group, such as ``speed_diagnostics.probes``, in the order of their names."""
    return sorted(entry_points(group=group), key=lambda point: point.name)


def load_plugin(point: EntryPoint) -> Any:
    """Return what an entry point names; raise UserError, which names the plugin, where its code fails."""
    try:
        return point.load()
    except Exception as error:  # the plugin's own code
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{_named(point)} cannot be loaded ({reason}): mend or uninstall it") from None


def unusable(point: EntryPoint, reason: str) -> UserError:
    """Return the error that names a plugin and its distribution, and says why it cannot be used."""
    return UserError(f"{_named(point)} cannot be used: {reason}")


def _named(point: EntryPoint) -> str:
    kind = {"policies": "policy", "probes": "probe", "rules": "rule"}[point.group.removeprefix(GROUPS)]
    distribution = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
    return f"the {kind} plugin {point.name!r}{distribution}"
