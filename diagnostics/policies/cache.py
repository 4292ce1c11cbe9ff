"""The KV cache of all policies: every layer holds its own columns.

It is a transformers ``Cache``: stock models write into it and ``generate()`` passes it on. ``get_seq_length()`` is the
number of columns seen, whatever the layers dropped. Only a model under the cache's policy can write into it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.cache_layer import PolicyLayer
from diagnostics.policies.columns import Pieces
from diagnostics.policies.contract import PolicyTraits
from diagnostics.support.errors import UserError


class PolicyCache(Cache):
    """KV cache of one policy: ``len(cache.layers)`` layers that may hold different tokens.

    ``n_columns`` is the number of columns that the model has seen. ``padding`` is the number of padding columns at the
    left of each row, int64 [batch], or None. ``batch`` is None until the first call. ``length`` is the number of
    columns that the text is known to reach. ``factors`` is the set of rotary frequencies of the keys, for a model that
    has several (see `diagnostics.models.rope`).
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
        """Whether the next token follows logits: the model then generated it, and it is decode phase."""
        return bool(self.decoded) and self.decoded[-1].stop == self.n_columns

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values in use, measured from the tensors; less than `allocated_bytes`."""
        return sum(layer.kv_bytes for layer in self.layers)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of storage, including room to grow."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def columns(self, layer: int) -> Pieces:
        """Return the columns whose keys and values a layer holds; under FastKV they may differ between heads."""
        return self.layers[layer].held

    def reserve(self, tokens: int) -> None:
        """Allocate room for this many tokens after the prompt; call it before the prompt."""
        for layer in self.layers:
            layer.room = max(tokens, 1)

    def copy(self) -> PolicyCache:
        """Return an independent copy: one prefilled document, many questions."""
        return copy.deepcopy(self)

    def first_columns(self, policy: PolicyTraits, stops: Sequence[int]) -> PolicyCache:
        """Return a cache of ``policy`` whose layers hold only columns up to their ``stops``; nothing is copied."""
        cache = copy.copy(self)
        cache.policy = policy
        cache.layers = [layer.first_columns(stop) for layer, stop in zip(self.layers, stops, strict=True)]
        return cache

    def repeated(self, rows: int) -> PolicyCache:
        """Return the cache of a batch that repeats this cache's one row ``rows`` times; this one stays as it is."""
        cache = self.first_columns(self.policy, [self.n_columns] * len(self.layers))
        cache.batch_repeat_interleave(rows)
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of columns seen, the same for every layer: where the next token goes."""
        return self.n_columns

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` columns, as transformers' caches do; 0 or negative.

        Raises
        ------
        UserError
            For more columns than the cache has, and for prompt columns if the policy selected among prompt tokens.
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
        """Make these rows the batch; beam search calls this."""
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
