"""What is said of rules and regions beside the measured loss, in sentences and in the terminal."""

import numpy as np
import pytest
from rich.console import Console

from diagnostics import recommend
from diagnostics.cutoffs.region_verdicts import region_lines, region_verdict
from diagnostics.cutoffs.rule_verdicts import description, measured_knee, rule_verdicts, rules_sentence
from diagnostics.cutoffs.rules import all_rules
from diagnostics.terminal.diagnosis import show_recommendation
from diagnostics.terminal.rules import distance, rules_table, show_rules
from tests.support.rules import judged, verdict, without_sweep
from tests.support.runs import FALLING, make_run, region_layers, spread

OURS = verdict("uptake", 5, title="Uptake above (ours)")
MISSING = verdict("cka", None, title="CKA", note="not measured: `rules='all,cka'`; map ours")
SILENT = verdict("calm", None, title="CALM", note="finds none: lens_exited has no value in 2 of 8 layers; map ours")


def rendered(show, width=80):
    console = Console(record=True, width=width, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console)
    return console.export_text()


def cells(table):
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


# --- Rules ---


def test_ours_stand_first_then_the_nearest_then_those_without_a_cutoff():
    records = [MISSING, verdict("asl", 2), verdict("layerskip", 7), verdict("structkv", 6), OURS]
    _, recommendation = judged(*records)
    verdicts = rule_verdicts(recommendation)
    assert list(verdicts["rule"]) == ["uptake", "structkv", "layerskip", "asl", "cka"]
    assert measured_knee(verdicts) == 6
    assert verdicts["cutoff"].isna().tolist() == [False] * 4 + [True]


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([verdict("asl", 7), verdict("structkv", 5), verdict("cka", 1)], "of 3 other rules 2 are within one layer"),
        ([verdict("asl", 7)], "of 1 other rule 1 is within one layer"),
        (
            [verdict("asl", 1), SILENT, MISSING],
            "of 3 other rules none are within one layer, 1 names no cutoff, 1 was not measured",
        ),
    ],
)
def test_one_sentence_says_which_rules_would_have_been_right(others, told):
    _, recommendation = judged(OURS, *others)
    assert rules_sentence(recommendation) == f"Our rule says 5, the measured knee is 6; {told}."


def test_the_sentence_without_a_knee_claims_nothing():
    records = [verdict(rule, k, knee=None) for rule, k in (("uptake", 5), ("asl", 2), ("structkv", 7))]
    _, unmeasured = judged(*records, run=without_sweep(make_run(spread(FALLING), layers=region_layers(2, 4, 5))))
    assert rules_sentence(unmeasured) == "Our rule says 5, no loss was measured; of 2 other rules 2 say from 2 to 7."
    _, teacher = judged(*records, max_kl=0.02)
    assert "no cutoff has a mean KL within 0.02" in rules_sentence(teacher)
    _, nothing = judged()
    assert rules_sentence(nothing) == ""


def test_the_real_rules_are_judged_at_the_goal_of_the_recommendation():
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    for goal, knee in ((0.1, 6), (0.2, 5), (0.4, 4)):
        verdicts = rule_verdicts(recommend(run, max_kl=goal))
        assert set(verdicts["rule"]) == set(all_rules())
        assert measured_knee(verdicts) == knee
        assert verdicts["ours"][0]
        assert verdicts.loc[verdicts["fixed"], "rule"].str.endswith("-depth").all()
        absent = [name for name, rule in all_rules().items() if "cka_to_final" in rule.reads]
        assert verdicts.set_index("rule").loc[absent, "absent"].all()


def test_the_short_table_collapses_fixed_depths_and_says_what_it_leaves_out():
    fixed = [verdict("speed-depth", 4), verdict("dash-depth", 1), verdict("pop-depth", 3)]
    many = [verdict(f"other-{i}", 1 + i % 7) for i in range(20)]
    _, recommendation = judged(*fixed, *many, OURS)
    short = cells(rules_table(recommendation, 12))
    assert len(short) == 12
    assert short[0] == ("Uptake above (ours)", "5", "-1", "0.150", "+12%")
    assert short[-2] == ("fixed depths (3)", "1 to 4", "-5 to -2", "0.30-2.00", "+25% to +62%")
    assert short[-1] == ("11 more, farther away", "", "", "", "")
    full = cells(rules_table(recommendation))
    assert len(full) == 24
    assert full[0] == ("Uptake above (ours)", "5", "-1", "0.150", "38%", "+12%")
    assert {"Speed-Depth", "Dash-Depth", "Pop-Depth"} <= {row[0] for row in full}


def test_a_range_is_shown_where_the_resamples_differ():
    _, recommendation = judged(verdict("asl", 6, low=5, high=7), verdict("calm", 7, low=7, high=7))
    assert [row[1:3] for row in cells(rules_table(recommendation))] == [("6 (5-7)", "0"), ("7", "+1")]
    assert [distance(off) for off in (0.0, 1.0, -5.0, np.nan)] == ["0", "+1", "-5", "-"]


def test_rules_without_a_cutoff_are_named_with_the_reason():
    _, recommendation = judged(OURS, MISSING, SILENT)
    text = rendered(lambda console: show_rules(recommendation, console, phrase=str.upper), 200)
    assert "FIND NO CUTOFF: CALM (LENS_EXITED HAS NO VALUE IN 2 OF 8 LAYERS)." in text
    assert "NOT MEASURED IN THIS RUN: CKA. TO MEASURE ONE, NAME IT: `RULES='ALL,CKA'`." in text
    assert "knee of KL 0.1: 6" in text
    _, nothing = judged()
    assert rendered(lambda console: show_rules(nothing, console)).strip() == ""


def test_the_terminal_shows_rules_and_stays_short():
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    lines = rendered(lambda console: show_recommendation(run, recommend(run), console)).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("Rules that only look at the layers"))
    last = next(i for i, line in enumerate(lines) if i > first and not line.strip() and i > first + 5)
    assert last - first <= 20


@pytest.mark.parametrize("rule", all_rules().values(), ids=all_rules())
def test_every_rule_describes_itself(rule):
    text = description(rule)
    assert ("this step is ours" in text) == rule.ours
    assert all(part in text for part in (rule.thresholds, rule.mapping, rule.blind, rule.source))
    assert text.endswith(".")


# --- Regions ---


def test_the_regions_say_which_goal_the_cutoff_stands_for():
    run = make_run(spread(FALLING), layers=region_layers(2, 4, 5))
    lines = region_lines(recommend(run))
    assert lines["Cutoff by selection"] == "5, stands for a KL of 0.1"
    assert lines["Selection region"].startswith("layers 2 to 4")
    assert region_lines(recommend(run, min_agreement=0.9))["Cutoff by selection"] == "5, stands for a KL of 0.1"
    assert region_lines(recommend(run, max_kl=0.05))["Cutoff by selection"].endswith("stands for a KL of 0.05")


def test_a_region_that_was_not_found_agrees_with_nothing():
    recommendation = recommend(make_run(spread(FALLING)))
    assert recommendation.selection_region is None
    assert region_lines(recommendation)["Selection region"] == "none found"
    said = region_verdict(recommendation)
    assert said.startswith("No selection region was found")
    assert "agree" not in said.lower()


def test_uptake_that_is_missing_names_no_cutoff():
    layers = region_layers(2, 4, 5) | {"selectivity": np.full(8, np.nan)}
    recommendation = recommend(make_run(spread(FALLING), layers=layers))
    assert region_lines(recommendation)["Cutoff by selection"] == "none found"
    assert region_verdict(recommendation).startswith("The layers alone name no cutoff")


def test_a_run_without_a_sweep_says_so_and_shows_the_rest():
    run = without_sweep(make_run(spread(FALLING), layers=region_layers(2, 4, 5)))
    recommendation = recommend(run)
    assert region_verdict(recommendation).endswith("no loss was measured to compare it with.")
    text = rendered(lambda console: show_recommendation(run, recommendation, console), 200)
    assert "Recommended cutoff: 5 of 8 layers" in text
    assert "Measured loss of SPEED" not in text
    assert "loss if cut above" not in text
    assert "(no loss was measured)" in text
    assert "Predicted savings" in text
    assert "nan" not in text.lower()
