"""Maps residuals to distributions over the vocabulary, and compares them with the model's final distribution.

The logit lens and the cutoff sweep ask the same question about many residuals at the same positions: *how far is this
residual's next-token distribution from the model's own?* The vocabulary is processed in tiles, so candidates x
vocabulary logits never exist at once, and a tile is still in the processor's cache when it is reduced.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from diagnostics.models.anatomy import Anatomy
from diagnostics.support.divergence import StreamedComparison, js_distances, log_probabilities, probability_gaps
from diagnostics.support.errors import UserError
from diagnostics.support.sums import total, wide

# Logits held at once: one tile where tiles stream; all logits of a block of positions where they are needed twice.
TILE_BYTES = 4 << 20
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Distances of candidate distributions q from the final one p; every field is [positions, candidates].

    ``kl``: KL(p || q) in nats, >= 0. ``rank``: rank of p's most likely token under q, 0 is top. ``nll``: negative
    log-likelihood of the target under q in nats, NaN without targets. ``js``: Jensen-Shannon distance (square root of
    the divergence in nats, 0..0.833) of candidate i from candidate i-1, NaN for the first candidate. ``gap``: largest
    probability of q less its second largest, 0..1. Both are NaN if not requested. ``rank`` is float32, the others
    float64 where the device supports it.
    """

    kl: Tensor
    rank: Tensor
    nll: Tensor
    js: Tensor
    gap: Tensor

    def last_is_final(self) -> "Comparison":
        """Treat the last candidate as the final residual itself: set its distance and rank to 0, without rounding."""
        kl, rank = self.kl.clone(), self.rank.clone()
        kl[:, -1] = rank[:, -1] = 0
        return replace(self, kl=kl, rank=rank)


class Readout:
    """Final norm and unembedding of one model, in float32 for any type of the model."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._norm: nn.Module | None = None

    # Created on first use: the weights may not be here before. (No cached_property: remote runs send this class.)

    @property
    def norm(self) -> nn.Module:
        """The final norm in float32."""
        if self._norm is None:
            norm = self.anatomy.final_norm
            exact = all(p.dtype == torch.float32 for p in norm.parameters())
            self._norm = norm if exact else copy.deepcopy(norm).float()
        return self._norm

    @property
    def plain(self) -> bool:
        """Whether the head is a plain matrix; a quantised, adapted or offloaded head must run as a module."""
        head = self.anatomy.unembedding
        return type(head) is nn.Linear and head.weight.is_floating_point() and not head.weight.is_meta

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the model's last layer."""
        return next(self.anatomy.layers[-1].parameters()).dtype

    def logits(self, residuals: Tensor) -> Tensor:
        """Map residuals [..., width] (before the final norm) to logits [..., vocab], float32."""
        hidden = self.norm(residuals.float())
        return torch.cat([tile for _, tile in self._tiles(hidden.flatten(0, -2))], dim=-1).view(
            *residuals.shape[:-1], -1
        )

    def top(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token of residuals [..., width], and its probability: int64 and float [...]."""
        hidden = self.norm(residuals.float()).flatten(0, -2)
        best = hidden.new_full((len(hidden),), -torch.inf)
        token = torch.zeros_like(best, dtype=torch.long)
        norm = torch.zeros_like(best, dtype=wide(best.device))  # running sum of exp(score - best)
        for columns, tile in self._tiles(hidden):
            tile_best, index = tile.max(-1)
            higher = torch.maximum(best, tile_best.to(best.device))
            weights = (tile.to(best.device) - higher[:, None]).exp_()
            norm = norm * (best - higher).exp() + total(weights)
            token = torch.where(higher > best, index.to(best.device) + columns.start, token)
            best = higher
        return token.view(residuals.shape[:-1]), (1 / norm).view(residuals.shape[:-1])

    def require_identity(self, ours: Tensor, logits: Tensor, name: str) -> None:
        """Raise UserError unless the lens after the last layer reproduces the model's logits.

        ``ours`` [rows, vocab] are `logits` of the last layer's output, ``logits`` [rows, vocab] the model's own.
        Tolerance: 1e-3 of the logits' standard deviation in float32; 0.1 of it in half precision, where rounding alone
        reaches a few hundredths.
        """
        tolerance = (1e-3 if self.dtype == torch.float32 else 0.1) * float(logits.std())
        error = float((ours - logits.to(ours.device)).abs().max())
        if not error <= tolerance:
            raise UserError(
                f"model {name!r} cannot be diagnosed: final norm and head on the last residual miss its own logits by "
                f"{error:.3g} (tolerance {tolerance:.3g}); something between them is not understood"
            )

    def compare(
        self, final: Tensor, candidates: Tensor, targets: Tensor | None = None, *, consecutive: bool = False
    ) -> Comparison:
        """Compare candidate residuals with the final distribution at the same positions.

        ``final`` [positions, vocab] are `logits` of the last layer's output, ``candidates`` [positions, candidates,
        width] residuals, ``targets`` [positions] token ids; ``consecutive`` adds the distance of each candidate from
        the previous one, and the gap.
        """
        n, m = candidates.shape[:2]
        # Streaming needs one tile of a block's rows; the second pass of ``consecutive`` needs all their logits. A head
        # that is not plain returns all logits at once, and two float64 copies of them are held.
        row_bytes = 4 * final.shape[1] if consecutive else TILE_BYTES // 2048
        block = max(1, BLOCK_BYTES // ((row_bytes if self.plain else 12 * final.shape[1]) * m))
        parts = []
        for i in range(0, n, block):
            rows = slice(i, i + block)
            parts.append(
                self._compare_block(
                    log_probabilities(final[rows]),
                    candidates[rows],
                    None if targets is None else targets[rows],
                    consecutive,
                )
            )
        return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _compare_block(
        self, log_p: Tensor, candidates: Tensor, targets: Tensor | None, consecutive: bool
    ) -> tuple[Tensor, ...]:
        n, m = candidates.shape[:2]
        hidden = self.norm(candidates.float())
        tiles: Iterable[tuple[slice, Tensor]] = self._tiles(hidden.flatten(0, 1))
        top = log_p.argmax(-1)
        # The final top token's score, to rank it: its own tile may come last, so the score is computed first ...
        if self.plain:
            best = self._scores_of(hidden, top)
        else:
            tiles = [*tiles]
            columns, logits = tiles[0]
            best = _scores_in(columns, logits.view(n, m, -1), top)[1]
        device = best.device
        compared = StreamedComparison(log_p.to(device), m)
        rank = torch.zeros_like(best)
        target_score = torch.full_like(best, torch.nan)
        kept = []
        scratch = best.new_empty(0)
        for columns, tile in tiles:
            z = tile.view(n, m, -1)
            # One buffer for all tiles: allocating memory of this size costs more than the arithmetic.
            scratch = scratch if scratch.shape == z.shape else torch.empty_like(z)
            rank += torch.gt(z, best[..., None], out=scratch).sum(-1)  # whole numbers: any order gives the same sum
            # ... it may differ in the last bit from the same score in the tile, and must not outrank itself.
            in_tile, scores = _scores_in(columns, z, top)
            rank -= ((scores > best) & in_tile).float()
            if targets is not None:
                in_tile, scores = _scores_in(columns, z, targets)
                target_score = torch.where(in_tile, scores, target_score)
            compared.add(columns, z)
            if consecutive:
                kept.append(z)
        log_norm = compared.log_norm
        js = gap = torch.full_like(log_norm, torch.nan)
        if consecutive:
            js, gap = js_distances(kept, log_norm), probability_gaps(kept, log_norm)
        return compared.kl, rank, log_norm - target_score, js, gap

    def _scores_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits of one token per position from a plain head: hidden [n, m, width], tokens [n] -> [n, m]."""
        head = self.anatomy.unembedding
        tokens = tokens.to(head.weight.device)
        scores = torch.bmm(hidden.to(head.weight.device), head.weight[tokens, :, None].float()).squeeze(-1)
        return self._finish(scores if head.bias is None else scores + head.bias[tokens, None].float())

    def _tiles(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield logits of normed rows [rows, width] by slices of the vocabulary: (columns, float32 [rows, columns])."""
        head = self.anatomy.unembedding
        if not self.plain:
            logits = self._finish(head(hidden.to(self.dtype)).float())
            yield slice(0, logits.shape[-1]), logits
            return
        hidden = hidden.to(head.weight.device)
        step = max(256, TILE_BYTES // (4 * len(hidden)))
        for start in range(0, head.weight.shape[0], step):
            columns = slice(start, min(start + step, head.weight.shape[0]))
            bias = None if head.bias is None else head.bias[columns].float()
            yield columns, self._finish(nn.functional.linear(hidden, head.weight[columns].float(), bias))

    def _finish(self, logits: Tensor) -> Tensor:
        """Apply the logit scale and the soft cap that some families have."""
        if self.anatomy.logit_scale != 1.0:
            logits = logits * self.anatomy.logit_scale
        cap = self.anatomy.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def _scores_in(columns: slice, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Look up one token per position [n] in a tile of logits [n, m, columns].

    Returns whether the tile contains the token, bool [n, 1], and the token's logits [n, m], meaningless where it does
    not.
    """
    tokens = tokens.to(logits.device)
    in_tile = (tokens >= columns.start) & (tokens < columns.stop)
    index = (tokens - columns.start).clamp(0, logits.shape[-1] - 1)
    return in_tile[:, None], logits.gather(-1, index[:, None, None].expand(*logits.shape[:2], 1)).squeeze(-1)
