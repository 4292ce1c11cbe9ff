"""The rotary embedding of a layer outside a forward pass: turning queries and keys, and turning them back.

Families differ in which numbers of a head form a pair and in how many of them turn, so the function of the family's own
modelling file does the work. It is linear in cosine and sine: with the inverse of both it turns back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import Anatomy, parameter_names, unwrapped


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of one attention at positions 0, 1, ...; ``cos`` and ``sin`` are [1, positions, turned]."""

    attention: nn.Module
    cos: Tensor
    sin: Tensor

    def turned(self, vectors: Tensor, positions: slice) -> Tensor:
        """Turn queries or keys [heads, rows, head_dim] to their positions."""
        return turn(self.attention, vectors[None], self.cos[:, positions], self.sin[:, positions])[0]

    def unturned(self, vectors: Tensor, positions: slice) -> Tensor:
        """Turn queries or keys [heads, rows, head_dim] at these positions back."""
        cos, sin = self.cos[:, positions], self.sin[:, positions]
        scale = cos.square() + sin.square()  # not 1 where a family scales them (YaRN, longrope)
        return turn(self.attention, vectors[None], cos / scale, -sin / scale)[0]


class NoRotation:
    """The rotary embedding of a layer that has none."""

    def turned(self, vectors: Tensor, positions: slice) -> Tensor:
        """Return the vectors."""
        return vectors

    unturned = turned


def rotation(anatomy: Anatomy, layer: int, n_positions: int, device: torch.device) -> Rotation | None:
    """Return the rotary embedding of a layer at the first ``n_positions``, float32; None where none is known."""
    module: Any = unwrapped(getattr(unwrapped(anatomy.stack), "rotary_emb", None))
    attention = unwrapped(anatomy.attentions[layer])
    if module is None or turning_function(attention) is None:
        return None
    names = parameter_names(module)
    if names not in (["x", "position_ids"], ["x", "position_ids", "layer_type"]):
        return None
    if any(buffer.is_meta for buffer in module.buffers()):  # offloaded
        return None
    own_frequencies = isinstance(getattr(module, "rope_type", None), dict)  # of each type of layer
    options = {"layer_type": anatomy.layer_types[layer]} if own_frequencies else {}
    # Of a copy: some kinds of frequencies depend on the longest call, and the module remembers it.
    module = copy.deepcopy(module)
    positions = torch.arange(n_positions, device=device)[None]
    angles = type(module).forward(module, torch.zeros(1, device=device), positions, **options)
    if not (isinstance(angles, tuple) and len(angles) == 2):
        return None
    return Rotation(attention, *angles)


def turning_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return the family's function that turns queries and keys; None where it has none."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def turn(attention: nn.Module, vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys [1, heads, rows, head_dim] as an attention with a turning function does.

    ``cos`` and ``sin`` are [1, rows, turned].
    """
    function = turning_function(attention)
    assert function is not None
    # Families that turn a part of each head take it out before the function, or leave that to the function.
    part = getattr(attention, "rotary_ndims", vectors.shape[-1])
    inner, outer = vectors[..., :part], vectors[..., part:]
    return torch.cat([function(inner, inner, cos, sin)[0], outer], dim=-1)
