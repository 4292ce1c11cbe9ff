"""The plain sentence says what the recommendation's numbers say."""

import dataclasses
import re

import pytest

from diagnostics import recommend
from diagnostics.cutoffs.answer import answer
from tests.support.runs import FALLING, make_run, spread


def changed(recommendation, **fields):
    """The recommendation with other fields of the evidence at its cutoff."""
    evidence = [dict(row) for row in recommendation.evidence]
    evidence[recommendation.cutoff - 1] |= fields
    return dataclasses.replace(recommendation, data=recommendation.data | {"evidence": evidence})


def test_depth_savings_and_changes():
    recommendation = recommend(make_run(spread(FALLING)))
    (at,) = (savings for savings in recommendation.data["predicted"] if savings["n_prompt"] == 8192)
    said = answer(changed(recommendation, top1_agreement=0.91))
    assert said.startswith("Prompts can stop at layer 6 of 8: at 8,192 tokens that saves a predicted ")
    shares = [int(number) for number in re.findall(r"(\d+)%", said)]
    assert set(shares) == {round(100 * (1 - at["ttft_ratio"])), round(100 * (1 - at["kv_ratio"]))}
    assert said.endswith("and changes 9 of 100 next tokens.")


def test_savings_are_those_of_the_nearest_length():
    recommendation = recommend(make_run(spread(FALLING)))
    assert "at 1,024 tokens" in answer(recommendation, 100)
    assert "at 131,072 tokens" in answer(recommendation, 10**6)


def test_full_depth():
    said = answer(recommend(make_run(spread(FALLING)), max_kl=1e-9))
    assert said == "Prompts must run through all 8 layers: no smaller cutoff meets the goal."


@pytest.mark.parametrize(
    ("agreement", "said"),
    [
        (1.0, "changed no next token that was measured"),
        (0.9999, "changes fewer than 1 of 1,000 next tokens"),
        (0.996, "changes 4 of 1,000 next tokens"),
        (0.9899, "changes 1 of 100 next tokens"),
    ],
)
def test_few_changes(agreement, said):
    recommendation = recommend(make_run(spread(FALLING)))
    assert answer(changed(recommendation, top1_agreement=agreement)).endswith(f"and {said}.")
