"""Where the decode-phase queries look, how selectively, and how much they take.

Mass alone misleads, since attention sinks sit on common tokens and late layers may look at the prompt and take nothing:
*selectivity* tells queries that look at different tokens from a sink that all of them share, and *contribution* weighs
what is written to the residual.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Columns, Measured, Probe, PromptContext
from diagnostics.support.errors import UserError
from diagnostics.support.finite import finite_mean

# Prompt tokens that the detail table of a head names.
TOP_TOKENS = 32


class AttentionMass(Probe):
    """Attention of decode queries to anchors, prompt and decode, per layer and head."""

    name = "attention_mass"
    of_additions = ("prompt_contribution",)
    describes: ClassVar[Mapping[str, str]] = {
        "mass_anchor": "attention weight on the anchors, mean over decode queries (and heads), 0..1",
        "mass_prompt": "attention weight on the prompt, mean over decode queries (and heads), 0..1",
        "mass_decode": "attention weight on decode-phase tokens, mean over decode queries (and heads), 0..1",
        "mass_sink": "attention weight on the model's learned sinks, 0..1; zero where it has none",
        "selectivity": "total variation between a query's attention over the prompt (as masses) and its mean over "
        "decode queries, 0..1; layers: mean over heads; tokens: one number per layer, this token's part of the layer's",
        "selectivity_max": "selectivity of the most selective head, 0..1",
        "prompt_entropy": "entropy of the attention over the prompt / log(prompt tokens), 0 (one token) .. 1 (uniform)",
        "prompt_top5": "share of the prompt mass on the 5% of prompt tokens that get most of it, 0..1",
        "prompt_contribution": "norm of what the attention adds to the residual from the prompt (gates, output "
        "projection, norms after it and multipliers included) / norm of the residual, mean over decode queries, >= 0",
        "evidence_mass": "attention weight on the evidence spans, 0..1; NaN where the prompt has none",
        "evidence_mass_max": "evidence mass of the head with most of it, 0..1",
        "attention": "attention weight on one prompt token, mean over decode queries, 0..1; tokens: mean over heads, "
        f"one number per layer; head_tokens: of one head, for the {TOP_TOKENS} tokens that get most of it",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.heads: list[Columns] = []
        self.contribution: list[float] = []
        self.received: list[np.ndarray] = []
        self.selective: list[np.ndarray] = []
        self.top: list[tuple[np.ndarray, np.ndarray]] = []

    def on_decode(self, rows: DecodeRows) -> None:
        """Measure the decode rows of one layer."""
        attention, context = rows.attention, self.context
        attended = context.attended(rows)
        _require_identity(attended.output, attention.output, rows.layer, context.model_name)
        written = attention.adds(attended.from_prompt.flatten(1)).norm(dim=-1)
        relative = written / rows.residual_in.float().norm(dim=-1)
        self.contribution.append(float(relative.cpu().double().mean()))
        self.heads.append({name: column.cpu().numpy() for name, column in attended.columns.items()})
        if context.detail:
            self.received.append(attended.received.mean(0).float().cpu().numpy())
            self.selective.append(attended.selective.mean(0).float().cpu().numpy())
            most, index = attended.received.topk(min(TOP_TOKENS, context.layout.n_segment), dim=-1)
            position = index + context.layout.prompt.start
            self.top.append((position.int().cpu().numpy(), most.float().cpu().numpy()))

    def measured(self) -> Measured:
        """Return per-head columns, and their means (selectivity and evidence: also maxima) over heads per layer."""
        heads = {name: np.stack([layer[name] for layer in self.heads]) for name in self.heads[0]}
        layers = {name: finite_mean(column, axis=-1) for name, column in heads.items()}
        layers["selectivity_max"] = heads["selectivity"].max(axis=1)
        layers["evidence_mass_max"] = heads["evidence_mass"].max(axis=1)
        layers["prompt_contribution"] = np.array(self.contribution)
        if not self.context.detail:
            return Measured(layers=layers, heads=heads)
        tokens = {"attention": np.stack(self.received, axis=1), "selectivity": np.stack(self.selective, axis=1)}
        position, attention = (np.stack(column) for column in zip(*self.top, strict=True))
        head_tokens = {"position": position, "attention": attention}
        return Measured(layers=layers, heads=heads, tokens=tokens, head_tokens=head_tokens)


def _require_identity(ours: Tensor, own: Tensor, layer: int, name: str) -> None:
    """Refuse a model whose own attention output differs from the recomputed one: [n_decode, heads, head_dim]."""
    tolerance = 1e-3 if own.dtype == torch.float32 else 0.05
    error = float((ours - own).abs().max() / own.abs().max().clamp_min(1e-6))
    if not error <= tolerance:
        raise UserError(
            f"model {name!r} cannot be diagnosed: in layer {layer} its attention output differs from softmax(q k) v by "
            f"{error:.2g} of its size; its attention does something that the probe does not know"
        )
