"""Encodes a prompt as tokens: chat template, cut of the document, evidence as token spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diagnostics.models.positions import prompt_room
from diagnostics.prompts.chat_template import Span, refuse_control_tokens, render
from diagnostics.prompts.document_cut import cut_points, longest_fit
from diagnostics.prompts.evidence import evidence_spans
from diagnostics.prompts.prompt import Message, Prompt, PromptSet
from diagnostics.prompts.tokenized import Tokenized, joined, tokenize
from diagnostics.support.defaults import DECODE_TOKENS
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt as tokens.

    Attributes
    ----------
    prompt_id, category
        As in the prompt.
    token_ids
        The prompt's tokens, in order, at least one.
    reference_ids
        The tokens of the reference, or None if the prompt has none.
    evidence
        Half-open ranges of ``token_ids`` that hold the evidence, in order and not touching.
    text
        The tokenized text, including the chat template and the cut document.
    has_bos
        Whether the first token is the tokenizer's begin-of-text token; if not, the anchor is an ordinary token.
    notes
        Changes to the prompt that its author may not expect, one sentence each.
    """

    prompt_id: str
    category: str
    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] | None
    evidence: tuple[Span, ...]
    text: str
    has_bos: bool
    notes: tuple[str, ...]

    @property
    def n_prompt(self) -> int:
        """Number of prompt tokens."""
        return len(self.token_ids)


class PromptTooLong(UserError):
    """Raised for a prompt that does not fit, even without its document."""

    def __init__(self, prompt: Prompt, needed: int, allowed: int, context_length: int | None) -> None:
        self.prompt_id, self.needed = prompt.id, needed
        even = ", even without its document" if prompt.document else ""
        advice = (
            f"ask for a context length of at least {needed}"
            if allowed == context_length
            else "shorten it, decode fewer tokens, or take a model with more positions"
        )
        super().__init__(f"prompt {prompt.id!r} has {needed} tokens{even}, but {allowed} fit: {advice}")


def encode_for_diagnosis(
    prompts: PromptSet, tokenizer: PreTrainedTokenizerBase, positions: int | None, decode_tokens: int = DECODE_TOKENS
) -> list[EncodedPrompt]:
    """Encode prompts so that they and the decode tokens fit into a model's positions (None: no limit).

    Raises UserError if no prompt can fit, and as `encode_prompts` does.
    """
    limit = prompt_room(positions, decode_tokens)
    if limit is not None and limit < 1:
        raise UserError(f"{decode_tokens} decode tokens leave no room in the {positions} positions of the model")
    return encode_prompts(prompts, tokenizer, limit=limit, max_reference_tokens=decode_tokens)


def encode_prompts(
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_reference_tokens: int | None = None,
) -> list[EncodedPrompt]:
    """Encode every prompt of a set within the set's context length, as `encode_prompt` does for one prompt.

    Raises
    ------
    UserError
        If a prompt cannot be encoded; if several are too long, the message names the longest.
    """
    encoded: list[EncodedPrompt] = []
    too_long: list[PromptTooLong] = []
    bounds = {"limit": limit, "context_length": prompts.context_length}
    for prompt in prompts:
        try:
            encoded.append(encode_prompt(prompt, tokenizer, **bounds, max_reference_tokens=max_reference_tokens))
        except PromptTooLong as error:
            too_long.append(error)
    if len(too_long) > 1:
        worst = max(too_long, key=lambda error: error.needed)
        raise UserError(f"{worst} ({len(too_long)} of {len(prompts)} prompts do not fit)")
    if too_long:
        raise too_long[0]
    return encoded


def encode_prompt(
    prompt: Prompt,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    context_length: int | None = None,
    max_reference_tokens: int | None = None,
) -> EncodedPrompt:
    """Encode one prompt; if it is too long, only the end of its document is cut off.

    Messages go through the tokenizer's chat template, which writes its own special tokens. A plain text gets those that
    the tokenizer puts before it, such as BoS, but none after it: the model continues from there.

    Parameters
    ----------
    prompt
        The prompt.
    tokenizer
        A transformers tokenizer. Evidence needs a fast one, which knows the characters of each token.
    limit
        Maximum number of prompt tokens: the model's positions minus those for decoding.
    context_length
        Desired maximum number of prompt tokens. The document is cut as little as possible: to within 0.5% or 2 tokens
        of the smaller of the two, as far as its words (lines, paragraphs) allow.
    max_reference_tokens
        Maximum number of reference tokens to keep.

    Raises
    ------
    PromptTooLong
        If the prompt does not fit even without its document.
    UserError
        If the chat template refuses the messages, or if the prompt or the reference has no tokens.
    """
    notes: list[str] = []
    chat = prompt.messages is not None and bool(tokenizer.chat_template)
    if prompt.messages is not None and not chat:
        notes.append("no chat template: the messages are joined as plain paragraphs")

    subject = f"prompt {prompt.id!r}"
    if prompt.messages is None or not chat:  # the author's own text may hold control tokens, data may not
        for data in (prompt.document, *(insert.text for insert in prompt.inserts)):
            refuse_control_tokens(subject, tokenizer, "the document", data)

    def encode(document: str) -> Tokenized:
        content = prompt.fill(document)
        if not isinstance(content, str):
            rendered = render(subject, tokenizer, content) if chat else joined(content)
            if chat:
                return tokenize(tokenizer, rendered.text, special=False, contents=rendered.contents)
            return tokenize(tokenizer, rendered.text, special=True, contents=rendered.contents)
        # A text that begins with BoS has its own special tokens and must not get a second BoS.
        has_bos = bool(tokenizer.bos_token) and content.startswith(str(tokenizer.bos_token))
        return tokenize(tokenizer, content, special=not has_bos)

    allowed = min((n for n in (limit, context_length) if n is not None), default=None)
    cuts = cut_points(prompt)
    size, tokens = longest_fit(cuts, lambda size: encode(prompt.document[:size]), allowed)
    if allowed is not None and len(tokens.ids) > allowed:
        raise PromptTooLong(prompt, len(tokens.ids), allowed, context_length)
    if tokenizer.bos_token_id is not None and tokens.ids[:2] == (tokenizer.bos_token_id,) * 2:
        raise UserError(f"{subject} begins with {tokenizer.bos_token!r} twice: the second would be a prompt token")
    if not tokens.ids:
        raise UserError(f"prompt {prompt.id!r} has no tokens: the tokenizer leaves nothing of its text")
    if size < len(prompt.document):
        goal = f"{allowed} tokens" if allowed == context_length else f"the model's limit of {allowed} tokens"
        notes.append(f"document cut from {len(prompt.document)} to {size} characters to fit {goal}")
    if tokens.stripped:
        notes.append(f"{tokens.stripped} closing special token(s) left out: the model goes on from the text")
    return EncodedPrompt(
        prompt_id=prompt.id,
        category=prompt.category,
        token_ids=tokens.ids,
        reference_ids=_reference_ids(prompt, tokenizer, max_reference_tokens, notes),
        evidence=evidence_spans(prompt, tokens, notes),
        text=tokens.text,
        has_bos=tokenizer.bos_token_id is not None and tokens.ids[0] == tokenizer.bos_token_id,
        notes=tuple(notes),
    )


def encode_messages(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Encode messages with the tokenizer's chat template, without a cut; raise UserError if it refuses them."""
    return tokenize(tokenizer, render("the prompt", tokenizer, messages).text, special=False).ids


def _reference_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, notes: list[str]
) -> tuple[int, ...] | None:
    if prompt.reference is None:
        return None
    ids = tokenize(tokenizer, prompt.reference, special=False).ids
    if not ids:
        raise UserError(f"prompt {prompt.id!r}: the reference has no tokens; leave it out or write one")
    if max_tokens is not None and len(ids) > max_tokens:
        notes.append(f"reference cut from {len(ids)} to {max_tokens} tokens")
    return ids[:max_tokens]
