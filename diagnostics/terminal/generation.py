"""Generated text in the terminal: one line of figures, or two policies side by side with the tokens that differ."""

import json
import math
from itertools import groupby
from operator import itemgetter
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from diagnostics.generation.differences import differing, marked_text, same_start
from diagnostics.generation.generation import Generation
from diagnostics.models.loading import LoadedModel
from diagnostics.policies import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.terminal.units import readable_bytes

OPEN, CLOSE = "[", "]"  # around tokens that differ, where there are no colours


def summary_line(lm: LoadedModel, prompt_ids: Tensor, generation: Generation, policy: Policy) -> str:
    """Return the time and memory of a generation as one line."""
    tpot = "" if math.isnan(generation.tpot_s) else f"TPOT {1000 * generation.tpot_s:.1f} ms, "
    return (
        f"[{policy}: {prompt_ids.shape[1]} prompt tokens, {generation.token_ids.shape[1]} generated, "
        f"TTFT {generation.ttft_s:.3f} s, {tpot}KV {readable_bytes(generation.kv_bytes)}]"
    )


def as_json(lm: LoadedModel, prompt_ids: Tensor, results: dict[str, Generation]) -> str:
    """Return token ids, text and timings as JSON; for several generations, one object per policy."""
    described = {name: _describe(lm, prompt_ids, generation) for name, generation in results.items()}
    return json.dumps(described if len(described) > 1 else next(iter(described.values())), indent=1)


def _describe(lm: LoadedModel, prompt_ids: Tensor, generation: Generation) -> dict[str, Any]:
    return {
        "model": lm.name,
        "policy": generation.cache.policy.spec,
        "n_prompt": prompt_ids.shape[1],
        "token_ids": generation.token_ids[0].tolist(),
        "text": lm.tokenizer.decode(generation.token_ids[0], skip_special_tokens=True),
        "ttft_s": generation.ttft_s,
        "tpot_s": None if math.isnan(generation.tpot_s) else generation.tpot_s,
        "kv_bytes": generation.kv_bytes,
    }


def show_comparison(
    lm: LoadedModel, prompt_ids: Tensor, results: dict[str, Generation], policy: Policy, console: Console
) -> None:
    """Print full depth and a policy side by side; tokens that the other side lacks are marked."""
    full, other = results[FullPolicy.name], results[policy.name]
    left, right = full.token_ids[0].tolist(), other.token_ids[0].tolist()
    texts = Table(box=SIMPLE_HEAD, expand=True)
    texts.add_column(FullPolicy.name, ratio=1)
    texts.add_column(str(policy), ratio=1)
    marks = differing(left, right)
    styled = console.is_terminal
    texts.add_row(
        _marked(lm, left, marks[0], "underline red" if styled else None),
        _marked(lm, right, marks[1], "underline green" if styled else None),
    )
    console.print(texts)
    if not styled and any(map(any, marks)):
        console.print(f"{OPEN}Tokens{CLOSE} that the other side lacks are marked.", markup=False)
    same = same_start(left, right)
    if left == right:
        console.print(f"All {len(left)} tokens are the same." if len(left) > 1 else "The one token is the same.")
    else:
        console.print(f"The first {same} tokens are the same (of {len(left)} and {len(right)}).")
    figures = Table(title=f"{prompt_ids.shape[1]} prompt tokens", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "TTFT, s", "TPOT, ms", "KV"):
        figures.add_column(heading, justify="left" if not heading else "right")
    for name, generation in ((str(full.cache.policy), full), (str(policy), other)):
        figures.add_row(
            name, f"{generation.ttft_s:.3f}", _number(1000 * generation.tpot_s, 1), readable_bytes(generation.kv_bytes)
        )
    figures.add_row(
        "ratio",
        f"{other.ttft_s / full.ttft_s:.2f}",
        _number(other.tpot_s / full.tpot_s, 2),
        f"{other.kv_bytes / full.kv_bytes:.2f}",
    )
    console.print(figures)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _marked(lm: LoadedModel, ids: list[int], differs: list[bool], style: str | None) -> Text:
    """Return the text of tokens, with those that differ in a style, or without one in brackets."""
    text = Text()
    for differ, pieces in groupby(marked_text(lm.tokenizer, ids, differs), key=itemgetter(1)):
        words = "".join(piece for piece, _ in pieces)
        if differ and style is None:
            inner = words.strip()
            words = words.replace(inner, f"{OPEN}{inner}{CLOSE}", 1) if inner else f"{OPEN}{words}{CLOSE}"
        text.append(words, style=style if differ else None)
    return text
