"""The dashboard's pages without a browser: reading what they show, and changing the files they read."""

import base64
import json
import re

import numpy as np
import pandas as pd
from streamlit.runtime.memory_media_file_storage import MemoryMediaFileStorage

from diagnostics.runs.places import MANIFEST
from diagnostics.support.files import read_json
from tests.support.paths import ROOT

MAIN = ROOT / "app" / "main.py"
RESULT_PAGES = ("overview", "layers", "cutoff", "compare")
# Characters that mean something to Markdown, HTML or Streamlit.
ODD = "a*b*c <b>d</b> [e](f) $g$ :red[h] `i` _j_ #k"


def go(at, page):
    return at.switch_page(f"views/{page}.py").run()


def calm(at):
    """Nothing was raised, and every error is one line; returns these lines, as they are read."""
    assert [(e.value, e.proto.stack_trace[-4:]) for e in at.exception] == []
    errors = [literal(error.value) for error in at.error]
    assert all("\n" not in line and len(line) < 500 for line in errors)
    return errors


def literal(markdown):
    """What Markdown shows of text whose special characters are all escaped."""
    return re.sub(r"\\([^A-Za-z0-9\s])", r"\1", markdown)


def figure(at, number=0):
    return json.loads(at.get("plotly_chart")[number].proto.spec)


def figure_title(at, number=0):
    """The heading of a figure, with its subject: it stands above the figure, not in it."""
    headings = [markdown.value for markdown in at.markdown if markdown.value.startswith("##### ")]
    title, _, subject = headings[number].removeprefix("##### ").partition(" :gray[:small[")
    return literal(f"{title}, {subject.removesuffix(']]')}" if subject else title)


def numbers(values):
    """Plotly's arrays: lists, or bytes with their type and shape."""
    if isinstance(values, dict):
        flat = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])
        return flat.reshape([int(n) for n in values["shape"].split(",")]) if "shape" in values else flat
    return np.array(values, dtype=float)


def curve(drawn, name):
    (trace,) = [t for t in drawn["data"] if t.get("name") == name and "y" in t and t.get("showlegend") is not False]
    return numbers(trace["y"])


def same(left, right):
    np.testing.assert_allclose(left, right, rtol=1e-6, atol=1e-9, equal_nan=True)


def metrics(at):
    return {metric.label: metric.value for metric in at.metric}


def table(at, number=0):
    return at.dataframe[number].value


def texts(at):
    """The HTML that a page shows, without the styles that all pages share."""
    return [element.value for element in at.html if "<style>" not in element.value]


def html(at):
    return "".join(texts(at))


def edit_manifest(folder, name=MANIFEST, /, **changes):
    manifest = read_json(folder / name)
    (folder / name).write_text(json.dumps(manifest | changes))


def edit_table(folder, name, change):
    path = folder / f"{name}.parquet"
    changed = change(pd.read_parquet(path))
    changed.to_parquet(path, index=False)


def downloads(monkeypatch):
    """Return what the pages offer from now on to be downloaded, by file name; it is filled as they run."""
    offered = {}
    load = MemoryMediaFileStorage.load_and_get_id

    def note(self, path_or_data, mimetype, kind, filename=None):
        offered[filename] = path_or_data
        return load(self, path_or_data, mimetype, kind, filename)

    monkeypatch.setattr(MemoryMediaFileStorage, "load_and_get_id", note)
    return offered
