"""The KV cache of all policies: every layer holds columns of its own.

It is a transformers ``Cache``: stock models write into it and ``generate()`` carries it along. Storage grows ahead of
need, so a decode step writes one row instead of copying all. Positions are kept apart from storage: what a layer holds
is told by columns (see `diagnostics.policies.columns`), and ``get_seq_length()`` is the number of columns seen,
whatever the layers dropped. Only a model under the cache's policy can write into it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.columns import Piece, Pieces, count, join
from diagnostics.policies.contract import PolicyTraits
from diagnostics.support.errors import UserError

# Slots a layer grows by at least when it is full, and the share of its length that it grows by.
GROWTH, GROWTH_SHARE = 128, 16


class KeysStored(Exception):
    """Ends the run of a layer that was only to store keys and values."""


class PolicyLayer(CacheLayerMixin):
    """Keys and values of one layer, [batch, kv_heads, slots, head_dim], and the columns in its slots.

    ``pieces`` tells the column of every slot. A sliding layer (``window``) leaves out the first slots, up to ``first``,
    which no later query can see, and forgets them when it next grows.
    """

    is_croppable = True

    def __init__(self, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.pieces: Pieces = ()
        self.incoming: Pieces | None = None  # columns of the next update; set by the policy's hooks
        self.only_store = False  # end the layer's run at the next update
        self.room = GROWTH  # slots to leave free when storage is made
        self.record_past = False
        self.first = 0
        self.forgotten = 0  # columns below this may be lost

    @property
    def held(self) -> Pieces:
        """Columns of the slots that later queries may look at."""
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
        """Number of slots that later queries may look at, unused ones of shorter rows included."""
        return count(self.pieces) - self.first

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values in those slots."""
        return 0 if self.keys is None else 2 * self.n_slots * self.keys[:, :, :1].numel() * self.keys.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage, room to grow included."""
        return 0 if self.keys is None else 2 * self.keys.numel() * self.keys.element_size()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty storage like the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values of the announced columns; return all that the queries of this call may look at."""
        if self.incoming is None:
            raise UserError("this KV cache belongs to a policy: use it inside `with policy(model):`")
        incoming, self.incoming = self.incoming, None
        if not incoming:  # a row that is not to be held
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
        """Bring the storage to where the layer computes now, and out of `torch.inference_mode` when that has ended."""
        if self.keys.device != like.device:  # of an offloaded or a moved model
            self.keys, self.values = self.keys.to(like.device), self.values.to(like.device)
        if self.keys.is_inference() and not torch.is_inference_mode_enabled():
            self.keys, self.values = self.keys.clone(), self.values.clone()

    def keep(self, index: Tensor, piece: Piece) -> None:
        """Keep only these slots, int64 [batch, kv_heads, kept], which hold ``piece`` from now on."""
        index, room = index.to(self.keys.device)[..., None], self.room
        kept = [torch.take_along_dim(held, index, dim=2) for held in (self.keys, self.values)]
        self.keys, self.values = (with_room(values, room) for values in kept)
        self.pieces = (piece,)

    def first_columns(self, stop: int) -> PolicyLayer:
        """Return a layer that holds only columns up to ``stop``, in the same storage until it grows."""
        made = copy.copy(self)
        if stop == 0 or not self.is_initialized:
            made.reset()
            return made
        slots = slice(0, count(made.pieces))
        made.keys, made.values = self.keys[:, :, slots], self.values[:, :, slots]
        if stop < made.pieces[-1].stop:
            made.crop_to(stop)
            slots = slice(0, count(made.pieces))
            made.keys, made.values = made.keys[:, :, slots], made.values[:, :, slots]
        return made

    def crop_to(self, stop: int) -> None:
        """Drop columns from ``stop`` on; see `check_crop` first."""
        kept: list[Piece] = []
        slots: list[int] = []
        at = 0
        for piece in self.pieces:
            cropped = piece.until(stop)
            if cropped:
                kept.append(cropped)
                slots += range(at, at + len(cropped))
            at += len(piece)
        if slots != list(range(len(slots))):  # slots between those that stay were dropped
            index = torch.tensor(slots, device=self.keys.device)
            for held in (self.keys, self.values):
                held[:, :, : len(slots)] = held[:, :, index]
        self.pieces = join((), kept)
        self.slide()

    def check_crop(self, stop: int) -> None:
        """Raise UserError where a sliding layer has forgotten what dropping columns from ``stop`` on uncovers."""
        if self.window is not None and self.forgotten > max(0, stop - self.window + 1):
            raise UserError(f"cannot crop to {stop} tokens: a sliding layer has forgotten what the last of them see")

    def select_rows(self, rows: Tensor) -> None:
        """Make these rows of the batch the batch, in this order and as often as given."""
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.keys.device))
            self.values = self.values.index_select(0, rows.to(self.values.device))
            self.pieces = tuple(piece.select_rows(rows) for piece in self.pieces)

    def get_seq_length(self) -> int:
        """Number of slots in use; the cache, not its layers, knows how many tokens were seen."""
        return self.n_slots

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes for transformers' own masks, which are not used under a policy."""
        return self.n_slots + query_length, 0

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def activate_past_recording(self) -> None:
        """Forget nothing from now on, so that `crop_to` always works: assisted generation asks for it."""
        self.record_past = True

    def reset(self) -> None:
        """Empty the layer."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized, self.pieces, self.first, self.forgotten = False, (), 0, 0

    def _grow(self, new: int) -> None:
        """Make storage for ``new`` more slots and some room; drop the slots that a sliding layer leaves out."""
        if not self.record_past and self.first:
            self.forgotten = self.hidden_stop
            kept = slice(self.first, count(self.pieces))
            self.pieces, self.first = self.held, 0
        else:
            kept = slice(0, count(self.pieces))
        more = new + max(self.room, (kept.stop - kept.start + new) // GROWTH_SHARE)
        self.keys, self.values = (with_room(held[:, :, kept], more) for held in (self.keys, self.values))

    def slide(self) -> None:
        """Find the first slot that the next query can see."""
        self.first = 0
        if self.window is None or not self.pieces:
            return
        needed = self.pieces[-1].stop - self.window + 1
        self.first = 0
        for piece in self.pieces:
            if piece.stop > needed:
                # Slots of a piece with columns of its own are not told apart without asking the device.
                self.first += max(0, needed - piece.start) if piece.columns is None else 0
                break
            self.first += len(piece)


class PolicyCache(Cache):
    """KV cache of one policy: ``len(cache.layers)`` layers that may hold different tokens.

    ``n_columns`` is the number of columns seen by the model, ``padding`` int64 [batch] the padding columns at the left
    of each row, or None. ``batch`` is None until the first call. ``length`` is the number of columns that its text is
    known to come to, and ``factors`` the set of rotary frequencies of its keys, where a model has several (see
    `diagnostics.models.rope`).
    """

    def __init__(self, policy: PolicyTraits, anatomy: Anatomy) -> None:
        sliding = [kind == "sliding_attention" for kind in anatomy.layer_types]
        super().__init__(layers=[PolicyLayer(anatomy.sliding_window if slides else None) for slides in sliding])
        self.policy = policy
        self.n_columns = 0
        self.n_prompt = 0  # columns of the first prompt
        self.batch: int | None = None
        self.padding: Tensor | None = None
        self.decoded: Pieces = ()  # columns of the decode phase
        self.length = 0
        self.factors: int | None = None
        self.writing = False  # a call has begun and not ended

    @property
    def awaits_token(self) -> bool:
        """Whether the next token follows logits: it is then the model's own, and decode phase."""
        return bool(self.decoded) and self.decoded[-1].stop == self.n_columns

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in use, measured from the tensors; less than `allocated_bytes`."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage, room to grow included."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def columns(self, layer: int) -> Pieces:
        """Columns whose keys and values a layer holds; in FastKV they may differ from head to head."""
        return self.layers[layer].held

    def reserve(self, tokens: int) -> None:
        """Have storage made with room for this many tokens after the prompt; call before the prompt."""
        for layer in self.layers:
            layer.room = max(tokens, 1)

    def copy(self) -> PolicyCache:
        """Return an independent copy: one prefilled document, many questions."""
        return copy.deepcopy(self)

    def first_columns(self, policy: PolicyTraits, stops: Sequence[int]) -> PolicyCache:
        """Return a cache of ``policy`` that holds of each layer only columns up to ``stops``; nothing is copied."""
        made = copy.copy(self)
        made.policy = policy
        made.layers = [layer.first_columns(stop) for layer, stop in zip(self.layers, stops, strict=True)]
        return made

    def repeated(self, rows: int) -> PolicyCache:
        """Return a cache of a batch whose rows are each that of this one row; this one stays as it is."""
        made = self.first_columns(self.policy, [self.n_columns] * len(self.layers))
        made.batch_repeat_interleave(rows)
        return made

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns seen, the same for every layer: where the next token goes."""
        return self.n_columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns, as transformers' caches do; 0 or negative.

        Raises
        ------
        UserError
            For more columns than there are, and for columns of the prompt where the policy chose among its tokens.
        """
        stop = self.n_columns + tokens_to_remove
        if not 0 <= stop <= self.n_columns:
            raise UserError(f"cannot crop by {tokens_to_remove}: give -{self.n_columns} to 0")
        if stop < self.n_prompt and not self.policy.crops_prompt:
            raise UserError(f"cannot crop into the prompt under {self.policy.name}: it chose among all of its tokens")
        if stop == self.n_columns:
            return
        if stop == 0:
            self.reset()
            return
        for layer in self.layers:
            layer.check_crop(stop)
        for layer in self.layers:
            layer.crop_to(stop)
        self.n_columns, self.n_prompt, self.length = stop, min(self.n_prompt, stop), min(self.length, stop)
        self.decoded = tuple(cropped for piece in self.decoded if (cropped := piece.until(stop)))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make these rows the batch, as beam search asks."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of the batch."""
        for layer in self.layers:
            layer.select_rows(indices)
        self.batch = len(indices)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, indices.to(self.padding.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self.batch_select_indices(torch.arange(self.batch or 0).repeat_interleave(repeats))

    def reset(self) -> None:
        """Empty the cache."""
        super().reset()
        self.n_columns, self.n_prompt, self.batch, self.padding = 0, 0, None, None
        self.decoded = ()
        self.length, self.factors = 0, None
        self.writing = False


def with_room(values: Tensor, slots: int) -> Tensor:
    """Copy [batch, heads, slots, head_dim] into storage with this many more slots."""
    batch, heads, used, width = values.shape
    storage = values.new_empty((batch, heads, used + slots, width))
    storage[:, :, :used] = values
    return storage
