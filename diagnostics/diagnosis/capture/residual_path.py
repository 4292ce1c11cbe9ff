"""How what a layer's attention computes comes to the residual, found by watching one short forward pass.

Between the heads and the residual there may be a gate or a norm before the output projection, a norm after it, and a
multiplier. Families name these alike for different things (``post_attention_layernorm`` norms the attention's output
in Gemma and OLMo 2, and the MLP's input in Llama), so they are found by where tensors go, not by what modules are
called. What is found is proven by the self-test, which compares it with what the residual really gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diagnostics.models.anatomy import Anatomy, unwrapped

MULTIPLIERS = ("residual_multiplier", "residual_scale")


@dataclass(frozen=True)
class ResidualPath:
    """The end of one layer's attention: ``multiplier`` times the output of ``adder`` is added to the residual.

    ``adder`` is the attention itself, or the norm after it.
    """

    adder: nn.Module
    multiplier: float


@dataclass(frozen=True)
class Gained:
    """What one layer added to its residual, as its modules showed it: all [batch, rows, width].

    ``residual`` is what entered the layer, ``attention`` the output of the `ResidualPath.adder` without the multiplier;
    ``total`` what was gained in all up to the point where the rest of the layer reads the residual, and ``others`` the
    further terms of that sum: none in a layer whose MLP reads the residual after the attention, the MLP's output in one
    where both run in parallel.
    """

    residual: Tensor
    attention: Tensor
    others: tuple[Tensor, ...]
    total: Tensor


class LayerWatch:
    """Watches the modules of one layer in the order in which they run, and finds the attention's way out.

    Tensors are held only while the layer runs: two tensors are the same if they are one object or share their memory.
    """

    def __init__(self, layer: nn.Module, attention: nn.Module) -> None:
        self.layer, self.attention = layer, attention
        self.adder = attention
        self._residual: Tensor | None = None
        self._before: Tensor | None = None  # a copy of it: some layers add in place
        self._end: Tensor | None = None  # the attention's output, as far as it has come
        self._after: Tensor | None = None  # the residual that a later module reads, the attention added
        self._outputs: list[Tensor] = []
        self._loose: list[Tensor] = []  # outputs that no other module has read

    def hooks(self, done: Callable[[LayerWatch, Gained], None]) -> Iterator[RemovableHandle]:
        """Add the hooks; ``done`` is called after every run of the layer."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._residual = first_tensor(args or kwargs.get("hidden_states"))
            self._before = None if self._residual is None else self._residual.clone()

        def after(_: nn.Module, __: Any, output: Any) -> None:
            gained = self._gained(first_tensor(output))
            self._residual = self._before = self._end = self._after = None
            self._outputs, self._loose = [], []
            if gained is not None:
                done(self, gained)

        yield self.layer.register_forward_pre_hook(before, with_kwargs=True)
        for child in unwrapped(self.layer).children():
            yield child.register_forward_hook(self._on_child, with_kwargs=True)
        yield self.layer.register_forward_hook(after)

    def _on_child(self, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        out = first_tensor(output)
        if self._residual is None or out is None:
            return
        read = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        self._loose = [tensor for tensor in self._loose if not any(same(tensor, value) for value in read)]
        if child is self.attention:
            self._end, self.adder = out, child
        elif self._end is not None and self._after is None:
            if any(same(self._end, value) for value in read):
                # Dropout is no step: in evaluation it changes nothing, and some layers share one for all their outputs.
                if out.shape == self._end.shape and not isinstance(child, nn.Dropout):
                    self.adder = child
                self._end = out
            else:
                known = [self._residual, *self._outputs]
                # Some layers flatten rows and columns before their MLP.
                alike = [value for value in read if value.numel() == self._residual.numel()]
                fresh = next((v for v in alike if not any(same(v, tensor) for tensor in known)), None)
                self._after = None if fresh is None else fresh.view_as(self._residual)
        self._outputs.append(out)
        if not any(same(out, tensor) for tensor in self._loose):
            self._loose.append(out)

    def _gained(self, output: Tensor | None) -> Gained | None:
        if self._before is None or self._end is None or output is None:
            return None
        if self._after is not None:
            return Gained(self._before, self._end, (), self._after - self._before)
        others = tuple(t for t in self._loose if t.shape == output.shape and not same(t, self._end))
        return Gained(self._before, self._end, others, output - self._before)


def multiplier_of(layer: nn.Module) -> float:
    """What a layer multiplies the outputs of its parts with before it adds them; 1 in most families."""
    values = (getattr(unwrapped(layer), name, None) for name in MULTIPLIERS)
    return next((float(value) for value in values if isinstance(value, int | float)), 1.0)


@contextmanager
def watched_layers(anatomy: Anatomy, done: Callable[[int, LayerWatch, Gained], None]) -> Iterator[None]:
    """Call ``done(layer, watch, gained)`` after every layer that runs inside the block."""
    handles: list[RemovableHandle] = []
    try:
        for index, (layer, attention) in enumerate(zip(anatomy.layers, anatomy.attentions, strict=True)):

            def show(watch: LayerWatch, gained: Gained, index: int = index) -> None:
                done(index, watch, gained)

            handles.extend(LayerWatch(layer, attention).hooks(show))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def residual_paths(anatomy: Anatomy, device: torch.device) -> tuple[ResidualPath, ...]:
    """Find the path of every layer by running four tokens through the model: one read of its weights.

    On the meta device nothing is computed, and the way of the tensors shows all the same.
    """
    adders = list(anatomy.attentions)

    def note(layer: int, watch: LayerWatch, _: Gained) -> None:
        adders[layer] = watch.adder

    options: dict[str, Any] = {"input_ids": torch.ones(1, 4, dtype=torch.long, device=device), "use_cache": False}
    if device.type == "meta":  # a mask that is there already is not made from numbers that are not
        options["attention_mask"] = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device)
    with watched_layers(anatomy, note):
        anatomy.stack(**options)
    return tuple(ResidualPath(adder, multiplier_of(layer)) for adder, layer in zip(adders, anatomy.layers, strict=True))


@dataclass(frozen=True)
class Shown:
    """What the modules of one attention showed of some rows, [rows, ...] each.

    ``entered`` and ``left`` are input and output of the output projection, ``added`` the output of the
    `ResidualPath.adder`.
    """

    entered: Tensor
    left: Tensor
    added: Tensor


@dataclass(frozen=True)
class Addition:
    """What parts of one layer's head outputs add to the residual, all else as it was in one pass.

    Called with a part of the head outputs, [rows, heads * head_dim], it gives what that part adds, float32
    [rows, width]: parts that sum to the head outputs give additions that sum to what the attention added, less its
    biases. ``before`` and ``after`` are what gates, norms and multipliers did to each number before and after the
    output projection: norms count with the scale that the whole gave them, as in direct logit attribution.
    """

    projection: nn.Module
    before: Tensor | None = field(repr=False)
    after: Tensor | float = field(repr=False)

    @classmethod
    def of(cls, projection: nn.Module, multiplier: float, heads: Tensor, shown: Shown) -> Addition:
        """Take what one pass showed of some rows, of which ``heads`` [rows, heads * head_dim] are the head outputs."""
        before, after = ratio(shown.entered, heads), ratio(shown.added, shown.left)
        return cls(projection, before, multiplier if after is None else after * multiplier)

    def __call__(self, part: Tensor) -> Tensor:
        """Return what a part of the head outputs adds to the residual."""
        part = part if self.before is None else part * self.before
        part = part.to(next(self.projection.parameters()).dtype)
        # By difference, so that biases stay out of it, and quantised and adapted projections work too.
        return (self.projection(part) - self.projection(torch.zeros_like(part[:1]))).float() * self.after

    def constant(self, heads: Tensor) -> Tensor:
        """Return what the projection adds whatever the heads, [rows, heads * head_dim], give: that of its bias."""
        return self.projection(torch.zeros_like(heads)).float() * self.after


def ratio(out: Tensor, into: Tensor) -> Tensor | None:
    """What each number was multiplied with on its way, float32; None where nothing changed, 0 for what was 0."""
    if same(out, into) or torch.equal(out, into):
        return None
    out, into = out.float(), into.float()
    return torch.where(into == 0, 0.0, out / into)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one: the same object, or all of the same memory, as after a reshape."""
    return a is b or (a.numel() == b.numel() and a.device == b.device and a.data_ptr() == b.data_ptr() != 0)


def first_tensor(output: Any) -> Tensor | None:
    """Return a module's output, or the first of several; None where it is no tensor."""
    output = output[0] if isinstance(output, tuple | list) and output else output
    return output if isinstance(output, Tensor) else None
