"""The text of a prompt as HTML: nothing lost, nothing taken for markup, colours by attention."""

import re
import tempfile
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard import prompt_text as text_module
from dashboard.prompt_text import EVIDENCE, MEASURE, SEGMENTS, attention_of_head, legend, measured_at, prompt_text
from tests.support.examples import examples


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


def coloured(tokens, layer=None, first=0):
    return prompt_text(tokens, "attention", measured_at(tokens, "attention", layer), first)


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
    page = Page(prompt_text(tokens, colour, measured_at(tokens, "attention", None), first))
    assert page.text == "".join(texts[first:]).replace("\n", "↵\n")
    assert page.tags == ["div"] + ["span"] * sum(bool(text) for text in texts[first:])
    assert [text for _, text in page.spans] == [text.replace("\n", "↵\n") for text in texts[first:] if text]


def test_segments_are_escaped_too():
    page = Page(prompt_text(make_tokens(["a"], segments=['"><script>']), "segment"))
    assert page.tags == ["div", "span"]
    assert page.spans[0][0]["title"] == 'token 0, "><script>'


def test_the_strongest_token_has_full_colour_and_others_their_share():
    weights = [0.0, 0.1, 0.4, 0.2, 0.4]
    page = Page(coloured(make_tokens("abcde", weights), 0))
    assert {alpha(span)[0] for span in page.spans} == {MEASURE}
    shares = [alpha(span)[1] for span in page.spans]
    assert shares == pytest.approx([0.85 * weight / 0.4 for weight in weights], abs=0.006)
    assert [span[0]["title"] for span in page.spans][:2] == [
        "token 0, prompt, attention 0",
        "token 1, prompt, attention 0.1",
    ]


@given(weights=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=150))
@examples(50)
def test_more_attention_is_no_paler(weights):
    page = Page(coloured(make_tokens(["x"] * len(weights), [[w] for w in weights])))
    shares = np.array([alpha(span)[1] for span in page.spans])[np.argsort(weights, kind="stable")]
    assert list(shares) == sorted(shares)
    assert shares[-1] == (0.85 if max(weights) >= 1e-12 else shares[-1])
    assert shares.max() <= 0.85


def test_one_outlier_does_not_leave_all_others_white():
    weights = [1.0, *[0.01] * 299]
    page = Page(coloured(make_tokens(["x"] * 300, weights), 0))
    assert {alpha(span)[1] for span in page.spans} == {0.85}


def test_a_layer_or_the_mean_over_layers():
    tokens = make_tokens("abc", [[0.5, 0.1], [0.1, 0.3], None])
    for layer, expected in ((0, [0.5, 0.1, np.nan]), (1, [0.1, 0.3, np.nan]), (None, [0.3, 0.2, np.nan])):
        np.testing.assert_allclose(measured_at(tokens, "attention", layer), expected)
    strongest = [np.argmax([alpha(s)[1] for s in Page(coloured(tokens, n)).spans]) for n in (0, 1)]
    assert strongest == [0, 1]


def test_segments_have_their_colours_in_both_modes():
    tokens = make_tokens("abcd", [None, 0.4, 0.2, None], ["anchor", "prompt", "prompt", "decode"])
    by_segment = [alpha(span) for span in Page(prompt_text(tokens, "segment")).spans]
    names = ["anchor", "prompt", "prompt", "decode"]
    assert [colour for colour, _ in by_segment] == [SEGMENTS[name] for name in names]
    assert by_segment[1] == by_segment[2]
    assert min(by_segment[0][1], by_segment[3][1]) > by_segment[1][1] > 0
    by_attention = [alpha(span) for span in Page(coloured(tokens)).spans]
    assert (by_attention[0], by_attention[3]) == (by_segment[0], by_segment[3])
    assert [colour for colour, _ in by_attention[1:3]] == [MEASURE] * 2
    assert by_attention[1][1] > by_attention[2][1]
    assert len(set(SEGMENTS.values()) | {MEASURE}) == 4


@pytest.mark.parametrize("colour", ["attention", "segment"])
def test_evidence_is_underlined_and_nothing_else_is(colour):
    page = Page(prompt_text(make_tokens("abcde", [0.1] * 5, evidence=(1, 2)), colour, np.full(5, 0.1)))
    assert [f"border-bottom:2px solid {EVIDENCE}" in span[0]["style"] for span in page.spans] == [0, 1, 1, 0, 0]


def test_missing_attention():
    for weights in ([None] * 3, [np.nan] * 3, None):
        page = Page(coloured(make_tokens("abc", weights)))
        assert page.text == "abc"
        assert [alpha(span)[1] for span in page.spans] == [0, 0, 0]
        assert not any("attention" in span[0]["title"] for span in page.spans)
    page = Page(coloured(make_tokens("abc", [[np.nan, 0.3], [0.2, 0.2], None]), 1))
    assert [alpha(span)[1] for span in page.spans] == [0.85, pytest.approx(0.57, abs=0.01), 0]
    page = Page(coloured(make_tokens("ab", [[0.0, 0.0]] * 2), 1))
    assert [alpha(span)[1] for span in page.spans] == [0, 0]
    assert Page(coloured(make_tokens(""))).text == ""


def test_pages_show_each_token_once_in_the_colours_of_the_whole(monkeypatch):
    texts, weights = [f"w{i} " for i in range(23)], [0.001 + i / 1000 for i in range(23)]
    tokens = make_tokens(texts, weights, evidence=(9, 10))
    whole = Page(coloured(tokens, 0)).spans
    monkeypatch.setattr(text_module, "PAGE_TOKENS", 5)
    pages = [Page(coloured(tokens, 0, first)).spans for first in range(0, 23, 5)]
    assert [len(page) for page in pages] == [5, 5, 5, 5, 3]
    assert [span for page in pages for span in page] == whole
    assert coloured(tokens, 0, 23).endswith("</div>")


def test_legend_names_every_colour():
    by_attention, by_segment = Page(legend("attention")), Page(legend("segment"))
    assert all(name in by_attention.text for name in ("anchors", "attention", "decode", "evidence"))
    assert all(name in by_segment.text for name in ("anchors", "prompt", "decode", "evidence"))
    assert "attention" not in by_segment.text
    styles = " ".join(span[0]["style"] for span in by_attention.spans)
    for colour in (SEGMENTS["anchor"], SEGMENTS["decode"], MEASURE):
        assert "rgba({},{},{},".format(*colour) in styles
    assert EVIDENCE in styles


def test_selectivity_has_a_column_of_its_own():
    tokens = make_tokens("ab", [[0.5, 0.1], [0.1, 0.3]]).assign(selectivity=[[0.01, 0.2], [0.03, 0.4]])
    np.testing.assert_allclose(measured_at(tokens, "selectivity", 1), [0.2, 0.4])
    np.testing.assert_allclose(measured_at(tokens, "selectivity", None), [0.105, 0.215])
    page = Page(prompt_text(tokens, "selectivity", measured_at(tokens, "selectivity", 0)))
    assert [span[0]["title"] for span in page.spans] == [
        f"token {i}, prompt, selectivity 0.0{w}" for i, w in ((0, 1), (1, 3))
    ]
    assert "selectivity" in Page(legend("selectivity")).text


def test_a_head_colours_the_tokens_that_it_attends_to():
    tokens = make_tokens("abcde", segments=["anchor", *["prompt"] * 4])
    head = pd.DataFrame({"position": [3, 1], "attention": [0.6, 0.2]})
    weights = attention_of_head(tokens, head)
    np.testing.assert_allclose(weights, [np.nan, 0.2, np.nan, 0.6, np.nan])
    page = Page(prompt_text(tokens, "head", weights))
    opacities = [alpha(span)[1] for span in page.spans[1:]]
    assert opacities[2] > opacities[0] > opacities[1] == opacities[3] == 0
    assert page.spans[3][0]["title"] == "token 3, prompt, attention 0.6"
    assert "this head" in Page(legend("head")).text


def test_text_on_a_strong_colour_is_dark_on_dark_pages_too():
    styles = [span[0]["style"] for span in Page(coloured(make_tokens("ab", [0.1, 1.0]), 0)).spans]
    assert "color:#" not in styles[0].replace("background-color", "")
    assert ";color:#050505" in styles[1]
