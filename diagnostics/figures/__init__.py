"""Draws result tables as plotly figures: pure functions for the dashboard, notebooks and reports.

Every figure has a transparent background and takes its text colours from plotly's template, so it suits light and dark
pages.
"""

from diagnostics.figures.benchmarks import benchmark_ratios, benchmark_sentences
from diagnostics.figures.cutoffs import compare_runs, cutoff_loss, measured_loss, retention
from diagnostics.figures.finetuning import finetuning_categories, finetuning_cutoffs, finetuning_steps
from diagnostics.figures.heads import head_map
from diagnostics.figures.layers import layer_curves, layer_panel, layer_sentences
from diagnostics.figures.lens import logit_lens
from diagnostics.figures.quality import quality_by_cutoff, quality_differences, quality_failures, quality_scores
from diagnostics.figures.rules import must_see, rule_cutoffs, uptake_above
from diagnostics.figures.style import PALETTE
from diagnostics.figures.values import figure_values

__all__ = [
    "PALETTE",
    "benchmark_ratios",
    "benchmark_sentences",
    "compare_runs",
    "cutoff_loss",
    "figure_values",
    "finetuning_categories",
    "finetuning_cutoffs",
    "finetuning_steps",
    "head_map",
    "layer_curves",
    "layer_panel",
    "layer_sentences",
    "logit_lens",
    "measured_loss",
    "must_see",
    "quality_by_cutoff",
    "quality_differences",
    "quality_failures",
    "quality_scores",
    "retention",
    "rule_cutoffs",
    "uptake_above",
]
