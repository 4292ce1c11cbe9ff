"""How long work tells of its progress, and how its durations are written."""

import warnings
from collections.abc import Callable
from typing import Any

from diagnostics.support.errors import UserError

# Called as ``progress(done, total, what)`` before each piece of the work and once at the end.
Progress = Callable[[int, int, str], None]


def readable_duration(seconds: float) -> str:
    """Write a duration as people say it: ``42 s``, ``6 min``, ``2 h 5 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def reporter(progress: Progress | bool | None, title: str) -> Progress:
    """Return the callback that work reports to: a bar on stderr for True, nothing for False, or the one given."""
    if progress is True:
        return _Bar(title)
    if not progress:
        return lambda done, total, what: None
    if not callable(progress):
        raise UserError(f"progress is {progress!r}: give True, False, or a function of (done, total, what)")
    return progress


class _Bar:
    """Draws a bar, in a notebook as its widget; work in several parts gets one for each."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: Any = None

    def __call__(self, done: int, total: int, what: str) -> None:
        if self.bar is None or total != self.bar.total or done < self.bar.n:
            self._close()
            self.bar = _tqdm()(total=total)
        self.bar.set_description(f"{self.title} {what}".rstrip(), refresh=False)
        self.bar.update(done - self.bar.n)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _tqdm() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a notebook without widgets, where it draws in text
        from tqdm.auto import tqdm
    return tqdm
