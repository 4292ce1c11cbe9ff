"""The teacher: another model whose full depth is the baseline, such as the original of a fine-tuned model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import EncodedPrompt, encode_for_diagnosis
from diagnostics.prompts.given import as_prompts
from diagnostics.prompts.prompt import PromptSet
from diagnostics.support.defaults import DECODE_TOKENS
from diagnostics.support.errors import UserError
from diagnostics.support.progress import Progress, reporter


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model's logits at full depth for some prompts.

    ``prompts`` are the tokens of each prompt; ``references`` are those that follow it, given or greedy. ``logits``
    [n_decode, vocabulary] are those at its decode positions, in the type of the weights, on the CPU; the logits of all
    prompts are held at once.
    """

    name: str
    weight_hash: str
    prompts: Mapping[str, tuple[int, ...]] = field(repr=False)
    references: Mapping[str, tuple[int, ...]] = field(repr=False)
    logits: Mapping[str, Tensor] = field(repr=False)

    def require_prompts(self, encoded: Sequence[EncodedPrompt], n_decode: int) -> None:
        """Raise UserError unless it was observed on these tokens, with at most ``n_decode`` reference tokens each."""
        for prompt in encoded:
            if self.prompts.get(prompt.prompt_id) != prompt.token_ids:
                problem = f"the teacher has not seen prompt {prompt.prompt_id!r} as it is"
                raise UserError(f"{problem}: give observe_teacher the same prompts")
            if len(self.references[prompt.prompt_id]) > n_decode:
                raise UserError(f"the teacher has more than {n_decode} reference tokens: give the same decode_tokens")


def observe_teacher(
    lm: LoadedModel,
    prompts: PromptSet | Sequence[Any] | str,
    *,
    decode_tokens: int = DECODE_TOKENS,
    progress: Progress | bool = True,
) -> Teacher:
    """Run a model over prompts at full depth, with at most ``decode_tokens`` reference tokens each, as `diagnose` does.

    ``progress`` is as for `diagnose`. Raises UserError for a prompt that does not fit.
    """
    lm, prompts, report = LoadedModel.of(lm), as_prompts(prompts), reporter(progress, "observing")
    capture = HooksCapture(lm)
    prompt_ids, references, logits = {}, {}, {}
    encoded = encode_for_diagnosis(prompts, lm.tokenizer, lm.anatomy.max_positions, decode_tokens)
    for index, prompt in enumerate(encoded):
        report(index, len(encoded), prompt.prompt_id)
        outcome = capture.run(prompt.token_ids, prompt.reference_ids, (), n_decode=decode_tokens, n_anchors=1)
        prompt_ids[prompt.prompt_id] = prompt.token_ids
        references[prompt.prompt_id] = tuple(outcome.reference_ids.tolist())
        logits[prompt.prompt_id] = outcome.logits.to("cpu", lm.dtype)
    report(len(encoded), len(encoded), "")
    return Teacher(lm.name, lm.weight_hash, prompt_ids, references, logits)
