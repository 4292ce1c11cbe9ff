"""Signs of life of long work, on stderr: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from diagnostics.support.progress import Progress, readable_duration

FEW = 30  # pieces that get a line each; of more, every tenth of the work does
SILENCE_S = 60.0  # after which a piece gets a line all the same


def announce(line: str, *, quiet: bool = False) -> None:
    """Print one line: what is done, and where its results go."""
    if not quiet:
        print(" ".join(line.split()), file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, *, first: str = "", quiet: bool = False) -> Iterator[Progress]:
    """Yield a callback that shows how far the work called ``title`` is; ``first`` says what goes before its pieces."""
    console = Console(stderr=True)
    if quiet:
        yield lambda done, total, what: None
    elif sys.stderr.isatty() and not console.is_dumb_terminal:  # rich alone would be led by FORCE_COLOR
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        with Bar(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(first or title, total=None)
            yield lambda done, total, what: bar.update(
                task, completed=done, total=total, description=f"{title} {what}".rstrip()
            )
    else:
        if first:
            announce(first)
        yield _Lines(title)


class _Lines:
    """Prints where the work is, and about how long it will take."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.total = self.done = 0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        begins = total != self.total or done < self.done  # a part of the work that counts anew
        if begins:
            self.total, self.began, self.done_before = total, now, done
        self.done = done
        if begins or self._is_due(now):
            self.shown, self.shown_at = done, now
            announce(self._line(what, now - self.began))

    def _is_due(self, now: float) -> bool:
        if self.total <= FEW or self.done == self.total:
            return self.done > self.shown
        a_tenth_more = self.done * 10 // self.total > self.shown * 10 // self.total
        first_estimate = self.shown == self.done_before < self.done
        return a_tenth_more or first_estimate or now - self.shown_at >= SILENCE_S

    def _line(self, what: str, elapsed: float) -> str:
        where = f", {what}" if what else ""
        if self.done == self.total:
            return f"{self.title}: all {self.total} done{where}; took {readable_duration(elapsed)}"
        line = f"{self.title}: {self.done + 1} of {self.total}{where}"
        if self.done == self.done_before:
            return line
        left = elapsed / (self.done - self.done_before) * (self.total - self.done)
        return f"{line}; {readable_duration(elapsed)} so far, about {readable_duration(left)} left"
