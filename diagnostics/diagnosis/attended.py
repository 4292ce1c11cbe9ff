"""The attention of the decode rows in one layer, recomputed by segments: what several probes read, computed once.

Only the decode rows are computed beside the model's own fused attention: in float32, one KV head and a bounded block of
queries at a time.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.diagnosis.observers import AttentionRows
from diagnostics.policies.segments import Layout
from diagnostics.support.sums import total, wide

# Weights computed at once: what stays in a processor's cache, or what keeps a GPU busy.
TILE_BYTES = {"cpu": 1 << 20, "mps": 64 << 20, "cuda": 256 << 20}
# Weights of one KV head that may wait for the second round; beyond, they are computed twice.
KEEP_BYTES = 256 << 20
TOP_SHARE = 0.05
TINY = torch.finfo(torch.float32).tiny
MASSES = ("mass_anchor", "mass_prompt", "mass_decode", "mass_sink")
PER_QUERY = (*MASSES, "entropy", "evidence_mass", "variation")


@dataclass(frozen=True)
class Attended:
    """The decode rows' attention in one layer, by segments.

    Attributes
    ----------
    columns
        Measures per head, each float32 [heads].
    from_prompt, from_rest
        The prompt part of the head outputs and that of anchors and decode phase, before the output projection, float32
        [n_decode, heads, head_dim].
    mass_prompt, mass_rest
        Weight on the prompt and on all else, learned sinks included, [n_decode, heads]. Neither is 1 minus the other,
        which would lose the digits of a small one.
    received, selective
        Weight on each token of the prompt segment, and its distance from the mean over queries (half of it: the token's
        part of the selectivity), means over queries, [heads, tokens]. ``selective`` is 0 unless it was asked for.
    peak
        The largest weight of any head on each token of the prompt segment, float32 [n_decode, tokens].
    """

    columns: dict[str, Tensor]
    from_prompt: Tensor
    from_rest: Tensor
    mass_prompt: Tensor
    mass_rest: Tensor
    received: Tensor
    selective: Tensor
    peak: Tensor

    @property
    def output(self) -> Tensor:
        """The head outputs, before the output projection, float32 [n_decode, heads, head_dim]."""
        return self.from_prompt + self.from_rest


def attend(
    attention: AttentionRows,
    layout: Layout,
    evidence: tuple[tuple[int, int], ...] = (),
    tile_bytes: int | None = None,
    keep_bytes: int = KEEP_BYTES,
    per_token: bool = False,
) -> Attended:
    """Recompute the decode rows' attention by segments, with ``per_token`` also the selectivity of every token.

    ``tile_bytes`` and ``keep_bytes`` bound the weights held.
    """
    tile_bytes = tile_bytes or TILE_BYTES.get(attention.value.device.type, TILE_BYTES["cuda"])
    peak = attention.value.new_zeros(attention.n_decode, layout.n_segment, dtype=torch.float32)
    parts = [
        _attend_kv_head(attention, kv_head, layout, evidence, tile_bytes, keep_bytes, per_token, peak)
        for kv_head in range(attention.n_kv_heads)
    ]
    return Attended(
        columns={name: torch.cat([part.columns[name] for part in parts]) for name in parts[0].columns},
        from_prompt=torch.cat([part.from_prompt for part in parts], dim=1),
        from_rest=torch.cat([part.from_rest for part in parts], dim=1),
        mass_prompt=torch.cat([part.mass_prompt for part in parts], dim=1),
        mass_rest=torch.cat([part.mass_rest for part in parts], dim=1),
        received=torch.cat([part.received for part in parts]),
        selective=torch.cat([part.selective for part in parts]),
        peak=peak,
    )


def _attend_kv_head(
    attention: AttentionRows,
    kv_head: int,
    layout: Layout,
    evidence: tuple[tuple[int, int], ...],
    tile_bytes: int,
    keep_bytes: int,
    per_token: bool,
    peak: Tensor,
) -> Attended:
    """Attend with the query heads of one KV head alone; raise ``peak`` to their largest weights."""
    value = attention.value[kv_head].float()
    n_decode, n_keys = attention.n_decode, len(value)
    group = attention.n_heads // attention.n_kv_heads
    anchors, prompt, decode = slice(0, layout.n_anchors), layout.prompt, slice(layout.n_prompt - 1, n_keys)
    first = attention.n_rows - n_decode
    block = max(1, min(n_decode, tile_bytes // (4 * group * n_keys)))
    blocks = [slice(first + i, first + min(i + block, n_decode)) for i in range(0, n_decode, block)]

    per_query: dict[str, list[Tensor]] = {name: [] for name in PER_QUERY}
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    token_mass = value.new_zeros(group, layout.n_segment, dtype=wide(value.device))
    scratch = value.new_empty(group, block, layout.n_segment)
    keep = 4 * group * n_decode * n_keys <= keep_bytes
    kept: list[Tensor] = []
    for rows in blocks:
        a, on_sinks = attention.weights_and_sinks(kv_head, rows)
        if keep:
            kept.append(a)
        on_prompt = a[..., prompt]
        per_query["mass_anchor"].append(total(a[..., anchors]))
        per_query["mass_prompt"].append(total(on_prompt))
        per_query["mass_decode"].append(total(a[..., decode]))
        per_query["mass_sink"].append(on_sinks)
        # Not torch.special.entr, which is several times as slow; weights of 0 still give 0.
        log_a = torch.clamp_min(on_prompt, TINY, out=scratch[:, : on_prompt.shape[1]]).log_()
        per_query["entropy"].append(-total(log_a.mul_(on_prompt)))
        nothing = a.new_zeros(a.shape[:2], dtype=token_mass.dtype)
        per_query["evidence_mass"].append(sum((total(a[..., i:j]) for i, j in evidence), nothing))
        token_mass.add_(on_prompt.sum(1))
        outputs[0].append(on_prompt @ value[prompt])
        outputs[1].append(a[..., anchors] @ value[anchors] + a[..., decode] @ value[decode])
        highest = peak[rows.start - first : rows.stop - first]
        for head in on_prompt:
            torch.maximum(highest, head, out=highest)
    # Total variation from the mean over queries: known only now, hence a second round.
    token_mass /= n_decode
    mean = token_mass.float()
    token_variation = torch.zeros_like(token_mass)
    for i, rows in enumerate(blocks):
        a = kept[i] if keep else attention.weights(kv_head, rows)
        distance = a[..., prompt].sub_(mean[:, None]).abs_()
        per_query["variation"].append(total(distance) / 2)
        if per_token:
            token_variation.add_(distance.sum(1), alpha=0.5 / n_decode)

    query = {name: torch.cat(values, dim=1) for name, values in per_query.items()}
    columns = {name: query[name].mean(-1) for name in MASSES}
    columns["selectivity"] = query["variation"].mean(-1)
    columns["prompt_entropy"] = _entropy(query["entropy"], query["mass_prompt"], layout.n_segment)
    columns["prompt_top5"] = _top_share(token_mass)
    columns["evidence_mass"] = query["evidence_mass"].mean(-1) if evidence else columns["mass_prompt"] * torch.nan
    columns = {name: column.float() for name, column in columns.items()}
    from_prompt, from_rest = (torch.cat(part, dim=1).transpose(0, 1) for part in outputs)
    mass_rest = query["mass_anchor"] + query["mass_decode"] + query["mass_sink"]
    return Attended(
        columns=columns,
        from_prompt=from_prompt,
        from_rest=from_rest,
        mass_prompt=query["mass_prompt"].T,
        mass_rest=mass_rest.T,
        received=token_mass,
        selective=token_variation,
        peak=peak,
    )


def _entropy(unnormalised: Tensor, mass: Tensor, n_tokens: int) -> Tensor:
    """Normalised entropy of a / mass from -sum(a log a), mean over queries that see the prompt at all: [group]."""
    if n_tokens < 2:
        return torch.full_like(mass[:, 0], torch.nan)
    entropy = (mass.log() + unnormalised / mass) / math.log(n_tokens)
    return entropy.where(mass > 0, torch.nan).nanmean(-1)


def _top_share(token_mass: Tensor) -> Tensor:
    """Share of the mass [group, tokens] that the top 5% of tokens hold (at least one token): [group]."""
    n_tokens = token_mass.shape[-1]
    if not n_tokens:
        return torch.full_like(token_mass.sum(-1), torch.nan)
    top = token_mass.topk(max(1, round(TOP_SHARE * n_tokens)), dim=-1).values
    return top.sum(-1) / token_mass.sum(-1)
