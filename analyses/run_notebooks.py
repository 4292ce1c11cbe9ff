"""Executes the notebooks of this folder, in place, and prints how long each took.

    python analyses/run_notebooks.py                      # all of them
    python analyses/run_notebooks.py 2_regions.ipynb      # those named

The committed outputs come from this script. Prompts, references and bootstraps are deterministic: the numbers are the
same, up to rounding, with the versions of ``constraints.txt`` and the same Python version, on which the built-in
prompts depend. Only measured times differ. The notebooks write to temporary folders.

Figures are stored as PNG if kaleido and a Chrome or Chromium are available (``BROWSER_PATH`` may give its path),
otherwise as plotly's JSON, which needs a viewer that supports it. Progress bars and warnings are not stored.

Needs ``pip install -e '.[dev]'``; for PNG also ``pip install kaleido`` (`make notebooks` does both).
"""

import argparse
import base64
import importlib.util
import io
import os
import shutil
import time
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
BROWSERS = ("google-chrome", "google-chrome-stable", "chrome", "chromium", "chromium-browser")
PNG, JSON = "png", "plotly_mimetype"
# No requests to a hub, no animated progress bars.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
CELL_SECONDS = 600


def notebooks() -> list[Path]:
    """Return the notebooks of this folder in order."""
    return sorted(FOLDER.glob("*.ipynb"))


def execute(path: Path, renderer: str = JSON) -> nbformat.NotebookNode:
    """Run a notebook from top to bottom in this folder and return it with its outputs; the file stays as it is.

    ``renderer`` is plotly's name for how figures are stored. Raises nbclient's CellExecutionError, with the cell and
    its traceback, if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources={"metadata": {"path": str(FOLDER)}},
        record_timing=False,
    )
    client.execute(env=os.environ | QUIET | {"PLOTLY_RENDERER": renderer})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [_tidy(output) for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def _tidy(output: Any) -> Any:
    """Make a picture small, and legible on a dark page: figures have a transparent background."""
    if "image/png" in output.get("data", {}) and importlib.util.find_spec("PIL"):
        from PIL import Image

        drawn = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGBA")
        page = Image.new("RGBA", drawn.size, "white")
        page.alpha_composite(drawn)
        pixels = np.asarray(page.convert("RGB"))
        # A palette of the most frequent colours, so that lines and areas keep theirs, and of some between all others.
        colours, place, count = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True, return_counts=True)
        between = Image.fromarray(colours[None]).quantize(96).getpalette()
        palette = np.concatenate([colours[np.argsort(-count)[:64]], np.array(between, np.uint8).reshape(-1, 3)])
        nearest = np.square(colours[:, None].astype(int) - palette).sum(-1).argmin(1)
        indexed = Image.fromarray(nearest[place].astype(np.uint8).reshape(pixels.shape[:2]), "P")
        indexed.putpalette(palette.tobytes())
        small = io.BytesIO()
        indexed.save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def best_renderer() -> str:
    """Return the renderer for PNG if it is available, else plotly's JSON."""
    browser = os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None or importlib.util.find_spec("kaleido") is None:
        return JSON
    os.environ["BROWSER_PATH"] = browser
    return PNG


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="file names; by default all notebooks")
    names = parser.parse_args().names
    renderer = best_renderer()
    for path in [FOLDER / Path(name).name for name in names] or notebooks():
        started = time.perf_counter()
        notebook = execute(path, renderer)
        seconds = time.perf_counter() - started
        nbformat.write(notebook, path)
        print(f"{path.name}: {seconds:.0f} s, {path.stat().st_size / 1024:.0f} KB, figures as {renderer}", flush=True)


if __name__ == "__main__":
    main()
