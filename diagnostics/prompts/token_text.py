"""From tokens back to text, piece by piece: what each token, or a continuation, adds to the text before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of the context that say how the first token after them is written.
LEAD_TOKENS = 4


def token_texts(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool = False
) -> list[str]:
    """Return the text that each token adds: joined they are the decoded text.

    A character made of several tokens comes with the last of them, and the others add "".
    """
    texts: list[str] = []
    begun = shown = 0  # decoded is ids[begun:], of which the text of ids[begun:shown] has been given out
    for end in range(1, len(ids) + 1):
        given, now = (
            tokenizer.decode(
                ids[begun:stop], skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
            for stop in (shown, end)
        )
        if now.endswith("\ufffd") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(given) :])
        # The tokens given out last stay in view: spaces depend on what is before.
        begun, shown = shown, end
    return texts


class Continuation:
    """Text of tokens that follow a context: some tokenizers leave out the space before a word that begins a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: Sequence[int]) -> None:
        self.tokenizer, self.before = tokenizer, list(context[-LEAD_TOKENS:])
        self.lead = self._decode(self.before)

    def text(self, ids: Sequence[int]) -> str:
        """Return what the tokens add to the context's text."""
        both = self._decode([*self.before, *ids])
        # The last token before may be part of a character that these tokens end.
        return both[len(self.lead) :] if both.startswith(self.lead) else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
