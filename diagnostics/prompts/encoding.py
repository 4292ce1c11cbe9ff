"""From a prompt to the tokens a model reads: chat template, cut of the document, evidence as token spans."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diagnostics.prompts.chat_template import Rendered, Span, refuse_control_tokens, render
from diagnostics.prompts.prompt import Message, Prompt, PromptSet, escaped
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from diagnostics.models.loading import LoadedModel


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
        Half-open ranges of ``token_ids`` that hold the evidence, in order, apart from each other.
    text
        What was tokenized: the chat template and the cut document included.
    has_bos
        Whether the first token is the tokenizer's begin-of-text token; if not, the anchor is an ordinary one.
    notes
        What was done to the prompt that its author may not expect, one sentence each.
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
    """A prompt that does not fit, even without its document."""

    def __init__(self, prompt: Prompt, needed: int, allowed: int, context_length: int | None) -> None:
        self.prompt_id, self.needed = prompt.id, needed
        even = ", even without its document" if prompt.document else ""
        advice = (
            f"ask for a context length of at least {needed}"
            if allowed == context_length
            else "shorten it, decode fewer tokens, or take a model with more positions"
        )
        super().__init__(f"prompt {prompt.id!r} has {needed} tokens{even}, but {allowed} fit: {advice}")


def encode_prompts(
    prompts: PromptSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    max_reference_tokens: int | None = None,
) -> list[EncodedPrompt]:
    """Encode every prompt of a set within the set's context length, as ``encode_prompt`` does it for one.

    Raises
    ------
    UserError
        If a prompt cannot be encoded; of several that are too long, the message names the longest.
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
    """Encode one prompt; if it is too long its document is cut, at its end and nowhere else.

    Messages go through the tokenizer's chat template, which writes its own special tokens. A plain text gets
    those that the tokenizer puts before it, such as BoS, but none after it: the model is to go on from there.

    Parameters
    ----------
    prompt
        The prompt.
    tokenizer
        A transformers tokenizer. Evidence needs a fast one, which knows the characters of each token.
    limit
        Tokens the prompt may have at most: the model's positions, less those to be decoded.
    context_length
        Tokens it is wanted to have at most. The document is cut as little as that takes: to within 0.5% or 2
        tokens of the smaller of the two, as far as its words (lines, paragraphs) allow.
    max_reference_tokens
        Tokens of the reference to keep.

    Raises
    ------
    PromptTooLong
        If the prompt does not fit, and cutting its document does not help.
    UserError
        If the chat template refuses the messages, or if no token comes of the prompt or the reference.
    """
    notes: list[str] = []
    chat = prompt.messages is not None and bool(tokenizer.chat_template)
    if prompt.messages is not None and not chat:
        notes.append("no chat template: the messages are joined as plain paragraphs")

    subject = f"prompt {prompt.id!r}"
    if prompt.messages is None or not chat:  # what the author wrote around it may hold such tokens, data may not
        for data in (prompt.document, *(insert.text for insert in prompt.inserts)):
            refuse_control_tokens(subject, tokenizer, "the document", data)

    def encode(document: str) -> _Tokens:
        content = prompt.fill(document)
        if not isinstance(content, str):
            rendered = render(subject, tokenizer, content) if chat else _join(content)
            if chat:
                return _tokenize(tokenizer, rendered.text, special=False, contents=rendered.contents)
            return _tokenize(tokenizer, rendered.text, special=True, contents=rendered.contents)
        # A text that begins with BoS brings its special tokens itself; a second BoS would be one too many.
        written = bool(tokenizer.bos_token) and content.startswith(str(tokenizer.bos_token))
        return _tokenize(tokenizer, content, special=not written)

    allowed = min((n for n in (limit, context_length) if n is not None), default=None)
    cuts = _cut_points(prompt)
    size, tokens = _longest(cuts, lambda size: encode(prompt.document[:size]), allowed)
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
        evidence=_evidence(prompt, tokens, notes),
        text=tokens.text,
        has_bos=tokenizer.bos_token_id is not None and tokens.ids[0] == tokenizer.bos_token_id,
        notes=tuple(notes),
    )


# --- Text and tokens ---


@dataclass(frozen=True)
class _Tokens:
    """A text, its tokens, the characters of each (None if unknown), and how many tokens were left out.

    ``contents`` are the characters that the prompt's author wrote: the rest is the chat template's.
    """

    text: str
    ids: tuple[int, ...]
    offsets: Sequence[Span] | None
    stripped: int
    contents: tuple[Span, ...]


def encode_messages(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Encode messages as they are through the tokenizer's chat template; raise UserError where it refuses them."""
    return _tokenize(tokenizer, render("the prompt", tokenizer, messages).text, special=False).ids


def encode_input(
    lm: LoadedModel, text: str, *, system: str | None = None, chat: bool | None = None, max_new_tokens: int = 0
) -> Tensor:
    """Return the token ids of a text to generate from, int64 [1, tokens], on the model's device.

    ``chat`` says whether to make it a user message of the chat template; by default where there is one. Raises
    UserError for a chat template that is missing, and where the tokens and the new ones exceed the model's positions.
    """
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    if chat and not templated:
        raise UserError(f"model {lm.name!r} has no chat template: use --text")
    if chat is False or not templated:
        if system is not None:
            raise UserError("--system needs a chat template")
        tokens = encode_prompt(Prompt(id="prompt", text=escaped(text)), lm.tokenizer).token_ids
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        tokens = encode_messages([*messages, {"role": "user", "content": text}], lm.tokenizer)
    room = lm.anatomy.room(max_new_tokens)
    if room is not None and len(tokens) > room:
        raise UserError(
            f"the prompt has {len(tokens)} tokens; with {max_new_tokens} new ones they exceed the "
            f"{lm.anatomy.max_positions} positions of {lm.name!r}"
        )
    return torch.tensor([tokens], device=lm.device)


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


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool, contents: tuple[Span, ...] | None = None
) -> _Tokens:
    output = tokenizer(
        text,
        add_special_tokens=special,
        truncation=False,
        padding=False,
        return_special_tokens_mask=True,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # whether a long text fits the model is checked here, not there
    )
    ids: list[int] = output["input_ids"]
    added = output["special_tokens_mask"]
    stop = len(ids)
    # The mask marks what the tokenizer added by itself; if that is all there is, nothing of the text is left.
    while special and stop and added[stop - 1]:
        stop -= 1
    contents = ((0, len(text)),) if contents is None else contents
    return _Tokens(text, tuple(ids[:stop]), output.get("offset_mapping"), len(ids) - stop, contents)


def _join(messages: Sequence[Message]) -> Rendered:
    text, contents = "", []
    for message in messages:
        text += f"{message['role']}: "
        contents.append((len(text), len(text) + len(message["content"])))
        text += f"{message['content']}\n\n"
    return Rendered(f"{text}assistant:", tuple(contents))


def _reference_ids(
    prompt: Prompt, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None, notes: list[str]
) -> tuple[int, ...] | None:
    if prompt.reference is None:
        return None
    ids = _tokenize(tokenizer, prompt.reference, special=False).ids
    if not ids:
        raise UserError(f"prompt {prompt.id!r}: the reference has no tokens; leave it out or write one")
    if max_tokens is not None and len(ids) > max_tokens:
        notes.append(f"reference cut from {len(ids)} to {max_tokens} tokens")
    return ids[:max_tokens]


# --- The cut ---

# A run of 40 characters without white space (Chinese, an address, a table) is cut anywhere from there on.
_CUTS = {
    "word": re.compile(r"\s+|(?<=\S{40})"),
    "line": re.compile(r"\n+"),
    "paragraph": re.compile(r"\n\s*\n"),
}
_LONGEST_TOKEN = 128  # characters; few tokenizers have one that is longer


def _cut_points(prompt: Prompt) -> list[int]:
    """The sizes, in characters, that the document may be cut to: from 0 to all of it."""
    ends = (match.start() for match in _CUTS[prompt.cut].finditer(prompt.document))
    return sorted({0, *ends, len(prompt.document)})


def _longest(sizes: Sequence[int], encode: Callable[[int], _Tokens], allowed: int | None) -> tuple[int, _Tokens]:
    """The longest of ``sizes`` that encodes to ``allowed`` tokens, or nearly so; the first, if none does.

    Tokens are nearly proportional to characters, so interpolation finds the place in a few encodings; every
    third step is a bisection, which bounds their number where it is not so.
    """
    if allowed is None:
        return sizes[-1], encode(sizes[-1])
    low, high = 0, len(sizes)  # sizes[low] fits; sizes[high] does not, or does not exist
    best = encode(sizes[0])
    rate, step = 0.25, 0  # tokens per character
    slack = max(2, allowed // 200)
    while high - low > 1 and len(best.ids) <= allowed - slack:
        step += 1
        wanted = sizes[low] + (allowed - len(best.ids) - slack / 2) / rate
        middle = (low + high) // 2 if step % 3 == 0 else bisect_right(sizes, wanted) - 1
        middle = min(max(middle, low + 1), high - 1)
        tokens = encode(sizes[middle])
        rate = max((len(tokens.ids) - len(best.ids)) / (sizes[middle] - sizes[low]), 1e-3)
        if len(tokens.ids) <= allowed:
            low, best = middle, tokens
        else:
            high = middle
    rest = sizes[-1] - sizes[low]
    if high == len(sizes) and 0 < rest <= _LONGEST_TOKEN * (allowed - len(best.ids)):
        # The tolerance must not cut a document that fits whole.
        tokens = encode(sizes[-1])
        if len(tokens.ids) <= allowed:
            return sizes[-1], tokens
    return sizes[low], best


# --- Evidence ---


def _evidence(prompt: Prompt, tokens: _Tokens, notes: list[str]) -> tuple[Span, ...]:
    """Token spans of the evidence, merged where they touch."""
    if not prompt.evidence:
        return ()
    if tokens.offsets is None:
        notes.append("evidence not used: the tokenizer cannot tell the characters of a token")
        return ()
    found = [_occurrences(tokens, span) if isinstance(span, str) else [span] for span in prompt.evidence]
    if lost := sum(not places for places in found):
        notes.append(f"{lost} of {len(found)} evidence strings are not in the prompt as encoded")
    marked = bytearray(len(tokens.text))
    for start, stop in {place for places in found for place in places}:
        marked[start:stop] = b"\1" * (stop - start)
    return tuple(_runs([marked.find(1, *offset) >= 0 for offset in tokens.offsets[: len(tokens.ids)]]))


def _occurrences(tokens: _Tokens, part: str) -> list[Span]:
    """Where a string stands in what the author wrote, overlapping ones included."""
    places = []
    for start, stop in tokens.contents:
        at = tokens.text.find(part, start, stop)
        while at >= 0:
            places.append((at, at + len(part)))
            at = tokens.text.find(part, at + 1, stop)
    return places


def _runs(flags: Sequence[bool]) -> list[Span]:
    """The half-open ranges where ``flags`` are true."""
    runs: list[Span] = []
    for index, flag in enumerate(flags):
        if flag and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif flag:
            runs.append((index, index + 1))
    return runs
