"""A processor that adds float32 one number after the other, from the end: what some libraries do on some processors.

Only float32 arithmetic changes; float64 references stay what they are. ``pytest --sequential-sums`` runs any test so.
"""

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def _add_up(values, dims, keepdim):
    """Sum over ``dims``, strictly one number after the other."""
    dims = sorted({d % values.ndim for d in (dims or range(values.ndim))})
    rest = [d for d in range(values.ndim) if d not in dims]
    count = int(np.prod([values.shape[d] for d in dims]))
    rows = values.permute(*rest, *dims).reshape(*(values.shape[d] for d in rest), count)
    if not rows.numel():
        result = rows.new_zeros(rows.shape[:-1])
    else:
        result = torch.from_numpy(np.add.accumulate(rows.detach().flip(-1).numpy(), axis=-1)[..., -1].copy())
    return result.reshape([1 if d in dims else n for d, n in enumerate(values.shape)]) if keepdim else result


def _multiply(a, b):
    """Matrix product [..., n, k] x [..., k, m], up to 16 columns of k at a time, from the last."""
    k = a.shape[-1]
    step = max(1, min(16, k // 16))
    product = torch.bmm if a.ndim == 3 else torch.mm
    out = a.new_zeros(*a.shape[:-1], b.shape[-1])
    for start in reversed(range(0, k, step)):
        out += product(a[..., start : start + step], b[..., start : start + step, :])
    return out


def _add_multiply(bias, a, b, *, beta=1, alpha=1):
    return beta * bias + alpha * _multiply(a, b)


def _sum(values, dims=None, keepdim=False):
    return _add_up(values, dims, keepdim)


def _mean(values, dims=None, keepdim=False):
    result = _add_up(values, dims, keepdim)
    return result / max(1, values.numel() // max(1, result.numel()))


def _softmax(values, dim, half_to_float):
    weights = (values - values.amax(dim, keepdim=True)).exp()
    return weights / _add_up(weights, [dim], True)


def _log_softmax(values, dim, half_to_float):
    shifted = values - values.amax(dim, keepdim=True)
    return shifted - _add_up(shifted.exp(), [dim], True).log()


def _norm(values, order=2, dims=None, keepdim=False):
    if order != 2:
        return _add_up(values.abs() ** order, dims, keepdim) ** (1 / order)
    return _add_up(values.square(), dims, keepdim).sqrt()


OTHERWISE = {
    aten.mm.default: _multiply,
    aten.bmm.default: _multiply,
    aten.addmm.default: _add_multiply,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.linalg_vector_norm.default: _norm,
}


class SequentialSums(TorchDispatchMode):
    """Within this block float32 sums are taken one number after the other."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Replace the sums of float32; whoever asks for another type to sum in gets it."""
        kwargs = kwargs or {}
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        exact = kwargs.get("dtype") not in (None, torch.float32)
        if func in OTHERWISE and not exact and all(t.dtype == torch.float32 for t in tensors):
            kwargs.pop("dtype", None)
            return OTHERWISE[func](*args, **kwargs)
        return func(*args, **kwargs)
