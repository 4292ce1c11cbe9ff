"""The parts of a page (cards, tables, pictures, sections) and how they become one self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import plotly.io as pio
from jinja2 import Environment

from diagnostics.figures.style import title_of, without_title
from diagnostics.support.glossary import GLOSSARY

TEMPLATE, STYLE = "page.html.jinja", "page.css"
# plotly.js with the traces that these pages use, as npm's plotly.js-cartesian-dist-min has it: a third of the whole.
PLOTLY = "plotly-cartesian.min.js"
# What a heading calls a term that the glossary has under another name.
ALIASES = {"KV": "KV cache", "same top": "same top token"}


@dataclass(frozen=True)
class Card:
    """One number of the result: what it is called, how it reads, and a line below it."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Texts in rows and columns; ``strong`` is the row that matters, ``text_columns`` how many columns are names."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: int | None = None
    text_columns: int = 0
    caption: str = ""


@dataclass(frozen=True)
class Picture:
    """A figure with a caption that says what to see in it."""

    figure: Any
    caption: str

    @property
    def title(self) -> str:
        """The figure's title, as text."""
        title, _ = title_of(self.figure)
        return title[:1].upper() + title[1:]

    def drawing(self) -> str:
        """Return the figure without its title as JSON that may stand in a script of a page."""
        text = pio.to_json(without_title(self.figure), validate=False)
        assert text is not None
        return text.replace("<", "\\u003c")


@dataclass(frozen=True)
class Facts:
    """Names and values, such as how something was measured; what has no value is left out."""

    entries: Mapping[str, str]


Part = str | Table | Picture | Facts


@dataclass(frozen=True)
class Section:
    """A heading with its paragraphs, tables, pictures and facts."""

    title: str
    parts: Sequence[Part]

    @property
    def anchor(self) -> str:
        """The section's address within the page."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Page:
    """A report: its title, the answer in one sentence, the numbers behind it, cautions, and the sections."""

    title: str
    answer: str
    cards: Sequence[Card]
    sections: Sequence[Section]
    remarks: Sequence[str] = ()
    notes: Sequence[str] = ()

    def render(self) -> str:
        """Return the page as HTML: about 1.6 MB, since it contains plotly's program."""
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        environment.filters["term"] = main_term
        environment.tests |= {kind.__name__.lower(): _is(kind) for kind in (str, Table, Picture, Facts)}
        template = environment.from_string(_file(TEMPLATE))
        return template.render(
            page=self,
            sections=self.sections,
            definitions={name: GLOSSARY[name] for name in sorted(self._terms(), key=str.lower)},
            glossary=GLOSSARY,
            style=_file(STYLE),
            plotly=_file(PLOTLY),
        )

    def _terms(self) -> set[str]:
        """Return the terms of the glossary that the page uses in cards, headings and captions."""
        return {term for text in self._texts() for term in terms(text)}

    def _texts(self) -> Iterator[str]:
        yield from (self.answer, *self.remarks, *self.notes)
        for card in self.cards:
            yield from (card.label, card.note)
        for section in self.sections:
            for part in section.parts:
                if isinstance(part, Table):
                    yield from (*part.headings, part.caption)
                elif isinstance(part, Picture):
                    yield from (part.title, part.caption)
                elif isinstance(part, str):
                    yield part


def terms(text: str) -> list[str]:
    """Return the terms of the glossary that a text has, longest first."""
    names = {name: name for name in GLOSSARY} | ALIASES
    found = []
    for name in sorted(names, key=len, reverse=True):
        text, count = re.subn(rf"(?<!\w){re.escape(name)}s?(?!\w)", " ", text, flags=re.IGNORECASE)
        if count:
            found.append(names[name])
    return list(dict.fromkeys(found))


def main_term(heading: str) -> str:
    """Return the term that a heading is about; "" for a heading that needs none."""
    return next(iter(terms(heading)), "")


def _is(kind: type) -> Any:
    return lambda value: isinstance(value, kind)


@cache
def _file(name: str) -> str:
    return files("diagnostics.report").joinpath(name).read_text("utf-8")
