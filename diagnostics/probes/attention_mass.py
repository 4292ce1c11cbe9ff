"""Where the decode-phase queries look, how selectively, and how much they take.

Only the decode rows are computed beside the model's own fused attention: in float32, one KV head and one slice of keys
at a time. Mass alone misleads, since attention sinks sit on common tokens and late layers may look at the prompt and
take nothing: *selectivity* tells queries that look at different tokens from a sink that all of them share, and
*contribution* weighs what is written to the residual.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diagnostics.capture.base import AttentionRows, DecodeRows, Layout
from diagnostics.errors import UserError
from diagnostics.probes.base import Columns, Measured, Probe, PromptContext

KEY_CHUNK = 4096
TOP_SHARE = 0.05


class AttentionMass(Probe):
    """Attention of decode queries to anchors, prompt and decode, per layer and head."""

    name = "attention_mass"
    describes = {
        "mass_anchor": "attention weight on the anchors, mean over decode queries (and heads), 0..1",
        "mass_prompt": "attention weight on the prompt, 0..1",
        "mass_decode": "attention weight on decode-phase tokens, 0..1",
        "mass_sink": "attention weight on the model's learned sinks, 0..1; zero where it has none",
        "selectivity": "total variation between a query's attention over the prompt (as masses) and its mean over "
        "decode queries, 0..1; layers: mean over heads",
        "selectivity_max": "selectivity of the most selective head, 0..1",
        "prompt_entropy": "entropy of the attention over the prompt / log(prompt tokens), 0 (one token) .. 1 (uniform)",
        "prompt_top5": "share of the prompt mass on the 5% of prompt tokens that get most of it, 0..1",
        "prompt_contribution": "norm of what the attention writes from the prompt / norm of the residual, mean over "
        "decode queries, >= 0",
        "evidence_mass": "attention weight on the evidence spans, 0..1; NaN where the prompt has none",
        "evidence_mass_max": "evidence mass of the head with most of it, 0..1",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.heads: list[Columns] = []
        self.contribution: list[float] = []

    def on_decode(self, rows: DecodeRows) -> None:
        """Measure the decode rows of one layer."""
        attention = rows.attention
        heads, from_prompt, total = attend(attention, self.context.layout, self.context.evidence)
        _require_identity(total, attention.output, rows.layer, self.context.model_name)
        written = attention.project(from_prompt.flatten(1)).norm(dim=-1)
        self.contribution.append(float((written / rows.residual_in.float().norm(dim=-1)).mean()))
        self.heads.append({name: column.cpu().numpy() for name, column in heads.items()})

    def measured(self) -> Measured:
        """Return per-head columns, and their means (selectivity and evidence: also maxima) over heads per layer."""
        heads = {name: np.stack([layer[name] for layer in self.heads]) for name in self.heads[0]}
        layers = {name: mean_over_heads(column) for name, column in heads.items()}
        layers["selectivity_max"] = heads["selectivity"].max(axis=1)
        layers["evidence_mass_max"] = heads["evidence_mass"].max(axis=1)
        layers["prompt_contribution"] = np.array(self.contribution)
        return Measured(layers=layers, heads=heads)


def mean_over_heads(column: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN (a head whose window ends after the prompt); NaN if nothing is."""
    counted = np.isfinite(column)
    total = np.where(counted, column, 0).sum(axis=-1)
    return np.divide(total, counted.sum(axis=-1), out=np.full(total.shape, np.nan), where=counted.any(axis=-1))


def attend(
    attention: AttentionRows, layout: Layout, evidence: tuple[tuple[int, int], ...] = (), chunk: int = KEY_CHUNK
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Recompute the decode rows' attention by segments.

    Returns per-head columns [heads], the prompt part of the head outputs and the whole of them, both float32
    [n_decode, heads, head_dim] before the output projection. ``chunk`` bounds the keys held at once.
    """
    parts = [
        _attend_kv_head(attention, kv_head, layout, evidence, chunk) for kv_head in range(attention.key.shape[0])
    ]
    columns = {name: torch.cat([part[0][name] for part in parts]) for name in parts[0][0]}
    from_prompt, total = (torch.cat([part[i] for part in parts]).transpose(0, 1) for i in (1, 2))
    return columns, from_prompt, total


def _attend_kv_head(
    attention: AttentionRows, kv_head: int, layout: Layout, evidence: tuple[tuple[int, int], ...], chunk: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """One KV head: columns [group], prompt part and total of the outputs [group, n_decode, head_dim]."""
    n_decode, n_keys = attention.n_decode, attention.key.shape[1]
    rows = slice(-n_decode, None)
    slices = list(_slices(layout, n_keys, chunk))
    # Two rounds over the keys: the softmax denominator first. The scores survive to the second where they are few.
    keep = n_keys <= 2 * chunk
    kept = {}
    normalisers = []
    for segment, keys in slices:
        scores = attention.scores(kv_head, rows, keys)
        normalisers.append(scores.logsumexp(-1, keepdim=True))
        if keep:
            kept[segment, keys.start] = scores
    log_norm = attention.log_normaliser(kv_head, torch.cat(normalisers, dim=-1))

    group, head_dim = log_norm.shape[0], attention.value.shape[-1]
    zeros = log_norm.new_zeros(group, n_decode)
    mass = {"anchor": zeros, "prompt": zeros, "decode": zeros}
    from_prompt = log_norm.new_zeros(group, n_decode, head_dim)
    total = from_prompt.clone()
    variation, a_log_a, on_evidence = zeros, zeros, zeros
    per_token = []
    for segment, keys in slices:
        scores = kept[segment, keys.start] if keep else attention.scores(kv_head, rows, keys)
        log_a = scores.sub_(log_norm)
        a = log_a.exp()
        taken = a @ attention.value[kv_head, keys].float()
        total = total + taken
        mass[segment] = mass[segment] + a.sum(-1)
        if segment != "prompt":
            continue
        from_prompt = from_prompt + taken
        mean = a.mean(1, keepdim=True)
        per_token.append(mean[:, 0])
        a_log_a = a_log_a + torch.linalg.vecdot(a, log_a)
        for start, stop in evidence:
            inside = slice(max(start - keys.start, 0), max(stop - keys.start, 0))
            on_evidence = on_evidence + a[:, :, inside].sum(-1)
        variation = variation + a.sub_(mean).abs_().sum(-1) / 2

    columns = {f"mass_{segment}": m.mean(-1) for segment, m in mass.items()}
    columns["mass_sink"] = (1 - sum(mass.values())).mean(-1) if attention.sinks is not None else zeros.mean(-1)
    columns["selectivity"] = variation.mean(-1)
    columns["prompt_entropy"] = _entropy(a_log_a, mass["prompt"], layout.n_segment)
    columns["prompt_top5"] = _top_share(per_token, columns["mass_prompt"])
    columns["evidence_mass"] = on_evidence.mean(-1) if evidence else torch.full_like(on_evidence[:, 0], torch.nan)
    return columns, from_prompt, total


def _slices(layout: Layout, n_keys: int, chunk: int) -> Iterator[tuple[str, slice]]:
    """Cut the keys into slices of at most ``chunk``, each inside one segment."""
    segments = (
        ("anchor", 0, layout.n_anchors),
        ("prompt", layout.prompt.start, layout.prompt.stop),
        ("decode", layout.n_prompt - 1, n_keys),
    )
    for name, first, last in segments:
        for start in range(first, last, chunk):
            yield name, slice(start, min(start + chunk, last))


def _entropy(a_log_a: Tensor, mass: Tensor, n_tokens: int) -> Tensor:
    """Normalised entropy of a / mass from sum(a log a), mean over queries that see the prompt at all: [group]."""
    if n_tokens < 2:
        return torch.full_like(mass[:, 0], torch.nan)
    entropy = (mass.log() - a_log_a / mass) / math.log(n_tokens)
    return entropy.where(mass > 0, torch.nan).nanmean(-1)


def _top_share(per_token: list[Tensor], mass: Tensor) -> Tensor:
    """Share of the prompt mass that the top 5% of prompt tokens hold (at least one token): [group]."""
    if not per_token:
        return torch.full_like(mass, torch.nan)
    tokens = torch.cat(per_token, dim=-1)
    count = max(1, round(TOP_SHARE * tokens.shape[-1]))
    return tokens.topk(count, dim=-1).values.sum(-1) / mass


def _require_identity(ours: Tensor, own: Tensor, layer: int, name: str) -> None:
    """Refuse a model whose own attention output differs from the recomputed one: [n_decode, heads, head_dim]."""
    tolerance = 1e-3 if own.dtype == torch.float32 else 0.05
    error = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
    if not error <= tolerance:
        raise UserError(
            f"model {name!r} cannot be diagnosed: in layer {layer} its attention output differs from softmax(q k) v by "
            f"{error:.2g} of its size; its attention does something that the probe does not know"
        )
