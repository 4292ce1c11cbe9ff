"""Which tokens a layer holds or runs: columns of the padded batch, independent of where they are stored.

A *column* is the index of a token in its row of the batch, including padding, counted from 0 over all calls of a cache.
Rows are padded on the left, so the columns of a row's tokens are adjacent and differences of columns are differences of
positions. Layers hold different columns. With padding, so may the rows of a batch: a row's anchors follow its padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMPTY = -1


@dataclass(frozen=True, eq=False)
class Piece:
    """Adjacent slots of a layer.

    Without ``columns`` they hold columns ``start`` to ``stop`` of every row, in order. Otherwise ``columns`` is
    int64 [1 or batch, slots] or [batch, kv_heads, slots] with ``EMPTY`` in unused slots, and ``start`` and ``stop``
    only bound it. ``full`` says that no slot is unused: it saves a read from the device.
    """

    start: int
    stop: int
    columns: Tensor | None = None
    full: bool = True

    def __len__(self) -> int:
        return self.stop - self.start if self.columns is None else self.columns.shape[-1]

    def tensor(self, device: torch.device) -> Tensor:
        """Columns of the slots, int64 [1 or batch, slots]; where heads hold different ones, the last of them."""
        if self.columns is None:
            return torch.arange(self.start, self.stop, device=device)[None]
        columns = self.columns.to(device)
        return columns if columns.ndim == 2 else columns.amax(dim=1)

    def until(self, stop: int) -> Piece | None:
        """Return the same slots without columns from ``stop`` on, or None if nothing is left."""
        if self.stop <= stop:
            return self
        if self.columns is None:
            return Piece(self.start, stop) if self.start < stop else None
        kept = self.columns.masked_fill(self.columns >= stop, EMPTY)
        return Piece(self.start, stop, kept, full=False) if bool((kept != EMPTY).any()) else None

    def select_rows(self, rows: Tensor) -> Piece:
        """Return the piece of a batch that consists of these rows of the present one."""
        if self.columns is None or self.columns.shape[0] == 1:
            return self
        return Piece(self.start, self.stop, self.columns.index_select(0, rows.to(self.columns.device)), self.full)


Pieces = tuple[Piece, ...]


def span(start: int, stop: int) -> Pieces:
    """Columns ``start`` to ``stop`` of every row; empty if there are none."""
    return (Piece(start, stop),) if start < stop else ()


def gaps(pieces: Sequence[Piece], start: int, stop: int) -> Pieces:
    """Columns from ``start`` to ``stop`` that these ascending pieces, the same for every row, leave out."""
    left: list[Piece] = []
    for piece in pieces:
        left += span(start, piece.start)
        start = piece.stop
    return (*left, *span(start, stop))


def count(pieces: Iterable[Piece]) -> int:
    """Count the slots."""
    return sum(len(piece) for piece in pieces)


def join(pieces: Sequence[Piece], more: Sequence[Piece]) -> Pieces:
    """Append pieces; a piece that continues the last one is merged with it."""
    joined = [*pieces]
    for piece in more:
        last = joined[-1] if joined else None
        if last and last.columns is None and piece.columns is None and last.stop == piece.start:
            joined[-1] = Piece(last.start, piece.stop)
        else:
            joined.append(piece)
    return tuple(joined)


def as_tensor(pieces: Sequence[Piece], device: torch.device) -> Tensor:
    """Columns of all slots, int64 [1 or batch, slots]."""
    parts = [piece.tensor(device) for piece in pieces]
    batch = max((part.shape[0] for part in parts), default=1)
    return torch.cat([part.expand(batch, -1) for part in parts], dim=1)


def rows_in(pieces: Sequence[Piece], first: int, device: torch.device) -> Sequence[slice] | Tensor:
    """Return the indices of columns among positions that begin with column ``first``, for `arguments.take_rows`.

    Unused slots point to the first position; nothing may read what they get.
    """
    if all(piece.columns is None for piece in pieces):
        return [slice(piece.start - first, piece.stop - first) for piece in pieces]
    return (as_tensor(pieces, device) - first).clamp_(min=0)
