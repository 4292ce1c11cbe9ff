"""Which adapters of PEFT take part in a model, and which of its parameters therefore do not."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diagnostics.support.digests import json_digest


def active_adapters(model: Any, inner: nn.Module) -> tuple[set[int], tuple[str, ...]]:
    """Return the ids of parameters that take no part, and the adapters that do, readable.

    Layers are told by their attributes: peft need not be installed, and transformers puts them into plain models, too.
    """
    idle: set[int] = set()
    layers: dict[str, set[str]] = {}
    for path, module in inner.named_modules():
        if not holds_adapters(module):
            continue
        merged = list(getattr(module, "merged_adapters", ()))
        on = [] if module.disable_adapters else list(module.active_adapters)
        holders = (*getattr(module, "adapter_layer_names", ()), "modules_to_save", "token_adapter")
        acting = False
        for holder in (getattr(module, name, None) for name in holders):
            for name, part in _items(holder):
                if name in on and name not in merged:
                    acting = True
                    continue
                idle |= {id(t) for t in _tensors_of(part)}
        scaling = getattr(module, "scaling", {})
        if acting:
            for name in on:
                scale = scaling.get(name) if isinstance(scaling, dict) else None
                layers.setdefault(f"{name}, scale {scale:g}" if scale is not None else name, set()).add(path)
        for name in merged:
            layers.setdefault(f"{name}, merged", set()).add(path)
    described = [f"{what} in {len(where)} layers ({json_digest(sorted(where))[:8]})" for what, where in layers.items()]
    if hasattr(model, "prompt_encoder"):
        state = "off" if "forward" in vars(model) else model.active_adapter
        described.append(f"prompt of {state}")
    return idle, tuple(sorted(described))


def holds_adapters(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers: they are told by their attributes."""
    # In transformers' own models `disable_adapters` is a method.
    return isinstance(getattr(module, "disable_adapters", None), bool) and hasattr(module, "active_adapters")


def _items(holder: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, nn.ModuleDict | nn.ParameterDict | dict):
        yield from holder.items()


def _tensors_of(part: Any) -> Iterator[Tensor]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
    elif isinstance(part, Tensor):
        yield part
