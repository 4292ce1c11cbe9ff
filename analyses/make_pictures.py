"""Draws the pictures of README and docs: the terminal, the main figure, the quality under policies, the dashboard.

python analyses/make_pictures.py [RUN]    # by default of the example that ships with the package

Needs `pip install -e '.[app,browser]'` and a Chromium.
"""

import io
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
from playwright.sync_api import Error
from rich.console import Console

from browsing import browsing, serving
from diagnostics import Run, figures, load_run, recommend
from diagnostics.evaluate.score_table import MARGIN
from diagnostics.runs.example import RUN, example_folder
from diagnostics.terminal.diagnosis import show_recommendation
from page_pictures import drawn

RESULTS = Path(__file__).parent / "results"
# Pages of the dashboard by the path of their address, and their pictures.
PAGES = {"": "dashboard.png", "cutoff": "dashboard_cutoff.png"}
WINDOW = {"width": 1280, "height": 1000}
# Policies of the evaluation that the README's picture compares.
POLICIES = ("full", "speed:22", "speed:25", "speed:25:anchors=0", "projected:22", "fastkv")


def main(given: str | None = None) -> None:
    run = load_run(given or example_folder() / RUN)
    terminal(run, RESULTS / "recommend.svg")
    with browsing() as browser:
        plain(browser, figures.cutoff_loss(run, recommend(run)), RESULTS / "cutoff_loss.svg")
        summary = pd.read_csv(RESULTS / "quality" / "choice.csv")
        quality = figures.quality_differences(summary[summary["policy"].isin(POLICIES)], MARGIN)
        plain(browser, quality, RESULTS / "quality.svg")
        dashboard(browser, example_folder())


def terminal(run: Run, picture: Path) -> None:
    """Draw the recommendation as the terminal shows it."""
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, highlight=False)
    show_recommendation(run, recommend(run), console)
    svg = console.export_svg(title="speed-diagnostics recommend")
    # The template fetches a web font; a picture must not.
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"Fira Code, ?monospace|Fira Code", "DejaVu Sans Mono, Menlo, Consolas, monospace", svg)
    picture.write_text(svg)


def plain(browser: Any, figure: Any, picture: Path) -> None:
    """Draw a figure on white: a README has no background of its own."""
    figure = figure.update_layout(paper_bgcolor="white", width=900)
    page = browser.new_page()
    page.set_content(figure.to_html(include_plotlyjs=True, full_html=True))
    page.wait_for_selector(".main-svg")
    image = page.evaluate("Plotly.toImage(document.querySelector('.js-plotly-plot'), {format: 'svg'})")
    page.close()
    picture.write_text(unquote(image.partition(",")[2]))


def dashboard(browser: Any, runs: Path) -> None:
    """Take screenshots of the dashboard's first page and of its cutoff page."""
    with serving(runs) as address:
        for path, picture in PAGES.items():
            page = browser.new_page(viewport=WINDOW)
            page.set_default_timeout(90_000)
            page.goto(f"{address}/{path}?run={RUN}")
            drawn(page)
            page.screenshot(path=RESULTS / picture)
            page.close()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Error as error:
        sys.exit(f"error: the browser: {error.message.splitlines()[0]}")
