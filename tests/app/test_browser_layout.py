"""The pages in a real browser, over the example: numbers at every width, downloads in a row, first screen, links."""

import re

import pytest

from browsing import serving, settled
from tests.support.watched import require_browser

pytestmark = pytest.mark.browser
require_browser()

WIDTHS = (800, 1024, 1152, 1440)
# What is wider than its box, of numbers, their names, headings and captions.
CUT = """() => [...document.querySelectorAll(
    '[data-testid=stMetricValue], [data-testid=stMetricLabel], [data-testid=stCaptionContainer], h1, h3, h4, h5')]
    .flatMap(e => [e, ...e.querySelectorAll('div, p')])
    .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth && getComputedStyle(e).display !== 'inline')
    .map(e => e.innerText)"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("nothing")) as url:
        yield url


@pytest.fixture
def open_page(browser, address):
    """``open_page("cutoff", width=800)``: a page over the example."""
    pages = []

    def opened(path="", width=1440, height=900, **query):
        asked = "&".join(f"{name}={value}" for name, value in ({"folder": "example"} | query).items())
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(60_000)
        pages.append(page)
        page.goto(f"{address}/{path}?{asked}")
        page.locator("h1").first.wait_for()
        settled(page)
        return page

    yield opened
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("path", ["", "cutoff"])
def test_no_number_and_no_name_is_cut(open_page, path, width):
    page = open_page(path, width)
    page.get_by_test_id("stMetricValue").nth(3).wait_for()
    assert page.get_by_test_id("stMetricValue").count() >= 4
    assert page.evaluate(CUT) == []
    sides = page.evaluate(
        "[...document.querySelectorAll('[class*=st-key-speed-card]')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.right, r.top])"
    )
    for left, right, top in sides:
        assert right <= width
        assert not [other for other in sides if other[2] == top and left < other[0] < right], "cards lie side by side"


def test_slider_verdict_and_figure_share_the_first_screen(open_page):
    page = open_page("cutoff")
    curves = page.locator(".js-plotly-plot .subplot.xy").first
    curves.wait_for()
    slider = page.get_by_role("slider", name=re.compile("^Cutoff"))
    verdict = page.get_by_text(re.compile(r"^Cutoff \d+ meets the goal"))
    for shown in (slider, verdict, curves):
        box = shown.bounding_box()
        assert box["y"] + box["height"] <= 900


def test_downloads_in_a_row_all_arrive(open_page):
    page = open_page("cutoff")
    arrived = []
    page.on("download", lambda download: arrived.append(download.suggested_filename))
    for name in ("Recommendation", "Figure of the loss", "Figure of the retention"):
        page.get_by_role("button", name=name, exact=True).click()
    page.get_by_role("button", name="CSV").first.click()
    ends = ("recommendation.json", "loss.html", "retention.html", "loss.csv")
    wanted = {f"smollm2-135m-instruct-{end}" for end in ends}
    for _ in range(100):
        if set(arrived) == wanted:
            break
        page.wait_for_timeout(100)
    assert set(arrived) == wanted


@pytest.mark.parametrize("width", WIDTHS)
def test_rules_stand_beside_the_knee_and_no_name_is_cut(open_page, width):
    page = open_page("cutoff", width)
    page.get_by_role("heading", name="Rules that only look at the layers").wait_for()
    figure = page.locator(".js-plotly-plot").nth(2)
    figure.get_by_text("measured knee: 24").wait_for()
    figure.get_by_text("Uptake above (ours)").wait_for()
    frame, names = figure.bounding_box(), figure.locator(".ytick text")
    assert names.count() > 2
    for name in names.all():
        assert name.bounding_box()["x"] >= frame["x"] - 2, name.inner_text()


def test_a_copied_link_shows_the_same(open_page, browser):
    page = open_page("cutoff", cutoff=20, length=32768)
    page.get_by_text("does not meet the goal").wait_for()
    page.get_by_role("button", name="Copy link").click()
    link = page.get_by_test_id("stPopoverBody").get_by_test_id("stCode")
    link.wait_for()
    copied = link.inner_text().strip()
    assert copied == page.url
    again = browser.new_page()
    again.goto(copied)
    slider = again.get_by_role("slider", name=re.compile("^Cutoff"))
    slider.wait_for(timeout=60_000)
    assert slider.input_value() == "20"
    again.close()


def test_reload_and_back_bring_the_cutoff_back(open_page):
    page = open_page("cutoff")
    slider = page.get_by_role("slider", name=re.compile("^Cutoff"))
    slider.wait_for()
    start = int(slider.input_value())
    slider.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(re.compile(f"cutoff={start - 1}"))
    page.keyboard.press("ArrowLeft")
    page.wait_for_url(re.compile(f"cutoff={start - 2}"))
    page.reload()
    slider.wait_for()
    assert int(slider.input_value()) == start - 2
    page.go_back()
    page.wait_for_function("value => document.querySelector('input[type=range]')?.value === value", arg=str(start - 1))


def test_the_start_leads_to_the_example(browser, address):
    page = browser.new_page(viewport={"width": 800, "height": 900})
    page.goto(address)
    page.get_by_role("button", name="Look at an example").click(timeout=60_000)
    page.get_by_text("You are looking at the example").wait_for()
    page.get_by_text(re.compile("^Prompts can stop at layer")).wait_for()
    assert "folder=example" in page.url
    pictures = page.locator(".speed-steps img")
    assert pictures.count() == 3
    assert all(pictures.nth(i).evaluate("e => e.naturalWidth") > 100 for i in range(3))
    page.close()
