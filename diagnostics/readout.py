"""Residuals -> distributions over the vocabulary, compared with the model's final one.

The logit lens and the cutoff sweep ask the same question, *how far is this residual's next-token distribution from the
model's own?*, of many residuals at the same positions. The vocabulary is walked in tiles, so that neither candidates x
vocabulary logits nor a second copy of them ever exist, and a tile is still in the processor's cache when it is reduced.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.anatomy import Anatomy
from diagnostics.errors import UserError

# Logits held at once: a tile where tiles stream, all of a block of positions where they are needed a second time.
TILE_BYTES = 4 << 20
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Distances of candidate distributions q from the final one p; every field is float32 [positions, candidates].

    ``kl``: KL(p || q) in nats, >= 0. ``rank``: rank of p's most likely token under q, 0 is top. ``nll``: negative
    log-likelihood of the target under q in nats, NaN without targets. ``js``: Jensen-Shannon distance (square root of
    the divergence in nats, 0..0.833) of candidate i from candidate i-1, NaN for the first and where not asked for.
    """

    kl: Tensor
    rank: Tensor
    nll: Tensor
    js: Tensor


class Readout:
    """Final norm and unembedding of one model, in float32 whatever the model's own type."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self._norm: nn.Module | None = None

    # Not before they are needed: the weights may be elsewhere until then. (No cached_property: this class travels.)

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
        """Whether the head is a matrix; of a quantised, adapted or offloaded one only the module knows the weights."""
        head = self.anatomy.unembedding
        return type(head) is nn.Linear and head.weight.is_floating_point() and not head.weight.is_meta

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's last layer."""
        return next(self.anatomy.layers[-1].parameters()).dtype

    def logits(self, residuals: Tensor) -> Tensor:
        """Map residuals [..., width] (before the final norm) to logits [..., vocab], float32."""
        hidden = self.norm(residuals.float())
        return torch.cat([tile for _, tile in self._tiles(hidden.flatten(0, -2))], dim=-1).view(
            *residuals.shape[:-1], -1
        )

    def top(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Return the most likely token of residuals [..., width], and its probability: int64 and float32 [...]."""
        hidden = self.norm(residuals.float()).flatten(0, -2)
        best = hidden.new_full((len(hidden),), -torch.inf)
        token = torch.zeros_like(best, dtype=torch.long)
        total = torch.zeros_like(best)  # running sum of exp(score - best)
        for columns, tile in self._tiles(hidden):
            here, at = tile.max(-1)
            higher = torch.maximum(best, here.to(best.device))
            total = total * (best - higher).exp() + (tile.to(best.device) - higher[:, None]).exp_().sum(-1)
            token = torch.where(higher > best, at.to(best.device) + columns.start, token)
            best = higher
        return token.view(residuals.shape[:-1]), (1 / total).view(residuals.shape[:-1])

    def require_identity(self, ours: Tensor, logits: Tensor, name: str) -> None:
        """Refuse the model unless the lens after the last layer reproduces its logits.

        ``ours`` [rows, vocab] are `logits` of the last layer's output, ``logits`` [rows, vocab] the model's own.
        Tolerance: 1e-3 of the logits' standard deviation in float32, 0.1 of it in half precision, whose rounding alone
        reaches a few hundredths. Raises UserError.
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
        width] residuals, ``targets`` [positions] token ids; ``consecutive`` asks for the distance of each candidate
        from the one before it.
        """
        n, m = candidates.shape[:2]
        log_p = final.to(wide(final.device)).log_softmax(-1).float()
        # Streaming needs a tile of a block's rows; the second round of ``consecutive`` needs all of their logits.
        row_bytes = 4 * log_p.shape[1] if consecutive or not self.plain else TILE_BYTES // 2048
        block = max(1, BLOCK_BYTES // (row_bytes * m))
        parts = []
        for i in range(0, n, block):
            rows = slice(i, i + block)
            parts.append(
                self._compare_block(
                    log_p[rows], candidates[rows], None if targets is None else targets[rows], consecutive
                )
            )
        return Comparison(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _compare_block(
        self, log_p: Tensor, candidates: Tensor, targets: Tensor | None, consecutive: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, m = candidates.shape[:2]
        hidden = self.norm(candidates.float())
        top, p = log_p.argmax(-1), log_p.exp()
        # The final top token's score, to rank it: its own tile comes too late, so it is computed first ...
        best = self._scores_of(hidden, top)
        rank = torch.zeros_like(best)
        peak = torch.full_like(best, -torch.inf)  # running maximum of the scores, and
        total = torch.zeros_like(best)  # running sum of exp(score - peak)
        expected = torch.zeros_like(best, dtype=wide(best.device))  # E_p[score]
        kept = []
        scratch = best.new_empty(0)
        for columns, tile in self._tiles(hidden.flatten(0, 1)):
            z = tile.view(n, m, -1)
            # One buffer for all tiles: fresh memory of this size costs more than the arithmetic.
            scratch = scratch if scratch.shape == z.shape else torch.empty_like(z)
            rank += torch.gt(z, best[..., None], out=scratch).sum(-1)
            higher = torch.maximum(peak, z.amax(-1))
            weights = torch.sub(z, higher[..., None], out=scratch).exp_()
            total = total * (peak - higher).exp() + weights.sum(-1)
            peak = higher
            expected += torch.bmm(z, p[:, columns, None]).squeeze(-1)
            # ... which may differ in the last bit from the same score in the tile, and must not outrank itself.
            here = (top >= columns.start) & (top < columns.stop)
            if here.any():
                own = (top - columns.start).clamp(0, z.shape[-1] - 1)[:, None, None].expand(n, m, 1)
                rank -= ((z.gather(-1, own).squeeze(-1) > best) & here[:, None]).float()
            if consecutive:
                kept.append(z)
        log_norm = peak + total.log()
        # KL(p || q) = E_p[log p] - E_p[log q]
        entropy = -(p * log_p).sum(-1, dtype=expected.dtype)
        kl = (log_norm - expected - entropy[:, None]).clamp_min(0).float()
        missing = torch.full_like(best, torch.nan)
        nll = missing if targets is None else log_norm - self._scores_of(hidden, targets)
        return kl, rank, nll, _js_distance(kept, log_norm) if consecutive else missing

    def _scores_of(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits of one token per position: hidden [n, m, width], tokens [n] -> [n, m]."""
        if not self.plain:
            logits = torch.cat([tile for _, tile in self._tiles(hidden.flatten(0, 1))], dim=-1)
            return logits.view(*hidden.shape[:2], -1).gather(-1, tokens[:, None, None].expand_as(hidden[..., :1]))[
                ..., 0
            ]
        head = self.anatomy.unembedding
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
        """Apply what some families do to the head's output."""
        if self.anatomy.logit_scale != 1.0:
            logits = logits * self.anatomy.logit_scale
        cap = self.anatomy.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def wide(device: torch.device) -> torch.dtype:
    """Return the type to sum in: float64, but on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _js_distance(tiles: list[Tensor], log_norm: Tensor) -> Tensor:
    """Jensen-Shannon distance of neighbouring candidates: tiles of [n, m, columns] logits -> [n, m], NaN first.

    JS = H((p + q) / 2) - (H(p) + H(q)) / 2, tile by tile; the tiles are overwritten.
    """
    entropy = torch.zeros_like(log_norm, dtype=wide(log_norm.device))
    mixed = torch.zeros_like(entropy[:, 1:])
    tiny = torch.finfo(log_norm.dtype).tiny
    q, log_mixture = log_norm.new_empty(0), log_norm.new_empty(0)
    for tile in tiles:
        if q.shape != tile.shape:
            q, log_mixture = torch.empty_like(tile), torch.empty_like(tile[:, 1:])
        log_q = tile.sub_(log_norm[..., None])
        torch.exp(log_q, out=q)
        entropy -= log_q.mul_(q).sum(-1)
        mixture = torch.add(q[:, 1:], q[:, :-1], out=tile[:, 1:]).mul_(0.5)
        torch.clamp_min(mixture, tiny, out=log_mixture).log_()  # several times as fast as xlogy
        mixed -= log_mixture.mul_(mixture).sum(-1)
    js = torch.full_like(log_norm, torch.nan)
    js[:, 1:] = (mixed - (entropy[:, 1:] + entropy[:, :-1]) / 2).clamp_min(0).sqrt()
    return js
