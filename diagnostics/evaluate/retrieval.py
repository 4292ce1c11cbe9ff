"""Finding things in long text, at any length: needles, variable tracking and common words, after RULER.

The tasks are those of RULER (Hsieh et al., 2024, arXiv 2404.06654) in our own words, over the language reference that
comes with Python. The target stands at a known relative depth; depths are spread evenly over the items. The document
comes first and the question last, so that the two can be prefilled separately.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from diagnostics.evaluate.items import Context, GenerationItem, Task
from diagnostics.prompts.builtin import (
    CHARACTERS_PER_TOKEN,
    CITIES,
    THINGS,
    VARIABLES,
    VERBS,
    assignments,
)
from diagnostics.prompts.encoding import encode_prompt
from diagnostics.prompts.inserts import Insert
from diagnostics.prompts.prompt import PLACEHOLDER, Prompt
from diagnostics.prompts.standard_library import documentation
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

N_DEPTHS = 10
N_DISTRACTORS = 3
CHAIN = 4
N_COMMON = 5
# How many times as often a common word occurs as a rare one.
COMMON_RATE = 10
MAX_NEW_TOKENS = {"needle": 16, "needle_multikey": 16, "variables": 16, "common_words": 48}


def retrieval_names() -> list[str]:
    """Return the names of the tasks; each comes with a length, such as ``needle@4096``."""
    return list(MAKERS)


def retrieval_task(
    name: str, length: int, tokenizer: PreTrainedTokenizerBase, *, n_items: int = 50, seed: int = 0
) -> Task:
    """Make one task whose prompts have ``length`` tokens, to within 0.5%; the same for the same seed and tokenizer.

    ``needle``: one number hidden in the text. ``needle_multikey``: the same among three distractors with other keys.
    ``variables``: a value passed from variable to variable. ``common_words``: the five words that occur ten times as
    often as all others. An answer is right if it contains the target; for common words the score is the share that it
    contains. Raises UserError for an unknown name, and for a length that leaves no room.
    """
    if name not in MAKERS:
        raise UserError(f"task {name!r} is not one of: {', '.join(MAKERS)}")
    items = []
    for index in range(n_items):
        rng = Random(f"{seed}/{name}/{length}/{index}")
        depth = (index % N_DEPTHS + 0.5) / N_DEPTHS
        items.append(_item(MAKERS[name](rng, depth, length), index, depth, length, tokenizer))
    metric = "share" if name == "common_words" else "contains"
    stop = ("\n",) if name != "common_words" else ("\n\n",)
    return Task(f"{name}@{length}", tuple(items), metric, MAX_NEW_TOKENS[name], stop, source="made here", licence="PSF")


Draft = tuple[str, str, str, tuple[Insert, ...], tuple[str, ...]]


def _needle(rng: Random, depth: float, length: int) -> Draft:
    return _codes(rng, depth, length, 0)


def _needle_multikey(rng: Random, depth: float, length: int) -> Draft:
    return _codes(rng, depth, length, N_DISTRACTORS)


def _codes(rng: Random, depth: float, length: int, others: int) -> Draft:
    cities = rng.sample(CITIES, 1 + others)
    codes = [str(rng.randrange(100_000, 10**6)) for _ in cities]
    depths = [depth, *(rng.random() for _ in range(others))]
    inserts = [
        Insert(at, f"The secret access code for {city} is {code}.")
        for at, city, code in zip(depths, cities, codes, strict=True)
    ]
    return (
        "Some secret access codes are hidden in the following text. Remember them.",
        documentation(rng, length * CHARACTERS_PER_TOKEN),
        f"What is the secret access code for {cities[0]}? The secret access code for {cities[0]} is",
        tuple(inserts),
        (codes[0],),
    )


def _variables(rng: Random, depth: float, length: int) -> Draft:
    names, value = rng.sample(VARIABLES, CHAIN), rng.randrange(10_000, 100_000)
    inserts = [Insert((step + depth) / CHAIN, line) for step, line in enumerate(assignments(names, value))]
    return (
        "The following text has assignments of variables in it. Keep track of their values.",
        documentation(rng, length * CHARACTERS_PER_TOKEN),
        f"What is the value of {names[-1]}? The value of {names[-1]} is",
        tuple(inserts),
        (str(value),),
    )


def _common_words(rng: Random, depth: float, length: int) -> Draft:
    words = sorted({f"{verb}{thing}" for verb in VERBS for thing in THINGS})
    rng.shuffle(words)
    common, rare = words[:N_COMMON], words[N_COMMON:]
    # In rounds, each in a new order, so that the proportions hold wherever the text is cut.
    rounds: list[str] = []
    while sum(map(len, rounds)) < length * CHARACTERS_PER_TOKEN:
        round_words = common * COMMON_RATE + rare[:: max(1, len(rare) // (N_COMMON * COMMON_RATE))]
        rng.shuffle(round_words)
        rounds.append(" ".join(round_words))
    return (
        "Here is a list of words.",
        " ".join(rounds),
        f"Which {N_COMMON} words are the most common in the list above? The {N_COMMON} most common words are",
        (),
        tuple(common),
    )


MAKERS: dict[str, Callable[[Random, float, int], Draft]] = {
    "needle": _needle,
    "needle_multikey": _needle_multikey,
    "variables": _variables,
    "common_words": _common_words,
}


def _item(draft: Draft, index: int, depth: float, length: int, tokenizer: PreTrainedTokenizerBase) -> GenerationItem:
    """Cut the document to the length, and split the prompt where the question begins."""
    opening, document, question, inserts, answers = draft
    query = f"\n\n{question}"
    prompt = Prompt(
        id=str(index), text=f"{opening}\n\n{PLACEHOLDER}{query}", document=document, inserts=inserts, evidence=()
    )
    text = encode_prompt(prompt, tokenizer, context_length=length).text
    return GenerationItem(str(index), Context(query, text.removesuffix(query)), answers, f"depth {depth:.0%}")
