"""Checks the attention's residual path: its addition to the residual, and that parts of the heads can be followed.

Two properties are checked in every layer. The sum: the attention's addition, computed by its residual path, and the
other parts of the layer sum to what the residual gains. The split: every operation between the heads and the residual
scales each number separately (a gate, a norm's scale), so that a part of the head outputs can be followed. To check the
split, the layer runs a second time with other head outputs; each number must be scaled by the same factor as before,
up to one common factor per token, the scale of a norm over all of them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diagnostics.diagnosis.capture.residual_path import Gained, LayerWatch, ResidualPath, Shown, multiplier_of, ratio
from diagnostics.models.anatomy import Anatomy, unwrapped
from diagnostics.models.attention_tap import AttentionCall, attention_tap
from diagnostics.policies.arguments import residual_of
from diagnostics.self_test.masked import Batch, stock_logits


class Gains:
    """The gain of the residual from each layer's attention in a pass of the stock model, and whether the parts sum up.

    ``paths`` are the residual paths; ``added`` [layers][rows, columns, width] is the addition of the attention, as the
    paths compute it; ``problem`` names the first layer whose parts differ from their sum.
    """

    def __init__(self, anatomy: Anatomy, tolerance: float) -> None:
        self.anatomy, self.tolerance = anatomy, tolerance
        self.paths: list[ResidualPath] = []
        self.added: list[Tensor] = []
        self._problem: str | None = None

    def note(self, layer: int, watch: LayerWatch, gained: Gained) -> None:
        """Compare the parts of one layer with its total addition."""
        path = ResidualPath(watch.adder, multiplier_of(self.anatomy.layers[layer]))
        self.paths.append(path)
        terms = [term.float() * path.multiplier for term in (gained.attention, *gained.others)]
        self.added.append(terms[0])
        parts, total = torch.stack(terms).sum(0), gained.total.float()
        # The total is a difference of residuals, so it has their rounding error.
        rounding = 8 * torch.finfo(gained.total.dtype).eps * float((gained.residual.float() + total).norm())
        error = float((parts - total).norm())
        if not error <= self.tolerance * float(parts.norm()) + rounding and self._problem is None:
            share = error / max(float(total.norm()), 1e-30)
            self._problem = f"what layer {layer} adds to the residual differs from its parts by {share:.2g} of its size"

    @property
    def problem(self) -> str | None:
        """What does not sum up, or could not be observed; None if nothing."""
        n_layers = self.anatomy.n_layers
        if len(self.added) != n_layers:
            return f"of {n_layers} layers {len(self.added)} showed what their attention adds to the residual"
        return self._problem


def split_problem(
    model: Any, anatomy: Anatomy, paths: Sequence[ResidualPath], batch: Batch, tolerance: float
) -> str | None:
    """Say in which layer parts of the head outputs cannot be followed to the residual; None if in none."""
    replay = _Replay(anatomy, paths, tolerance)
    handles = []
    try:
        for index, layer in enumerate(anatomy.layers):
            projection = anatomy.output_projections[index]
            handles.append(projection.register_forward_pre_hook(replay.before_projection))
            handles.append(projection.register_forward_hook(replay.on_projection))
            handles.append(paths[index].adder.register_forward_hook(replay.on_added))
            handles.append(layer.register_forward_hook(replay.layer_hook(index), with_kwargs=True))
        with replay.tap(model):
            stock_logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return replay.problem


class _Replay:
    """Runs every layer twice, the second time with other head outputs, and compares the factors applied to them."""

    def __init__(self, anatomy: Anatomy, paths: Sequence[ResidualPath], tolerance: float) -> None:
        self.anatomy, self.paths, self.tolerance = anatomy, paths, tolerance
        self.problem: str | None = None
        self._again = self._tapped = False
        self._heads: Tensor | None = None
        self._shown: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def tap(self, model: Any) -> AbstractContextManager[None]:
        """Tap the head outputs; a TransformerBridge computes attention itself: there use the projection's input."""
        if any(unwrapped(attention) is not attention for attention in self.anatomy.attentions):
            return nullcontext()
        self._tapped = True
        return attention_tap(model, self.anatomy.attentions, self.on_attention)

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Run the attention; in the second run change its output."""
        output, weights = call.proceed()
        self._heads = output = self._changed(output)
        return output, weights

    def before_projection(self, _: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """In the second run change the projection's input, if the attention is not tapped."""
        if self._tapped:
            return None
        self._heads = self._changed(args[0])
        return (self._heads, *args[1:])

    def _changed(self, heads: Tensor) -> Tensor:
        if not self._again:
            return heads
        factors = 0.5 + torch.rand(heads.shape, generator=self._generator)
        return heads * factors.to(heads.device, heads.dtype)

    def on_projection(self, _: Any, args: tuple[Any, ...], output: Tensor) -> None:
        """Record the projection's input and output."""
        self._shown |= {"entered": args[0], "left": output}

    def on_added(self, _: Any, __: Any, output: Any) -> None:
        """Record the addition to the residual."""
        self._shown.setdefault("added", residual_of(output))

    def layer_hook(self, layer: int) -> Any:
        """Return the hook of one layer, which runs the layer again and compares."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            if self._again or self.problem is not None:
                return
            first = self._steps()
            self._again = True
            try:
                module(*args, **kwargs)
                second = self._steps()
            finally:
                self._again = False
            for name, a, b in zip(("before", "after"), first, second, strict=True):
                if not self._alike(a, b):
                    self.problem = (
                        f"what layer {layer} does to its heads {name} the output projection does not "
                        "multiply each number by itself"
                    )
                    return

        return hook

    def _steps(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the factors applied to each number before and after the output projection in the latest run."""
        assert self._heads is not None
        shown, self._shown = Shown(**self._shown), {}
        heads = self._heads.reshape(shown.entered.shape)
        return ratio(shown.entered, heads), ratio(shown.added, shown.left)

    def _alike(self, a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        scale = (a * b).sum(-1, keepdim=True) / (b * b).sum(-1, keepdim=True)
        return bool(((a - b * scale).norm(dim=-1) <= self.tolerance * a.norm(dim=-1)).all())
