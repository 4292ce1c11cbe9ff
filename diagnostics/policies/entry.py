"""Guards at two entries: when a model enters a policy's block, and when a call enters the model.

They guarantee to inference and training a transformers model whose layers each take a mask and which runs under no
other policy; and calls with one text per row, whose positions follow from its padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.models.anatomy import Anatomy, dissect, unwrapped
from diagnostics.models.attention_tap import PREFIX
from diagnostics.models.libraries import stock_model
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.contract import PolicyTraits
from diagnostics.policies.masks import SERVED
from diagnostics.policies.occupancy import require_free
from diagnostics.support.errors import UserError

# --- A model enters a block ---


@dataclass(frozen=True, eq=False)
class Entrant:
    """A model that may run under a policy: the transformers model, its name and its parts.

    Attributes
    ----------
    model
        The transformers model, without a PEFT or TransformerLens wrapper.
    name
        Its name for messages.
    anatomy
        Its parts.
    implementation
        Its attention implementation, ``sdpa`` or ``eager``.
    """

    model: Any
    name: str
    anatomy: Anatomy
    implementation: str


def admit(model: Any) -> Entrant:
    """Check that a model, a transformers causal language model or a wrapper of it, can run under a policy.

    Raises
    ------
    UserError
        If it is no transformers model, cannot be served, already runs under a policy, or takes no mask per layer.
    """
    inner = stock_model(model)
    if not hasattr(getattr(inner, "config", None), "get_text_config"):
        raise UserError(f"a policy runs transformers models, not {type(model).__name__}")
    name = getattr(inner.config, "_name_or_path", "") or type(inner).__name__
    anatomy = dissect(inner, name)
    require_free(inner)
    implementation = inner.config._attn_implementation
    if implementation.startswith(PREFIX):
        raise UserError(
            "the attention of this model, or of one that shares its configuration, is tapped: leave that block first"
        )
    if implementation not in SERVED:
        raise UserError(
            f"attention implementation {implementation!r} takes no mask per layer: "
            'use model.set_attn_implementation("sdpa")'
        )
    return Entrant(inner, name, anatomy, implementation)


# --- A call enters the model ---


def admit_options(arguments: dict[str, Any], config: Any, anatomy: Anatomy, selecting: PolicyTraits | None) -> None:
    """Raise UserError for options of a decoder stack's call that a policy does not support.

    ``selecting`` is the policy if it runs only some tokens through the upper layers, else None.
    """
    use_cache = arguments.get("use_cache")
    if use_cache is False or (use_cache is None and not getattr(config, "use_cache", True)):
        raise UserError("a policy needs the KV cache: leave out use_cache=False")
    if any(getattr(unwrapped(m), "gradient_checkpointing", False) and m.training for m in anatomy.layers):
        raise UserError(
            "in training mode, layers with gradient checkpointing forget the KV cache that a policy needs: "
            "call model.eval() or model.gradient_checkpointing_disable()"
        )
    for name in ("output_hidden_states", "output_attentions") if selecting is not None else ():
        if arguments.get(name, getattr(config, name, False)):
            raise UserError(
                f"{name}: under {selecting} the upper layers run some tokens only, and what they return is "
                "not in the tokens' places; leave it out, or look at the model at full depth"
            )


def admit_cache(cache: Any, policy: PolicyTraits, n_layers: int) -> PolicyCache:
    """Return the KV cache that the caller passed if it is the policy's own and fits; else raise UserError."""
    if not isinstance(cache, PolicyCache):
        raise UserError(
            f"a policy runs with its own KV cache, not with a {type(cache).__name__}: leave out past_key_values "
            "and cache_implementation, and go on with the past_key_values of the output"
        )
    if cache.policy != policy:
        raise UserError(f"this KV cache was made under {cache.policy}, the model runs under {policy}")
    if cache.writing:
        raise UserError("a call was interrupted while it wrote into this KV cache: prefill anew")
    if len(cache.layers) != n_layers:
        raise UserError(f"this KV cache has {len(cache.layers)} layers, the model {n_layers}")
    return cache


def admit_padding(cache: PolicyCache, mask: Any, batch: int, n_new: int, device: torch.device) -> None:
    """Record the padding of the first call in the cache; raise UserError for masks that are not left padding.

    ``mask`` is the attention mask [batch, all tokens so far] of a call with ``n_new`` new tokens, or None.
    """
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise UserError(
            "a policy makes the attention masks itself: give attention_mask as [batch, tokens], or none; where a "
            "class for text and other media makes them, use the class of its text model alone"
        )
    total = cache.n_columns + n_new
    if tuple(mask.shape) != (batch, total):
        raise UserError(f"attention_mask is {list(mask.shape)}, not {[batch, total]}: all tokens so far and the new")
    real = mask.to(device) != 0
    if bool((real[:, 1:] < real[:, :-1]).any()):
        raise UserError(
            "attention_mask has padding after tokens: pad on the left (tokenizer.padding_side = 'left'); with "
            "prompt tuning, whose virtual tokens come before the padding, give texts of one length"
        )
    if not bool(real[:, -1].all()):
        raise UserError("attention_mask has a row without tokens")
    padding = (~real).sum(1)
    if cache.n_columns == 0:
        cache.padding = padding if bool(padding.any()) else None
    elif bool((padding != (0 if cache.padding is None else cache.padding.to(device))).any()):
        raise UserError(
            "attention_mask has other padding than the first call into this KV cache was told of: "
            "give the mask from the first call on"
        )


def positions(start: int, stop: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Return the positions of columns ``start`` to ``stop``, int64 [1 or batch, columns]; negative at padding."""
    columns = torch.arange(start, stop, device=device)[None]
    return columns if padding is None else columns - padding.to(device)[:, None]


def admit_positions(position_ids: Tensor, own: Tensor) -> None:
    """Raise UserError unless the caller's positions [..., 1 or batch, tokens] are those of its tokens, ``own``."""
    if position_ids.shape[-1] != own.shape[-1] or bool(((position_ids.to(own.device) != own) & (own >= 0)).any()):
        raise UserError(
            "position_ids are not those of one text per row, from 0 on and through all calls of a KV cache (several "
            "texts in one row?): leave them out, and give each text a row of its own"
        )
