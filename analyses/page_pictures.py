"""Photographs every page of the dashboard, and finds texts that are cut or lie over each other.

python analyses/page_pictures.py FOLDER [RUNS]    # by default with the example, and with no run at all

Every page is taken at three widths, light and dark. The command ends with status 1 if a text is cut anywhere.
Needs `pip install -e '.[app,browser]'` and a Chromium.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from browsing import browsing, serving, settled
from diagnostics.runs.example import example_folder

WIDTHS = (800, 1024, 1440)  # pixels
SCHEMES = ("light", "dark")
HEIGHT, TALLEST = 900, 6000
START = "h1, [data-testid=stMain] h2"  # what every page begins with

# Elements whose own text does not fit, where the rest is hidden. Fields to type in, code and tables may scroll.
CUT = """() => {
    const scrolls = 'input, textarea, select, pre, code, [data-baseweb=select], [data-testid=stDataFrame], [hidden]';
    const ownText = e => [...e.childNodes].some(n => n.nodeType === Node.TEXT_NODE && n.textContent.trim());
    return [...document.querySelectorAll('[data-testid=stMain] *')]
        .filter(e => e instanceof HTMLElement && ownText(e) && !e.closest(scrolls) && e.checkVisibility())
        .filter(e => {
            for (let box = e, n = 0; box && n < 3; box = box.parentElement, n++) {
                const hidden = ['hidden', 'clip'].includes(getComputedStyle(box).overflowX);
                if (hidden && box.clientWidth && box.scrollWidth > box.clientWidth + 1) return true;
            }
            return false;
        })
        .map(e => `cut: ${e.innerText.trim().slice(0, 60)}`);
}"""
# Texts of figures that reach out of their figure, and legends that lie over a title, a heading or an axis.
FIGURES = """() => [...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => {
    const box = e => e.getBoundingClientRect();
    const seen = selector => [...plot.querySelectorAll(selector)].filter(e => e.textContent.trim() && box(e).width);
    const frame = box(plot), found = [];
    for (const text of seen('.main-svg text')) {
        const b = box(text);
        const beside = b.left < frame.left - 2 || b.right > frame.right + 2;
        if (beside || b.top < frame.top - 2 || b.bottom > frame.bottom + 2)
            found.push(`outside its figure: ${text.textContent.slice(0, 60)}`);
    }
    const over = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
    const labels = seen('.gtitle, .annotation-text, .xtitle, .ytitle, .xtick text, .ytick text');
    const entries = seen('.legendtext');
    for (const entry of entries)
        for (const other of [...labels, ...entries])
            if (other !== entry && over(box(entry), box(other)))
                found.push(`over each other: ${entry.textContent.slice(0, 40)} | ${other.textContent.slice(0, 40)}`);
    return [...new Set(found)];
})"""


def main(folder: str, runs: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as empty, browsing() as browser:
        kinds = {"runs": Path(runs)} if runs else {"example": example_folder(), "empty": Path(empty)}
        found = []
        for kind, place in kinds.items():
            with serving(place) as address:
                found += photograph(browser, address, Path(folder) / kind)
    print(*found, sep="\n")
    if found:
        sys.exit(f"error: {len(found)} texts are cut or covered")


def photograph(browser: Any, address: str, folder: Path, schemes: Sequence[str] = SCHEMES) -> list[str]:
    """Take every page of a dashboard at every width in every scheme, and return what is cut, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for scheme in schemes:
        page = browser.new_page(viewport={"width": WIDTHS[-1], "height": HEIGHT}, color_scheme=scheme)
        page.set_default_timeout(90_000)
        for name, path in pages(page, address).items():
            page.set_viewport_size({"width": WIDTHS[-1], "height": HEIGHT})
            page.goto(f"{address}{path}")
            for width in WIDTHS:
                page.set_viewport_size({"width": width, "height": HEIGHT})
                drawn(page)
                found += [f"{name}, {width} px, {scheme}: {fault}" for fault in faults(page)]
                content = page.evaluate("document.querySelector('[data-testid=stMain]').scrollHeight")
                page.set_viewport_size({"width": width, "height": min(max(content, HEIGHT), TALLEST)})
                drawn(page)
                page.screenshot(path=folder / f"{name}_{width}_{scheme}.png")
        page.close()
    return found


def pages(page: Any, address: str) -> dict[str, str]:
    """Return the path of every page of a dashboard by a name for files, in the order of its sidebar."""
    page.goto(address)
    page.get_by_test_id("stSidebarNavLink").first.wait_for()
    links = page.get_by_test_id("stSidebarNavLink").evaluate_all(
        "links => links.map(link => new URL(link.href).pathname)"
    )
    return {path.strip("/") or "overview": path for path in links}


def drawn(page: Any) -> None:
    """Wait until a page has everything that it will show."""
    page.locator(START).first.wait_for()
    settled(page)
    page.wait_for_function("!document.querySelector('[data-testid=stSkeleton], [data-testid=stSpinner]')")
    page.wait_for_function(
        "[...document.querySelectorAll('[data-testid=stPlotlyChart]')].every(chart => chart.querySelector('.main-svg'))"
    )
    page.wait_for_timeout(700)  # figures follow the window after a pause


def faults(page: Any) -> list[str]:
    """Return the texts of a page that are cut, or lie over each other in a figure."""
    return [*page.evaluate(CUT), *page.evaluate(FIGURES)]


if __name__ == "__main__":
    main(*sys.argv[1:])
