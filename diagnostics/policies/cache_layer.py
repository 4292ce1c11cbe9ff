"""One layer of a policy's KV cache: storage that grows ahead of need, and the columns in its slots.

Storage grows by many slots at a time, so a decode step writes one row instead of copying all. Storage and positions are
separate: columns say which tokens a layer holds (see `diagnostics.policies.columns`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from diagnostics.policies.columns import Piece, Pieces, count, join
from diagnostics.support.errors import UserError

# A full layer grows by at least GROWTH slots, and by at least 1 / GROWTH_SHARE of its length.
GROWTH, GROWTH_SHARE = 128, 16


class KeysStored(Exception):
    """Ends the forward pass of a layer that only stores keys and values."""


class PolicyLayer(CacheLayerMixin):
    """Keys and values of one layer, [batch, kv_heads, slots, head_dim], and the columns in its slots.

    ``pieces`` has the column of every slot. In a sliding layer, whose queries see ``window`` positions, no later query
    sees the slots before ``first``: the layer hides them at once and drops them when it next grows.
    """

    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.pieces: Pieces = ()
        self.incoming: Pieces | None = None  # columns of the next update; set by the policy's hooks
        self.only_store = False  # end the layer's run at the next update
        self.room = GROWTH  # slots that new storage leaves free
        self.record_past = False
        self.first = 0
        self.forgotten = 0  # columns below this may be lost

    @property
    def held(self) -> Pieces:
        """Columns of the slots that later queries may see."""
        skip, pieces = self.first, list(self.pieces)
        while skip and skip >= len(pieces[0]):
            skip -= len(pieces.pop(0))
        if skip:
            pieces[0] = Piece(pieces[0].start + skip, pieces[0].stop)
        return tuple(pieces)

    @property
    def hidden_stop(self) -> int:
        """Columns below this may be lost once the slots that no later query can see are dropped."""
        skip, stop = self.first, self.forgotten
        for piece in self.pieces:
            if skip <= 0:
                break
            stop = max(stop, min(piece.stop, piece.start + skip) if piece.columns is None else piece.stop)
            skip -= len(piece)
        return stop

    @property
    def n_slots(self) -> int:
        """Number of slots that later queries may see, including unused ones of shorter rows."""
        return count(self.pieces) - self.first

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values in those slots."""
        return 0 if self.keys is None else 2 * self.n_slots * self.keys[:, :, :1].numel() * self.keys.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage, including room to grow."""
        return 0 if self.keys is None else 2 * self.keys.numel() * self.keys.element_size()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate empty storage of the type and on the device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of the ``incoming`` columns; return all that the queries of this call may see."""
        if self.incoming is None:
            raise UserError("this KV cache belongs to a policy: use it inside `with policy(model):`")
        incoming, self.incoming = self.incoming, None
        if not incoming:  # a row that leaves no keys and values
            return key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._settle(key_states)
        new = key_states.shape[2]
        assert new == count(incoming), f"{new} keys for {count(incoming)} columns"
        if count(self.pieces) + new > self.keys.shape[2]:
            self._grow(new)
        start, stop = count(self.pieces), count(self.pieces) + new
        self.keys[:, :, start:stop] = key_states
        self.values[:, :, start:stop] = value_states
        self.pieces = join(self.pieces, incoming)
        seen = slice(self.first, stop)
        if self.only_store:
            raise KeysStored
        return self.keys[:, :, seen], self.values[:, :, seen]

    def _settle(self, like: Tensor) -> None:
        """Move the storage to the layer's present device, and out of `torch.inference_mode` once that has ended."""
        if self.keys.device != like.device:  # the model is offloaded or was moved
            self.keys, self.values = self.keys.to(like.device), self.values.to(like.device)
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def keep(self, index: Tensor, piece: Piece) -> None:
        """Keep only these slots, int64 [batch, kv_heads, kept], which hold ``piece`` from now on."""
        index, room = index.to(self.keys.device)[..., None], self.room
        kept = [torch.take_along_dim(stored, index, dim=2) for stored in (self.keys, self.values)]
        self.keys, self.values = (with_room(values, room) for values in kept)
        self.pieces = (piece,)

    def first_columns(self, stop: int) -> PolicyLayer:
        """Return a layer that holds only columns up to ``stop``, in the same storage until it grows."""
        layer = copy.copy(self)
        if stop == 0 or not self.is_initialized:
            layer.reset()
            return layer
        slots = slice(0, count(layer.pieces))
        layer.keys, layer.values = self.keys[:, :, slots], self.values[:, :, slots]
        if stop < layer.pieces[-1].stop:
            layer.crop_to(stop)
            slots = slice(0, count(layer.pieces))
            layer.keys, layer.values = layer.keys[:, :, slots], layer.values[:, :, slots]
        return layer

    def crop_to(self, stop: int) -> None:
        """Drop columns from ``stop`` on; call `check_crop` first."""
        kept: list[Piece] = []
        slots: list[int] = []
        first_slot = 0
        for piece in self.pieces:
            cropped = piece.until(stop)
            if cropped:
                kept.append(cropped)
                slots += range(first_slot, first_slot + len(cropped))
            first_slot += len(piece)
        if slots != list(range(len(slots))):  # the kept slots are not adjacent
            index = torch.tensor(slots, device=self.keys.device)
            for stored in (self.keys, self.values):
                stored[:, :, : len(slots)] = stored[:, :, index]
        self.pieces = join((), kept)
        self.slide()

    def check_crop(self, stop: int) -> None:
        """Raise UserError if a sliding layer has dropped keys that the last columns before ``stop`` see."""
        if self.window is not None and self.forgotten > max(0, stop - self.window + 1):
            raise UserError(f"cannot crop to {stop} tokens: a sliding layer has forgotten what the last of them see")

    def select_rows(self, rows: Tensor) -> None:
        """Make these rows the batch, in this order; a row may be repeated."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))
            self.pieces = tuple(piece.select_rows(rows) for piece in self.pieces)

    def get_seq_length(self) -> int:
        """Number of slots in use; only the cache knows how many tokens were seen."""
        return self.n_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes for transformers' own masks, which a policy replaces."""
        return self.n_slots + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def activate_past_recording(self) -> None:
        """Drop nothing from now on, so that `crop_to` always works: assisted generation needs it."""
        self.record_past = True

    def reset(self) -> None:
        """Empty the layer."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized, self.pieces, self.first, self.forgotten = False, (), 0, 0

    def _grow(self, new: int) -> None:
        """Allocate storage for ``new`` more slots and some room; drop the slots that a sliding layer hides."""
        if not self.record_past and self.first:
            self.forgotten = self.hidden_stop
            kept = slice(self.first, count(self.pieces))
            self.pieces, self.first = self.held, 0
        else:
            kept = slice(0, count(self.pieces))
        more = new + max(self.room, (kept.stop - kept.start + new) // GROWTH_SHARE)
        self.keys, self.values = (with_room(stored[:, :, kept], more) for stored in (self.keys, self.values))

    def slide(self) -> None:
        """Set ``first`` to the first slot that the next query can see."""
        self.first = 0
        if self.window is None or not self.pieces:
            return
        needed = self.pieces[-1].stop - self.window + 1
        self.first = 0
        for piece in self.pieces:
            if piece.stop > needed:
                # Where a piece has explicit columns, only a read from the device could tell its slots apart.
                self.first += max(0, needed - piece.start) if piece.columns is None else 0
                break
            self.first += len(piece)


def with_room(values: Tensor, slots: int) -> Tensor:
    """Copy ``values`` [batch, heads, slots, head_dim] into storage with ``slots`` more slots."""
    batch, heads, used, width = values.shape
    storage = values.new_empty((batch, heads, used + slots, width))
    storage[:, :, :used] = values
    return storage
