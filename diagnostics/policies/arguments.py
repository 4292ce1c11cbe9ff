"""Arguments and outputs of a decoder layer: arguments by name, and selected rows of every per-position value.

Inference, training and capture share them: all three run layers on some of the positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import parameter_names

# Positions to pick: slices in order, or indices of positions, int64 [1 or batch, rows].
Rows = slice | Sequence[slice] | Tensor
Edit = Callable[[nn.Module, dict[str, Any]], None]


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's call by name, positional ones included."""
    return dict(zip(parameter_names(module), args, strict=False)) | kwargs


class EditArguments:
    """Forward pre-hook, with keyword arguments: ``edit(module, arguments)`` changes a call's arguments by name."""

    def __init__(self, module: nn.Module, edit: Edit) -> None:
        self.names, self.edit = parameter_names(module), edit

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the edited arguments in the form that torch expects from a hook."""
        named = dict(zip(self.names, args, strict=False)) | kwargs
        self.edit(module, named)
        # Positional arguments stay positional: reentrant checkpoints pass gradients to these alone.
        positional = tuple(named.pop(name) for name, _ in zip(self.names, args, strict=False))
        return (*positional, *args[len(self.names) :]), named


def input_tokens(arguments: dict[str, Any]) -> Tensor | None:
    """Return the token ids [batch, tokens] or embeddings [batch, tokens, width] in a decoder stack's call, or None."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def placeholder_mask(device: torch.device) -> Tensor:
    """Return a mask that the decoder stack passes on unchanged, since it is four-dimensional; layers get their own."""
    return torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)


def residual_of(output: Any) -> Tensor:
    """Return the residual in a layer's output, a tensor in transformers 5 and a tuple before: [batch, rows, width]."""
    residual = output[0] if isinstance(output, tuple) else output
    assert residual.ndim == 3, f"expected [batch, position, width], got {tuple(residual.shape)}"
    return residual


def with_residual(output: Any, residual: Tensor) -> Any:
    """Return a layer's output with its residual replaced."""
    return (residual, *output[1:]) if isinstance(output, tuple) else residual


def take_rows(value: Any, rows: Rows) -> Any:
    """Copy positions out of ``value``, [1 or batch, positions, ...] or a tuple of such; return others unchanged."""
    if isinstance(value, tuple):
        return tuple(take_rows(part, rows) for part in value)
    if not isinstance(value, Tensor):
        return value
    if isinstance(rows, Tensor):
        index = rows.to(value.device)
        if value.shape[0] > 1:
            index = index + _row_starts(value.shape[0], value.shape[1], value.device)
        return value.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, *value.shape[2:])
    # Slices need no index on the device; cat copies, so that ``value`` can be freed.
    return torch.cat([value[:, part] for part in ((rows,) if isinstance(rows, slice) else rows)], dim=1)


def spread_rows(values: Tensor, rows: Tensor, n_positions: int, fill: float) -> Tensor:
    """Put ``values`` [batch, rows, width] back to their positions: [batch, n_positions, width], ``fill`` elsewhere.

    ``rows`` are the positions, int64 [1 or batch, rows]; a row whose position is out of range is dropped.
    """
    batch, _, width = values.shape
    rows = rows.to(values.device)
    index = rows + _row_starts(batch, n_positions, values.device)
    dropped = batch * n_positions  # one extra row receives all dropped rows
    index = index.masked_fill((rows < 0) | (rows >= n_positions), dropped)
    spread = values.new_full((dropped + 1, width), fill)
    return spread.index_copy_(0, index.flatten(), values.flatten(0, 1))[:-1].view(batch, n_positions, width)


def _row_starts(batch: int, n_positions: int, device: torch.device) -> Tensor:
    """Index of each row's first position in a batch whose rows are laid end to end: int64 [batch, 1]."""
    return torch.arange(batch, device=device)[:, None] * n_positions
