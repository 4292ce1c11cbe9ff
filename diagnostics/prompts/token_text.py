"""Decodes tokens piece by piece: the text that each token, or a continuation, adds to the text before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Last tokens of the context that determine how the next token is written.
LEAD_TOKENS = 4


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False
) -> list[str]:
    """Return the text that each token adds; joined they are the decoded text.

    A character of several tokens belongs to the last of them; the others add "".
    """
    texts: list[str] = []
    start = returned = 0  # ids[start:] is decoded; the text of ids[start:returned] is already returned
    for end in range(1, len(ids) + 1):
        old, new = (
            tokenizer.decode(
                ids[start:stop], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            for stop in (returned, end)
        )
        if new.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(new[len(old) :])
        # The tokens returned last are decoded again: spaces depend on the preceding tokens.
        start, returned = returned, end
    return texts


class Continuation:
    """Text of tokens that follow a context: some tokenizers omit the space before a text's first word."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> None:
        self.tokenizer, self.before = tokenizer, list(context[-LEAD_TOKENS:])
        self.lead = self._decode(self.before)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text that the tokens add to the context's."""
        both = self._decode([*self.before, *ids])
        # The context's last token may be part of a character that these tokens complete.
        return both[len(self.lead) :] if both.startswith(self.lead) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
