"""The page *Fine-tuning*: its numbers are those of the package; unfinished and broken folders are said in a line."""

import json
import re
import shutil

import numpy as np
import pytest

from dashboard import catalog
from diagnostics import load_run, recommend
from diagnostics.finetune.cutoff_comparison import compare_cutoffs
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, FINETUNING, STEPS, SWEEPS, FineTuning
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.files import read_json
from tests.support.finetunings import DAMAGE, TRAINED, change, make_finetuning, save_finetuning
from tests.support.pages import ODD, calm, figure, figure_title, literal, metrics, numbers, same
from tests.support.runs import write_run


@pytest.fixture(scope="module")
def made():
    return make_finetuning(start=5)


@pytest.fixture(scope="module")
def runs(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetunings") / "runs"
    save_finetuning(folder / "tuned", made, goals={"max_kl": 0.3})
    return folder


def captions(at):
    return [literal(caption.value) for caption in at.caption]


def test_the_headline_is_before_and_after(runs, made, open_app):
    at = open_app(runs, "finetuning")
    assert calm(at) == []
    table = compare_cutoffs(made).set_index("cutoff")
    before, after = (recommend(load_run(runs / "tuned" / name), max_kl=0.3).cutoff for name in (BEFORE, AFTER))
    assert before > after
    assert metrics(at) == {
        "Recommended cutoff": f"{before} → {after}",
        "KL at cutoff 3": f"{table['kl_after'][TRAINED]:.3f}",
        "Same top token at 3": f"{table['top1_agreement_after'][TRAINED]:.1%}",
        "Full depth's own drift": "0.010",
    }
    said = captions(at)
    assert "before → after; goal: KL at most 0.3" in said
    assert f"{table['kl_before'][TRAINED]:.3f} before; nats per token" in said
    assert literal(at.subheader[0].value) == "made-model: trained at cutoff 3 of 6 layers"
    assert any(
        "LoRA of rank 4, self-distillation, 40 steps of 1 x 8 rows, cutoff lowered from 5, data: made.jsonl, "
        "held out: 6 prompts of builtin, CPU" in line
        for line in said
    )


def judged(at):
    """The sentences in words, with the colour of their verdict."""
    return [literal(markdown.value) for markdown in at.markdown if "-badge[" in markdown.value]


def test_sentences_say_what_training_changed(runs, made, open_app):
    cutoffs, at_trained = judged(open_app(runs, "finetuning"))
    before, after = (recommend(load_run(runs / "tuned" / name), max_kl=0.3).cutoff for name in (BEFORE, AFTER))
    n = before - after
    assert cutoffs.startswith(":green-badge[better] After training, at the same goal, prompts can stop at layer")
    assert f"at layer {after} of 6, {n} layer{'s' if n > 1 else ''} earlier than before" in cutoffs
    table = compare_cutoffs(made).set_index("cutoff")
    kl = [f"{table[f'kl_{when}'][TRAINED]:.3f}" for when in (BEFORE, AFTER)]
    assert at_trained.startswith(":green-badge[better] At the trained cutoff 3")
    assert f"fell from {kl[0]} to {kl[1]} nats" in at_trained


def test_a_change_for_the_worse_is_called_so(tmp_path, made, open_app):
    turned = made.sweeps.assign(step=made.sweeps["step"].max() - made.sweeps["step"])
    save_finetuning(tmp_path / "worse", FineTuning(made.manifest, made.steps, turned), goals={"max_kl": 0.3})
    cutoffs, at_trained = judged(open_app(tmp_path, "finetuning"))
    assert cutoffs.startswith(":red-badge[worse]")
    assert "more than before" in cutoffs
    assert at_trained.startswith(":red-badge[worse]")
    assert "rose from" in at_trained


def test_given_answers_have_no_drift_but_a_likelihood(tmp_path, open_app):
    made = make_finetuning(against="itself", supervised=1.0, method="full")
    save_finetuning(tmp_path / "taught", made)
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    table = compare_cutoffs(made).set_index("cutoff")
    assert metrics(at)["NLL at full depth"] == f"{table['nll_after'][6]:.3f}"
    assert "Full depth's own drift" not in metrics(at)
    assert any("all weights, given answers" in line for line in captions(at))


def test_the_figures_are_those_of_the_package(runs, made, open_app):
    at = open_app(runs, "finetuning")
    titles = [figure_title(at, number).partition(", ")[0] for number in range(3)]
    assert titles == ["Loss of every cutoff", "Training", "By kind of prompt"]
    (after,) = [trace for trace in figure(at)["data"] if trace["name"] == "after"]
    same(numbers(after["y"])[:-1], made.curve().to_numpy()[:-1])
    assert 0.3 in {shape["y0"] for shape in figure(at)["layout"]["shapes"]}
    at.slider(key="kinds tuned").set_value(5).run()
    assert calm(at) == []
    bars = next(trace for trace in figure(at, 2)["data"] if trace["name"] == "after")
    at_five = made.sweeps.query("cutoff == 5 and step == 40").groupby("category")["kl"].mean()
    same(numbers(bars["x"]), at_five)


def test_the_table_has_every_cutoff_and_says_which_matter(runs, made, open_app):
    shown = open_app(runs, "finetuning").dataframe[0].value.set_index("cutoff")
    table = compare_cutoffs(made).set_index("cutoff")
    assert list(shown.index) == [6, 5, 4, 3, 2, 1]
    for column in table:
        same(shown[column].sort_index(), table[column])
    notes = {name: recommend(load_run(runs / "tuned" / name), max_kl=0.3).cutoff for name in (BEFORE, AFTER)}
    assert "trained" in shown["note"][TRAINED]
    for name, cutoff in notes.items():
        assert re.search(rf"recommended.* {name}", shown["note"][cutoff])
    assert sum(map(bool, shown["note"])) == len({TRAINED, *notes.values()})


def test_data_settings_and_versions_are_told(runs, made, open_app):
    at = open_app(runs, "finetuning")
    assert any(line.startswith("Data: 10 loaded: 8 kept") for line in captions(at))
    settings, versions = at.dataframe[1].value, at.dataframe[2].value
    told = dict(zip(settings["settings"], settings["value"], strict=True))
    assert told == {name.replace("_", " "): str(value) for name, value in made.manifest["settings"].items()}
    assert versions.to_numpy().tolist() == [["python", "3.11"]]


def test_both_runs_are_compared_at_a_click(runs, open_app):
    at = open_app(runs, "finetuning")
    at.button(key="both").click().run()
    assert calm(at) == []
    assert at.title[0].value == "Runs side by side"
    assert at.multiselect(key="compared").value == ["tuned/before", "tuned/after"]
    drawn = figure(at)["data"]
    assert [trace["name"] for trace in drawn] == ["tuned/before", "tuned/after"]
    assert [trace["hovertemplate"].partition(":")[0] for trace in drawn] == ["tuned/before", "tuned/after"]
    assert list(at.dataframe[0].value["model"]) == [BEFORE, AFTER]
    at.switch_page("views/compare.py").run()  # where a browser is by now
    at.multiselect(key="compared").set_value(["tuned/after"]).run()
    at.switch_page("views/overview.py").run()
    at.switch_page("views/compare.py").run()
    assert at.multiselect(key="compared").value == ["tuned/after"]


@pytest.mark.parametrize("page", ["overview", "layers", "cutoff"])
def test_the_runs_in_it_have_all_other_pages(runs, open_app, page):
    at = open_app(runs, page)
    assert set(at.sidebar.selectbox[0].options) == {"tuned/before", "tuned/after"}
    at.sidebar.selectbox[0].select("tuned/after").run()
    assert calm(at) == []
    text = figure_title(at) if page == "cutoff" else literal(at.caption[0].value)
    assert AFTER in text
    assert at.query_params["run"] in ("tuned/after", ["tuned/after"])


# --- Unfinished, broken, none ---


def running(folder, made, step, runs=(BEFORE,)):
    """A fine-tuning that was stopped five steps after a measurement."""
    part = FineTuning(
        made.manifest | {"status": "running"},
        made.steps[made.steps["step"] <= step + 5],
        made.sweeps[made.sweeps["step"] <= step],
    )
    return save_finetuning(folder, part, runs=runs)


def test_an_unfinished_one_shows_what_there_is(tmp_path, made, open_app):
    folder = running(tmp_path / "going", made, 20)
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert "going** is not finished: step 25 of 40" in literal(at.info[0].value)
    assert at.code[0].value == f"--out {folder} --resume"
    # The goal is the one that was asked for; nothing is recommended after what is not over.
    before = recommend(load_run(folder / BEFORE), max_kl=0.2).cutoff
    assert metrics(at)["Recommended cutoff"] == f"{before} → ?"
    assert metrics(at)["KL at cutoff 3"] == f"{made.curve(20)[TRAINED]:.3f}"
    assert {"before", "step 20"} <= {trace["name"] for trace in figure(at)["data"]}
    assert len(at.get("plotly_chart")) == 3
    assert not [button for button in at.button if button.key == "both"]


def test_measured_before_training_only(tmp_path, made, open_app):
    running(tmp_path / "going", made, 0)
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert metrics(at)["KL at cutoff 3"] == f"{made.curve(0)[TRAINED]:.3f}"
    assert metrics(at)["Full depth's own drift"] == "-"
    assert not [name for name in at.dataframe[0].value if name.endswith("after")]
    assert len(at.get("plotly_chart")) == 3


def test_nothing_measured_yet(tmp_path, made, open_app):
    folder = running(tmp_path / "going", made, 0, runs=())
    (folder / STEPS).unlink()
    (folder / SWEEPS).unlink()
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert "is not finished" in at.info[0].value
    assert "Nothing of the training was written yet. Before it: -." in captions(at)
    write_run(folder / BEFORE, n_prompts=3, finished=2)
    at.run()
    assert calm(at) == []
    assert any("Before it: 2 of 3 prompts." in line for line in captions(at))


def test_without_one_the_page_says_how_to_make_it(tmp_path, open_app):
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert "There is no fine-tuning" in at.info[0].value
    assert re.search(r"speed-diagnostics finetune --cutoff \d+", at.code[0].value)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_one_line(tmp_path, made, open_app, damage):
    DAMAGE[damage](save_finetuning(tmp_path / "broken", made))
    (said,) = calm(open_app(tmp_path, "finetuning"))
    assert "broken" in said


def test_a_damaged_one_leaves_the_others_alone(runs, tmp_path, open_app):
    for name in ("bad", "good"):
        shutil.copytree(runs / "tuned", tmp_path / name)
    (tmp_path / "bad" / SWEEPS).write_bytes(b"")
    at = open_app(tmp_path, "finetuning")
    at.selectbox(key="finetuning").select("bad").run()
    assert len(calm(at)) == 1
    at.selectbox(key="finetuning").select("good").run()
    assert calm(at) == []
    assert len(at.get("plotly_chart")) == 3


@pytest.mark.parametrize("name", [BEFORE, AFTER])
def test_a_damaged_run_in_it_leaves_its_measurements(tmp_path, made, open_app, name):
    folder = save_finetuning(tmp_path / "tuned", made)
    change(f"{name}/cutoffs.parquet", lambda t: t.drop(columns="kl"))(folder)
    at = open_app(tmp_path, "finetuning")
    (said,) = calm(at)
    assert "no column kl" in said
    assert len(at.get("plotly_chart")) == 3
    assert "?" in metrics(at)["Recommended cutoff"]


@pytest.mark.parametrize("missing", [[BEFORE], [AFTER], [BEFORE, AFTER], [RECOMMENDATION]])
def test_a_folder_that_lacks_something_shows_the_rest(tmp_path, made, open_app, missing):
    folder = save_finetuning(tmp_path / "tuned", made)
    for name in missing:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert len(at.get("plotly_chart")) == 3
    assert metrics(at)["Recommended cutoff"].count("?") == len(set(missing) & {BEFORE, AFTER})


def test_a_manifest_that_says_little_is_enough(tmp_path, made, open_app):
    folder = save_finetuning(tmp_path / "bare", made, runs=())
    little = {"model": "m", "status": "complete", "n_layers": 6, "settings": {"cutoff": 3}, "identity": {}}
    (folder / FINETUNING).write_text(json.dumps(little))
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    assert metrics(at)["Recommended cutoff"] == "? → ?"


@pytest.mark.parametrize("odd", [{"arguments": 3}, {"held_out": []}, {"versions": "all"}, {"data": None}], ids=str)
def test_a_manifest_with_a_field_of_another_type_is_one_line(tmp_path, made, open_app, odd):
    folder = save_finetuning(tmp_path / "bare", made, runs=())
    (folder / FINETUNING).write_text(json.dumps(read_json(folder / FINETUNING) | odd))
    (line,) = calm(open_app(tmp_path, "finetuning"))
    assert f"field {next(iter(odd))} is missing or wrong" in line


def test_names_are_text(tmp_path, open_app):
    made = make_finetuning(categories=(ODD, "plain"), supervised=ODD, steps=ODD)
    made.manifest.update(model=ODD, source=ODD, hardware=ODD, held_out={"name": ODD, "n_prompts": ODD})
    save_finetuning(tmp_path / "*ru<b>n*", FineTuning(made.manifest | {"status": "running"}, made.steps, made.sweeps))
    at = open_app(tmp_path, "finetuning")
    assert calm(at) == []
    seen = 0
    for element in (*at.markdown, *at.caption, *at.info, *at.subheader):
        for part in ("*b*", "<b>", "[e](f)", "$g$", ":red[", "`i`", "_j_"):
            assert part not in element.value, element.value
        seen += ODD in literal(element.value)
    assert seen >= 3
    assert all("<b>d" not in json.dumps(figure(at, number)) for number in range(3))


# --- Catalog ---


def test_a_fine_tuning_is_listed_with_its_runs(runs, tmp_path):
    found = {entry.name: entry for entry in catalog.find_runs(runs)}
    assert set(found) == {"tuned", "tuned/before", "tuned/after"}
    tuned, before = found["tuned"], found["tuned/before"]
    assert (tuned.status, tuned.problem, tuned.readable, tuned.has_finetuning) == ("fine-tuning", None, False, True)
    assert (before.status, before.readable, before.has_finetuning) == ("complete", True, False)
    assert before.path == runs / "tuned" / BEFORE
    assert tuned.goals["max_kl"] == pytest.approx(0.3)
    assert {entry.name for entry in catalog.find_runs(runs / "tuned")} == set(found)
    # In a folder that is none, folders of these names are nobody's runs.
    write_run(tmp_path / "other" / BEFORE)
    (entry,) = catalog.find_runs(tmp_path)
    assert (entry.name, entry.status) == ("other", "not a run")


def test_the_overview_lists_the_runs_and_a_broken_one_with_its_reason(tmp_path, made, open_app):
    folder = save_finetuning(tmp_path / "tuned", made)
    (folder / AFTER / MANIFEST).write_text("{")
    at = open_app(tmp_path, "overview")
    lines = at.dataframe[0].value.set_index("run")
    assert set(lines.index) == {"tuned/before", "tuned/after"}
    assert "damaged: manifest.json" in lines.loc["tuned/after", "problem"]
    assert np.isfinite(lines.loc["tuned/before", "cutoff"])
