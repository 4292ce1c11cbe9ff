"""Names with characters of Markdown, HTML or Streamlit are shown as they are."""

import json
import shutil

from diagnostics.generation.benchmark_folder import BENCHMARK_MANIFEST
from diagnostics.support.files import read_json
from tests.support.pages import ODD, RESULT_PAGES, calm, edit_manifest, edit_table, figure, go, literal


def test_odd_names_are_shown_as_they_are(copy, open_app):
    folder = copy("tiny", into="*ru<b>n</b>*")
    edit_manifest(folder, model=ODD, prompt_set=ODD, notes=[ODD])
    edit_table(folder, "prompts", lambda table: table.assign(category=ODD))
    at = open_app(folder.parent)
    seen = 0
    for page in (*RESULT_PAGES, "playground"):
        if page != "overview":
            go(at, page)
        assert calm(at) == []
        for element in (*at.markdown, *at.caption, *at.subheader, *at.info):
            for part in ("*b*", "<b>", "[e](f)", "$g$", ":red[", "`i`", "_j_"):
                assert part not in element.value, (page, element.value)
            seen += ODD in literal(element.value)
    assert seen >= 4


def test_names_in_figures_are_shown_as_they_are(copy, library, open_app):
    folder = copy("tiny", into="<b>run</b>")
    edit_manifest(folder, model=ODD)
    for file in (library / "bench").iterdir():
        shutil.copy(file, folder)
    (folder / BENCHMARK_MANIFEST).write_text(json.dumps(read_json(folder / BENCHMARK_MANIFEST) | {"model": ODD}))
    at = open_app(folder.parent)
    for page in ("layers", "cutoff", "compare", "benchmark"):
        go(at, page)
        for number in range(len(at.get("plotly_chart"))):
            drawn = figure(at, number)
            # Plotly reads a subset of HTML in names of curves; titles are headings of the page.
            names = [t.get("name", "") for t in drawn["data"]]
            assert not [name for name in names if "<b>" in name], page


def test_the_folder_in_the_sidebar_is_text(copy, open_app):
    folder = copy("tiny")
    odd = folder.parent.rename(folder.parent.with_name("*my* runs"))
    at = open_app(odd)
    assert "*my*" not in at.sidebar.selectbox[0].proto.help
