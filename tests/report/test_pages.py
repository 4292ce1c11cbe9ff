"""Reports: one page with everything in it, of runs and benchmarks; `tests/figures` has the other two kinds."""

import html
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from plotly.offline import get_plotlyjs_version

from diagnostics import diagnose, load_prompts, load_run, recommend
from diagnostics.cutoffs.answer import answer
from diagnostics.cutoffs.losses import loss_by_category
from diagnostics.cutoffs.rule_verdicts import description, rule_verdicts, rules_sentence
from diagnostics.cutoffs.rules import all_rules
from diagnostics.generation import benchmarks as benchmark_module
from diagnostics.generation.benchmark_folder import load_benchmark
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.report import benchmark_report, report
from diagnostics.report.document import main_term, terms
from diagnostics.support.glossary import GLOSSARY
from diagnostics.terminal.units import readable_time
from tests.support.rules import without_sweep
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
    recommendation = recommend(load_run(folder), max_kl=0.7)
    assert f"Cutoff {recommendation.cutoff} of 5" in page
    assert page.count('class="drawing"') == 10
    for title in (
        "Where do decode positions look?",
        "Selectivity of every head",
        "What a cutoff keeps",
        "Measured beside the limit",
    ):
        assert title in page
    assert "tolerance 0.7" in page
    assert load_run(folder).manifest["identity"]["weight_hash"] in page


class Tags(HTMLParser):
    """Collects the attributes that load, link or name something; scripts are no tags."""

    def __init__(self, page):
        super().__init__()
        self.found = {name: [] for name in ("src", "href", "id")}
        self.tags = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            self.found.setdefault(name, []).append(value)


def shown(page):
    """Return the page as a reader sees it: its text, without scripts and styles, in one line."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", text)))


def test_the_page_needs_no_network(page):
    found = Tags(page).found
    assert found["src"] == []
    assert all(address.startswith("#") for address in found["href"])


def test_the_contents_lead_to_every_section(page):
    found = Tags(page).found
    assert sorted(address.removeprefix("#") for address in found["href"]) == sorted(found["id"])
    assert {"loss-at-every-cutoff", "prompts", "how-this-was-measured", "definitions"} <= set(found["id"])


def test_the_page_is_a_document_and_no_terminal(page, folder):
    run = load_run(folder)
    recommendation = recommend(run, max_kl=0.7)
    text = shown(page)
    assert answer(recommendation) in text
    assert "pre" not in Tags(page).tags
    at = run.cutoffs[run.cutoffs["cutoff"] == recommendation.cutoff].set_index("prompt_id")["kl"]
    for _, prompt in run.prompts.iterrows():
        row = f"{prompt['prompt_id']} {prompt['category']} {prompt['n_prompt']:,} {prompt['n_decode']:,}"
        assert f"{row} {at[prompt['prompt_id']]:.4f}" in text
    for category, kl in loss_by_category(run, recommendation.cutoff).items():
        n = int((run.prompts["category"] == category).sum())
        assert f"{category} {n} {kl:.4f}" in text
    for savings in recommendation.data["predicted"]:
        assert f"{savings['n_prompt']:,}" in text
        assert f"{savings['ttft_ratio'] - 1:+.1%} {savings['speedup_ttft']:.2f}x" in text


def test_the_page_says_where_rules_put_the_cutoff_and_what_each_is(page, folder):
    recommendation = recommend(load_run(folder), max_kl=0.7)
    text = shown(page)
    assert rules_sentence(recommendation) in text
    verdicts = rule_verdicts(recommendation).set_index("rule")
    for name, rule in all_rules().items():
        if not np.isnan(verdicts.loc[name, "cutoff"]):
            assert f"{rule.title} {verdicts.loc[name, 'cutoff']:.0f}" in text
        assert description(rule) in text
    for term in ("rule", "uptake"):
        assert f"{term} {GLOSSARY[term]}" in text


def test_a_page_without_a_measured_loss_says_so_and_shows_the_rest(folder):
    run = without_sweep(load_run(folder))
    page = report(run, recommend(run))
    text = shown(page)
    assert "No loss was measured" in text
    assert "loss-at-every-cutoff" not in Tags(page).found["id"]
    for title in ("Savings at", "Where do decode positions look?", "What our rule reads", "What a cutoff keeps"):
        assert title in text
    assert "nan" not in text.lower().split()
    assert "KL at cutoff" not in text


def test_what_was_not_set_is_not_listed_and_times_are_readable(page, folder):
    manifest = load_run(folder).manifest
    assert manifest["identity"]["teacher"] is None
    text = shown(page)
    assert "None" not in text
    assert "Teacher" not in text
    assert f"Measured {readable_time(manifest['created'])}" in text
    assert manifest["created"] not in text


def test_terms_are_defined_once_and_only_those_in_use(page):
    text = shown(page)
    for name in ("KL", "TTFT", "KV cache", "selectivity"):
        assert f"{name} {GLOSSARY[name]}" in text
    assert GLOSSARY["non-inferior"] not in text


def test_a_heading_knows_its_term():
    assert main_term("KL, nats/token") == "KL"
    assert main_term("95% bound") == "bound"
    assert main_term("KV bytes") == "KV cache"
    assert main_term("Same top token") == "same top token"
    assert main_term("speed-up") == ""
    assert terms("NLL increases") == ["NLL increase"]


def test_a_page_is_below_two_megabytes(page):
    assert len(page.encode()) < 2_000_000


def test_plotly_in_the_page_is_of_the_tested_version():
    """The figures come from the Python package, and the program that draws them from another; they must agree."""
    program = files("diagnostics.report").joinpath("plotly-cartesian.min.js").read_text("utf-8")
    (version,) = re.findall(r"^\* plotly.js \(cartesian - minified\) v(\S+)$", program, flags=re.MULTILINE)
    assert version.split(".")[0] == get_plotlyjs_version().split(".")[0]
    assert "</script" not in program


def test_a_benchmark_has_a_page_of_its_own(folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "bench").mkdir()
    for name in ("benchmark.json", "benchmark.parquet"):
        shutil.copy(folder / name, tmp_path / "bench")
    status, _, err = run_command(monkeypatch, capfd, "report", tmp_path / "bench", "--html", tmp_path / "b.html")
    assert (status, err) == (0, "")
    page = (tmp_path / "b.html").read_text("utf-8")
    text = shown(page)
    assert page.count('class="drawing"') == 1
    summary = load_benchmark(tmp_path / "bench").summary()
    longest = summary[(summary["n_prompt"] == 32) & (summary["policy"] == "speed")].iloc[0]
    assert (
        f"At 32 prompt tokens SPEED 3 takes {longest['ttft_s_ratio']:.0%} of the time to first token of full depth, "
        f"and {longest['kv_bytes_ratio']:.0%} of its KV cache." in text
    )
    for _, row in summary.iterrows():
        assert f"{row['ttft_s_ratio']:.3f} ({row['ttft_limit']:.3f})" in text


def test_full_depth_alone_has_a_page_too(folder):
    measured = load_benchmark(folder)
    alone = replace(measured, rows=measured.rows[measured.rows["policy"] == "full"])
    text = shown(benchmark_report(alone))
    assert "full depth alone" in text
    assert "to the first token of 32 prompt tokens" in text


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("2026-11-25T16:37:09+00:00", "25 Nov 2026, 16:37 UTC"),
        ("2026-11-25T16:37:09+02:00", "25 Nov 2026, 14:37 UTC"),
        ("2026-03-05T06:07:09", "5 Mar 2026, 06:07"),
        ("yesterday", "yesterday"),
        (None, ""),
    ],
)
def test_times_are_readable(moment, said):
    assert readable_time(moment) == said


def test_names_are_shown_and_not_run(tmp_path, monkeypatch, capfd):
    name = "<script>alert(1)</script>"
    model = save_tiny(tmp_path / "model")
    write_prompts(tmp_path / "p.jsonl", n_prompts=5, n_tokens=30)
    run = diagnose(tiny_model("llama"), load_prompts(str(tmp_path / "p.jsonl")), decode_tokens=4)
    run.manifest["model"] = name
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
    assert page.count('class="drawing"') == 9
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
