"""What the dashboard finds in a folder, the text of a prompt as HTML, and the command that starts it."""

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard import prompt_text as text_module
from dashboard.catalog import find_runs
from dashboard.prompt_text import ATTENTION, EVIDENCE, SEGMENTS, legend, prompt_text, received_attention
from diagnostics import load_run, recommend
from diagnostics.support.files import read_json
from tests.support.examples import examples
from tests.support.paths import ROOT
from tests.support.runs import contents, run_command, write_run
from tests.support.users import as_nobody

# The module: `from diagnostics.cli import dashboard` would be the function.
command = importlib.import_module("diagnostics.cli.dashboard")


def set_time(folder, seconds):
    """Give everything in a folder one time."""
    for path in (*folder.rglob("*"), folder):
        os.utime(path, ns=(seconds * 10**9,) * 2)


def only(folder):
    (entry,) = find_runs(folder)
    return entry


@pytest.fixture
def open_place():
    """A folder that another user can get to, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)
        for path in Path(place).rglob("*"):
            path.chmod(0o755)


# --- Catalog ---


def test_a_complete_run(tmp_path):
    folder = write_run(tmp_path / "run")
    entry = only(tmp_path)
    assert (entry.path, entry.name, entry.problem, entry.has_benchmark) == (folder, "run", None, False)
    assert (entry.status, entry.finished_prompts, entry.readable) == ("complete", 3, True)
    assert entry.manifest == load_run(folder).manifest


@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_an_interrupted_run(tmp_path, finished):
    folder = write_run(tmp_path / "run", finished=finished)
    (folder / "parts").mkdir(exist_ok=True)
    for leftover in (folder / ".writing-a", folder / "parts" / ".writing-b"):
        leftover.mkdir()
        (leftover / "layers.parquet").write_bytes(b"half")
    entry = only(tmp_path)
    assert (entry.status, entry.finished_prompts) == (f"{finished} of 3 prompts", finished)
    assert entry.readable == (finished > 0)
    assert entry.problem is None
    if finished:
        assert len(load_run(folder).prompts) == finished


def test_a_benchmark_alone_and_beside_a_run(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "benchmark.parquet").write_bytes(b"")
    entry = only(tmp_path)
    assert (entry.status, entry.problem, entry.has_benchmark, entry.readable) == ("benchmark", None, True, False)
    assert entry.finished_prompts == 0
    assert only(tmp_path / "bench").name == "bench"
    folder = write_run(tmp_path / "run")
    shutil.copy(tmp_path / "bench" / "benchmark.parquet", folder)
    entry = only(folder)
    assert (entry.status, entry.has_benchmark, entry.readable) == ("complete", True, True)
    (folder / "manifest.json").write_text("{")
    entry = only(folder)
    assert (entry.status, entry.has_benchmark, entry.readable) == ("benchmark", True, False)
    assert "damaged" in entry.problem


def test_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "photos" / "2026").mkdir(parents=True)
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a-file").write_text("x")
    found = {entry.name: entry for entry in find_runs(tmp_path)}
    assert set(found) == {"photos", "empty"}
    for entry in found.values():
        assert (entry.status, entry.manifest, entry.readable, entry.goals) == ("not a run", None, False, {})
        assert "has no manifest.json" in entry.problem
        assert "\n" not in entry.problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"\xff\xfe", "damaged"),
        (b"[]", "no schema_version"),
        (b"null", "no schema_version"),
        (b'{"schema_version": 7}', "another version"),
        (b'{"schema_version": 1}', "field model"),
        ({"n_prompts": "3"}, "field n_prompts"),
        ({"shape": []}, "field shape"),
        ({"identity": None}, "field identity"),
        ({"status": "done"}, "field status"),
        ({"status": ["complete"]}, "field status"),
    ],
)
def test_a_broken_manifest(tmp_path, data, problem):
    folder = write_run(tmp_path / "run")
    whole = read_json(folder / "manifest.json")
    (folder / "manifest.json").write_bytes(json.dumps(whole | data).encode() if isinstance(data, dict) else data)
    write_run(tmp_path / "good")
    found = {entry.name: entry for entry in find_runs(tmp_path)}
    assert problem in found["run"].problem
    assert (found["run"].status, found["run"].readable, found["run"].finished_prompts) == ("not a run", False, 0)
    assert found["good"].readable
    assert problem in only(folder).problem


def test_a_manifest_that_is_a_folder_or_a_dangling_link(tmp_path):
    (tmp_path / "folder" / "manifest.json").mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "manifest.json").symlink_to("nowhere")
    (tmp_path / "loop").mkdir()
    (tmp_path / "loop" / "manifest.json").symlink_to("manifest.json")
    assert {entry.status for entry in find_runs(tmp_path)} == {"not a run"}
    assert len(find_runs(tmp_path)) == 3


def test_a_run_given_itself(tmp_path):
    folder = write_run(tmp_path / "run", finished=2)
    entry = only(folder)
    assert (entry.path, entry.name, entry.status) == (folder, "run", "2 of 3 prompts")


def test_a_folder_that_is_missing_or_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "missing", tmp_path / "file", tmp_path / "file" / "deeper"):
        assert find_runs(folder) == []
    assert find_runs(tmp_path) == []


def test_hidden_folders_are_skipped(tmp_path):
    for name in (".jobs", ".writing-abc", ".hidden"):
        write_run(tmp_path / name)
    write_run(tmp_path / "seen")
    assert only(tmp_path).name == "seen"


def test_links_to_runs_are_followed_and_dangling_ones_are_not(tmp_path):
    write_run(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    (tmp_path / "runs" / "dangling").symlink_to(tmp_path / "nowhere")
    assert (only(tmp_path / "runs").name, only(tmp_path / "runs").readable) == ("link", True)


def test_newest_first(tmp_path):
    for name, seconds in (("b", 3000), ("a", 1000), ("d", 2000), ("c", 2000)):
        set_time(write_run(tmp_path / name), seconds)
    (tmp_path / "empty").mkdir()
    set_time(write_run(tmp_path / "part", finished=2), 500)
    assert [entry.name for entry in find_runs(tmp_path)] == ["b", "d", "c", "a", "part", "empty"]
    os.utime(tmp_path / "a" / "heads.parquet", (4000, 4000))
    os.utime(tmp_path / "part" / "parts" / "000001", (5000, 5000))
    assert [entry.name for entry in find_runs(tmp_path)] == ["part", "a", "b", "d", "c", "empty"]


def test_the_signature_changes_with_any_file_and_with_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    set_time(folder, 1000)
    before = only(tmp_path).signature
    assert only(tmp_path).signature == only(folder).signature == before
    assert {name for name, *_ in before} == set(contents(folder))
    seen = {before}
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        file.write_bytes(data)  # the same size, another time
        seen.add(one := only(tmp_path).signature)
        os.utime(file, (1000, 1000))
        assert only(tmp_path).signature == before
        file.write_bytes(data + b" ")  # another size, the same time
        os.utime(file, (1000, 1000))
        seen.add(other := only(tmp_path).signature)
        file.unlink()
        seen.add(only(tmp_path).signature)
        file.write_bytes(data)
        os.utime(file, (1000, 1000))
        assert one != other
    assert len(seen) == 1 + 3 * len(before)
    (folder / "recommendation.json").write_text("{}")
    assert only(tmp_path).signature != before


def test_the_signature_changes_with_the_parts(tmp_path):
    folder = write_run(tmp_path / "run", finished=1)
    seen = {only(folder).signature}
    (folder / "parts" / ".writing-a").mkdir()
    assert only(folder).signature in seen
    for name in ("000001", "000002"):
        (folder / "parts" / name).mkdir()
        assert only(folder).signature not in seen
        seen.add(only(folder).signature)
    shutil.rmtree(folder / "parts")
    assert only(folder).signature not in seen
    assert hash(only(folder).signature)


def test_goals_are_those_that_were_saved(tmp_path):
    folder = write_run(tmp_path / "run", n_prompts=6)
    assert only(folder).goals == {}
    for goals in ({}, {"max_kl": 0.5}, {"max_nll_increase": 0.25, "min_agreement": 0.5, "confidence": 0.9}):
        made = recommend(load_run(folder), **goals)
        made.save(folder / "recommendation.json")
        found = only(folder).goals
        assert goals.items() <= found.items()
        assert recommend(load_run(folder), **found).data == made.data


CRITERIA = ["null", "[1]", '{"max_kl": "x"}', '{"max_kl": null}']


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "{}", "\0", *(f'{{"criterion": {text}}}' for text in CRITERIA)]
)
def test_goals_that_cannot_be_read(tmp_path, text):
    folder = write_run(tmp_path / "run")
    (folder / "recommendation.json").write_text(text)
    assert only(folder).goals == {}
    (folder / "recommendation.json").unlink()
    (folder / "recommendation.json").mkdir()
    assert only(folder).goals == {}


def test_a_folder_that_cannot_be_listed(open_place):
    """Searched but not listed, and listed but not searched."""
    write_run(open_place / "runs" / "run")
    for mode in (0o711, 0o744):
        (open_place / "runs").chmod(mode)
        with as_nobody():
            try:
                assert find_runs(open_place / "runs") == []
            except PermissionError:
                assert mode == 0o744  # see test_a_folder_that_cannot_be_searched


def test_a_manifest_that_cannot_be_read(open_place):
    (write_run(open_place / "runs" / "run") / "manifest.json").chmod(0o600)
    write_run(open_place / "runs" / "good")
    with as_nobody():
        found = {entry.name: entry for entry in find_runs(open_place / "runs")}
    assert "Permission denied" in found["run"].problem
    assert (found["run"].readable, found["good"].readable) == (False, True)


# --- The text of a prompt ---


class Page(HTMLParser):
    """Text, tags and their attributes of some HTML; a list of (attributes, text) for spans."""

    def __init__(self, html):
        super().__init__()
        self.text, self.tags, self.spans = "", [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        assert set(dict(attrs)) <= {"title", "style"}
        if tag == "span":
            self.spans.append((dict(attrs), ""))

    def handle_data(self, data):
        self.text += data
        if self.spans:
            attributes, text = self.spans[-1]
            self.spans[-1] = attributes, text + data

    def handle_comment(self, data):
        raise AssertionError(data)

    handle_decl = handle_pi = unknown_decl = handle_comment


def make_tokens(texts, attention=None, segments=None, evidence=()):
    """Rows as `run.tokens` has them, after a way through a file."""
    n = len(texts)
    table = pd.DataFrame(
        {
            "prompt_id": "p",
            "position": range(n),
            "token_id": 7,
            "text": list(texts),
            "segment": segments or ["prompt"] * n,
            "evidence": [i in evidence for i in range(n)],
            "attention": [None if a is None else np.atleast_1d(a) for a in attention or [None] * n],
        }
    )
    with tempfile.TemporaryFile() as file:
        table.to_parquet(file)
        return pd.read_parquet(file)


def alpha(span):
    """(colour, opacity) of a span's background."""
    *colour, opacity = re.search(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", span[0]["style"]).groups()
    return tuple(map(int, colour)), float(opacity)


ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
MARKUP_WORDS = """< > & " ' </span> <script>alert(1)</script> &lt; &amp;amp; &#0; <!-- --> ]]> <![CDATA[ `` **b** $x$
<s> <b é☃"""
MARKUP = st.sampled_from([*MARKUP_WORDS.split(), "\n", "\n\n", "\t", "\r\n", "  ", "\ufffd", "\u202e", "\0"])


@given(
    texts=st.lists(st.lists(ANY | MARKUP, max_size=3).map("".join), max_size=12),
    colour=st.sampled_from(["attention", "segment"]),
    first=st.integers(0, 3),
)
@examples(200)
def test_the_text_on_the_page_is_the_text_of_the_tokens(texts, colour, first):
    tokens = make_tokens(texts, [[0.5, i / 100] for i in range(len(texts))], evidence=(1, 3))
    page = Page(prompt_text(tokens, None, colour, first))
    assert page.text == "".join(texts[first:]).replace("\n", "↵\n")
    assert page.tags == ["div"] + ["span"] * sum(bool(text) for text in texts[first:])
    assert [text for _, text in page.spans] == [text.replace("\n", "↵\n") for text in texts[first:] if text]


def test_segments_are_escaped_too():
    page = Page(prompt_text(make_tokens(["a"], segments=['"><script>']), None, "segment"))
    assert page.tags == ["div", "span"]
    assert page.spans[0][0]["title"] == 'token 0, "><script>'


def test_the_strongest_token_has_full_colour_and_others_their_share():
    weights = [0.0, 0.1, 0.4, 0.2, 0.4]
    page = Page(prompt_text(make_tokens("abcde", weights), 0, "attention"))
    assert {alpha(span)[0] for span in page.spans} == {ATTENTION}
    shares = [alpha(span)[1] for span in page.spans]
    assert shares == pytest.approx([0.85 * weight / 0.4 for weight in weights], abs=0.006)
    assert [span[0]["title"] for span in page.spans][:2] == [
        "token 0, prompt, attention 0",
        "token 1, prompt, attention 0.1",
    ]


@given(weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=150))
@examples(50)
def test_more_attention_is_no_paler(weights):
    page = Page(prompt_text(make_tokens(["x"] * len(weights), [[w] for w in weights]), None, "attention"))
    shares = np.array([alpha(span)[1] for span in page.spans])[np.argsort(weights, kind="stable")]
    assert list(shares) == sorted(shares)
    assert shares[-1] == (0.85 if max(weights) >= 1e-12 else shares[-1])
    assert shares.max() <= 0.85


def test_one_outlier_does_not_leave_all_others_white():
    weights = [1.0, *[0.01] * 299]
    page = Page(prompt_text(make_tokens(["x"] * 300, weights), 0, "attention"))
    assert {alpha(span)[1] for span in page.spans} == {0.85}


def test_a_layer_or_the_mean_over_layers():
    tokens = make_tokens("abc", [[0.5, 0.1], [0.1, 0.3], None])
    for layer, expected in ((0, [0.5, 0.1, np.nan]), (1, [0.1, 0.3, np.nan]), (None, [0.3, 0.2, np.nan])):
        np.testing.assert_allclose(received_attention(tokens, layer), expected)
    strongest = [np.argmax([alpha(s)[1] for s in Page(prompt_text(tokens, n, "attention")).spans]) for n in (0, 1)]
    assert strongest == [0, 1]


def test_segments_have_their_colours_in_both_modes():
    tokens = make_tokens("abcd", [None, 0.4, 0.2, None], ["anchor", "prompt", "prompt", "decode"])
    by_segment = [alpha(span) for span in Page(prompt_text(tokens, None, "segment")).spans]
    names = ["anchor", "prompt", "prompt", "decode"]
    assert [colour for colour, _ in by_segment] == [SEGMENTS[name] for name in names]
    assert by_segment[1] == by_segment[2]
    assert min(by_segment[0][1], by_segment[3][1]) > by_segment[1][1] > 0
    by_attention = [alpha(span) for span in Page(prompt_text(tokens, None, "attention")).spans]
    assert (by_attention[0], by_attention[3]) == (by_segment[0], by_segment[3])
    assert [colour for colour, _ in by_attention[1:3]] == [ATTENTION] * 2
    assert by_attention[1][1] > by_attention[2][1]
    assert len(set(SEGMENTS.values()) | {ATTENTION}) == 4


@pytest.mark.parametrize("colour", ["attention", "segment"])
def test_evidence_is_underlined_and_nothing_else_is(colour):
    page = Page(prompt_text(make_tokens("abcde", [0.1] * 5, evidence=(1, 2)), None, colour))
    assert [f"border-bottom:2px solid {EVIDENCE}" in span[0]["style"] for span in page.spans] == [0, 1, 1, 0, 0]


def test_missing_attention():
    for weights in ([None] * 3, [np.nan] * 3, None):
        page = Page(prompt_text(make_tokens("abc", weights), None, "attention"))
        assert page.text == "abc"
        assert [alpha(span)[1] for span in page.spans] == [0, 0, 0]
        assert not any("attention" in span[0]["title"] for span in page.spans)
    page = Page(prompt_text(make_tokens("abc", [[np.nan, 0.3], [0.2, 0.2], None]), 1, "attention"))
    assert [alpha(span)[1] for span in page.spans] == [0.85, pytest.approx(0.57, abs=0.01), 0]
    page = Page(prompt_text(make_tokens("ab", [[0.0, 0.0]] * 2), 1, "attention"))
    assert [alpha(span)[1] for span in page.spans] == [0, 0]
    assert Page(prompt_text(make_tokens(""), None, "attention")).text == ""


def test_pages_show_each_token_once_in_the_colours_of_the_whole(monkeypatch):
    texts, weights = [f"w{i} " for i in range(23)], [0.001 + i / 1000 for i in range(23)]
    tokens = make_tokens(texts, weights, evidence=(9, 10))
    whole = Page(prompt_text(tokens, 0, "attention")).spans
    monkeypatch.setattr(text_module, "PAGE_TOKENS", 5)
    pages = [Page(prompt_text(tokens, 0, "attention", first)).spans for first in range(0, 23, 5)]
    assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
    assert [span for page in pages for span in page] == whole
    assert prompt_text(tokens, 0, "attention", 23).endswith("</div>")


def test_legend_names_every_colour():
    by_attention, by_segment = Page(legend("attention")), Page(legend("segment"))
    assert all(name in by_attention.text for name in ("anchors", "attention", "decode", "evidence"))
    assert all(name in by_segment.text for name in ("anchors", "prompt", "decode", "evidence"))
    assert "attention" not in by_segment.text
    styles = " ".join(span[0]["style"] for span in by_attention.spans)
    for colour in (SEGMENTS["anchor"], SEGMENTS["decode"], ATTENTION):
        assert "rgba({},{},{},".format(*colour) in styles
    assert EVIDENCE in styles


# --- The command ---


@pytest.fixture
def replaced(monkeypatch):
    """What the command would become."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(subprocess, "call", lambda *call, **more: 0)
    return calls


def refuse(monkeypatch, capfd, *arguments):
    status, out, err = run_command(monkeypatch, capfd, "dashboard", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def free_port():
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def test_a_file_is_no_folder_of_runs(monkeypatch, capfd, tmp_path, replaced):
    (tmp_path / "file").write_text("x")
    assert f"{str(tmp_path / 'file')!r} is not a folder of runs" in refuse(monkeypatch, capfd, tmp_path / "file")
    assert not replaced


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use(monkeypatch, capfd, tmp_path, replaced, address):
    with socket.socket() as taken:
        taken.bind((address, 0))
        taken.listen()
        port = taken.getsockname()[1]
        err = refuse(monkeypatch, capfd, tmp_path, "--port", port)
    assert f"port {port} cannot be used (Address already in use): choose another --port" in err
    assert not replaced


def test_a_port_just_left_can_be_used(monkeypatch, capfd, tmp_path, replaced):
    """In TIME_WAIT: the dashboard is started anew right after it ended."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Streamlit's
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server.accept()[0].close()
        client.close()
    run_command(monkeypatch, capfd, "dashboard", tmp_path, "--port", port)
    assert f"--server.port={port}" in replaced[0][1]


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999999999999999999", "http", "80.5", ""])
def test_a_port_out_of_range(monkeypatch, capfd, tmp_path, replaced, port):
    assert "--port" in refuse(monkeypatch, capfd, tmp_path, f"--port={port}")
    assert not replaced


def test_the_first_free_port(monkeypatch, capfd, tmp_path, replaced):
    with contextlib.ExitStack() as stack:
        first = 8501
        while True:  # one that is free, taken here
            taken = stack.enter_context(socket.socket())
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                taken.bind(("127.0.0.1", first))
                taken.listen()
                break
            except OSError:
                first += 1
        run_command(monkeypatch, capfd, "dashboard", tmp_path)
        (port,) = [int(word.partition("=")[2]) for word in replaced[0][1] if word.startswith("--server.port=")]
        assert first < port < 8600


def test_no_port_is_free(monkeypatch, capfd, tmp_path, replaced):
    class Taken(socket.socket):
        def bind(self, address):
            raise OSError(98, "Address already in use")

    monkeypatch.setattr(command.socket, "socket", Taken)
    assert "choose a --port" in refuse(monkeypatch, capfd, tmp_path)
    assert "port 9999 cannot be used" in refuse(monkeypatch, capfd, tmp_path, "--port=9999")


@pytest.mark.parametrize("name", ["streamlit", "plotly", "psutil"])
def test_what_the_dashboard_needs_is_missing(monkeypatch, capfd, tmp_path, replaced, name):
    monkeypatch.setattr(command, "find_spec", lambda asked: None if asked == name else importlib.util.find_spec(asked))
    err = refuse(monkeypatch, capfd, tmp_path)
    assert f"the dashboard needs {name}: pip install 'speed-diagnostics[app]'" in err
    assert not replaced


@pytest.mark.parametrize("browser", [True, False])
def test_what_is_started(monkeypatch, capfd, tmp_path, replaced, browser):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KEPT", "yes")
    port = free_port()
    arguments = ["dashboard", "my runs", f"--port={port}", *([] if browser else ["--no-browser"])]
    run_command(monkeypatch, capfd, *arguments)
    ((program, words, environment),) = replaced
    assert program == words[0] == sys.executable
    assert words[1:4] == ["-m", "streamlit", "run"]
    assert Path(words[4]) == ROOT / "app" / "server.py"
    options = dict(word.removeprefix("--").split("=", 1) for word in words[5:])
    assert options["server.address"] == "127.0.0.1"
    assert options["browser.gatherUsageStats"] == "false"
    assert options["server.port"] == str(port)
    assert options["server.headless"] == ("false" if browser else "true")
    assert not {"server.enableCORS", "server.enableXsrfProtection"} & set(options)
    from streamlit import config

    for name in options:
        config.get_option(name)  # an unknown one is an error of Streamlit's
    assert environment["SPEED_DIAGNOSTICS_RUNS"] == str(tmp_path / "my runs")
    assert environment["KEPT"] == "yes"
    assert "SPEED_DIAGNOSTICS_RUNS" not in os.environ
    assert not (tmp_path / "my runs").exists()


def test_the_folder_of_runs_is_absolute_also_by_default_and_from_home(monkeypatch, capfd, tmp_path, replaced):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for argument, expected in ((None, "runs"), ("~/mine", "home/mine"), (tmp_path / "x", "x"), ("a/../b", "a/../b")):
        run_command(monkeypatch, capfd, "dashboard", *([] if argument is None else [argument]))
        assert replaced.pop()[2]["SPEED_DIAGNOSTICS_RUNS"] == str(tmp_path / expected)


# --- The installed copy ---


def install(place):
    """Copy what a wheel would hold, as pyproject.toml says."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in wheel["packages"]:
        target = wheel["sources"].get(name, name)
        shutil.copytree(ROOT / name, place / target, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def program_of(place):
    """(output, error) of the program that the package in a folder would start."""
    code = "from diagnostics.cli.dashboard import _program; print(_program())"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=place.parent, env=os.environ | {"PYTHONPATH": str(place)}, text=True,
        capture_output=True, check=False,
    )  # fmt: skip


def test_the_installed_copy_is_found_and_whole(tmp_path):
    site = install(tmp_path / "site")
    # Another package of this name is none of ours.
    (site / "app").mkdir()
    (site / "app" / "main.py").write_text("")
    done = program_of(site)
    assert done.stdout.strip() == str(site / "speed_diagnostics_app" / "server.py"), done.stderr
    there = set(contents(site / "speed_diagnostics_app"))
    assert {str(p.relative_to(ROOT / "app")) for p in (ROOT / "app").rglob("*.py")} | {"icon.svg"} <= there


def test_an_installation_without_the_app_says_so(tmp_path):
    site = install(tmp_path / "site")
    shutil.rmtree(site / "speed_diagnostics_app")
    done = program_of(site)
    assert done.stderr.strip().endswith("this installation has no dashboard: install speed-diagnostics anew")


def test_the_wheel_holds_the_app(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    assert program_of(site).stdout.strip() == str(site / "speed_diagnostics_app" / "server.py")


def test_an_editable_installation_has_no_copy_of_the_app():
    """A copy would be used, and be old, wherever the checkout is not found."""
    assert importlib.util.find_spec("speed_diagnostics_app") is None


# --- A real start ---


def get(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=5) as answer:
        return answer.status, answer.read().decode()


def own_addresses():
    """Addresses of this machine other than the loopback's."""
    found = [a.address for one in psutil.net_if_addrs().values() for a in one if a.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT])
def test_a_real_start_and_end(tmp_path, end):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "diagnostics.cli", "dashboard", tmp_path, f"--port={port}", "--no-browser"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a test run in the background ignores it
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                assert get(f"http://127.0.0.1:{port}/_stcore/health") == (200, "ok")
                break
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.communicate()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        server = psutil.Process(process.pid)
        family = [server, *server.children(recursive=True)]
        listening = {c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == "LISTEN"}
        assert listening == {"127.0.0.1"}
        for address in own_addresses():
            with pytest.raises(OSError, match="refused"):
                socket.create_connection((address, port), timeout=2)
        process.send_signal(end)
        out, _ = process.communicate(timeout=20)
        assert "Traceback" not in out
        assert not psutil.wait_procs(family, timeout=5)[1]
        with socket.socket() as trial, pytest.raises(OSError, match="refused"):
            trial.connect(("127.0.0.1", port))
    finally:
        process.kill()
        process.wait()
    assert contents(tmp_path) == {}


# --- FAILING: bugs found while writing these tests ---


@pytest.mark.parametrize("where", ["inside", "itself"])
def test_a_folder_that_cannot_be_searched(open_place, where):
    """PermissionError of `(folder / MANIFEST).exists()` and of `(path / BENCHMARK).exists()`, outside of the `try`."""
    write_run(open_place / "runs" / "good")
    closed = write_run(open_place / "runs" / "closed")
    closed.chmod(0o700)
    with as_nobody():
        found = find_runs(closed if where == "itself" else open_place / "runs")
    by_name = {entry.name: entry for entry in found}
    if where == "inside":
        assert by_name["good"].readable
        assert "Permission denied" in by_name["closed"].problem
    assert not any(entry.readable for entry in found if entry.name == "closed")


@pytest.mark.parametrize("folder", ["x" * 300, "x/" * 3000, "a\0b"], ids=["long", "deep", "NUL"])
def test_a_folder_that_cannot_be(tmp_path, folder):
    """OSError and ValueError of pathlib; such a folder can be given to the command or on the page."""
    assert find_runs(tmp_path / folder) == []


@pytest.mark.parametrize("name", ["manifest.json", "recommendation.json"])
def test_json_nested_too_deep(tmp_path, name):
    """RecursionError of the JSON parser: one such file takes every page away."""
    folder = write_run(tmp_path / "run")
    (folder / name).write_text("[" * 100_000)
    entry = only(tmp_path)
    assert entry.goals == {}
    assert entry.readable == (name != "manifest.json")


def test_a_home_that_nobody_has(monkeypatch, capfd, replaced):
    """RuntimeError of `expanduser`: a traceback instead of one line."""
    assert "nobody-has-this" in refuse(monkeypatch, capfd, "~nobody-has-this/runs")


def test_a_file_at_home_is_no_folder_of_runs(monkeypatch, capfd, tmp_path, replaced):
    """`~` reaches the command as it is from `make`, `env` and Python; it is checked before it is expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("x")
    assert "is not a folder of runs" in refuse(monkeypatch, capfd, "~/file")
    assert not replaced
