"""What an item asked, as short texts that a person can read beside the answers."""

import os
from typing import Any

from diagnostics.evaluate.items import ChoiceItem, GenerationItem

# Characters that are kept of a question, and of one choice.
MOST = 2000
# Of a text that is cut, the share from its beginning; the question itself stands at the end of a prompt.
BEGINNING = 0.2
COLUMNS = ("question", "choices")


def item_texts(item: ChoiceItem | GenerationItem) -> dict[str, Any]:
    """Return an item's ``question`` and its ``choices`` (None where the answer is generated), long ones cut.

    Where the choices have contexts of their own, the question ends where these differ; the rest goes to the choices.
    """
    if isinstance(item, GenerationItem):
        return {"question": shortened(item.context.text), "choices": None}
    contexts = [context.text for context in item.contexts]
    question = os.path.commonprefix(contexts)  # noqa: RUF071 -- characters, not folders
    if len(set(contexts)) > 1:
        question = question[: len(question) - len(question.split(" ")[-1])]  # no word is cut in two
    choices = [context[len(question) :] + text for context, text in zip(contexts, item.continuations, strict=True)]
    return {"question": shortened(question), "choices": [shortened(choice) for choice in choices]}


def shortened(text: str, most: int = MOST) -> str:
    """Return a text of at most about ``most`` characters: from a longer one the middle is left out, and said so."""
    if len(text) <= most:
        return text
    first = int(BEGINNING * most)
    return f"{text[:first]}\n[... {len(text) - most:,} characters ...]\n{text[first - most :]}"
