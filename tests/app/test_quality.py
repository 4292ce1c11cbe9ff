"""The page *Quality*: every number on it is that of the package, and folders that are broken are one line each."""

import io
import json
import re

import numpy as np
import pandas as pd
import pytest

from dashboard import catalog
from diagnostics.evaluate import score_table as summary_module
from diagnostics.evaluate.evaluation_folder import EVALUATION, ITEMS, Evaluation
from diagnostics.evaluate.score_table import AVERAGE, cell, markdown, summarize
from diagnostics.figures.quality import policy_label
from tests.support.evaluations import POLICIES, make_evaluation, save_evaluation
from tests.support.pages import ODD, calm, downloads, edit_manifest, figure, figure_title, literal, numbers, same

SPEEDS = {"full": 1.0, "speed:4": 0.5, "speed:6": 0.99}


@pytest.fixture(scope="module")
def evaluation():
    return make_evaluation()


@pytest.fixture(scope="module")
def runs(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluations") / "runs"
    save_evaluation(folder / "made-eval", evaluation)
    return folder


def verdicts(at):
    return {line.split("**")[1]: literal(line) for m in at.markdown for line in m.value.split("\n") if "- **" in line}


def test_the_table_is_the_summary_in_percent(runs, evaluation, open_app):
    at = open_app(runs, "quality")
    at.number_input(key="margin made-eval").set_value(8.0).run()
    assert calm(at) == []
    summary = summarize(evaluation, margin=0.08)
    shown = at.dataframe[0].value
    assert list(shown.index) == [policy_label(policy) for policy in POLICIES]
    assert list(shown.columns)[:4] == ["arc_easy", "boolq", "gsm8k", AVERAGE]
    fits = 0
    for _, row in summary.iterrows():
        in_table = shown.loc[policy_label(row["policy"]), row["task"]]
        assert in_table.removesuffix(" ✓") == cell(row)
        assert ("✓" in in_table) == (row["non_inferior"] is True)
        fits += "✓" in in_table
    assert 0 < fits < 10
    rate = summary.loc[(summary["policy"] == "fastkv") & (summary["task"] == "gsm8k"), "empty"].item()
    assert shown.loc["FastKV", "empty, %"] == f"{100 * rate:.1f}"
    averages = summary[summary["task"] == AVERAGE].set_index("policy")["score"]
    assert shown.loc["FastKV", "kept, %"] == f"{100 * averages['fastkv'] / averages['full']:.0f}"
    assert any("made-model, float32, CPU, 360 items of 3 tasks, query: prompt" in literal(c.value) for c in at.caption)


def test_a_sentence_says_what_each_policy_keeps(runs, evaluation, open_app):
    said = verdicts(open_app(runs, "quality"))
    summary = summarize(evaluation)
    averages = summary[summary["task"] == AVERAGE].set_index("policy")["score"]
    assert list(said) == [policy_label(policy) for policy in list(POLICIES)[1:]]
    for policy in list(POLICIES)[1:]:
        rows = summary[(summary["policy"] == policy) & (summary["task"] != AVERAGE)]
        below = ((rows["p_holm"] < 0.05) & (rows["difference"] < 0)).sum()
        line = said[policy_label(policy)]
        assert f"keeps {averages[policy] / averages['full']:.0%} of the average score" in line
        assert f"significantly below full depth on {below} of 3 tasks" in line
        assert f"non-inferior at 2 points on {rows['non_inferior'].sum()} of 3" in line


def test_the_margin_moves_the_verdict_without_new_resamples(runs, evaluation, monkeypatch, open_app):
    at = open_app(runs, "quality")
    assert at.number_input(key="margin made-eval").value == 2

    def not_again(*_, **__):
        raise AssertionError("resampled")

    monkeypatch.setattr(summary_module, "summarize", not_again)
    bounds = summarize(evaluation)["lower_bound"]
    counts = []
    for margin in (0.0, 10.0, 100.0):
        at.number_input(key="margin made-eval").set_value(margin).run()
        assert calm(at) == []
        counts.append(sum("✓" in text for text in at.dataframe[0].value.to_numpy().ravel()))
        assert counts[-1] == (bounds > -margin / 100).sum()
        lines = {shape["x0"] for shape in figure(at)["layout"]["shapes"] if shape["x0"] == shape["x1"]}
        assert lines == {0, -margin}
        assert all(f"at {margin:g} points" in line for line in verdicts(at).values())
    assert counts[0] < counts[1] < counts[2] == 24


def test_the_margin_begins_with_the_one_that_was_asked_for(tmp_path, open_app):
    made = make_evaluation(policies=SPEEDS, n=20)
    made.manifest["arguments"] = {"margin": 0.05}
    save_evaluation(tmp_path / "a", made)
    made.manifest["arguments"] = {"margin": "wide"}
    save_evaluation(tmp_path / "b", made)
    at = open_app(tmp_path, "quality")
    for name, margin in (("a", 5), ("b", 2)):
        at.selectbox(key="evaluation").select(name).run()
        assert at.number_input(key=f"margin {name}").value == margin
    at.number_input(key="margin b").set_value(7.5).run()
    at.switch_page("views/overview.py").run()
    at.switch_page("views/quality.py").run()
    at.selectbox(key="evaluation").select("b").run()
    assert at.number_input(key="margin b").value == 7.5


def test_the_figures_are_those_of_the_package(runs, evaluation, open_app):
    at = open_app(runs, "quality")
    titles = [figure_title(at, number) for number in range(4)]
    assert titles == [
        "Differences on the same items",
        "Scores with their 95% intervals",
        "What cutoffs keep of the score",
        "How answers fail",
    ]
    (dots,) = [t for t in figure(at)["data"] if t.get("name") == "SPEED 24"]
    rows = summarize(evaluation).query("policy == 'speed:24'")
    same(numbers(dots["x"]), 100 * rows["difference"])


def test_where_answers_changed_is_item_by_item(runs, evaluation, open_app):
    at = open_app(runs, "quality")
    at.selectbox(key="changed_policy").select("speed:26").run()
    right = evaluation.items.pivot(index=["task", "item_id"], columns="policy", values="score") == 1
    lost = right.index[right["full"] & ~right["speed:26"]]
    assert len(lost)
    assert set(zip(at.dataframe[1].value["task"], at.dataframe[1].value["item"], strict=True)) == set(lost)
    at.selectbox(key="changed_task").select("gsm8k").run()
    shown = at.dataframe[1].value
    assert set(shown["item"]) == {item for task, item in lost if task == "gsm8k"}
    assert (shown["score, full depth"] == 1).all()
    assert (shown["score, SPEED 26"] == 0).all()
    first = int(shown["item"][0].partition("/")[2])
    assert [block.value for block in at.code] == [f"The answer is {first}.", "The answer is -1."]
    assert "chosen, full depth" not in shown
    at.segmented_control(key="changed_side").set_value("won").run()
    assert calm(at) == []
    assert len(at.dataframe) == 1
    assert "None." in [caption.value for caption in at.caption]


def test_graded_and_won_answers_and_empty_ones(tmp_path, open_app):
    made = make_evaluation(choice={}, written={"squad": 0.5}, policies={"full": 1.0, "speed:4": 0.9}, n=12)
    items = made.items
    items["score"], items["answer"] = 0.5, "# *half* <b>right</b>"
    ours = items["policy"] == "speed:4"
    items.loc[ours & items["item_id"].isin(["squad/3", "squad/7"]), ["score", "answer"]] = [0.75, "  "]
    save_evaluation(tmp_path / "graded", made)
    at = open_app(tmp_path, "quality")
    at.segmented_control(key="changed_side").set_value("won").run()
    assert calm(at) == []
    assert list(at.dataframe[1].value["item"]) == ["squad/3", "squad/7"]
    at.selectbox(key="changed_item").select_index(1).run()
    assert [block.value for block in at.code] == ["# *half* <b>right</b>", "  "]
    assert {"full depth: score 0.5", "SPEED 4: score 0.75, empty"} <= {literal(c.value) for c in at.caption}


def test_the_downloads_are_the_table(runs, evaluation, monkeypatch, open_app):
    kept = downloads(monkeypatch)
    at = open_app(runs, "quality")
    at.number_input(key="margin made-eval").set_value(4.0).run()
    wanted = summarize(evaluation, margin=0.04)
    given = pd.read_parquet(io.BytesIO(kept["summary.parquet"]))
    for name in ("score", "lower_bound", "p_holm"):
        np.testing.assert_allclose(given[name], wanted[name].astype(float))
    assert [*given["non_inferior"].fillna(False)] == [*wanted["non_inferior"].fillna(False)]
    text = kept["summary.csv"]
    assert list(pd.read_csv(io.BytesIO(text if isinstance(text, bytes) else text.encode()))["policy"]) == list(
        wanted["policy"]
    )
    text = kept["summary.md"]
    assert (text.decode() if isinstance(text, bytes) else text) == markdown(wanted)


def test_what_did_not_finish_is_said(tmp_path, open_app):
    made = make_evaluation(n=20)
    gone = (made.items["policy"] == "speed:24") & (made.items["task"] == "boolq")
    made.manifest["errors"] = [f"boolq, speed:24: OutOfMemoryError: {ODD}"]
    save_evaluation(tmp_path / "part", Evaluation(made.manifest, made.items[~gone]))
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    assert any("boolq, speed:24: OutOfMemoryError" in literal(c.value) and ODD not in c.value for c in at.caption)
    shown = at.dataframe[0].value
    assert shown.loc["SPEED 24", "boolq"] == shown.loc["SPEED 24", AVERAGE] == "-"
    assert "SPEED 24 finished 2 of 3 tasks" in verdicts(at)["SPEED 24"].replace("**", "")


@pytest.mark.parametrize("policies", [{"full": 1.0}, {"speed:4": 0.5}], ids=["full depth alone", "no full depth"])
def test_nothing_to_compare(tmp_path, open_app, policies):
    save_evaluation(tmp_path / "alone", make_evaluation(policies=policies, n=10))
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    assert len(at.dataframe) == 1
    assert verdicts(at) == {}
    assert "There is nothing to compare." in [caption.value for caption in at.caption]


def test_names_are_text(tmp_path, open_app):
    made = make_evaluation(choice={ODD: 0.8, "policy": 0.5, "empty": 0.5}, written={}, policies=SPEEDS, n=10)
    made.items["policy"] = made.items["policy"].replace({"speed:4": ODD})
    made.manifest.update(model=ODD, errors=[ODD])
    save_evaluation(tmp_path / "*ru<b>n*", made)
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    seen = 0
    for element in (*at.markdown, *at.caption, *at.info):
        for part in ("*b*", "<b>", "[e](f)", "$g$", ":red[", "`i`", "_j_"):
            assert part not in element.value, element.value
        seen += ODD in literal(element.value)
    assert seen >= 3
    assert list(at.dataframe[0].value.columns) == [ODD, "policy", "empty", AVERAGE, "kept, %"]
    assert "<b>d" not in json.dumps(figure(at))


def test_without_an_evaluation_the_page_says_how_to_make_one(tmp_path, open_app):
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    assert "There is no evaluation" in at.info[0].value
    assert re.search(r"speed-diagnostics evaluate --tasks \S+ --policies \S+", at.code[0].value)


def test_an_unfinished_evaluation_says_how_to_go_on(tmp_path, open_app):
    folder = save_evaluation(tmp_path / "running", make_evaluation(policies=SPEEDS, n=5))
    (folder / ITEMS).unlink()
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    assert "is not finished" in at.info[0].value
    assert at.code[0].value == f"--out {folder} --resume"


def edited(change):
    return lambda folder: change(pd.read_parquet(folder / ITEMS)).to_parquet(folder / ITEMS, index=False)


def with_manifest(**changes):
    return lambda folder: edit_manifest(folder, EVALUATION, **changes)


DAMAGE = {
    "manifest no JSON": lambda f: (f / EVALUATION).write_text("{"),
    "manifest a list": lambda f: (f / EVALUATION).write_text("[]"),
    "manifest without a model": with_manifest(model=None),
    "no parquet": lambda f: (f / ITEMS).write_bytes(b"PAR1"),
    "no rows": edited(lambda t: t.iloc[:0]),
    "no scores": edited(lambda t: t.drop(columns="score")),
    "scores missing": edited(lambda t: t.assign(score=np.nan)),
    "scores of words": edited(lambda t: t.assign(score="good")),
    "scores of 100": edited(lambda t: t.assign(score=t["score"] * 100)),
    "an item missing": edited(lambda t: t.iloc[1:]),
    "an item doubled": edited(lambda t: pd.concat([t, t.iloc[:1]])),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_evaluation_is_one_line(tmp_path, open_app, damage):
    DAMAGE[damage](save_evaluation(tmp_path / "made-eval", make_evaluation(policies=SPEEDS, n=5)))
    (said,) = calm(open_app(tmp_path, "quality"))
    assert "made-eval" in said


def test_a_manifest_that_says_little_is_enough(tmp_path, open_app):
    folder = save_evaluation(tmp_path / "bare", make_evaluation(policies=SPEEDS, n=5))
    (folder / EVALUATION).write_text(json.dumps({"model": "m"}))
    at = open_app(tmp_path, "quality")
    assert calm(at) == []
    assert len(at.dataframe) >= 1


@pytest.mark.parametrize("odd", [{"identity": []}, {"arguments": 3}, {"errors": "none"}], ids=str)
def test_a_manifest_with_a_field_of_another_type_is_one_line(tmp_path, open_app, odd):
    folder = save_evaluation(tmp_path / "bare", make_evaluation(policies=SPEEDS, n=5))
    (folder / EVALUATION).write_text(json.dumps({"model": "m"} | odd))
    (line,) = calm(open_app(tmp_path, "quality"))
    assert f"field {next(iter(odd))} is missing or wrong" in line


def with_texts(items):
    """What each item asked, and the choices where there are some."""
    return items.assign(
        question=[f"Question <b>{item}</b>?" for item in items["item_id"]],
        choices=[
            None if pd.isna(gold) else [f" choice *{n}* of {item}" for n in range(4)]
            for item, gold in zip(items["item_id"], items["gold"], strict=True)
        ],
    )


def test_a_changed_item_shows_its_question_its_choices_and_who_chose_what(tmp_path, open_app):
    made = make_evaluation(n=60)
    save_evaluation(tmp_path / "made", Evaluation(made.manifest, with_texts(made.items)))
    at = open_app(tmp_path, "quality")
    at.selectbox(key="changed_policy").select("speed:22").run()
    at.selectbox(key="changed_task").select("boolq").run()
    assert calm(at) == []
    shown = at.dataframe[1].value
    at.selectbox(key="changed_item").select_index(1).run()
    item = shown["item"][1]
    assert [text.value for text in at.text] == [f"Question <b>{item}</b>?"]
    assert shown["question"][1] == f"Question <b>{item}</b>?"
    number = int(item.partition("/")[2])
    table = at.table[0].value
    assert [literal(text) for text in table["choice"]] == [f"choice *{n}* of {item}" for n in range(4)]
    marked = {column: list(table.index[table[column] == "✓"]) for column in ("right", "full depth", "SPEED 22")}
    right, wrong = "ABCD"[number % 4], "ABCD"[(number + 1) % 4]
    assert marked == {"right": [right], "full depth": [right], "SPEED 22": [wrong]}
    assert (shown["right choice"][1], shown["chosen, SPEED 22"][1]) == (right, wrong)
    at.selectbox(key="changed_task").select("gsm8k").run()
    assert calm(at) == []
    assert len(at.table) == 0
    assert len(at.text) == 1
    assert len(at.code) == 2


def test_an_evaluation_without_texts_says_why(runs, open_app):
    at = open_app(runs, "quality")
    assert any("made before questions and choices were kept" in caption.value for caption in at.caption)


def test_the_address_brings_the_margin_and_the_changed_item_back(runs, open_app):
    at = open_app(runs, "quality", margin="7.5", policy="speed:22", task="gsm8k", side="lost", item="1")
    assert calm(at) == []
    assert at.number_input(key="margin made-eval").value == 7.5
    assert (at.selectbox(key="changed_policy").value, at.selectbox(key="changed_task").value) == ("speed:22", "gsm8k")
    assert at.selectbox(key="changed_item").value == 1


# --- Catalog ---


def test_evaluations_lie_beside_runs(runs, tmp_path):
    (entry,) = catalog.find_runs(runs)
    assert (entry.status, entry.problem, entry.has_evaluation, entry.readable) == ("evaluation", None, True, False)
    assert [entry.name for entry in catalog.find_runs(runs / "made-eval")] == ["made-eval"]
    (tmp_path / "other").mkdir()
    (entry,) = catalog.find_runs(tmp_path)
    assert (entry.status, entry.has_evaluation) == ("not a run", False)
