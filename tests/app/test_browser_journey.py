"""The whole way of a newcomer in a real browser: from an empty start over the example to results from elsewhere."""

import re
import shutil

import pytest

from browsing import go, serving, settled
from diagnostics.runs.example import BENCHMARK, EVALUATION, FINETUNING, RUN, example_folder
from page_pictures import photograph
from tests.support.watched import require_browser, watched

pytestmark = pytest.mark.browser
require_browser()

TITLES = {
    "Layers": "What each layer does with the prompt",
    "Cutoff": "Which cutoff?",
    "Benchmark": "What policies cost",
    "Quality": "What quality do policies keep?",
    "Fine-tuning": "What did fine-tuning change?",
    "Compare": "Runs side by side",
    "Playground": "Full depth and a policy, side by side",
    "New diagnosis": "Diagnose a model",
}
RESULTS = ("Layers", "Cutoff", "Benchmark", "Quality", "Fine-tuning", "Compare")
# Kinds of results, and the page that an added one opens.
KINDS = {
    RUN: None,
    BENCHMARK: "What policies cost",
    EVALUATION: "What quality do policies keep?",
    FINETUNING: "What did fine-tuning change?",
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return tmp_path_factory.mktemp("newcomer") / "runs"


@pytest.fixture(scope="module")
def address(empty):
    empty.mkdir()
    with serving(empty) as url:
        yield url


def test_from_an_empty_start_over_the_example_to_every_page(browser, address):
    with watched(browser, address) as page:
        page.goto(address)
        page.get_by_role("button", name="Look at an example").click()
        page.get_by_role("heading", name=re.compile("^Prompts can stop at layer")).wait_for()
        for name, title in TITLES.items():
            go(page, name)
            page.get_by_role("heading", name=title, level=1).wait_for()
            settled(page)
            page.wait_for_url(re.compile("folder=example"))
            if name in RESULTS:
                page.locator(".js-plotly-plot .main-svg").first.wait_for()
                assert page.get_by_role("button", name="Look at an example").count() == 0
        go(page, "Overview")
        page.get_by_role("button", name="Back to your runs").click()
        page.get_by_role("button", name="Look at an example").wait_for()


@pytest.mark.parametrize("kind", [name for name in KINDS if (example_folder() / name).is_dir()])
def test_results_of_every_kind_can_be_added(browser, address, empty, tmp_path, kind):
    packed = shutil.make_archive(str(tmp_path / kind), "zip", example_folder(), kind)
    with watched(browser, address) as page:
        page.goto(address)
        page.get_by_text(re.compile("^Add results from another machine")).click()
        page.get_by_test_id("stFileUploaderDropzoneInput").set_input_files(packed)
        page.get_by_role("button", name="Add it to the folder").click()
        title = KINDS[kind]
        page.get_by_role("heading", name=title or re.compile("^Prompts can stop at layer")).wait_for()
        settled(page)
    assert (empty / kind).is_dir()


@pytest.mark.parametrize("folder", ["example", "nothing"])
def test_no_text_is_cut_on_any_page_at_any_width(browser, tmp_path, folder):
    (tmp_path / "nothing").mkdir()
    place = example_folder() if folder == "example" else tmp_path / "nothing"
    with serving(place) as address:
        assert photograph(browser, address, tmp_path / "pictures", schemes=("light",)) == []
