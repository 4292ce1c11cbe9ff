"""Shows queries, keys and values after rotary embedding, through transformers' public attention interface.

A wrapped attention function is registered under its own name together with the mask of the implementation it
wraps, and the model's configuration points to it only inside the ``with`` block. The model's own fused attention
still does the work. Neither transformers nor the model is patched; on exit every configuration is restored.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "speed_diagnostics_"

# module -> its recorder, only while a tap is open. Keyed by module: models in different threads stay separate.
_RECORDERS: dict[nn.Module, Callable[..., tuple[Tensor, Any]]] = {}


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function; tensors have the batch dimension, ``[batch, heads, rows, head_dim]``."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    original: Callable[..., tuple[Tensor, Any]]

    def proceed(self) -> tuple[Tensor, Any]:
        """Run the model's own attention; the output is [batch, rows, heads, head_dim]."""
        return self.original(self.module, self.query, self.key, self.value, self.mask, **self.options)


Handler = Callable[[AttentionCall], tuple[Tensor, Any]]


@contextmanager
def attention_tap(model: nn.Module, attentions: tuple[nn.Module, ...], handler: Handler) -> Iterator[None]:
    """Send every attention call of ``attentions`` through ``handler`` while the block is open.

    ``handler`` returns what the attention should return, usually ``call.proceed()``.
    """
    inner: str = model.config._attn_implementation  # type: ignore[union-attr, assignment]
    tapped = _register(inner)

    for module in attentions:
        original = _original(module, inner)

        def record(
            module: nn.Module,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attention_mask: Tensor | None = None,
            *,
            original: Callable[..., tuple[Tensor, Any]] = original,
            **options: Any,
        ) -> tuple[Tensor, Any]:
            return handler(AttentionCall(module, query, key, value, attention_mask, options, original))

        _RECORDERS[module] = record
    try:
        with attention_implementation(model, tapped):
            yield
    finally:
        for module in attentions:
            _RECORDERS.pop(module, None)


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Make all parts of a model use the attention implementation of this name inside the block."""
    # Each configuration separately: the public setter would also overwrite sub-configurations, irreversibly.
    distinct = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    configs = [config for config in distinct if hasattr(config, "_attn_implementation_internal")]
    originals = [(config, config._attn_implementation_internal) for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in originals:
            config._attn_implementation_internal = implementation


def _register(inner: str) -> str:
    """Register the tap over implementation ``inner`` with that implementation's own mask; return the tap's name."""
    tapped = PREFIX + inner
    if tapped not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(tapped, _dispatch)
        masks = AttentionMaskInterface()
        if inner in masks:  # without a registered mask the model passes none, and the tap must do the same
            AttentionMaskInterface.register(tapped, masks[inner])
    return tapped


def _dispatch(module: Any, *args: Any, **options: Any) -> tuple[Tensor, Any]:
    recorder = _RECORDERS.get(module)
    if recorder is None:  # another model that shares the configuration of the tapped one
        recorder = _original(module, module.config._attn_implementation.removeprefix(PREFIX))
    return recorder(module, *args, **options)


def _original(module: nn.Module, inner: str) -> Callable[..., tuple[Tensor, Any]]:
    """Return the function that ``module`` would call without the tap."""
    return ALL_ATTENTION_FUNCTIONS[inner] if inner in ALL_ATTENTION_FUNCTIONS else eager_attention(module)


def eager_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """Return the eager attention of a module's family: unregistered, but under the same name in all modelling files."""
    for base in type(module).__mro__:
        function = getattr(sys.modules[base.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise LookupError(f"{type(module).__name__} has no eager attention function")
