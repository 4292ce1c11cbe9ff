"""Norms and angles of residual rows [positions, width] of any type, computed in float32 blocks of rows.

Float32 copies of all rows of a long prompt would cost more than the model's own activations.
"""

import torch
from torch import Tensor

# Positions per block.
BLOCK = 512


def scratch_for(rows: Tensor) -> Tensor:
    """Return one float32 buffer for all blocks of ``rows``: fresh memory would cost more than the arithmetic."""
    return torch.empty((min(BLOCK, len(rows)), rows.shape[1]), device=rows.device)


def one_minus_cosine(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return 1 - cos of the angle between two vectors of norms ``a`` and ``b`` whose difference has norm ``c``.

    From the three sides of a triangle, 1 - cos = (c^2 - (a - b)^2) / (2 a b): nothing cancels where the angle is small.
    """
    # A side is at least the difference of the other two; rounding may see it otherwise.
    return (c.square() - (a - b).square()).clamp_min(0) / (2 * a * b)


def mean_of(values: Tensor) -> float:
    """Mean of a float32 vector, added in float64."""
    return float(values.cpu().double().mean())
