"""The section of a report on rules that only look at the layers: pictures, the whole table, and what each rule is."""

from __future__ import annotations

from diagnostics import figures
from diagnostics.cutoffs.recommendation import Recommendation
from diagnostics.cutoffs.rule_verdicts import description, must_see_sentence, rule_verdicts, rules_sentence
from diagnostics.cutoffs.rules import all_rules
from diagnostics.report.document import Facts, Part, Picture, Section
from diagnostics.report.tables import from_terminal
from diagnostics.runs.run import Run
from diagnostics.terminal.rules import rules_table, silent_rules

OUR_RULE = (
    "Our rule sums uptake over all layers above a cutoff: what they would still take from the prompt. The cutoff is "
    "the first one that leaves no more than the limit."
)


def rules_section(run: Run, recommendation: Recommendation) -> list[Section]:
    """Return the section on rules; nothing where no rule was asked."""
    verdicts = rule_verdicts(recommendation)
    if verdicts.empty:
        return []
    parts: list[Part] = [
        f"{rules_sentence(recommendation)} Rules see the layers alone; only the measured loss tells which is right.",
        Picture(figures.rule_cutoffs(run, recommendation), _cutoffs_caption(recommendation)),
        from_terminal(
            rules_table(recommendation),
            text_columns=1,
            caption="All rules that name a cutoff; in brackets the range over 90% of the resamples",
        ),
        *silent_rules(verdicts),
        Picture(figures.uptake_above(run, recommendation), OUR_RULE),
    ]
    seen = figures.must_see(run, recommendation)
    if seen is not None:
        parts.append(Picture(seen, must_see_sentence(recommendation)))
    parts += ["What each rule is, in its own words:", _descriptions(list(verdicts["rule"]))]
    return [Section("Rules that only look at the layers", parts)]


def _cutoffs_caption(recommendation: Recommendation) -> str:
    ranges = "A bar holds 90% of the resamples of the prompts."
    return f"The grey line is the measured knee. {ranges}" if recommendation.measured else ranges


def _descriptions(names: list[str]) -> Facts:
    """Return what each rule is, by its own texts."""
    known = all_rules()
    return Facts({known[name].title: description(known[name]) for name in names if name in known})
