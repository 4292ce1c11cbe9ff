"""How long work tells of its progress."""

from collections.abc import Callable

# Called as ``progress(done, total, what)`` before each piece of the work and once at the end.
Progress = Callable[[int, int, str], None]
