"""Queries as the attention uses them, from the output of the projection that makes them.

For backends that see modules but not the attention function. A family that does more to its queries than is known here
is refused by the attention identity that every run checks, never served silently wrong.
"""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.arguments import take_rows
from diagnostics.support.errors import UserError

# Modules that make queries alone, and those that make queries, keys and values at once, queries first.
ALONE = ("q_proj", "wq")
FUSED = ("qkv_proj", "c_attn")
INTERLEAVED = ("query_key_value",)  # queries, keys and values of one head side by side


def query_projection(attention: nn.Module) -> nn.Module:
    """Return the module whose output holds an attention's queries; raise UserError where none is known."""
    for name in (*ALONE, *FUSED, *INTERLEAVED):
        if isinstance(module := getattr(attention, name, None), nn.Module):
            return module
    raise UserError(
        f"the queries of {type(attention).__name__} come from no projection known to the nnsight backend: "
        "use the hooks backend"
    )


def turned_queries(
    attention: nn.Module, anatomy: Anatomy, projected: Tensor, arguments: dict[str, Any], rows: slice
) -> Tensor:
    """Return queries after query norm and rotary embedding, [heads, rows, head_dim].

    ``projected`` is the output of `query_projection`, [1, rows, ...]; ``arguments`` are those of the layer's call.
    """
    query = projected[:, rows]
    heads, width = anatomy.n_heads, anatomy.head_dim
    if hasattr(attention, INTERLEAVED[0]):
        query = query.unflatten(-1, (heads, 3 * width))[..., :width]
        norm = _query_norm(attention)
        query = query if norm is None else norm(query)
    else:
        query = query[..., : heads * width]
        norm = _query_norm(attention)
        jointly = norm is not None and norm.weight.shape[0] != width  # OLMo 2 norms all heads together
        query = norm(query) if norm is not None and jointly else query
        query = query.unflatten(-1, (heads, width))
        query = norm(query) if norm is not None and not jointly else query
    query = query.transpose(1, 2)
    embeddings = arguments.get("position_embeddings")
    if embeddings is not None:
        cos, sin = take_rows(embeddings, rows)
        turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        if turn is None:
            raise UserError(f"the rotary embedding of {type(attention).__name__} is not known: use the hooks backend")
        # Families that turn a part of each head take it out before the function, or leave that to the function.
        part = getattr(attention, "rotary_ndims", width)
        turned, kept = query[..., :part], query[..., part:]
        query = torch.cat([turn(turned, turned, cos, sin)[0], kept], dim=-1)
    return query[0]


def _query_norm(attention: nn.Module) -> Any:
    """Return the norm of the queries, or None."""
    return getattr(attention, "q_norm", None) or getattr(attention, "q_layernorm", None)
