"""The dashboard in a real browser: every page, sliders, a generation, a diagnosis started, reloaded and cancelled.

`make test-browser` installs what this needs. Without it these tests are skipped, and say what is missing.
"""

import re

import pytest

from browsing import go, serving, settled
from diagnostics import diagnose, load_prompts, load_run, recommend
from diagnostics.generation.benchmarks import benchmark
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.runs.places import RECOMMENDATION
from tests.support.finetunings import make_finetuning, save_finetuning
from tests.support.tiny import tiny_model
from tests.support.watched import require_browser, watched

pytestmark = pytest.mark.browser
require_browser()

# Pages after the first, in the order of a visit, and whether they have figures.
PAGES = {
    "Layers": True,
    "Cutoff": True,
    "Benchmark": True,
    "Quality": False,
    "Fine-tuning": True,
    "Playground": False,
    "Compare": True,
    "New diagnosis": False,
}


@pytest.fixture(scope="module")
def runs(smollm, tmp_path_factory):
    """Runs of the embedded model and of a tiny one, the latter with a benchmark; a fine-tuning made by hand."""
    folder = tmp_path_factory.mktemp("browser") / "runs"
    save_finetuning(folder / "tuned", make_finetuning(start=5))  # the oldest: pages begin with the newest run
    prompts = load_prompts("builtin", context_length=256, max_prompts=5)
    run = diagnose(smollm, prompts, decode_tokens=8, detail_prompts=1, out=folder / "embedded")
    recommend(run).save(folder / "embedded" / RECOMMENDATION)
    benchmark(tiny_model("llama"), [SpeedPolicy(3)], lengths=[32, 64], repeats=2, new_tokens=3, out=folder / "bench")
    return folder


@pytest.fixture(scope="module")
def address(runs):
    with serving(runs) as url:
        yield url


@pytest.fixture
def page(browser, address):
    with watched(browser, address) as opened:
        yield opened


def test_every_page_and_its_figures(page, address):
    page.goto(address)
    page.get_by_role("heading", name="How deep must a prompt go?").wait_for()
    settled(page)
    drawn = page.locator(".js-plotly-plot .main-svg").first
    drawn.wait_for()
    for title, has_figures in PAGES.items():
        go(page, title)
        if has_figures:
            drawn.wait_for()  # the browser draws after the server is done
        assert bool(drawn.count()) == has_figures


def test_a_page_can_be_linked_to(page, address):
    page.goto(f"{address}/cutoff?run=embedded")
    page.get_by_role("heading", name="Which cutoff?").wait_for()


def test_the_cutoff_slider_moves_the_evidence(page, address, runs):
    run = load_run(runs / "embedded")
    evidence = recommend(run).evidence
    page.goto(f"{address}/cutoff?run=embedded")
    slider = page.get_by_role("slider", name=re.compile("^Cutoff, layers"))
    slider.wait_for()
    settled(page)
    start = int(slider.input_value())
    assert start == recommend(run).cutoff
    metric = page.get_by_test_id("stMetricValue").first
    assert metric.inner_text() == f"{evidence[start - 1]['kl']:.3f}"
    slider.focus()
    for moved in (1, 2, 3):
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(
            "([e, text]) => e.innerText === text",
            arg=[metric.element_handle(), f"{evidence[start - moved - 1]['kl']:.3f}"],
        )
    page.get_by_text(f"SpeedPolicy(cutoff={start - 3})").wait_for()
    go(page, "Layers")
    go(page, "Cutoff")
    assert int(slider.input_value()) == start - 3


def test_a_click_on_a_head_shows_what_it_looks_at(page, address, runs):
    n_layers, n_heads = load_run(runs / "embedded").array("selectivity").shape[1:]
    page.goto(f"{address}/layers?run=embedded&section=Heads")
    plot = page.locator(".js-plotly-plot .nsewdrag").first
    plot.wait_for()
    settled(page)
    box = plot.bounding_box()
    for layer, head in ((28, 6), (20, 3)):
        x = box["x"] + (head + 0.2) / n_heads * box["width"]  # not in the middle: the whole cell is there to be clicked
        y = box["y"] + box["height"] - (layer + 0.5) / n_layers * box["height"]
        page.mouse.move(x - 3, y)
        page.mouse.move(x, y)
        page.locator(".hoverlayer .hovertext", has_text=f"layer {layer}, head {head}").wait_for()
        page.mouse.click(x, y)
        page.get_by_role("heading", name=f"Layer {layer}, head {head}").wait_for()
        settled(page)
    page.get_by_text("of all attention that this head gives").wait_for()
    assert "layer=20" in page.url
    assert "head=3" in page.url


def test_a_fine_tuning_leads_to_its_runs_side_by_side(page, address):
    page.goto(f"{address}/finetuning")
    page.get_by_role("heading", name="made-model: trained at cutoff 3 of 6 layers").wait_for()
    settled(page)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 6")  # of each figure two
    page.get_by_role("button", name="Compare layers before and after").click()
    page.get_by_role("heading", name="Runs side by side").wait_for()
    page.locator(".js-plotly-plot .legendtext", has_text="tuned/after").wait_for()
    legend = page.locator(".js-plotly-plot .legendtext").all_text_contents()
    assert legend == ["tuned/before", "tuned/after"]


def test_generating_beside_full_depth(page, address):
    page.goto(f"{address}/playground?run=embedded")
    model = page.get_by_role("textbox", name="Model")
    model.wait_for()
    assert model.input_value() == "smollm2-135m-instruct"
    page.get_by_role("button", name="Load").click()
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.wait_for()
    settled(page)
    prompt.fill("Name three colours of the rainbow.")
    prompt.press("Control+Enter")
    settled(page)
    page.get_by_role("button", name="Generate").click()
    page.get_by_text("prompt tokens. One run of each").wait_for()
    assert page.get_by_text(re.compile("the same tokens|the same for .* tokens")).count() == 1
    page.get_by_test_id("stDataFrame").wait_for()
    page.reload()  # the process still has the model, and the address the prompt
    prompt.wait_for()
    settled(page)
    assert prompt.input_value() == "Name three colours of the rainbow."
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("New tokens").fill("4000")
    page.get_by_label("New tokens").press("Enter")
    settled(page)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()


def test_a_diagnosis_is_started_survives_a_reload_and_is_cancelled(page, address, runs):
    page.goto(f"{address}/diagnosis")
    page.get_by_role("button", name="Start").wait_for()
    settled(page)
    length = page.get_by_role("spinbutton", name="Context length, tokens")
    for tokens in ("100", "256"):  # the first is too short for the built-in prompts, and is corrected
        length.fill(tokens)
        length.press("Tab")
        settled(page)
        page.get_by_role("button", name="Start").click()
        if tokens == "100":
            page.get_by_test_id("stAlertContentError").wait_for()
            assert length.input_value() == tokens
            assert not [path for path in runs.iterdir() if path.name.startswith("smollm2")]
    progress = page.get_by_text(re.compile("^[1-9] of 28 prompts$"))  # the error before says how many do not fit
    progress.wait_for()
    page.reload()
    progress.wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").click()
    page.get_by_role("button", name="Cancel").click()
    page.get_by_role("button", name="Resume").wait_for()
    page.get_by_text("are finished and kept").wait_for()
    (made,) = [path for path in runs.iterdir() if path.name.startswith("smollm2")]
    assert not load_run(made).complete
    go(page, "Overview")
    page.get_by_role(
        "heading", name=re.compile("^Prompts (can stop at layer .* of 30|must run through all 30)")
    ).wait_for()
