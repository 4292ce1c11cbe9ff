"""Which PEFT adapters are active in a model, and which of its parameters are therefore unused."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from diagnostics.support.digests import json_digest


def active_adapters(model: Any, inner: nn.Module) -> tuple[set[int], tuple[str, ...]]:
    """Return the ids of unused adapter parameters, and readable names of the active adapters.

    Layers are recognised by their attributes: peft need not be installed, and transformers also puts adapters into
    plain models.
    """
    idle: set[int] = set()
    layers: dict[str, set[str]] = {}
    for path, module in inner.named_modules():
        if not holds_adapters(module):
            continue
        merged = list(getattr(module, "merged_adapters", ()))
        active = [] if module.disable_adapters else list(module.active_adapters)
        holders = (*getattr(module, "adapter_layer_names", ()), "modules_to_save", "token_adapter")
        is_active = False
        for holder in (getattr(module, name, None) for name in holders):
            for name, part in _items(holder):
                if name in active and name not in merged:
                    is_active = True
                    continue
                idle |= {id(t) for t in _tensors_of(part)}
        scaling = getattr(module, "scaling", {})
        if is_active:
            for name in active:
                scale = scaling.get(name) if isinstance(scaling, dict) else None
                layers.setdefault(f"{name}, scale {scale:g}" if scale is not None else name, set()).add(path)
        for name in merged:
            layers.setdefault(f"{name}, merged", set()).add(path)
    described = [f"{name} in {len(paths)} layers ({json_digest(sorted(paths))[:8]})" for name, paths in layers.items()]
    if hasattr(model, "prompt_encoder"):
        state = "off" if "forward" in vars(model) else model.active_adapter
        described.append(f"prompt of {state}")
    return idle, tuple(sorted(described))


def holds_adapters(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, recognised by their attributes."""
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
