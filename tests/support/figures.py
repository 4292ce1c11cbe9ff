"""What every figure must have."""

import json

import pytest


def assert_complete_figure(figure):
    """It is JSON without NaN; has a title, a titled axis, hover texts, and the house's background."""
    text = figure.to_json()
    json.loads(text, parse_constant=lambda constant: pytest.fail(constant))
    assert figure.layout.title.text
    assert any(axis.title.text for axis in figure.select_xaxes())
    assert all("<extra></extra>" in t.hovertemplate for t in figure.data if t.hoverinfo != "skip")
    assert figure.layout.paper_bgcolor == "rgba(0, 0, 0, 0)"
    assert "#000000" not in text
