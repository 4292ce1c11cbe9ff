"""What a reader chose, kept in the address of the page: reload, Back and a copied link bring it back.

A page calls `bind` just before it draws a widget; where there is no widget it calls `kept` and `keep`. Choices that are
the default are left out, and those of other pages stay with the session until their page is visited again. What an
address asks for is checked like any other input: nonsense is answered by one line, and the default is shown.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

import streamlit as st

from dashboard.markdown import md

T = TypeVar("T")
LATE_SECONDS = 1.0  # in which a browser may still send the address of before
MOST_CHARACTERS = 1500  # of a text in an address: browsers and chats cut very long ones


@dataclass(frozen=True)
class Kind(Generic[T]):
    """How an address says a value: ``read`` raises ValueError for anything but ``wanted``."""

    read: Callable[[list[str]], T]
    wanted: str


@dataclass
class _State:
    """Of one session: own choices by owner and name, what an address brought, what this run says, what was written.

    ``replaced`` is the address written before, until ``replaced_until`` on the monotonic clock.
    """

    own: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    arrived: dict[str, list[str]] = field(default_factory=dict)
    shown: dict[str, list[str]] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    replaced: dict[str, list[str]] = field(default_factory=dict)
    replaced_until: float = 0.0
    drawn: dict[str, Any] = field(default_factory=dict)
    page: str | None = None
    is_running: bool = False


def whole(low: int, high: int) -> Kind[int]:
    """Return the kind of whole numbers from ``low`` to ``high``."""
    return Kind(lambda texts: _within(int(_single(texts)), low, high), f"a whole number from {low} to {high}")


def number(low: float, high: float) -> Kind[float]:
    """Return the kind of numbers from ``low`` to ``high``."""
    return Kind(lambda texts: _within(float(_single(texts)), low, high), f"a number from {low:g} to {high:g}")


def one_of(options: Iterable[T]) -> Kind[T]:
    """Return the kind of values that are one of ``options``, by their text."""
    by_text = {_text(option): option for option in options}
    return Kind(lambda texts: _look_up(by_text, _single(texts)), _wanted("one of", by_text))


def some_of(options: Iterable[T]) -> Kind[list[T]]:
    """Return the kind of lists of ``options``, none of them included."""
    by_text = {_text(option): option for option in options}
    read = lambda texts: [_look_up(by_text, text) for text in texts if text]  # noqa: E731
    return Kind(read, _wanted("some of", by_text))


def flag() -> Kind[bool]:
    """Return the kind of yes and no."""
    return one_of([True, False])


def text() -> Kind[str]:
    """Return the kind of texts; one of more than `MOST_CHARACTERS` stays with the session, out of the address."""
    return Kind(_single, "a text")


def begin(page: str) -> None:
    """Take in the address, at the start of every run of the app."""
    state = _state()
    asked = {name: st.query_params.get_all(name) for name in st.query_params}
    # A widget that was moved comes with the address of before; without one, what differs was typed, linked or Back.
    moved = any(_moved(state, key) for key in state.drawn)
    # A click that follows a typed value at once is sent before the browser has got the new address.
    late = asked == state.replaced and time.monotonic() < state.replaced_until
    if state.page is None or not (moved or late):
        state.arrived |= {name: texts for name, texts in asked.items() if texts != state.written.get(name)}
    state.page, state.shown, state.is_running = page, {}, True


def finish() -> None:
    """Write the address, at the end of every run of the app, in one step: each is one entry of the history."""
    state = _state()
    if state.shown != state.written:
        state.replaced, state.replaced_until = state.written, time.monotonic() + LATE_SECONDS
    state.is_running, state.written = False, dict(state.shown)
    if {name: st.query_params.get_all(name) for name in st.query_params} != state.shown:
        st.query_params.from_dict(state.shown)


def kept(name: str, default: T, kind: Kind[T], *, of: str = "", always: bool = False) -> T:
    """Return the reader's choice, or the default; the address then says it.

    Parameters
    ----------
    name
        Name in the address.
    default
        What is shown until the reader chooses.
    kind
        How an address says it.
    of
        To what the choice belongs, such as a run's name: each has its own.
    always
        Say the default too: where it depends on what lies in the folder, a link must not.
    """
    state, slot = _state(), (of, name)
    if name in state.arrived:
        state.own[slot] = state.arrived.pop(name)
    value = default
    if slot in state.own:
        try:
            value = kind.read(state.own[slot])
        except (ValueError, OverflowError):
            asked = ", ".join(state.own.pop(slot))[:80]
            st.warning(md(f"The address asks for {name}={asked}, but {name} is {kind.wanted}."))
    _say(name, _texts(value) if always or value != default else None)
    return value


def bind(key: str, name: str, default: T, kind: Kind[T], *, of: str = "", always: bool = False) -> T:
    """Give the widget with ``key``, drawn next, the reader's choice as `kept` does, and keep what the reader chooses.

    The widget itself gets no value: ``st.slider("Cutoff", 1, n, key="cutoff")``.
    """
    state = _state()
    if _moved(state, key):
        keep(name, st.session_state[key], of=of)
    value = kept(name, default, kind, of=of, always=always)
    st.session_state[key] = state.drawn[key] = value
    return value


def keep(name: str, value: object, *, of: str = "") -> None:
    """Choose a value for the reader; None goes back to the default."""
    state = _state()
    state.arrived.pop(name, None)
    state.own.pop((of, name), None)
    if value is not None:
        state.own[of, name] = _texts(value)


def leave() -> None:
    """Forget what the address brought and no page has asked for: it belongs to a run that was left."""
    _state().arrived.clear()


@st.fragment
def copy_link() -> None:
    """Offer the address of what is on the screen; it holds no token, which the browser keeps as a cookie."""
    # A fragment, run when the list opens: choices inside other fragments do not run the whole page.
    box = st.popover("Copy link", icon=":material/link:", width="stretch", on_change="rerun", key="copy_link")
    if box.open:
        box.caption("The page as it is now, for whoever can reach this dashboard:")
        box.code(link(str(st.context.url or "")), language=None, wrap_lines=True)


def link(base: str) -> str:
    """Return the address of what is shown, under the page's own address ``base``."""
    query = urlencode(_state().shown, doseq=True)
    return base.partition("?")[0] + (f"?{query}" if query else "")


def _state() -> _State:
    state: _State = st.session_state.setdefault("address", _State())
    return state


def _moved(state: _State, key: str) -> bool:
    return key in state.drawn and key in st.session_state and st.session_state[key] != state.drawn[key]


def _say(name: str, texts: list[str] | None) -> None:
    state = _state()
    if texts is None or sum(map(len, texts)) > MOST_CHARACTERS:
        state.shown.pop(name, None)
    else:
        state.shown[name] = texts
    if not state.is_running:  # in a fragment
        finish()


def _texts(value: object) -> list[str]:
    if isinstance(value, list | tuple | set):
        return [_text(part) for part in value] or [""]  # an empty list is a choice, too
    return [_text(value)]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _single(texts: list[str]) -> str:
    if len(texts) != 1:
        raise ValueError(f"{len(texts)} values")
    return texts[0]


def _within(value: Any, low: Any, high: Any) -> Any:
    if not low <= value <= high:
        raise ValueError(f"not from {low} to {high}")
    return value


def _look_up(by_text: dict[str, T], text: str) -> T:
    if text not in by_text:
        raise ValueError(f"no {text}")
    return by_text[text]


def _wanted(how: str, by_text: Iterable[str]) -> str:
    names = list(by_text)
    return f"{how} {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "nothing here"
