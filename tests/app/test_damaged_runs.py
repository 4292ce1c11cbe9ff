"""Runs that were changed by hand: one line at most on every page."""

import numpy as np
import pandas as pd
import pytest

from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.files import read_json
from tests.support.pages import RESULT_PAGES, calm, edit_manifest, edit_table, go, table


def without(name, column):
    return lambda f: edit_table(f, name, lambda t: t.drop(columns=column))


def with_column(name, column, value):
    def change(t):
        return t.assign(**{column: value(t[column]) if callable(value) else value})

    return lambda f: edit_table(f, name, change)


def rows(name, choose):
    return lambda f: edit_table(f, name, choose)


def manifest_with(**changes):
    return lambda f: edit_manifest(f, **changes)


def nested(f, field, **changes):
    manifest = read_json(f / MANIFEST)
    edit_manifest(f, **{field: {k: v for k, v in (manifest[field] | changes).items() if v != "gone"}})


def identity(**changes):
    return lambda f: nested(f, "identity", **changes)


def shape(**changes):
    return lambda f: nested(f, "shape", **changes)


def written(name, text):
    return lambda f: (f / name).write_text(text)


def attention(make):
    def change(tokens):
        return tokens.assign(attention=[None if w is None else make(w) for w in tokens["attention"]])

    return lambda f: edit_table(f, "tokens", change)


# What is done to a run folder; the pages that cannot be shown any more.
ALL = "overview layers cutoff compare"
DAMAGE = {
    "cutoffs: no column kl": (without("cutoffs", "kl"), ALL),
    "layers: no column selectivity": (without("layers", "selectivity"), ALL),
    "prompts: no column category": (without("prompts", "category"), ALL),
    "lens: no column lens_text": (without("lens", "lens_text"), ALL),
    "cutoffs: one row short": (rows("cutoffs", lambda t: t.iloc[:-1]), ALL),
    "heads: twice": (rows("heads", lambda t: pd.concat([t, t])), ALL),
    "cutoffs: one twice, one missing": (with_column("cutoffs", "cutoff", lambda c: c.replace(2, 1)), ALL),
    "cutoffs: another prompt's": (with_column("cutoffs", "prompt_id", lambda c: c.replace("p1", "p9")), ALL),
    "cutoffs: text": (with_column("cutoffs", "kl", "much"), ALL),
    "cutoffs: numbers as text": (with_column("cutoffs", "kl", lambda c: c.astype(str)), None),
    "cutoffs: not a number": (with_column("cutoffs", "kl", np.nan), ALL),
    "cutoffs: infinite": (with_column("cutoffs", "nll", np.inf), ALL),
    "layers: selectivity text": (with_column("layers", "selectivity", "much"), ALL),
    "layers: all not a number": (with_column("layers", "drift_prompt_centred", np.nan), None),
    "heads: text": (with_column("heads", "selectivity", "much"), ALL),
    "prompts: no category": (with_column("prompts", "category", None), None),
    "prompts: numbers for names": (with_column("prompts", "prompt_id", range(6)), ALL),
    "tokens: attention too short": (attention(lambda w: w[:2]), None),
    "tokens: attention empty": (attention(lambda w: w[:0]), None),
    "tokens: attention of text": (attention(lambda w: ["much"] * len(w)), None),
    "tokens: attention a number": (attention(lambda w: 1.0), None),
    "tokens: none": (rows("tokens", lambda t: t.iloc[:0]), None),
    "tokens: positions twice": (with_column("tokens", "position", 40), None),
    "lens: half": (rows("lens", lambda t: t.iloc[: len(t) // 2 - 3]), None),
    "lens: layers all the same": (with_column("lens", "layer", 0), None),
    "kl is no parquet": (written("cutoffs.parquet", "hello"), ALL),
    "n_layers text": (manifest_with(n_layers="5"), "list"),
    "n_layers too few": (manifest_with(n_layers=3), "list"),
    "n_prompts none": (manifest_with(n_prompts=0), "list"),
    "n_heads none": (manifest_with(n_heads=0), ALL),
    "identity empty": (manifest_with(identity={}), None),
    "no anchors": (identity(anchors="gone"), None),
    "anchors text": (identity(anchors="many"), None),
    "anchors negative": (identity(anchors=-3), None),
    "context a list": (identity(context_length=[1, {}]), None),
    "shape empty": (manifest_with(shape={}), None),
    "shape of other layers": (shape(layer_parameters=[1, 2]), None),
    "shape of no layers": (shape(layer_parameters=[], layer_types=[]), None),
    "shape of text": (shape(layer_parameters="many"), None),
    "no positions": (manifest_with(max_positions=None), None),
    "notes of other things": (manifest_with(notes=[1, {"a": 2}, None]), None),
    "meanings of other things": (manifest_with(columns={"a": 1, "b": None}), None),
    "huge number": (written(MANIFEST, '{"schema_version": ' + "9" * 5000 + "}"), "list"),
    "goals no JSON": (written(RECOMMENDATION, "{"), ""),
    "goals unknown": (written(RECOMMENDATION, '{"criterion": {"speed": 3}}'), ""),
    "goals are arguments": (written(RECOMMENDATION, '{"criterion": {"rules": 1, "seed": 1.5}}'), ""),
    "goals are lengths": (written(RECOMMENDATION, '{"criterion": {"lengths": 4}}'), ""),
    "prompts: categories of two kinds": (with_column("prompts", "category", lambda c: pd.Series([[1], [2]] * 3)), None),
    "tokens: text missing": (with_column("tokens", "text", None), None),
    "tokens: text numbers": (with_column("tokens", "text", 5), None),
    "lens: none": (rows("lens", lambda t: t.iloc[:0]), None),
    "lens: gone": (lambda f: (f / "lens.parquet").unlink(), None),
    "lens: text missing": (with_column("lens", "lens_text", None), None),
    "lens: text numbers": (with_column("lens", "lens_text", 7), None),
    "shape of zeros": (shape(layer_parameters=[0] * 5, head_parameters=0, n_heads=0, n_kv_heads=0), None),
    "deep manifest": (written(MANIFEST, "[" * 100_000), "list"),
    "goals deep": (written(RECOMMENDATION, "[" * 100_000), ""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_that_was_tampered_with_is_one_line_at_most(copy, open_app, damage):
    check_run(copy, open_app, *DAMAGE[damage])


def check_run(copy, open_app, change, broken):
    folder = copy("tiny")
    change(folder)
    at = open_app(folder.parent)
    troubles = {}
    # Compare shows what the others show; once is enough where they show it.
    for page in RESULT_PAGES if broken == ALL else RESULT_PAGES[:3]:
        if page != "overview":
            go(at, page)
        said = calm(at)
        assert len(said) <= 1, page
        troubles[page] = said
        assert said or at.get("plotly_chart") or at.dataframe or at.info, page
        if said:
            assert "tiny" in said[0], "it names the run"
    if broken == "list":
        assert not any(troubles.values())
        at = go(at, "overview")
        assert table(at)["status"].tolist() in (["not a run"], ["complete"])
    elif broken is not None:
        assert {page for page, said in troubles.items() if said} == set(broken.split())


def test_one_damaged_run_leaves_the_others_alone(copy, open_app):
    folder = copy("tiny")
    DAMAGE["cutoffs: no column kl"][0](copy("plain"))
    at = open_app(folder.parent, run="tiny")
    assert calm(at) == []
    lines = table(at).set_index("run")
    assert lines.loc["plain", "status"] == "damaged"
    assert "no column kl" in lines.loc["plain", "problem"]
    assert lines.loc["tiny", "status"] == "complete"
    for page in ("layers", "cutoff"):
        assert calm(go(at, page)) == []
