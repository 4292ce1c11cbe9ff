"""How closely a policy follows full depth on prompts: it compares next-token distributions and needs no right answers.

For SPEED the numbers equal those of the cutoff sweep; this module measures them for any policy.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from diagnostics.evaluate.scoring import Encoded, SharedPrefill, prefill_context
from diagnostics.generation.generation import decode, generate
from diagnostics.models.loading import LoadedModel
from diagnostics.policies import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.registry import as_policies
from diagnostics.prompts.encoding import EncodedPrompt, encode_for_diagnosis
from diagnostics.prompts.given import as_prompts
from diagnostics.prompts.prompt import PromptSet
from diagnostics.self_test import looked_up_once
from diagnostics.support.defaults import DECODE_TOKENS
from diagnostics.support.divergence import kl_divergence, log_probabilities, reported
from diagnostics.support.errors import UserError
from diagnostics.support.progress import Progress, reporter


@torch.no_grad()
@looked_up_once()
def fidelity(
    lm: LoadedModel,
    prompts: PromptSet | Sequence[Any] | str,
    policies: Sequence[Policy | str] | Policy | str,
    *,
    decode_tokens: int = DECODE_TOKENS,
    chunk_size: int | None = None,
    progress: Progress | bool = True,
) -> pd.DataFrame:
    """Compare every policy's next-token distributions with those of full depth, teacher-forced on the reference.

    Parameters
    ----------
    lm, prompts, policies
        The model, its prompts as `diagnostics.diagnose` takes them, and the policies. A prompt without a reference is
        continued greedily at full depth.
    decode_tokens
        Reference tokens per prompt at most, 1 or more.
    chunk_size
        Prompt tokens per forward pass; bounds memory at long prompts.
    progress
        A bar on stderr by default, False for none, or a function that is called as ``progress(done, total, prompt_id)``
        before each prompt and once at the end.

    Returns
    -------
    DataFrame
        One row per prompt and policy: prompt_id, category, policy, n_prompt, n_decode, and means over decode positions:
        ``kl``, KL(full depth || policy), ``nll`` and ``nll_full``, of the reference, all in nats per token, and
        ``top1_agreement``, 0..1.

    Raises
    ------
    UserError
        If a policy does not fit the model, or a prompt cannot be encoded.
    """
    if decode_tokens < 1:
        raise UserError(f"decode tokens is {decode_tokens}: give 1 or more")
    lm, prompts, policies = LoadedModel.of(lm), as_prompts(prompts), as_policies(policies)
    report = reporter(progress, "comparing")
    for policy in policies:
        policy.check(lm.anatomy)
    encoded = encode_for_diagnosis(prompts, lm.tokenizer, lm.anatomy.max_positions, decode_tokens)
    rows = []
    for index, prompt in enumerate(encoded):
        report(index, len(encoded), prompt.prompt_id)
        shared = SharedPrefill(lm, chunk_size)
        reference = _reference(lm, prompt, decode_tokens, chunk_size)
        full = _log_probabilities(lm, prompt, reference, FullPolicy(), shared)
        for policy in policies:
            under_policy = _log_probabilities(lm, prompt, reference, policy, shared)
            row = {"prompt_id": prompt.prompt_id, "category": prompt.category, "policy": policy.spec}
            lengths = {"n_prompt": len(prompt.token_ids), "n_decode": len(reference)}
            rows.append(row | lengths | _compared(full, under_policy, reference))
    report(len(encoded), len(encoded), "")
    return pd.DataFrame(rows)


def _reference(lm: LoadedModel, prompt: EncodedPrompt, decode_tokens: int, chunk_size: int | None) -> Tensor:
    """Tokens after the prompt, int64 [n]: its reference, or greedy tokens of full depth up to an end of text."""
    if prompt.reference_ids is not None:
        return torch.tensor(prompt.reference_ids[:decode_tokens], device=lm.device)
    ids = torch.tensor([prompt.token_ids], device=lm.device)
    return generate(lm, ids, max_new_tokens=decode_tokens, chunk_size=chunk_size).token_ids[0]


def _log_probabilities(
    lm: LoadedModel, prompt: EncodedPrompt, reference: Tensor, policy: Policy, shared: SharedPrefill
) -> Tensor:
    """Log-probabilities at every decode position, [n, vocabulary]."""
    length = len(prompt.token_ids) + len(reference) - 1
    logits, cache = prefill_context(lm, policy, Encoded((), prompt.token_ids), shared=shared, length=length)
    if len(reference) > 1:
        logits = torch.cat([logits, decode(lm, reference[None, :-1], cache)[0]])
    return log_probabilities(logits)


def _compared(full: Tensor, under_policy: Tensor, reference: Tensor) -> dict[str, float]:
    target = reference[:, None].to(full.device)
    numbers = {
        "kl": reported(kl_divergence(full, under_policy)),
        "top1_agreement": (full.argmax(-1) == under_policy.argmax(-1)).float(),
        "nll": -under_policy.gather(-1, target)[:, 0],
        "nll_full": -full.gather(-1, target)[:, 0],
    }
    return {name: float(values.double().mean()) for name, values in numbers.items()}
