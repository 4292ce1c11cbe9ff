"""The guards at the two doors: when a model enters a policy's block, and when a call enters the model.

What they let in, inference and training can rely on: a transformers model whose layers take a mask each, held by nobody
else; one text per row, in positions that follow from its padding.
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
    """A model that may run under a policy: the transformers model itself, and what is known of it.

    Attributes
    ----------
    model
        The transformers model, out of a PEFT or TransformerLens wrapper.
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
    """Look at a model, a transformers causal language model or a wrapper of it, that is to run under a policy.

    Raises
    ------
    UserError
        If it is no transformers model, cannot be served, runs under a policy already, or takes no mask per layer.
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
    """Refuse what a call of the decoder stack may ask for and a policy does not serve; raise UserError.

    ``selecting`` is the policy if only some tokens run through the upper layers under it, else None.
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
    """Return the KV cache that a call brought along, if it is the policy's own and fits; else raise UserError."""
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
    """Note in the cache the padding of its first call; refuse masks that are not left padding.

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


def admit_positions(given: Tensor, own: Tensor) -> None:
    """Raise UserError unless the positions [..., 1 or batch, tokens] that a call brought along are its tokens' own."""
    if given.shape[-1] != own.shape[-1] or bool(((given.to(own.device) != own) & (own >= 0)).any()):
        raise UserError(
            "position_ids are not those of one text per row, from 0 on and through all calls of a KV cache (several "
            "texts in one row?): leave them out, and give each text a row of its own"
        )
