"""A model in the dashboard's process: loaded once, one generation at a time, streamed to the page."""

import html
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import streamlit as st
import torch

from diagnostics.generation.differences import Marked, differing, marked_text
from diagnostics.generation.generation import Generation, generate
from diagnostics.models.loading import LoadedModel, load_model
from diagnostics.policies import Policy
from diagnostics.support.errors import UserError

# Seconds between two looks at what was generated: painting takes time that would count as the model's.
PAINT_EVERY = 0.1
DIFFERENT = "rgba(213,94,0,0.30)"
TEXT = "font: 15px/1.6 system-ui, sans-serif; white-space: pre-wrap; overflow-wrap: anywhere"

# A model runs under one policy at a time.
BUSY = threading.Lock()
# Name, device and type of the model that this process holds.
LOADED: list[tuple[str, str, str]] = []


@dataclass(frozen=True)
class Played:
    """One generation as it is shown afterwards."""

    spec: str
    token_ids: list[int]
    ttft_s: float
    tpot_s: float
    kv_bytes: int


@st.cache_resource(max_entries=1, show_spinner=False)
def playground_model(name: str, device: str, dtype: str) -> LoadedModel:
    """Load a model, and let it run once: the first pass of a process also sets libraries up."""
    LOADED.clear()
    lm = load_model(name, device=device, dtype=dtype)
    with BUSY:
        generate(lm, torch.zeros(1, 8, dtype=torch.long, device=lm.device), max_new_tokens=2, eos_token_id=())
    LOADED.append((name, device, dtype))
    return lm


def is_loaded(name: str, device: str, dtype: str) -> bool:
    """Whether `playground_model` has this model, so that a page that is reloaded need not ask for it again."""
    return (name, device, dtype) in LOADED


def play(lm: LoadedModel, ids: torch.Tensor, policy: Policy, paint: Callable[[str], None], **options: object) -> Played:
    """Generate under a policy, painting the text as it grows; a page that goes on stops it.

    Raises UserError if another page is generating.
    """
    if not BUSY.acquire(timeout=1):
        raise UserError("the model is busy with another page: try again when it is done")
    try:
        generation: Generation = generate(lm, ids, policy=policy, streamer=_Painter(lm, paint), **options)  # type: ignore[arg-type]
    finally:
        BUSY.release()
    token_ids = generation.token_ids[0].tolist()
    return Played(policy.spec, token_ids, generation.ttft_s, generation.tpot_s, generation.kv_bytes)


def marked(lm: LoadedModel, full: Played, other: Played) -> tuple[str, str]:
    """Return both texts as HTML; what the other has not is marked."""
    marks = differing(full.token_ids, other.token_ids)
    pieces = [marked_text(lm.tokenizer, one.token_ids, mark) for one, mark in zip((full, other), marks, strict=True)]
    return text_html(pieces[0]), text_html(pieces[1])


def text_html(pieces: Marked) -> str:
    """Return pieces of text as HTML, those that differ on a colour."""
    spans = (
        f'<span style="background:{DIFFERENT}">{html.escape(text)}</span>' if differs else html.escape(text)
        for text, differs in pieces
    )
    return f'<div style="{TEXT}">{"".join(spans)}</div>'


class _Painter:
    """A streamer as ``generate`` takes it: the prompt comes first, then token by token."""

    def __init__(self, lm: LoadedModel, paint: Callable[[str], None]) -> None:
        self.tokenizer, self.paint = lm.tokenizer, paint
        self.ids: list[int] = []
        self.begun = False
        self.painted = time.perf_counter()

    def put(self, ids: torch.Tensor) -> None:
        """Take the prompt, or the next token."""
        if not self.begun:
            self.begun = True
            return
        self.ids += ids.flatten().tolist()
        if time.perf_counter() - self.painted >= PAINT_EVERY:
            self._show(self.ids)

    def end(self) -> None:
        """Paint what is left."""
        self._show(self.ids)

    def _show(self, ids: Sequence[int]) -> None:
        self.paint(text_html([(self.tokenizer.decode(ids, skip_special_tokens=True), False)]))
        self.painted = time.perf_counter()
