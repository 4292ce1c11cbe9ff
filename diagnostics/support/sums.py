"""Sums that lose no digits, on any processor.

Libraries add float32 in blocks, in vector lanes or one number after the other, as the processor has it; over thousands
of numbers the last way loses what the first keeps. Sums over a vocabulary, over keys or over positions are therefore
taken in float64. Sums over a residual's width are not: their error is about 1e-6 of them, whatever the order.
"""

import torch
from torch import Tensor

# Rows added in float32 before float64 takes over: a float64 copy of a long prompt's residuals would cost too much.
BLOCK = 256


def wide(device: torch.device) -> torch.dtype:
    """Return the type to sum in: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def total(values: Tensor) -> Tensor:
    """Sum over the last dimension."""
    return values.sum(-1, dtype=wide(values.device))


def mean_row(rows: Tensor) -> Tensor:
    """Mean of rows [n, width] of any floating-point type, float32 [width]."""
    n_blocked = len(rows) // BLOCK * BLOCK
    sums = rows[:n_blocked].unflatten(0, (-1, BLOCK)).sum(dim=1, dtype=torch.float32)
    rest = rows[n_blocked:].sum(dim=0, dtype=torch.float32)
    return ((sums.sum(dim=0, dtype=wide(rows.device)) + rest) / len(rows)).float()
