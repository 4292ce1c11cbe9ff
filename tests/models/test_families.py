"""The table of families: its own few rows, from model to line."""

import check_families
import pandas as pd
import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")
TABLE = ROOT / "analyses" / "results" / "families.csv"


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("olmo3", "proven"),
        ("diffllama", "refused: .* more than once"),
        ("llama4_text", "refused: .*chunked attention"),
        ("gemma3n_text", "refused: the check of sweep ended in"),
        ("mamba", "refused: "),
        ("reformer", "not built: "),
    ],
)
def test_a_family_is_proven_or_refused_with_a_line(family, line):
    assert pd.Series(check_families.outcome(family, "eager")["diagnosis"]).str.match(line).all()


def test_the_committed_table_names_every_family_and_no_traceback():
    table = pd.read_csv(TABLE)
    assert set(table["family"]) >= {"llama", "gemma2", "olmo2", "granite", "doge", "diffllama"}
    for use in ("diagnosis", "policies", "training"):
        assert not table[use].str.contains("TRACEBACK").any()
        assert (table[use] == "proven").sum() > 120
