"""EleutherAI's lm-evaluation-harness with the model under a policy: its tasks, its prompts, its metrics.

The whole context of a request is prompt, its last token the first decode-phase token; continuations and generated
tokens are decode phase. In Python, or by lm-eval's own command, which this module starts with the model registered:

    lm_eval.simple_evaluate(model=PolicyLM("path/to/model", cutoff=24), tasks=["arc_easy"])
    python -m diagnostics.evaluate.lm_eval run --model speed-diagnostics --model_args cutoff=24 --tasks arc_easy

Releases of lm-eval after 0.4.13 find the model through this package's entry point: there ``lm_eval run`` works too.

Texts become tokens as with lm-eval's own ``hf``, so that scores compare. The anchor is a context's first token: BoS
where the tokenizer or the chat template puts it, else the first of the text.
"""

import copy
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm

from diagnostics.evaluate.scoring import Encoded, score
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.loading import LoadedModel, load_model
from diagnostics.policies import Policy, parse_policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.prompts.digests import tokenizer_digest
from diagnostics.self_test import looked_up_once
from diagnostics.support.errors import UserError, require_integer
from diagnostics.support.sameness import difference
from diagnostics.support.versions import versions

# The device that lm-eval passes when the user names none, with or without a GPU.
UNASKED_DEVICE = "cuda:0"
# Arguments of lm-eval's `hf` that mean the same here; the others load a model, or set how it is called.
PASSED_ON = (
    "add_bos_token",
    "chat_template_args",
    "enable_thinking",
    "max_batch_size",
    "max_length",
    "prefix_token_id",
    "think_end_token",
)
# Key under which a response cache names the owner of its responses; its other keys are hashes.
OWNER = "speed-diagnostics"

Request = tuple[tuple[str, str], list[int], list[int]]


@register_model("speed-diagnostics")
class PolicyLM(HFLM):
    """A model of lm-eval that runs under a policy.

    Parameters
    ----------
    pretrained
        The built-in name, a GGUF file, a folder or a hub id, as for `diagnostics.load_model`; or a loaded model.
    policy
        A policy, or its name such as ``speed:24`` or ``speed:24:anchors=0``. By default full depth.
    cutoff, anchors
        The short form of SPEED: layers that prompt tokens run through, and leading tokens that run through all.
    recommendation
        A ``recommendation.json``, or a run folder, to take SPEED's cutoff and anchors from.
    chunk_size
        Prompt tokens per forward pass when log-likelihoods are asked for; bounds memory at long prompts.
    device, dtype, revision, trust_remote_code
        As for `diagnostics.load_model`.
    batch_size
        Prompts that are generated from together, padded on the left. Log-likelihoods take one context at a time, with
        all its continuations.
    settings
        Arguments of lm-eval's ``hf``: those of `PASSED_ON`.

    Raises
    ------
    UserError
        If the model cannot be loaded or does not fit the policy, and for arguments that make no sense; later for a
        context that is too long, which lm-eval would cut on the left, where the anchors are; for perplexity over whole
        texts; and for a response cache (``use_cache``) with responses of another model or policy.
    """

    def __init__(
        self,
        pretrained: str | Path | LoadedModel = EMBEDDED_MODEL,
        *,
        policy: str | Policy | None = None,
        cutoff: int | None = None,
        anchors: int | None = None,
        recommendation: str | Path | None = None,
        chunk_size: int | None = None,
        device: str | None = None,
        dtype: str = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        **settings: Any,
    ) -> None:
        unknown = [name for name in settings if name not in PASSED_ON]
        if unknown:
            raise UserError(f"{unknown[0]!r} is no argument of this model; of hf's own it takes {', '.join(PASSED_ON)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"batch size is {batch_size!r}: give a number, 1 or more; none is found by trying")
        if chunk_size is not None:
            require_integer("chunk size", chunk_size, 1)
        self.policy = chosen_policy(policy, cutoff, anchors, recommendation)
        self.chunk_size = chunk_size
        if isinstance(pretrained, LoadedModel):
            self.loaded = pretrained
        else:
            missing = device == UNASKED_DEVICE and not torch.cuda.is_available()
            chosen_device = "auto" if device is None or missing else device
            self.loaded = load_model(
                pretrained, device=chosen_device, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
            )
        with self.policy(self.loaded.model):
            pass  # refuses a policy that does not fit, before tasks load
        self.settings = settings
        super().__init__(
            self.loaded.model,
            backend="causal",
            # A copy: lm-eval gives it a padding token where it has none.
            tokenizer=copy.deepcopy(self.loaded.tokenizer),
            batch_size=int(batch_size),
            **settings,
        )

    @looked_up_once()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Score continuations in the order of the requests, with one prefill per distinct context."""
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (texts, context, continuation) in enumerate(requests):
            self._require_scorable(texts, context, continuation)
            by_context[tuple(context)].append(index)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc=f"Log-likelihoods under {self.policy}") as bar:
            # The longest first: too little memory shows at once.
            for ids in sorted(by_context, key=len, reverse=True):
                continuations = [requests[index][2] for index in by_context[ids]]
                scored = score(self.loaded, self.policy, Encoded((), ids), continuations, chunk_size=self.chunk_size)
                for index, one in zip(by_context[ids], scored, strict=True):
                    answers[index] = (one.log_likelihood, one.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update(len(continuations))
        return [answers[index] for index in range(len(requests))]

    def _require_scorable(self, texts: tuple[str, str], context: list[int], continuation: list[int]) -> None:
        for ids, what in ((context, "context"), (continuation, "continuation")):
            if not ids:
                raise UserError(f"the {what} of an item has no tokens: {_beginning(''.join(texts))}")
        if len(context) < self.policy.anchors:
            raise UserError(
                f"an item has {len(context)} tokens of context, fewer than the anchors of {self.policy}: "
                f"{_beginning(texts[0])}"
            )
        # The last token of a continuation is predicted, never run.
        if len(context) + len(continuation) - 1 > self.max_length:
            raise UserError(
                f"an item has {len(context)} tokens of context and {len(continuation)} of continuation, too many for "
                f"the {self.max_length} positions; give fewer examples (num_fewshot): {_beginning(texts[0])}"
            )

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Tokenize contexts to generate from, int64 [batch, tokens], and their mask; refuse what lm-eval would cut."""
        ids, mask = super().tok_batch_encode(strings, padding_side, truncation=truncation)
        if left_truncate_len and ids.shape[1] > left_truncate_len:
            raise UserError(
                f"an item has {ids.shape[1]} tokens of context and {self.max_length - left_truncate_len} to generate, "
                f"too many for the {self.max_length} positions; give fewer examples (num_fewshot) or a smaller "
                f"max_gen_toks: {_beginning(strings[int(mask.sum(1).argmax())])}"
            )
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **generation_kwargs: Any) -> Tensor:
        with self.policy(self.loaded.model):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    def _model_call(self, *arguments: Any, **named: Any) -> NoReturn:
        raise UserError("one pass over context and continuation cannot say which tokens are prompt")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> NoReturn:
        """Refuse: a text without a prompt is all decode phase."""
        raise UserError(
            "perplexity over whole texts has no prompt: all but the first token would be decode phase, and the result "
            "that of the stock model whatever the policy; give a split, the beginning as context, the rest to be scored"
        )

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Use lm-eval's response cache, whose keys know requests only, if its owner is this model and policy."""
        responses = cache_hook.dbdict
        own = {"policy": self.policy.spec, "settings": self.settings} | self._identity()
        if responses is not None:
            if len(responses) and responses.get(OWNER) != own:
                raise UserError(
                    f"{responses.filename} has responses of {_described(responses.get(OWNER), own)}, not of this model "
                    f"under {self.policy}: give each its own use_cache"
                )
            responses[OWNER] = own
        super().set_cache_hook(cache_hook)

    def _identity(self) -> dict[str, Any]:
        """Return what decides a response besides the text of its request, the only key of lm-eval's cache."""
        lm, identity = self.loaded, self.loaded.identity()
        runtime = {"device": lm.device.type, "tokenizer": tokenizer_digest(lm.tokenizer)}
        return {"configuration": identity.configuration, "identity": identity.entries() | runtime}

    def get_model_info(self) -> dict[str, Any]:
        """Return the description of model and policy for lm-eval's results, without asking the hub."""
        lm = self.loaded
        return {
            "model_num_parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
            "model_dtype": str(lm.dtype).removeprefix("torch."),
            "model_sha": lm.revision or "",
            "model_weight_hash": lm.weight_hash,
            "pretrained": lm.name,
            "n_layers": lm.anatomy.n_layers,
            "policy": self.policy.spec,
            "speed_diagnostics_version": versions()["speed-diagnostics"],
        }


def chosen_policy(
    policy: str | Policy | None = None,
    cutoff: int | None = None,
    anchors: int | None = None,
    recommendation: str | Path | None = None,
) -> Policy:
    """Return the policy that one of the arguments names; full depth if none does.

    Raises UserError if several name one, and for what the policy itself refuses.
    """
    if sum(way is not None for way in (policy, cutoff, recommendation)) > 1:
        raise UserError("policy, cutoff and recommendation each say how the model runs: give one")
    if anchors is not None and cutoff is None:
        raise UserError("anchors go with cutoff; with policy they are part of it, as in speed:24:anchors=0")
    if isinstance(policy, Policy):
        return policy
    if policy is not None:
        return parse_policy(str(policy))
    if recommendation is not None:
        return SpeedPolicy.from_recommendation(recommendation)
    if cutoff is None:
        return FullPolicy()
    return SpeedPolicy(cutoff) if anchors is None else SpeedPolicy(cutoff, anchors)


def main() -> None:
    """Run lm-eval's command; bad input gives one line on stderr and exit status 2."""
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")


def _described(owner: dict[str, Any] | None, present: dict[str, Any]) -> str:
    if not owner or "identity" not in owner:
        return "another model"
    if differs := difference(owner, present):
        return f"{owner['policy']} ({differs})"
    same_settings = owner["settings"] == present["settings"]
    return str(owner["policy"]) if same_settings else f"{owner['policy']} with other settings ({owner['settings']})"


if __name__ == "__main__":
    main()
