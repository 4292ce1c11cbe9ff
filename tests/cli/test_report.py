"""The report: one page with everything in it, of a real run of the embedded model and of made ones."""

import html
from html.parser import HTMLParser

import numpy as np
import pytest

from diagnostics import diagnose, load_prompts, recommend
from diagnostics.generation import benchmarks as benchmark_module
from diagnostics.policies.speed import SpeedPolicy
from tests.support.runs import run_command, save_tiny, write_prompts
from tests.support.tiny import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run folder of a tiny model, with a recommendation for a goal of its own and a benchmark."""
    place = tmp_path_factory.mktemp("runs") / "run"
    prompts = place.parent / "prompts.jsonl"
    write_prompts(prompts, n_prompts=6, n_tokens=40)
    lm = tiny_model("llama")
    run = diagnose(lm, load_prompts(str(prompts)), decode_tokens=6, out=place)
    recommend(run, max_kl=0.7).save(place / "recommendation.json")
    benchmark_module.benchmark(lm, [SpeedPolicy(3)], lengths=[16, 32], repeats=2, new_tokens=3, out=place)
    return place


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["speed-diagnostics", "report", str(folder), "--html", str(path)])
        from diagnostics import cli

        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    return path.read_text(encoding="utf-8")


def test_the_page_has_the_recommendation_and_every_figure(page, folder):
    from diagnostics import load_run

    recommendation = recommend(load_run(folder), max_kl=0.7)
    assert f"Cutoff {recommendation.cutoff} of 5" in page
    assert page.count("Plotly.newPlot(") == 5
    for title in (
        "What each layer does",
        "selectivity of every head",
        "What a cutoff keeps",
        "Measured beside the limit",
    ):
        assert title in page
    assert "tolerance 0.7" in page
    assert load_run(folder).manifest["identity"]["weight_hash"] in page


class Tags(HTMLParser):
    """Collects what the tags of a page load or link; scripts are no tags."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_no_network(page):
    tags = Tags()
    tags.feed(page)
    assert tags.addresses == []


def test_names_are_shown_and_not_run(tmp_path, monkeypatch, capfd):
    name = "<script>alert(1)</script>"
    model = save_tiny(tmp_path / "model")
    write_prompts(tmp_path / "p.jsonl", n_prompts=5, n_tokens=30)
    run = diagnose(tiny_model("llama"), load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=4)
    run.manifest["model"] = name
    from diagnostics.report import report

    page = report(run, recommend(run))
    assert html.escape(name) in page
    assert name not in page
    assert model.exists()


def test_without_recommendation_or_benchmark_the_defaults_decide(tmp_path, monkeypatch, capfd):
    write_prompts(tmp_path / "p.jsonl", n_prompts=2, n_tokens=30)
    run = diagnose(tiny_model("gpt2"), load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=4, out=tmp_path / "run")
    status, out, err = run_command(monkeypatch, capfd, "report", tmp_path / "run", "--html", tmp_path / "a.html")
    assert (status, err) == (0, "")
    assert "Report: " in out
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert page.count("Plotly.newPlot(") == 4
    assert f"Cutoff {recommend(run).cutoff} of 5" in page
    assert np.isfinite(run.array("kl")).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{run}x", "--html", "{out}"), "there is no run folder"),
        (("{run}", "--html", "{folder}"), "cannot write the report"),
        (("{run}", "--html", "{folder}/missing/a.html"), "cannot write the report"),
        (("{run}",), "--html"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capfd, arguments, said):
    places = {"run": folder, "out": tmp_path / "out.html", "folder": tmp_path}
    status, out, err = run_command(monkeypatch, capfd, "report", *(a.format(**places) for a in arguments))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
