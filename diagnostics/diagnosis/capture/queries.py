"""Queries as the attention uses them, from the output of the projection that makes them.

For backends that see modules but not the attention function. A family that does more to its queries than is known here
is refused by the attention identity that every run checks, never served silently wrong.
"""

from typing import Any

from torch import Tensor, nn

from diagnostics.models.anatomy import Anatomy
from diagnostics.models.rotation import turn, turning_function
from diagnostics.policies.arguments import take_rows
from diagnostics.support.errors import UserError

# Modules that make queries alone, and those that make queries, keys and values at once, queries first.
ALONE = ("q_proj", "wq")
FUSED = ("qkv_proj", "c_attn")
INTERLEAVED = ("query_key_value",)  # queries, keys and values of one head side by side


def known_query_projection(attention: nn.Module) -> nn.Module | None:
    """Return the module whose output holds an attention's queries; None where none is known."""
    named = (getattr(attention, name, None) for name in (*ALONE, *FUSED, *INTERLEAVED))
    return next((module for module in named if isinstance(module, nn.Module)), None)


def query_projection(attention: nn.Module) -> nn.Module:
    """Return `known_query_projection`; raise UserError where none is known."""
    module = known_query_projection(attention)
    if module is None:
        raise UserError(
            f"the queries of {type(attention).__name__} come from no projection known to the nnsight backend: "
            "use the hooks backend"
        )
    return module


def unturned_queries(attention: nn.Module, anatomy: Anatomy, projected: Tensor) -> Tensor:
    """Return queries after query norm and before rotary embedding, [1, heads, rows, head_dim].

    ``projected`` is the output of `query_projection`, [1, rows, ...].
    """
    heads, width, norm = anatomy.n_heads, anatomy.head_dim, _query_norm(attention)
    if hasattr(attention, INTERLEAVED[0]):
        query = projected.unflatten(-1, (heads, 3 * width))[..., :width]
        return (query if norm is None else norm(query)).transpose(1, 2)
    query = projected[..., : heads * width]
    jointly = norm is not None and norm.weight.shape[0] != width  # OLMo 2 norms all heads together
    query = norm(query) if norm is not None and jointly else query
    query = query.unflatten(-1, (heads, width))
    return (norm(query) if norm is not None and not jointly else query).transpose(1, 2)


def turned_queries(attention: nn.Module, unturned: Tensor, arguments: dict[str, Any], rows: slice) -> Tensor:
    """Return queries after rotary embedding, [heads, rows, head_dim].

    ``unturned`` are `unturned_queries` of these rows; ``arguments`` are those of the layer's call.
    """
    embeddings = arguments.get("position_embeddings")
    if embeddings is None:
        return unturned[0]
    if turning_function(attention) is None:
        raise UserError(f"the rotary embedding of {type(attention).__name__} is not known: use the hooks backend")
    return turn(attention, unturned, *take_rows(embeddings, rows))[0]


def _query_norm(attention: nn.Module) -> Any:
    """Return the norm of the queries, or None."""
    return getattr(attention, "q_norm", None) or getattr(attention, "q_layernorm", None)
