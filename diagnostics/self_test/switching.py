"""Switches the self-test on or off: for the process, for a block, or by the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "SPEED_DIAGNOSTICS_SELF_TEST"

_on: ContextVar[bool] = ContextVar("self_test", default=True)


@contextmanager
def self_test(on: bool) -> Iterator[None]:
    """Switch the self-test on or off inside the block."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def switch(on: bool) -> None:
    """Switch the self-test on or off from now on, as a command's option does."""
    _on.set(on)


def skipped() -> bool:
    """Whether the self-test is off, by `self_test`, by `switch` or by ``SPEED_DIAGNOSTICS_SELF_TEST=off``."""
    return not _on.get() or os.environ.get(VARIABLE, "").lower() in ("off", "0", "no")
