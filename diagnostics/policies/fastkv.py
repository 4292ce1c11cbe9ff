"""FastKV (arXiv 2502.01068): above one layer only the most salient prompt tokens run, and every layer caches few.

Token-selective propagation: the *TSP layer* runs on all tokens; the layers above run on the ``tsp_rate`` most salient
and the last ``window`` ones, at their original positions. Retention: each KV head of each layer caches its own most
salient tokens and the window, ``retention_rate`` of the prompt in all. The first token is not protected.

Salience of a token, as published: attention of the last ``window`` queries, softmax in float32 over all keys, summed
over these queries; max-pooled over ``kernel`` neighbours; summed over the query heads of a KV head (retention) or
over all heads (TSP). `diagnostics.policies.salience` computes it.

Three cases that the published code leaves open: a layer keeps every token of a prompt so short that the rate would
leave no more than the window; padding scores nothing and each row of a batch selects by its own length; later turns of
a conversation run at full depth and drop nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from diagnostics.policies.base import Policy, Workload
from diagnostics.policies.recommendation import integer_of, read_recommendation
from diagnostics.support.errors import UserError, require, require_integer

if TYPE_CHECKING:
    from diagnostics.models.anatomy import Anatomy
    from diagnostics.models.attention_tap import AttentionCall
    from diagnostics.policies.call import Call
    from diagnostics.policies.columns import Pieces


@dataclass(frozen=True)
class Propagated:
    """Note of a call: the columns selected at the TSP layer."""

    columns: Pieces


@dataclass(frozen=True)
class FastKVPolicy(Policy):
    """Propagate and cache the most salient prompt tokens.

    Attributes
    ----------
    tsp_layer
        Last layer that all prompt tokens run through, 0-based; None for L/2 - 1, as published.
    tsp_rate
        Share of the prompt that runs on above it, 0 to 1.
    retention_rate
        Share of the prompt that every layer caches, 0 to ``tsp_rate``.
    window
        Last prompt tokens, whose queries score the others; always kept.
    kernel
        Width of the max-pooling over tokens; odd.
    """

    tsp_layer: int | None = None
    tsp_rate: float = 0.2
    retention_rate: float = 0.1
    window: int = 8
    kernel: int = 7
    name: ClassVar[str] = "fastkv"
    title: ClassVar[str] = "FastKV"
    rank: ClassVar[int] = 3
    chunked: ClassVar[bool] = False
    crops_prompt: ClassVar[bool] = False
    taps_attention: ClassVar[bool] = True
    later_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tsp_layer is not None:
            require_integer("tsp_layer", self.tsp_layer, 0)
        require(0 < self.tsp_rate <= 1, f"tsp_rate is {self.tsp_rate}: give a share above 0, at most 1")
        require(
            0 < self.retention_rate <= self.tsp_rate,
            f"retention_rate is {self.retention_rate}: give a share above 0, at most tsp_rate ({self.tsp_rate})",
        )
        require_integer("window", self.window, 1)
        require_integer("kernel", self.kernel, 1)
        require(self.kernel % 2 == 1, f"kernel is {self.kernel}: give an odd number")

    @classmethod
    def from_recommendation(cls, path: str | Path) -> FastKVPolicy:
        """Use the first layer of a run's stabilization region as the TSP layer.

        Raises
        ------
        UserError
            If there is no recommendation, or it has no stabilization region.
        """
        region = read_recommendation(path).get("stabilization_region")
        if not region:
            raise UserError(f"{str(path)!r} found no stabilization region to take the TSP layer from")
        first = region.get("first") if isinstance(region, dict) else None
        return cls(tsp_layer=integer_of(first, "stabilization region's first layer", path))

    def check(self, anatomy: Anatomy) -> None:
        """Refuse models with sliding layers: the method scores tokens by attention to the entire prompt."""
        super().check(anatomy)
        if "sliding_attention" in anatomy.layer_types:
            raise UserError(
                "fastkv scores tokens by attention to the whole prompt: not defined for sliding-window layers"
            )

    def depth(self, n_layers: int) -> int:
        """All layers up to and including the TSP layer."""
        return max(n_layers // 2, 1) if self.tsp_layer is None else self.tsp_layer + 1

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """All tokens up to the TSP layer, the salient ones above; each cache holds the retention rate's share."""
        depth, above = self.depth(n_layers), self._propagated(n_prompt)
        tokens = [n_prompt] * depth + [above] * (n_layers - depth)
        return Workload(
            run=tokens,
            held=[self._retained(n, layer < depth) for layer, n in enumerate(tokens)],
            projected=[0] * n_layers,
        )

    def runs_on(self, call: Call) -> Pieces:
        """Return the columns selected at the TSP layer; all, if the prompt is short or is a later turn."""
        one_token = call.phases.tail == 1
        require(one_token, f"{self.name} gives logits of the last prompt token alone (assisted generation?)")
        propagated = call.noted(Propagated)
        return call.rows if propagated is None else propagated.columns

    def after_attention(self, call: Call, layer: int, attention: AttentionCall) -> None:
        """Reduce a layer's cache to its most salient tokens; at the TSP layer select the tokens that run on."""
        if call.start > 0:
            return
        from diagnostics.policies.salience import keep_salient  # it loads torch

        depth = self.depth(call.n_layers)
        columns = keep_salient(
            call,
            layer,
            attention,
            window=self.window,
            kernel=self.kernel,
            retained=lambda n: self._retained(n, layer < depth),
            propagated=self._propagated if layer == depth - 1 and depth < call.n_layers else None,
        )
        if columns is not None:
            call.note(Propagated(columns))

    def _retained(self, n: int, below: bool) -> int:
        """Cache size of a layer that runs on ``n`` tokens; above the TSP layer ``n`` is already smaller."""
        capacity = int(n * (self.retention_rate if below else self.retention_rate / self.tsp_rate))
        return capacity if self.window <= capacity < n else n

    def _propagated(self, n: int) -> int:
        capacity = int(n * self.tsp_rate)
        return capacity if self.window <= capacity < n else n
