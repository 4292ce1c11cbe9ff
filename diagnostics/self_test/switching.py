"""Whether models are tested at all: a switch for the process, a block, or the environment."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

VARIABLE = "SPEED_DIAGNOSTICS_SELF_TEST"

_on: ContextVar[bool] = ContextVar("self_test", default=True)


@contextmanager
def self_test(on: bool) -> Iterator[None]:
    """Switch the self-test off, or on again, inside the block."""
    token = _on.set(on)
    try:
        yield
    finally:
        _on.reset(token)


def switch(on: bool) -> None:
    """Switch the self-test on or off from here on, as a command does by its option."""
    _on.set(on)


def skipped() -> bool:
    """Whether models are taken without a test, by `self_test`, or by ``SPEED_DIAGNOSTICS_SELF_TEST=off``."""
    return not _on.get() or os.environ.get(VARIABLE, "").lower() in ("off", "0", "no")
