"""The page on rules says of each what the rule says of itself."""

import pytest

from diagnostics.cutoffs.rules import all_rules
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "method" / "rules.md").read_text()


@pytest.mark.parametrize("rule", all_rules().values(), ids=lambda rule: rule.name)
def test_every_rule_has_its_row(rule):
    (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{rule.name}` |"))
    cells = [cell.strip() for cell in row.strip("|").split(" | ")]
    assert cells[1] == rule.source
    assert all(f"`{column}`" in cells[2] for column in (*rule.reads, *rule.reads_heads))
    assert cells[3] == rule.thresholds
    assert cells[4].removesuffix(" (ours)") == rule.mapping
    assert cells[5].removesuffix(" |") == rule.blind
