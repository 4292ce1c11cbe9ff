"""How long work tells of its progress, and how its durations are written."""

from collections.abc import Callable

# Called as ``progress(done, total, what)`` before each piece of the work and once at the end.
Progress = Callable[[int, int, str], None]


def readable_duration(seconds: float) -> str:
    """Write a duration as people say it: ``42 s``, ``6 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
