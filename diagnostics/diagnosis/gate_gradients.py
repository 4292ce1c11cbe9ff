"""Gradients of a loss by gates on what each layer adds: one backward pass, layer by layer from the last.

A gate g of layer l multiplies what both of its branches add to the residual: h_mid = h + g a and h_out = h_mid + g m,
with a the addition of the attention and m that of the rest. At g = 1, where the model is as it is,

    dL/dg = <dL/da, a> + <dL/dm, m>,   dL/dm = dL/dh_out,   m = h_out - h - a.

So no gate is put into the model, and only the end of the attention must be known (`residual_path`), whether attention
and MLP run one after the other or side by side. The forward pass keeps each layer's input, layers x tokens x width; the
backward pass runs one layer at a time again, with gradients. It asks for those of activations alone: weights are not
touched, and hooks only look.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from diagnostics.diagnosis.capture.residual_path import ResidualPath, residual_paths
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.arguments import residual_of
from diagnostics.support.errors import UserError, one_line
from diagnostics.support.sums import wide

# Tolerated relative difference of a layer's output when it runs again.
RUNS_AGAIN = {torch.float32: 1e-3, torch.float64: 1e-3}
RUNS_AGAIN_IN_HALF = 0.05

# Takes the output of the last layer [tokens, width], and returns the gradient of the loss by it, float32.
LossGradient = Callable[[Tensor], Tensor]


def gate_gradients(lm: LoadedModel, token_ids: Sequence[int], loss_gradient: LossGradient) -> np.ndarray:
    """Return dL/dg of every layer's gate at g = 1, float64 [L], for one row of tokens.

    Raises
    ------
    UserError
        If the weights are not on this machine, a module of the model passes on no gradient, or a layer does not give
        the same when it runs again.
    """
    if lm.wrapper is not None and not getattr(lm.wrapper, "dispatched", True):
        raise UserError(f"gradients of {lm.name!r} cannot be computed: the model runs elsewhere")
    # Of a caller in inference mode too: its tensors know no gradients.
    with torch.inference_mode(False):
        pass_ = _Pass(lm, token_ids)
        gradient = loss_gradient(pass_.states[-1][0])[None]
        gates = np.empty(lm.anatomy.n_layers)
        for layer in reversed(range(lm.anatomy.n_layers)):
            gates[layer], gradient = pass_.back_through(layer, gradient)
    if not np.isfinite(gates).all():
        raise UserError(f"gradients of {lm.name!r} are not finite in {str(lm.dtype).removeprefix('torch.')}")
    return gates


class _Pass:
    """One forward pass without gradients: the inputs of all layers, how they were called, and the last output."""

    @torch.no_grad()
    def __init__(self, lm: LoadedModel, token_ids: Sequence[int]) -> None:
        self.lm = lm
        self.paths: tuple[ResidualPath, ...] = residual_paths(lm.anatomy, lm.device)
        self.states: list[Tensor] = []
        self.calls: list[Callable[[Tensor], Any]] = []
        with ExitStack() as stack:
            for layer in lm.anatomy.layers:
                stack.callback(layer.register_forward_pre_hook(self._before, with_kwargs=True).remove)
            stack.callback(lm.anatomy.layers[-1].register_forward_hook(self._after_last).remove)
            lm.anatomy.stack(input_ids=torch.tensor([list(token_ids)], device=lm.device), use_cache=False)
        if len(self.states) != lm.anatomy.n_layers + 1:
            raise UserError(f"gradients of {lm.name!r} cannot be computed: its layers do not run once each")

    def _before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}

        def call(hidden: Tensor) -> Any:
            return layer(hidden, *args[1:], **kwargs) if args else layer(**kwargs | {"hidden_states": hidden})

        # A copy: some layers add in place.
        self.states.append((args[0] if args else kwargs["hidden_states"]).clone())
        self.calls.append(call)

    def _after_last(self, _: nn.Module, __: Any, output: Any) -> None:
        self.states.append(residual_of(output).clone())

    def back_through(self, layer: int, gradient: Tensor) -> tuple[float, Tensor]:
        """Return dL/dg of a layer and the gradient by its input, from that by its output; drop the output's state."""
        module, path = self.lm.anatomy.layers[layer], self.paths[layer]
        expected = self.states.pop()
        shown: list[Tensor] = []

        def on_added(_: nn.Module, __: Any, output: Any) -> None:
            shown.append(residual_of(output))

        with torch.enable_grad(), _passing_gradients(module, layer, self.lm.name):
            residual = self.states[-1].detach().requires_grad_()
            handle = path.adder.register_forward_hook(on_added)
            try:
                output = residual_of(self.calls[layer](residual.clone()))
            finally:
                handle.remove()
            require_derivatives(output, self.lm.name)
            self._require_same(layer, output.detach(), expected)
            added = shown[0]
            gradient = gradient.to(output.device, output.dtype)
            try:
                by_residual, by_added = torch.autograd.grad(output, (residual, added), gradient)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise self._refusal(layer, one_line(error)) from error
        rest = output.detach().float() - residual.detach().float() - added.detach().float() * path.multiplier
        return _inner(by_added, added.detach()) + _inner(gradient, rest), by_residual

    def _require_same(self, layer: int, output: Tensor, expected: Tensor) -> None:
        tolerance = RUNS_AGAIN.get(output.dtype, RUNS_AGAIN_IN_HALF)
        expected = expected.to(output.device)
        error = float((output.float() - expected.float()).norm() / expected.float().norm())
        if not error <= tolerance:
            raise self._refusal(layer, f"run again it differs by {error:.2g} of its size from what follows it")

    def _refusal(self, layer: int, reason: str) -> UserError:
        return UserError(f"gradients of {self.lm.name!r} cannot be computed: in layer {layer}, {reason}")


def require_derivatives(output: Tensor, name: str) -> None:
    """Raise UserError if an operation on the way to ``output`` has no derivative: PyTorch would warn and go on."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "NotImplemented" in node.name():
            raise UserError(f"gradients of {name!r} cannot be computed: some of its operations have no derivative")
        nodes.extend(following for following, _ in node.next_functions)


@contextmanager
def _passing_gradients(layer: nn.Module, index: int, name: str) -> Iterator[None]:
    """Raise UserError inside the block for a module with weights, plain or packed, whose output has no gradient."""

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _has_gradient((args, kwargs)) and not _has_gradient(output):
            kind = type(module).__name__
            raise UserError(f"gradients of {name!r} cannot be computed: in layer {index}, {kind} passes on none")

    handles: list[RemovableHandle] = []
    try:
        for module in layer.modules():
            if module is not layer and module.state_dict():
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_gradient(value: Any) -> bool:
    """Whether a tensor in nested tuples, lists and dictionaries is part of a graph of gradients."""
    leaves, _ = tree_flatten(value)
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)


def _inner(a: Tensor, b: Tensor) -> float:
    """Inner product of two tensors of one shape, multiplied in float32 and added in float64."""
    return float((a.float() * b.float()).sum(dtype=wide(a.device)))
