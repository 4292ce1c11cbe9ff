"""Prefill, decode and generate, phase by phase: for long prompts in chunks, documents with many questions, and timing.

``model.generate()`` inside ``with policy(model):`` needs none of this. These functions enter the block themselves,
say which tokens are prompt and which are decode phase, and return the KV cache.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from diagnostics.generation.inputs import token_ids, token_input
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import RopeLengths
from diagnostics.policies import Policy
from diagnostics.policies.block import active, running
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.entry import admit_padding
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.registry import parse_policy
from diagnostics.policies.runtime import Runtime, ShallowCallDone
from diagnostics.policies.segments import Phases, phases_of, require_anchors
from diagnostics.support.errors import UserError

Model = LoadedModel | nn.Module


@dataclass(frozen=True, eq=False)
class Generation:
    """The generated tokens, with their time and memory.

    Attributes
    ----------
    token_ids
        int64 [batch, tokens]; rows that ended earlier are padded.
    cache
        The KV cache; it holds all tokens but the last one generated.
    ttft_s
        Time to first token in seconds: prefill and choice of the token, device synchronized.
    tpot_s
        Time per output token after the first, mean in seconds; NaN if there is only one.
    kv_bytes
        Bytes of keys and values in use at the end, measured from the tensors.
    texts
        The generated text of every row, without special tokens; empty for a model that came without its tokenizer.
    """

    token_ids: Tensor
    cache: PolicyCache
    ttft_s: float
    tpot_s: float
    kv_bytes: int
    texts: tuple[str, ...] = ()


@torch.no_grad()
def prefill(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    policy: Policy | None = None,
    cache: PolicyCache | None = None,
    chunk_size: int | None = None,
    more: bool = False,
    length: int | None = None,
) -> tuple[Tensor | None, PolicyCache]:
    """Run prompt tokens and put them into a KV cache.

    Parameters
    ----------
    model
        A `LoadedModel`, a transformers causal language model or a PEFT wrapper.
    input_ids
        int64 [batch, tokens]: those that are not in the cache yet.
    attention_mask
        [batch, all tokens so far], 0 at padding, which is on the left; None without padding.
    policy
        The policy; by default that of ``cache``, else full depth.
    cache
        A cache to continue: of a document, or of a conversation. After generated tokens, the first of the new tokens is
        the last generated one, which no cache holds yet, and it is decode phase.
    chunk_size
        Tokens per forward pass at most: bounds memory at long prompts. The result is the same.
    more
        Whether more of the prompt follows, such as a question after its document. Then no token is decode phase and
        there are no logits.
    length
        Tokens of the text in all, padding included, if more follows: a model whose rotary frequencies depend on the
        length takes those of such a text.

    Returns
    -------
    logits, cache
        float [batch, vocabulary] for the token after the last one, or None; and the cache, the same object if given.

    Raises
    ------
    UserError
        If the policy does not fit the model, the tokens or the cache.
    """
    module = _module(model)
    tokens = token_ids(input_ids).shape[1]
    if tokens == 0:
        raise UserError("the prompt has no tokens")
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk size is {chunk_size}: give 1 or more")
    with _under(module, policy, cache) as runtime:
        cache = cache if cache is not None else runtime.new_cache()
        past = cache.n_columns
        chunk = tokens if chunk_size is None else chunk_size
        phases = phases_of(cache, tokens, 0 if more else 1)
        if not runtime.policy.chunked and past == 0 and (chunk < tokens or more):
            raise UserError(
                f"{runtime.policy.name} chooses among all prompt tokens: it cannot take them in several calls"
            )
        admit_padding(cache, attention_mask, len(input_ids), tokens, input_ids.device)
        if past == 0 and not more:
            require_anchors(cache, tokens)
        cache.length = max(cache.length, past + tokens, length or 0)
        logits = _run_in_chunks(module, runtime, input_ids, cache, chunk, phases)
        if past == 0:
            cache.n_prompt = tokens
        return (None if more or logits is None else logits[:, -1]), cache


def _run_in_chunks(
    module: Any, runtime: Runtime, input_ids: Tensor, cache: PolicyCache, chunk: int, phases: Phases
) -> Tensor | None:
    """Run tokens in calls of ``chunk`` each, divided into ``phases`` as a whole; return the logits of the last call."""
    tokens, logits = input_ids.shape[1], None
    for start in range(0, tokens, chunk):
        stop = min(start + chunk, tokens)
        runtime.expect(phases.within(start, stop, tokens))
        with suppress(ShallowCallDone):
            logits = module(
                input_ids=input_ids[:, start:stop], past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits
    return logits


@torch.no_grad()
def decode(model: Model, input_ids: Tensor, cache: PolicyCache) -> Tensor:
    """Run decode-phase tokens, int64 [batch, tokens], at full depth against a cache; logits [batch, tokens, vocab].

    One call with several tokens equals as many calls with one token each: use it to score a given continuation, or to
    ask at full depth about a document. Raises UserError if the cache does not fit the model.
    """
    module = _module(model)
    tokens = token_ids(input_ids).shape[1]
    with _under(module, None, cache) as runtime:
        runtime.expect(Phases(0, tokens))
        return module(input_ids=input_ids, past_key_values=cache, use_cache=True).logits


@torch.no_grad()
def generate(
    model: Model,
    input_ids: Tensor | Mapping[str, Any] | str | Sequence[Mapping[str, str]],
    attention_mask: Tensor | None = None,
    *,
    policy: Policy | str | None = None,
    cache: PolicyCache | None = None,
    max_new_tokens: int = 64,
    chunk_size: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    streamer: Any = None,
    chat: bool | None = None,
) -> Generation:
    """Generate after a prompt, and time it.

    Parameters
    ----------
    model, attention_mask, policy, cache, chunk_size
        As for `prefill`; the policy also as a text, such as ``speed:24``.
    input_ids
        As for `prefill`, or what a tokenizer returns. A `LoadedModel` also takes a text, or a conversation: a list of
        ``{"role": ..., "content": ...}``.
    max_new_tokens
        Tokens to generate at most, 1 or more.
    temperature, top_p
        0 takes the most likely token; above 0 tokens are drawn, from the ``top_p`` share of the probability.
    generator
        Source of randomness for drawing.
    eos_token_id
        Tokens that end a row; by default the model's own, ``()`` for none.
    streamer
        Gets prompt and tokens as from ``model.generate()``: ``put(ids)``, ``end()``.
    chat
        Whether a text is a user message of the chat template (True) or stands as it is (False); by default the former
        if the model has a chat template, as for the command.

    Raises
    ------
    UserError
        If a number is out of range, or for what `prefill` refuses.
    """
    if max_new_tokens < 1:
        raise UserError(f"max new tokens is {max_new_tokens}: give 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give 0 or more, and a finite number")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: give a share above 0, at most 1")
    module = _module(model)
    input_ids, attention_mask = token_input(model, input_ids, attention_mask, chat=chat, max_new_tokens=max_new_tokens)
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    ends = end_tokens(module, eos_token_id).to(input_ids.device)
    pad = module.generation_config.pad_token_id
    pad = pad if pad is not None else int(ends[0]) if len(ends) else 0
    with _under(module, policy, cache) as runtime:
        if cache is None:
            cache = runtime.new_cache()
            cache.reserve(max_new_tokens)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        started = _now(input_ids.device)
        fresh = cache.n_columns == 0
        logits, cache = prefill(module, input_ids, attention_mask, cache=cache, chunk_size=chunk_size)
        assert logits is not None
        running_rows = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        generated: list[Tensor] = []
        first_token_at = started
        while True:
            token = _choose(logits, temperature, top_p, generator)
            token = torch.where(running_rows, token, pad)
            running_rows &= ~torch.isin(token, ends)
            generated.append(token)
            if len(generated) == 1:
                first_token_at = _now(input_ids.device)
            if streamer is not None:
                streamer.put(token.cpu())
            # Without end tokens the device can run ahead.
            if len(generated) == max_new_tokens or (len(ends) and not running_rows.any()):
                break
            if fresh and outgrown(cache, runtime.rope):
                # As stock generate() does: run prompt and answer again, with the frequencies of longer texts.
                cache.reset()
                length = input_ids.shape[1] + len(generated)
                prefill(module, input_ids, attention_mask, cache=cache, chunk_size=chunk_size, length=length)
                logits = decode(module, torch.stack(generated, dim=1), cache)[:, -1]
            else:
                logits = decode(module, token[:, None], cache)[:, -1]
        ended = _now(input_ids.device)
        if streamer is not None:
            streamer.end()
    steps = len(generated) - 1
    answers = torch.stack(generated, dim=1)
    texts = model.tokenizer.batch_decode(answers, skip_special_tokens=True) if isinstance(model, LoadedModel) else ()
    return Generation(
        token_ids=answers,
        cache=cache,
        ttft_s=first_token_at - started,
        tpot_s=(ended - first_token_at) / steps if steps else float("nan"),
        kv_bytes=cache.kv_bytes,
        texts=tuple(texts),
    )


def outgrown(cache: PolicyCache, rope: RopeLengths) -> bool:
    """Whether the next token has other rotary frequencies than the keys of a cache."""
    if not rope.switches:
        return False
    padding = 0 if cache.padding is None else int(cache.padding.min())
    return rope.factors(max(cache.n_columns + 1, cache.length) - padding) != cache.factors


def _module(model: Model) -> Any:
    return model if isinstance(model, nn.Module) else LoadedModel.of(model).model


@contextmanager
def _under(model: nn.Module, policy: Policy | None, cache: PolicyCache | None) -> Iterator[Runtime]:
    """Run the model inside the block under its active policy, or else under the requested one."""
    if cache is not None and policy is not None and cache.policy != policy:
        raise UserError(f"this KV cache was made under {cache.policy}, not {policy}")
    current = active(model)
    requested = policy or (cast(Policy, cache.policy) if cache is not None else None)
    if current is None:
        with running(requested or FullPolicy(), model) as runtime:
            yield runtime
    elif requested is None or requested == current.policy:
        yield current
    else:
        raise UserError(f"this model runs under {current.policy}: leave that `with` block to use {requested}")


def end_tokens(model: Any, eos_token_id: int | Sequence[int] | None = None) -> Tensor:
    """Return the tokens that end a row: those given, or the model's own; int64 [n]."""
    ends = model.generation_config.eos_token_id if eos_token_id is None else eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    return torch.tensor(ends, dtype=torch.long)


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1)
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    # At most 0, so that with a tiny temperature the best score stays 0 and no other overflows.
    scores = logits.float() - logits.float().amax(-1, keepdim=True)
    scores = TemperatureLogitsWarper(float(temperature))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _now(device: torch.device) -> float:
    """Return the seconds of a clock once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()
