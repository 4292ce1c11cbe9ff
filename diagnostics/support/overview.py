"""How results and models look at a prompt of Python and in a notebook: a title, one sentence, and a few facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape

# No colours but those of the page, so that it reads on light and on dark ones.
FRAME = "display:inline-block;border:1px solid rgba(128,128,128,.45);border-radius:6px;padding:.5em .9em;max-width:60em"
CELL = "text-align:left;vertical-align:top;padding:.1em .9em .1em 0;border:0;background:none"


@dataclass(frozen=True)
class Overview:
    """What an object says of itself; facts that are None are left out."""

    title: str
    answer: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        """Return the overview as lines."""
        width = max((len(name) for name in self.known), default=0)
        facts = [f"  {name:<{width}}  {fact}" for name, fact in self.known.items()]
        return "\n".join([self.title, *([f"  {self.answer}"] if self.answer else []), *facts])

    def html(self) -> str:
        """Return the overview as a card for a notebook."""
        rows = "".join(
            f'<tr style="background:none"><th style="{CELL};font-weight:normal;opacity:.7">{escape(name)}</th>'
            f'<td style="{CELL}">{escape(str(fact))}</td></tr>'
            for name, fact in self.known.items()
        )
        answer = f'<div style="margin:.25em 0">{escape(self.answer)}</div>' if self.answer else ""
        table = f'<table style="border:0;margin:.25em 0 0;border-collapse:collapse">{rows}</table>' if rows else ""
        return f'<div style="{FRAME}"><b>{escape(self.title)}</b>{answer}{table}</div>'

    @property
    def known(self) -> dict[str, object]:
        """The facts that are known."""
        return {name: fact for name, fact in self.facts.items() if fact is not None}


class Readable:
    """Base class of what shows its overview; its dataclasses say ``repr=False``."""

    def overview(self) -> Overview:
        """Return what is shown of this object."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.overview().text()

    def _repr_html_(self) -> str:
        return self.overview().html()
