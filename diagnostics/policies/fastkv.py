"""FastKV (arXiv 2502.01068): from one layer on only the most salient prompt tokens run on, and every layer keeps few.

Token-selective propagation: the *TSP layer* runs on all tokens; the layers above run on the ``tsp_rate`` most salient
and the last ``window`` ones, at their original positions. Retention: each KV head of each layer caches its own most
salient tokens and the window, ``retention_rate`` of the prompt in all. The first token is not protected.

Salience of a token, as published: attention of the last ``window`` queries, softmax in float32 over all keys, summed
over these queries; max-pooled over ``kernel`` neighbours; summed over the query heads of a KV head (retention) or
over all heads (TSP).

Where the published code has no answer, this one does: a prompt too short for a rate to leave more than the window keeps
everything at that layer; padding scores nothing and rows of a batch choose by their own lengths; later turns of a
conversation run at full depth and drop nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.base import Policy, Workload, require, require_whole
from diagnostics.policies.columns import EMPTY, Piece, Pieces, as_tensor
from diagnostics.policies.recommendation import read_recommendation, whole_number
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.models.attention_tap import AttentionCall
    from diagnostics.policies.runtime import Call


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
    chunked: ClassVar[bool] = False
    crops_prompt: ClassVar[bool] = False
    taps_attention: ClassVar[bool] = True
    later_prompts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.tsp_layer is not None:
            require_whole("tsp_layer", self.tsp_layer, 0)
        require(0 < self.tsp_rate <= 1, f"tsp_rate is {self.tsp_rate}: give a share above 0, at most 1")
        require(
            0 < self.retention_rate <= self.tsp_rate,
            f"retention_rate is {self.retention_rate}: give a share above 0, at most tsp_rate ({self.tsp_rate})",
        )
        require_whole("window", self.window, 1)
        require_whole("kernel", self.kernel, 1)
        require(self.kernel % 2 == 1, f"kernel is {self.kernel}: give an odd number")

    @classmethod
    def from_recommendation(cls, path: str | Path) -> FastKVPolicy:
        """Take as TSP layer the first layer of the stabilization region that a run's probes found.

        Raises
        ------
        UserError
            If there is no recommendation, or none of its layers was found stable.
        """
        region = read_recommendation(path).get("stabilization_region")
        if not region:
            raise UserError(f"{str(path)!r} found no stabilization region to take the TSP layer from")
        first = region.get("first") if isinstance(region, dict) else None
        return cls(tsp_layer=whole_number(first, "stabilization region's first layer", path))

    def check(self, anatomy: Anatomy) -> None:
        """Refuse models with sliding layers: the method scores by attention to the whole prompt."""
        super().check(anatomy)
        if "sliding_attention" in anatomy.layer_types:
            raise UserError(
                "fastkv scores tokens by attention to the whole prompt: not defined for sliding-window layers"
            )

    def depth(self, n_layers: int) -> int:
        """All layers up to and with the TSP layer."""
        return max(n_layers // 2, 1) if self.tsp_layer is None else self.tsp_layer + 1

    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """All tokens up to the TSP layer, the salient ones above; caches of the retention rate."""
        depth, above = self.depth(n_layers), self._propagated(n_prompt)
        tokens = [n_prompt] * depth + [above] * (n_layers - depth)
        return Workload(
            run=tokens,
            held=[self._retained(n, layer < depth) for layer, n in enumerate(tokens)],
            projected=[0] * n_layers,
        )

    def runs_on(self, call: Call) -> Pieces:
        """Columns chosen at the TSP layer; all, if the prompt is short or came in a later turn."""
        require(call.tail == 1, f"{self.name} gives logits of the last prompt token alone (assisted generation?)")
        return call.notes.get("chosen", call.rows)

    def after_attention(self, call: Call, layer: int, attention: AttentionCall) -> None:
        """Score the tokens of a layer, cut its cache down to the retained ones; at the TSP layer choose who runs on."""
        if call.start > 0:
            return
        depth = self.depth(call.n_layers)
        batch, device = attention.key.shape[0], attention.key.device
        columns = as_tensor(call.rows, device).expand(batch, -1)
        if call.padding is None:
            lengths = [columns.shape[1]] * batch
        else:
            lengths = (columns >= call.padding.to(device)[:, None]).sum(1).tolist()
        capacities = [self._retained(n, layer < depth) for n in lengths]
        choosing = layer == depth - 1 and depth < call.n_layers
        propagated = [self._propagated(n) for n in lengths] if choosing else lengths
        if capacities == lengths and propagated == lengths:
            return
        slots, chosen = [], []
        for row, n in enumerate(lengths):  # slots of a row: unused ones first, then its n tokens
            scores = self._scores(attention, row, n)
            offset = columns.shape[1] - n
            slots.append(offset + _top(scores, capacities[row], n))
            chosen.append(offset + _top(scores.sum(0), propagated[row], n))
        if capacities != lengths:
            index = _pad_left(slots)  # [batch, kv_heads, kept]
            held = torch.take_along_dim(columns[:, None].expand(-1, index.shape[1], -1), index.clamp(min=0), dim=2)
            held = held.masked_fill(index == EMPTY, EMPTY)
            full = call.padding is None
            call.cache.layers[layer].keep(index.clamp(min=0), Piece(0, call.stop, held, full))
        if propagated != lengths:
            index = _pad_left(chosen).sort(dim=-1).values
            kept = columns.gather(1, index.clamp(min=0)).masked_fill(index == EMPTY, EMPTY)
            call.notes["chosen"] = (Piece(0, call.stop, kept, full=call.padding is None),)

    def _retained(self, n: int, below: bool) -> int:
        """Cache size of a layer that runs on ``n`` tokens; above the TSP layer they are fewer already."""
        capacity = int(n * (self.retention_rate if below else self.retention_rate / self.tsp_rate))
        return capacity if self.window <= capacity < n else n

    def _propagated(self, n: int) -> int:
        capacity = int(n * self.tsp_rate)
        return capacity if self.window <= capacity < n else n

    def _scores(self, attention: AttentionCall, row: int, n: int) -> Tensor:
        """Salience of the first n - window of a row's n tokens, per KV head: float32 [kv_heads, n - window]."""
        key = attention.key[row, :, -n:]
        query = attention.query[row, :, -min(self.window, n) :]
        heads, window = query.shape[:2]
        scaling = attention.options.get("scaling") or query.shape[-1] ** -0.5
        softcap, sinks = attention.options.get("softcap"), attention.options.get("s_aux")
        query = query.reshape(len(key), -1, query.shape[-1])  # query heads of a KV head follow one another
        logits = (query @ key.mT).view(heads, window, n).float() * scaling
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        ahead = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
        logits[:, :, -window:].masked_fill_(ahead, -torch.inf)
        if sinks is not None:  # a sink takes weight from the tokens and has none itself
            logits = torch.cat([logits, sinks[:, None, None].float().expand(-1, window, 1)], dim=-1)
        # Cast as the published code does: the order of the scores depends on it.
        weights = logits.softmax(-1).to(query.dtype)[:, :, : max(0, n - self.window)].sum(1)
        if weights.shape[-1] == 0:
            return weights.new_zeros((len(key), 0), dtype=torch.float32)
        pooled = nn.functional.max_pool1d(weights[None], self.kernel, stride=1, padding=self.kernel // 2)[0]
        return pooled.view(len(key), -1, pooled.shape[-1]).sum(1).float()


def _top(scores: Tensor, capacity: int, n: int) -> Tensor:
    """Return which of ``n`` tokens stay: the best scored ones and those after the scored ones, [..., capacity]."""
    scored = scores.shape[-1]
    # Max-pooling makes neighbours equal; a stable order lets the earlier win, on every device.
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : capacity - (n - scored)]
    tail = torch.arange(scored, n, device=scores.device).expand(*best.shape[:-1], -1)
    return torch.cat([best, tail], dim=-1)


def _pad_left(slots: list[Tensor]) -> Tensor:
    """Stack slots of rows that keep different numbers; unused ones are EMPTY and come first."""
    width = max(part.shape[-1] for part in slots)
    return torch.stack([nn.functional.pad(part, (width - part.shape[-1], 0), value=EMPTY) for part in slots])
