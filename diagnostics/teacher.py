"""Another model's full depth to measure against: that of the model from which a fine-tuned one was made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diagnostics.capture.hooks import HooksCapture
from diagnostics.diagnose import DECODE_TOKENS, encode_for_diagnosis
from diagnostics.models import LoadedModel
from diagnostics.prompts import PromptSet

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Teacher:
    """What a model says at full depth to some prompts.

    ``references`` are the tokens that follow each prompt, given or greedy; ``logits`` [n_decode, vocabulary] are those
    at its decode positions, in the type of the weights, on the CPU: as many as all prompts have together are held.
    """

    name: str
    weight_hash: str
    references: Mapping[str, tuple[int, ...]] = field(repr=False)
    logits: Mapping[str, Tensor] = field(repr=False)


def observe_teacher(
    lm: LoadedModel, prompts: PromptSet, *, decode_tokens: int = DECODE_TOKENS, progress: Progress | None = None
) -> Teacher:
    """Run a model over prompts at full depth, with ``decode_tokens`` reference tokens each at most, as `diagnose` does.

    Raises UserError for a prompt that does not fit.
    """
    capture = HooksCapture(lm)
    references, logits = {}, {}
    encoded = encode_for_diagnosis(lm, prompts, decode_tokens)
    for index, prompt in enumerate(encoded):
        if progress:
            progress(index, len(encoded), prompt.prompt_id)
        outcome = capture.run(prompt.token_ids, prompt.reference_ids, (), n_decode=decode_tokens, n_anchors=1)
        references[prompt.prompt_id] = tuple(outcome.reference_ids.tolist())
        logits[prompt.prompt_id] = outcome.logits.to("cpu", lm.dtype)
    if progress:
        progress(len(encoded), len(encoded), "")
    return Teacher(lm.name, lm.weight_hash, references, logits)
