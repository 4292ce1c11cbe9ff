"""One forward pass under a policy: its new columns, those of them that run on, and the attention masks."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from diagnostics.models.anatomy import PER_POSITION, Anatomy
from diagnostics.policies.arguments import take_rows
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.cache_layer import KeysStored
from diagnostics.policies.columns import Pieces, join, rows_in, span
from diagnostics.policies.masks import attention_mask
from diagnostics.policies.segments import Phases, deep_columns
from diagnostics.support.errors import UserError

NoteT = TypeVar("NoteT")


class Call:
    """One forward pass under a policy.

    Attributes
    ----------
    cache
        The KV cache that the call writes into.
    start, stop
        Columns of the new tokens.
    phases
        How many of these, at the start and at the end, are decode phase.
    n_logits
        How many of the last tokens the caller wants logits for; 0 for all.
    rows
        Columns that run through the present layer; fewer above ``depth``.
    selects, selected
        Whether some columns stop at ``depth``, and whether they have stopped.
    hidden
        Output of the last layer that all rows ran through, while the policy selects; [batch, columns, width].
    projecting
        Number of tokens for which the present layer only stores keys and values; 0 otherwise.
    unheld
        Whether the rows of upper layers leave no keys and values.
    """

    def __init__(
        self,
        cache: PolicyCache,
        n_new: int,
        phases: Phases,
        *,
        anatomy: Anatomy,
        depth: int,
        implementation: str,
        n_logits: int = 0,
    ) -> None:
        self.cache, self.anatomy, self.depth, self.implementation = cache, anatomy, depth, implementation
        self.n_layers = anatomy.n_layers
        self.start, self.stop = cache.n_columns, cache.n_columns + n_new
        self.phases, self.n_logits = phases, n_logits
        self.rows: Pieces = span(self.start, self.stop)
        self.selects = depth < self.n_layers and phases.head + phases.tail < n_new
        self.selected = False
        self.unheld = False
        self.projecting = 0
        self.hidden: Tensor
        self._notes: dict[type, object] = {}
        self._masks: dict[Any, Tensor | None] = {}

    @property
    def padding(self) -> Tensor | None:
        """Padding columns of each row, int64 [batch], or None without padding."""
        return self.cache.padding

    def deep_columns(self, anchors: int) -> Pieces:
        """Return the columns of this call's decode-phase tokens and of each row's first ``anchors`` tokens."""
        return deep_columns(self.start, self.stop, self.phases, self.padding, anchors)

    def note(self, note: object) -> None:
        """Keep an object of the policy's own class until the call ends; it replaces an earlier one of that class."""
        self._notes[type(note)] = note

    def noted(self, kind: type[NoteT]) -> NoteT | None:
        """Return the object of this class that the policy noted in this call, or None."""
        return cast(NoteT | None, self._notes.get(kind))

    def mask(self, layer: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Return the attention mask of a layer; layers that hold and run the same columns share one."""
        held = () if self.unheld and self.selected else self.cache.layers[layer].held
        keys, window = join(held, self.rows), self.cache.layers[layer].window
        key = (
            tuple((p.start, p.stop, id(p.columns) if p.columns is not None else 0) for p in keys),
            self.selected,
            window,
            device,
        )
        if key not in self._masks:
            self._masks[key] = attention_mask(
                self.rows,
                keys,
                padding=self.padding,
                window=window,
                implementation=self.implementation,
                dtype=dtype,
                device=device,
            )
        return self._masks[key]

    def project(self, layer: int, arguments: dict[str, Any], hidden: Tensor, columns: Pieces) -> None:
        """Have a layer store keys and values of ``hidden``, the residual at ``columns``, and do nothing else."""
        rows = rows_in(columns, self.start, hidden.device)
        arguments = {k: take_rows(v, rows) if k in PER_POSITION else v for k, v in arguments.items()}
        cache_layer = self.cache.layers[layer]
        cache_layer.incoming, cache_layer.only_store, self.projecting = columns, True, hidden.shape[1]
        try:
            self.anatomy.layers[layer](**arguments | {"hidden_states": hidden})
        except KeysStored:
            return
        finally:
            cache_layer.only_store, self.projecting = False, 0
        name = self.cache.policy.name
        raise UserError(
            f"layer {layer} of this model does not store its keys through the cache: {name} cannot serve it"
        )
