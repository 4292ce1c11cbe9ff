"""The page of a run: its recommendation, the loss at every cutoff, the layers, and the prompts it was measured on."""

from __future__ import annotations

import numpy as np
import pandas as pd

from diagnostics import figures
from diagnostics.cutoffs.answer import ANSWER_LENGTH, answer
from diagnostics.cutoffs.goals import goals_in_words
from diagnostics.cutoffs.losses import ROUNDING
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.region_verdicts import region_lines, region_verdict
from diagnostics.generation.benchmark_folder import Benchmark
from diagnostics.report.benchmarks import benchmark_parts
from diagnostics.report.document import Card, Facts, Page, Part, Picture, Section, Table
from diagnostics.report.facts import run_facts
from diagnostics.report.rules import rules_section
from diagnostics.report.tables import from_frame, from_terminal
from diagnostics.runs.run import Run
from diagnostics.terminal.diagnosis import loss_table, savings_table
from diagnostics.terminal.units import readable_bytes


def report(run: Run, recommendation: Recommendation, benchmark: Benchmark | None = None) -> str:
    """Return the page of a run as HTML, with its benchmark if there is one."""
    sections = run_sections(run, recommendation)
    if benchmark is not None:
        sections.insert(-1, Section("Measured costs", benchmark_parts(benchmark)))
    return Page(
        title=f"Cutoff {recommendation.cutoff} of {run.n_layers} for {run.manifest['model']}",
        answer=answer(recommendation),
        cards=run_cards(recommendation),
        remarks=[goal(run, recommendation), region_verdict(recommendation)],
        notes=recommendation.data["notes"],
        sections=[*sections, Section("How this was measured", [Facts(run_facts(run))])],
    ).render()


def run_cards(recommendation: Recommendation) -> list[Card]:
    """Return the numbers of the recommended cutoff."""
    data = recommendation.data
    saved = min(data["predicted"], key=lambda savings: abs(savings["n_prompt"] - ANSWER_LENGTH))
    length = f"predicted at {saved['n_prompt']:,} tokens"
    held = f"{readable_bytes(saved['kv_bytes'])} of {readable_bytes(saved['kv_bytes_full'])}"
    return [
        Card(
            "Cutoff", f"{recommendation.cutoff} of {data['n_layers']}", f"layers, {data['depth_fraction']:.0%} of all"
        ),
        *_loss_cards(recommendation),
        Card("TTFT", f"{saved['ttft_ratio'] - 1:+.0%}", length),
        Card("KV cache", f"{saved['kv_ratio'] - 1:+.0%}", f"{held} at {saved['n_prompt']:,} tokens"),
    ]


def _loss_cards(recommendation: Recommendation) -> list[Card]:
    if not recommendation.measured:
        return [Card("KL from full depth", "-", "not measured: a run without the sweep")]
    at = recommendation.evidence[recommendation.cutoff - 1]
    bound = "no bound: too few prompts" if at["kl_bound"] is None else f"bound {at['kl_bound']:.3f}, nats per token"
    return [
        Card("KL from full depth", f"{at['kl']:.3f}", bound),
        Card("Same top token", f"{at['top1_agreement']:.1%}", "of the next tokens"),
    ]


def goal(run: Run, recommendation: Recommendation) -> str:
    """Say which goal the cutoff meets, and on what."""
    criterion, lengths = recommendation.data["criterion"], run.prompts["n_prompt"]
    of = "1 prompt" if len(lengths) == 1 else f"{len(lengths)} prompts"
    sure = f", with {criterion['confidence']:.0%} confidence" if recommendation.measured else ""
    layers = "Measured" if recommendation.measured else "No loss was measured; the layers were diagnosed"
    return (
        f"Goal: {goals_in_words(criterion)}{sure}. {layers} on {of} of {lengths.min():,} to {lengths.max():,} tokens."
    )


def run_sections(run: Run, recommendation: Recommendation) -> list[Section]:
    """Return what a run has to show: losses, savings, categories, rules, layers, prompts."""
    return [
        _loss(run, recommendation),
        Section(
            "Predicted savings",
            ["What the recommended cutoff saves, as changes from full depth.", _savings(recommendation)],
        ),
        *([Section("Loss by category of prompts", [_categories(run, recommendation)])] if run.has_sweep else []),
        *rules_section(run, recommendation),
        Section(
            "What the layers do",
            [
                " ".join(f"{name}: {region}." for name, region in region_lines(recommendation).items()),
                REGIONS,
                *_panels(run, recommendation),
                Picture(figures.head_map(run), _heads_caption(run)),
                Picture(figures.retention(run, recommendation), _retention_caption(recommendation)),
            ],
        ),
        Section("Prompts", [_prompts(run, recommendation.cutoff)]),
    ]


def _loss(run: Run, recommendation: Recommendation) -> Section:
    """Return what every cutoff loses; without a sweep, what it is predicted to save, and that no loss was measured."""
    picture = figures.cutoff_loss(run, recommendation)
    if not recommendation.measured:
        return Section("Every cutoff", [NO_LOSS, Picture(picture, "What each cutoff is predicted to save.")])
    return Section(
        "Loss at every cutoff",
        [
            Picture(picture, _loss_caption(recommendation)),
            from_terminal(loss_table(recommendation), caption="Around the recommended cutoff; means over prompts"),
        ],
    )


NO_LOSS = (
    "No loss was measured: the run was made without the sweep. The cutoff is what our rule says of the layers, and "
    "nothing here tells what it changes. Diagnose the model again with the sweep to know."
)
REGIONS = (
    "In the figures the selection region is orange, the stabilization region green, and the cutoff dashed. A line is "
    "the mean over prompts; its band holds the middle half of them."
)


def _panels(run: Run, recommendation: Recommendation) -> list[Part]:
    """Return the probes layer by layer, each with the sentence on what it shows."""
    sentences = figures.layer_sentences(run, recommendation)
    return [Picture(figures.layer_panel(run, name, recommendation), sentence) for name, sentence in sentences.items()]


def _loss_caption(recommendation: Recommendation) -> str:
    evidence, cutoff = recommendation.evidence, recommendation.cutoff
    text = (
        "Above: KL from full depth at every cutoff, and a band up to the bound that decides. The grey line is the "
        "recommended cutoff. Below: what each cutoff is predicted to save; lower is cheaper."
    )
    if cutoff > 1:
        lower, here = (evidence[k - 1]["kl"] for k in (cutoff - 1, cutoff))
        text += f" One layer lower, at cutoff {cutoff - 1}, KL is {lower:.3g} instead of {here:.3g} nats per token."
    return text


def _savings(recommendation: Recommendation) -> Table:
    return from_terminal(savings_table(recommendation), caption="Counted from operations and bytes, not measured")


def _categories(run: Run, recommendation: Recommendation) -> Table:
    cutoff, limit = recommendation.cutoff, recommendation.data["criterion"].get("max_kl")
    at = run.cutoffs[run.cutoffs["cutoff"] == cutoff].merge(run.prompts[["prompt_id", "category"]], on="prompt_id")
    grouped = at.groupby("category", sort=False).agg(
        prompts=("kl", "size"), kl=("kl", "mean"), same=("top1_agreement", "mean")
    )
    frame = pd.DataFrame(
        {
            "prompts": grouped["prompts"].map(str),
            "KL, nats/token": grouped["kl"].map("{:.4f}".format),
            "same top token": grouped["same"].map("{:.1%}".format),
        }
    )
    if limit is not None:
        frame["within the goal"] = np.where(grouped["kl"] <= limit + ROUNDING, "yes", "no")
    return from_frame(frame, "category", caption=f"Means at cutoff {cutoff}")


def _heads_caption(run: Run) -> str:
    values = run.array("selectivity")
    text = "One cell per head. A bright head looks at other prompt tokens from one decode position to the next."
    if not np.isfinite(values).any():
        return text
    mean = np.nanmean(values, axis=0)
    layer, head = np.unravel_index(int(np.nanargmax(mean)), mean.shape)
    return f"{text} The most selective is head {head} of layer {layer}: {mean[layer, head]:.2f}."


def _retention_caption(recommendation: Recommendation) -> str:
    kept = recommendation.data["retention"]
    shares = [
        f"{kept[name]:.0%} of the {label}"
        for name, label in (("mass_prompt", "attention mass on the prompt"), ("prompt_contribution", "contribution"))
        if kept[name] is not None
    ]
    return f"Layers below cutoff {recommendation.cutoff} have {' and '.join(shares)}." if shares else ""


def _prompts(run: Run, cutoff: int) -> Table:
    prompts = run.prompts.set_index("prompt_id")
    frame = pd.DataFrame(
        {
            "category": prompts["category"].astype(str),
            "prompt tokens": prompts["n_prompt"].map("{:,}".format),
            "reference tokens": prompts["n_decode"].map("{:,}".format),
        }
    )
    if run.has_sweep:
        at = run.cutoffs[run.cutoffs["cutoff"] == cutoff].set_index("prompt_id")["kl"]
        frame[f"KL at cutoff {cutoff}"] = at.loc[prompts.index].map("{:.4f}".format)
    return from_frame(frame, "prompt")
