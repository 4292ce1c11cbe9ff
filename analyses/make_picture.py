"""Draw a run's recommendation, as the terminal shows it, into an SVG.

python analyses/make_picture.py RUN analyses/results/recommend.svg
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from diagnostics import load_run, recommend
from diagnostics.terminal.diagnosis import show_recommendation


def main(run_folder: str, picture: str) -> None:
    run = load_run(run_folder)
    console = Console(record=True, width=92, file=io.StringIO(), force_terminal=True, highlight=False)
    show_recommendation(run, recommend(run), console)
    svg = console.export_svg(title="speed-diagnostics recommend")
    # The template fetches a web font; a picture should not.
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"Fira Code, ?monospace|Fira Code", "DejaVu Sans Mono, Menlo, Consolas, monospace", svg)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    Path(picture).write_text(svg)


if __name__ == "__main__":
    main(*sys.argv[1:])
