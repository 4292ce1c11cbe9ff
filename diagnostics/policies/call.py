"""One forward pass under a policy: which columns are new, which of them run on, and the masks that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diagnostics.models.anatomy import PER_POSITION
from diagnostics.policies.cache import KeysStored, PolicyCache
from diagnostics.policies.columns import EMPTY, Piece, Pieces, join, span, take
from diagnostics.policies.masks import attention_mask
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.policies.runtime import Runtime


class Call:
    """One forward pass under a policy.

    Attributes
    ----------
    start, stop
        Columns of the new tokens.
    rows
        Columns that run through the present layer; fewer above the policy's depth.
    hidden
        Output of the last layer that all rows ran through, while the policy decides; [batch, columns, width].
    notes
        What the policy keeps from one layer to another.
    """

    def __init__(self, runtime: Runtime, cache: PolicyCache, n_new: int, head: int, tail: int) -> None:
        self.runtime, self.cache, self.n_layers = runtime, cache, runtime.anatomy.n_layers
        self.start, self.stop = cache.n_columns, cache.n_columns + n_new
        self.head, self.tail = head, tail
        self.rows: Pieces = span(self.start, self.stop)
        self.selects = runtime.depth < self.n_layers and head + tail < n_new
        self.selected = False
        self.unheld = False  # the rows of upper layers leave no keys and values
        self.hidden: Tensor
        self.notes: dict[str, Any] = {}
        self._masks: dict[Any, Tensor | None] = {}

    @property
    def padding(self) -> Tensor | None:
        """Padding columns of each row, int64 [batch], or None without padding."""
        return self.cache.padding

    def kept_columns(self, anchors: int) -> Pieces:
        """Columns of this call's decode-phase tokens and of the first ``anchors`` tokens of each row."""
        lead = self.start + self.head
        tail = span(max(self.stop - self.tail, lead), self.stop)
        if self.padding is None:
            lead = max(lead, min(anchors, self.stop - self.tail))
            return join(span(self.start, lead), tail)
        first = self.padding[:, None] + torch.arange(anchors, device=self.padding.device)
        fits = (first >= lead) & (first < self.stop - self.tail)
        pieces = span(self.start, lead)
        if anchors and bool(fits.any()):
            columns = first.masked_fill(~fits, EMPTY).sort(dim=1).values
            pieces = (*pieces, Piece(self.start, self.stop, columns, full=False))
        return (*pieces, *tail)

    def mask(self, layer: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the attention mask of a layer; made once for all layers that hold and run the same columns."""
        held = () if self.unheld and self.selected else self.cache.layers[layer].held
        keys, window = join(held, self.rows), self.cache.layers[layer].window
        same = (
            tuple((p.start, p.stop, id(p.columns) if p.columns is not None else 0) for p in keys),
            self.selected,
            window,
            device,
        )
        if same not in self._masks:
            self._masks[same] = attention_mask(
                self.rows,
                keys,
                padding=self.padding,
                window=window,
                implementation=self.runtime.implementation,
                dtype=dtype,
                device=device,
            )
        return self._masks[same]

    def project(self, layer: int, arguments: dict[str, Any], hidden: Tensor, columns: Pieces) -> None:
        """Have a layer store keys and values of ``hidden``, the given columns, and do nothing else."""
        runtime = self.runtime
        arguments = arguments | {"hidden_states": hidden}
        arguments = {
            k: take_positions(v, columns, self.start) if k in PER_POSITION else v for k, v in arguments.items()
        }
        held = self.cache.layers[layer]
        held.incoming, held.only_store, runtime.projecting = columns, True, hidden.shape[1]
        try:
            runtime.anatomy.layers[layer](**arguments)
        except KeysStored:
            return
        finally:
            held.only_store, runtime.projecting = False, 0
        raise UserError(
            f"layer {layer} of this model does not store its keys through the cache: projected cannot serve it"
        )


def take_positions(value: Any, columns: Pieces, first: int) -> Any:
    """Pick columns out of what a layer gets per position: [1 or batch, columns, ...] or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(take_positions(part, columns, first) for part in value)
    return take(value, columns, first) if isinstance(value, Tensor) else value
