"""Which models run under a policy at present; a model runs under one policy at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from diagnostics.policies.contract import Holder
from diagnostics.support.errors import UserError

_HELD: dict[nn.Module, Holder] = {}


def require_free(model: nn.Module) -> None:
    """Raise UserError if a model already runs under a policy."""
    if model in _HELD:
        raise UserError(f"this model runs under {_HELD[model].policy} already: leave that `with` block first")


@contextmanager
def occupy(model: nn.Module, holder: Holder) -> Iterator[None]:
    """Hold a model inside the block; raise UserError if another holds it."""
    if _HELD.setdefault(model, holder) is not holder:
        require_free(model)
    try:
        yield
    finally:
        del _HELD[model]


def holder_of(model: nn.Module) -> Any:
    """Return what runs a model under a policy, or None."""
    return _HELD.get(model)
