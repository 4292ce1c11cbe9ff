"""Reports in a real browser: they open from a file, draw everything, and cut no text, on any screen and on paper."""

import pytest

from diagnostics import load_run, recommend
from diagnostics.evaluate.evaluation_folder import load_evaluation
from diagnostics.finetune.finetuning_folder import AFTER, load_finetuning
from diagnostics.generation.benchmark_folder import load_benchmark
from diagnostics.report import benchmark_report, evaluation_report, finetuning_report, report
from diagnostics.runs.example import BENCHMARK, EVALUATION, RUN, example_folder
from tests.support.finetunings import make_finetuning, save_finetuning
from tests.support.watched import require_browser

pytestmark = pytest.mark.browser
require_browser()

WIDTHS = (800, 1024, 1440)
# Elements whose content is wider than they are; tables scroll.
CUT = """() => [...document.querySelectorAll('h1, h2, h3, p, .card, .label, .value, figcaption, dd, dt, .drawing')]
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText.slice(0, 60))"""
# Texts of figures that reach out of their figure.
OUTSIDE = """() => [...document.querySelectorAll('.drawing')].flatMap(drawing => {
    const box = drawing.getBoundingClientRect();
    return [...drawing.querySelectorAll('text')].filter(text => text.textContent.trim()).filter(text => {
        const own = text.getBoundingClientRect();
        return own.width && (own.left < box.left - 2 || own.right > box.right + 2
            || own.top < box.top - 2 || own.bottom > box.bottom + 2);
    }).map(text => text.textContent)
})"""

# Asked after the page's own listener, so what it has set is there.
WIDTHS_ON_PAPER = """() => addEventListener('beforeprint', () => {
    widths = [...document.querySelectorAll('.drawing .main-svg')].map(svg => svg.getBoundingClientRect().width);
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The example's reports as files, by name."""
    example, folder = example_folder(), tmp_path_factory.mktemp("reports")
    run, benchmark = load_run(example / RUN), load_benchmark(example / BENCHMARK)
    texts = {
        "run": report(run, recommend(run), benchmark),
        "benchmark": benchmark_report(benchmark),
        "evaluation": evaluation_report(load_evaluation(example / EVALUATION)),
    }
    tuned = save_finetuning(folder / "tuned", make_finetuning())
    after = load_run(tuned / AFTER)
    texts["finetuning"] = finetuning_report(load_finetuning(tuned), after, recommend(after))
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "benchmark", "evaluation", "finetuning"])
def test_a_report_opens_from_a_file_and_cuts_nothing(browser, pages, name, scheme):
    page = browser.new_page(viewport={"width": WIDTHS[0], "height": 900}, color_scheme=scheme)
    troubles = []
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
    page.goto((pages / f"{name}.html").as_uri())
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)  # plotly follows the window after a pause
        assert page.locator(".drawing .main-svg").count() >= page.locator(".drawing").count() > 0
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(CUT) == []
        assert page.evaluate(OUTSIDE) == []
    assert troubles == []
    page.close()


def test_a_printed_report_fits_its_paper(browser, pages, tmp_path):
    page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme="dark")
    page.goto((pages / "run.html").as_uri())
    page.locator(".drawing .main-svg").first.wait_for()
    page.evaluate(WIDTHS_ON_PAPER)
    page.pdf(path=tmp_path / "run.pdf", format="A4")
    widths = page.evaluate("widths")
    assert widths
    assert max(widths) <= 680
    page.close()
