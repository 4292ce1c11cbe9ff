"""Projected: prompt tokens stop at the cutoff, and the layers above make their keys and values from its state.

The idea of POP (arXiv 2602.03295) and of SwiftKV (arXiv 2410.03960), here without distillation: every upper layer
applies its own norm and its own key and value projections to the state that entered layer k. It skips the compute of
the upper layers for the prompt and keeps their cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from diagnostics.policies.base import Policy, Workload, require_whole
from diagnostics.policies.columns import Pieces, gaps, span, take
from diagnostics.policies.recommendation import recommended_cutoff

if TYPE_CHECKING:
    from diagnostics.policies.runtime import Call, Runtime


@dataclass(frozen=True)
class ProjectedPolicy(Policy):
    """Prompt tokens run through layers 0..cutoff-1; layers above project their keys and values from that state.

    Attributes
    ----------
    cutoff
        Layers that prompt tokens run through, 1 to L; L is the stock model.
    boundary
        Trailing prompt tokens that run through all layers, 1 or more.
    """

    cutoff: int
    boundary: int = 1
    name: ClassVar[str] = "projected"

    def __post_init__(self) -> None:
        require_whole("cutoff", self.cutoff, 1)
        require_whole("boundary", self.boundary, 1)

    @classmethod
    def from_recommendation(cls, path: str | Path) -> ProjectedPolicy:
        """Read the cutoff that was recommended for SPEED; raise UserError where there is none."""
        return cls(cutoff=recommended_cutoff(path))

    def depth(self, n_layers: int) -> int:
        """The cutoff."""
        return self.cutoff

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """All tokens below the cutoff; the boundary, and keys and values of the rest, above."""
        deep, upper = min(n_prompt, self.boundary), n_layers - self.cutoff
        return Workload(
            run=[n_prompt] * self.cutoff + [deep] * upper,
            held=[n_prompt] * n_layers,
            projected=[0] * self.cutoff + [n_prompt - deep] * upper,
        )

    def runs_on(self, call: Call) -> Pieces:
        """Decode-phase columns; in a call without any, the last one, to keep the upper layers busy."""
        kept = call.kept_columns(0)
        resting = gaps(kept, call.start, call.stop)
        call.notes["resting"] = resting
        call.notes["state"] = take(call.hidden, resting, call.start) if resting else None
        if not kept:
            call.unheld = True
            return span(call.stop - 1, call.stop)
        return kept

    def install(self, runtime: Runtime) -> None:
        """Spare the query projection where it is apart from the others: no query is asked while projecting."""

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (args[0][:, :1], *args[1:]) if runtime.projecting else None

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output.expand(-1, runtime.projecting, -1) if runtime.projecting else None

        for attention in runtime.anatomy.attentions[self.cutoff :]:
            queries = getattr(attention, "q_proj", None)
            if isinstance(queries, nn.Module):
                runtime.hook(queries.register_forward_pre_hook(before))
                runtime.hook(queries.register_forward_hook(after))

    def before_upper_layer(self, call: Call, layer: int, arguments: dict[str, Any]) -> None:
        """Have the layer store keys and values of the resting tokens, made from the state at the cutoff."""
        if call.notes.get("resting"):
            call.project(layer, arguments, call.notes["state"], call.notes["resting"])
