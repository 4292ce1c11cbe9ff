"""The slow reference of the self-test: passes of the stock model over complete sequences, under masks.

It shares no code with the sweep, the policies or their caches: the model's own code runs every token through every
layer and builds its own mask for each layer (causal, sliding, ...); the test only hides some more entries.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.models.anatomy import Anatomy, parameter_names
from diagnostics.models.attention_tap import attention_implementation

MASKED_BY = ("sdpa", "eager")  # implementations that take a mask for every query and key


class Unprovable(Exception):
    """The stock model cannot be run under masks, so no reference exists."""


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, padded on the left: token ids and mask (1 for tokens), int64 [rows, columns].

    In every row the tokens before column ``n_prompt`` - 1 are prompt, the others decode phase; the first token after
    the padding is the anchor.
    """

    ids: Tensor
    mask: Tensor
    n_prompt: int

    @property
    def positions(self) -> Tensor:
        """Positions as ``generate()`` counts them: 0 at the first token; padding gets 0."""
        return (self.mask.cumsum(-1) - 1).clamp_min(0)

    @property
    def decode(self) -> slice:
        """Columns of the decode phase; the last prompt token is the first of them."""
        return slice(self.n_prompt - 1, None)

    @property
    def hidden(self) -> Tensor:
        """Keys that SPEED hides in its upper layers, prompt from decode-phase queries: bool [rows, queries, keys]."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        decode = columns >= self.n_prompt - 1
        prompt = (self.mask.cumsum(-1) > 1) & ~decode
        return decode[None, :, None] & prompt[:, None, :]


@torch.no_grad()
def stock_logits(model: Any, batch: Batch) -> Tensor:
    """Return the model's own logits, [rows, columns, vocabulary], without a cache."""
    arguments = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        arguments["position_ids"] = batch.positions
    return model(**arguments).logits


@torch.no_grad()
def masked_logits(model: Any, anatomy: Anatomy, batch: Batch, cutoff: int) -> Tensor:
    """Return logits of a full-length pass in which layers from ``cutoff`` on hide the keys that SPEED hides."""
    with _hiding(anatomy, cutoff, batch.hidden):
        return stock_logits(model, batch)


@contextmanager
def masks(model: Any) -> Iterator[None]:
    """Make the model take masks inside the block, with any attention implementation."""
    if model.config._attn_implementation in MASKED_BY:
        yield
        return
    with attention_implementation(model, "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"):
        yield


@contextmanager
def _hiding(anatomy: Anatomy, cutoff: int, hidden: Tensor) -> Iterator[None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(zip(parameter_names(module), args, strict=False)) | kwargs
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != hidden.shape[-2:]:
            raise Unprovable("its layers take no mask of queries and keys")
        entries = hidden[:, None].to(mask.device)
        if mask.dtype == torch.bool:
            changed = mask & ~entries
        else:
            changed = mask.expand(len(hidden), -1, -1, -1).masked_fill(entries, torch.finfo(mask.dtype).min)
        return (), named | {"attention_mask": changed}

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in anatomy.layers[cutoff:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
