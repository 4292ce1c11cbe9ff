"""Draws the pictures of the README: the terminal, the main figure, the quality under policies, and the dashboard.

python analyses/make_pictures.py [RUN]    # by default a new run of the embedded model on the built-in prompts

Needs `pip install -e '.[app,browser]'` and a Chromium.
"""

import io
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pandas as pd
from playwright.sync_api import Error
from rich.console import Console

from browsing import browsing, serving
from diagnostics import Run, diagnose, figures, load_model, load_prompts, load_run, recommend
from diagnostics.evaluate.score_table import MARGIN
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.terminal.diagnosis import show_recommendation

RESULTS = Path(__file__).parent / "results"
NAME = "smollm2-135m-instruct"
# Policies of the evaluation that the README's picture compares.
POLICIES = ("full", "speed:22", "speed:25", "speed:25:anchors=0", "projected:22", "fastkv")


def main(given: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / NAME
        if given is None:
            diagnose(load_model(), load_prompts("builtin"), out=folder)
        else:
            shutil.copytree(given, folder)
        run = load_run(folder)
        recommend(run).save(folder / RECOMMENDATION)
        terminal(run, RESULTS / "recommend.svg")
        with browsing() as browser:
            loss = figures.cutoff_loss(run, recommend(run))
            plain(browser, loss, RESULTS / "cutoff_loss.svg")
            summary = pd.read_csv(RESULTS / "quality" / "choice.csv")
            quality = figures.quality_differences(summary[summary["policy"].isin(POLICIES)], MARGIN)
            plain(browser, quality, RESULTS / "quality.svg")
            dashboard(browser, Path(scratch), RESULTS / "dashboard.png")


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


def dashboard(browser: Any, runs: Path, picture: Path) -> None:
    """Take a screenshot of the dashboard's cutoff page."""
    with serving(runs) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 1420})
        page.goto(f"{address}/cutoff")
        page.get_by_text("Take it with you").wait_for(timeout=60_000)
        page.locator(".main-svg").first.wait_for(timeout=60_000)
        page.get_by_test_id("stSkeleton").first.wait_for(state="detached", timeout=60_000)
        page.wait_for_timeout(2000)
        page.screenshot(path=picture)
        page.close()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Error as error:
        sys.exit(f"error: the browser: {error.message.splitlines()[0]}")
