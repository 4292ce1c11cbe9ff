"""Projected: prompt tokens stop at the cutoff; the layers above compute their keys and values from the state there.

The idea of POP (arXiv 2602.03295) and of SwiftKV (arXiv 2410.03960), here without distillation: every upper layer
applies its own norm and its own key and value projections to the state that entered layer k. It skips the compute of
the upper layers for the prompt and keeps their cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diagnostics.policies.base import Policy, Workload
from diagnostics.support.errors import require_integer

if TYPE_CHECKING:
    from torch import Tensor, nn

    from diagnostics.policies.call import Call
    from diagnostics.policies.columns import Pieces
    from diagnostics.policies.runtime import Runtime


@dataclass(frozen=True)
class Stopped:
    """Note of a call: the columns that stopped at the cutoff, and their state there, [batch, columns, width]."""

    columns: Pieces
    state: Tensor


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
    title: ClassVar[str] = "Projected"
    rank: ClassVar[int] = 2

    def __post_init__(self) -> None:
        require_integer("cutoff", self.cutoff, 1)
        require_integer("boundary", self.boundary, 1)

    def depth(self, n_layers: int) -> int:
        """The cutoff."""
        return self.cutoff

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """All tokens below the cutoff; above it the boundary, and the keys and values of the rest."""
        deep, upper = min(n_prompt, self.boundary), n_layers - self.cutoff
        return Workload(
            run=[n_prompt] * self.cutoff + [deep] * upper,
            held=[n_prompt] * n_layers,
            projected=[0] * self.cutoff + [n_prompt - deep] * upper,
        )

    def runs_on(self, call: Call) -> Pieces:
        """Return the decode-phase columns; in a call without any, the last column, so that the upper layers run."""
        from diagnostics.policies.arguments import take_rows  # it loads torch
        from diagnostics.policies.columns import gaps, rows_in, span

        deep = call.deep_columns(0)
        if stopped := gaps(deep, call.start, call.stop):
            rows = rows_in(stopped, call.start, call.hidden.device)
            call.note(Stopped(stopped, take_rows(call.hidden, rows)))
        if not deep:
            call.unheld = True
            return span(call.stop - 1, call.stop)
        return deep

    def install(self, runtime: Runtime) -> None:
        """Skip the query projection where it is a module of its own: projecting needs no queries."""

        def n_projected() -> int:
            return 0 if runtime.call is None else runtime.call.projecting

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            return (args[0][:, :1], *args[1:]) if n_projected() else None

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output.expand(-1, n_projected(), -1) if n_projected() else None

        for attention in runtime.anatomy.attentions[self.cutoff :]:
            queries: Any = getattr(attention, "q_proj", None)
            if hasattr(queries, "register_forward_pre_hook"):
                runtime.hook(queries.register_forward_pre_hook(before))
                runtime.hook(queries.register_forward_hook(after))

    def before_upper_layer(self, call: Call, layer: int, arguments: dict[str, Any]) -> None:
        """Have the layer store keys and values of the stopped tokens, computed from their state at the cutoff."""
        if stopped := call.noted(Stopped):
            call.project(layer, arguments, stopped.state, stopped.columns)
