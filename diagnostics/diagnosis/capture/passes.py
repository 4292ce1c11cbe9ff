"""One prompt in one forward pass or two: what all backends share.

With a given reference, prompt and reference run as one forward pass. Without one, the context runs first into a KV
cache; the greedy continuation is generated from that cache and rolled back; then the decode-phase rows run as one chunk
against it. The prompt runs through the model once either way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from diagnostics.diagnosis.capture.residual_path import ResidualPath, multiplier_of, residual_paths
from diagnostics.diagnosis.observers import AttentionRows, Branch, ContextRows, DecodeRows, Observer, Outcome
from diagnostics.models.loading import LoadedModel
from diagnostics.models.rope import rope_lengths
from diagnostics.support.errors import UserError

# Query rows up to the first decode row whose attention probes may look at, that one included: as many as the widest
# observation window of a published rule (ASL).
N_WINDOW = 32


@dataclass(frozen=True)
class Pass:
    """A forward pass over ``n_rows`` positions from ``first_row`` on; the first ``n_context`` of them are context."""

    first_row: int
    n_rows: int
    n_context: int

    @property
    def window(self) -> slice:
        """Context rows of the observation window."""
        return slice(max(0, self.n_context - N_WINDOW + 1), self.n_context)

    @property
    def decode(self) -> slice:
        """Decode-phase rows; they may be none."""
        return slice(self.n_context, self.n_rows)

    @property
    def has_decode(self) -> bool:
        """Whether decode-phase rows are among the pass's rows."""
        return self.n_context < self.n_rows


class Watch:
    """Divides the layers that a backend sees, in the passes of one prompt, into context and decode rows."""

    def __init__(self, lm: LoadedModel, observers: Sequence[Observer], *, n_prompt: int, n_anchors: int) -> None:
        self.anatomy, self.name = lm.anatomy, lm.name
        self.observers = observers
        self.n_context, self.n_anchors = n_prompt - 1, n_anchors
        self.seen: set[int] = set()

    def over(self, first_row: int, n_rows: int) -> Pass:
        """Describe a pass over these positions."""
        return Pass(first_row, n_rows, min(max(0, self.n_context - first_row), n_rows))

    def layer(
        self,
        layer: int,
        over: Pass,
        residual_in: Tensor,
        residual_out: Tensor,
        added: Tensor,
        attention: AttentionRows | None,
        branch: Branch,
    ) -> None:
        """Show one layer of a pass to the observers.

        ``added`` is what the attention adds to the residual, without the multiplier of the layer, all [rows, width];
        ``attention`` is that of the decode rows.
        """
        if over.n_context:
            rows = slice(over.n_context)
            scale = multiplier_of(self.anatomy.layers[layer])
            gain = added[rows] if scale == 1 else added[rows] * scale
            context = ContextRows(layer, residual_in[rows], residual_out[rows], gain)
            for observer in self.observers:
                observer.on_context(context)
        if attention is not None:
            self.seen.add(layer)
            decode = DecodeRows(layer, residual_in[over.decode], residual_out[over.decode], attention, branch)
            for observer in self.observers:
                observer.on_decode(decode)

    def require_all_layers(self) -> None:
        """Refuse a model in which a layer's attention was not seen; raise UserError."""
        missing = sorted(set(range(self.anatomy.n_layers)) - self.seen)
        if missing:
            raise UserError(
                f"model {self.name!r} cannot be diagnosed: the attention of layer {missing[0]} "
                "did not run through transformers' attention interface"
            )


def finished(observers: Sequence[Observer], outcome: Outcome) -> Outcome:
    """Show the outcome of a prompt to its observers, and return it with what they measured."""
    for observer in observers:
        observer.on_outcome(outcome)
    return replace(outcome, measured=tuple(observer.measured() for observer in observers))


class PassCapture(ABC):
    """A backend that shows the layers of one forward pass at a time to a `Watch`."""

    name: ClassVar[str]
    reads_cache: ClassVar[bool] = False  # whether it takes keys and values from the KV cache, and so needs one always

    def __init__(self, lm: LoadedModel) -> None:
        self.lm = lm
        self._paths: tuple[ResidualPath, ...] = ()
        self._rope = rope_lengths(lm.anatomy.stack)

    @property
    def paths(self) -> tuple[ResidualPath, ...]:
        """How the attention of each layer comes to the residual; determined on first use."""
        if not self._paths:
            self._paths = residual_paths(self.lm.anatomy, self.lm.device)
        return self._paths

    @abstractmethod
    def forward(self, watch: Watch, ids: Tensor, first_row: int, cache: Cache | None, n_logits: int) -> Tensor | None:
        """Run token ids [1, rows] and show every layer to ``watch``.

        Returns the logits of the last ``n_logits`` rows, [n_logits, vocabulary]; None where ``n_logits`` is 0.
        """

    @torch.inference_mode()
    def run(
        self,
        prompt_ids: Sequence[int],
        reference_ids: Sequence[int] | None,
        observers: Sequence[Observer],
        *,
        n_decode: int,
        n_anchors: int,
    ) -> Outcome:
        """Take one prompt through the model; see `diagnostics.diagnosis.observers.Capture`."""
        prompt = torch.tensor([prompt_ids], device=self.lm.device)
        self._rope.settle()
        if self._rope.mixes(max(1, len(prompt_ids) - 1), len(prompt_ids) + n_decode - 1) and reference_ids is None:
            # The passes of prompt and reference would share keys of two sets of rotary frequencies.
            reference_ids = self._greedy_across(prompt, n_decode).tolist()
        watch = Watch(self.lm, observers, n_prompt=prompt.shape[1], n_anchors=n_anchors)
        # A plain cache keeps every position in every layer, also where the model's own would forget (sliding windows).
        cache = DynamicCache() if reference_ids is None or self.reads_cache else None
        if reference_ids is not None:
            first_row = 0
            reference = torch.tensor(list(reference_ids)[:n_decode], device=self.lm.device)
            rows = torch.cat([prompt[0], reference[:-1]])[None]
        else:
            assert cache is not None
            first_row = prompt.shape[1] - 1
            if first_row > 0:
                self.forward(watch, prompt[:, :-1], 0, cache, 0)
            reference = self._greedy(prompt[:, -1:], cache, n_decode)
            rows = torch.cat([prompt[0, -1:], reference[:-1]])[None]
        logits = self.forward(watch, rows, first_row, cache, len(reference))
        assert logits is not None
        watch.require_all_layers()
        return finished(observers, Outcome(logits.float(), reference))

    def _greedy_across(self, prompt: Tensor, n_decode: int) -> Tensor:
        """Continue greedily; where rotary frequencies change, all tokens run again, as in ``generate()``."""
        ends, rows, new, cache = self._ends(), prompt, prompt, DynamicCache()
        for _ in range(n_decode):
            if cache.get_seq_length() and self._rope.mixes(cache.get_seq_length(), rows.shape[1]):
                new, cache = rows, DynamicCache()
            logits = self.lm.model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            new = logits[:, -1:].argmax(-1)
            rows = torch.cat([rows, new], dim=1)
            if new.item() in ends:
                break
        return rows[0, prompt.shape[1] :]

    def _ends(self) -> set[int]:
        ends: Any = self.lm.model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends])

    def _greedy(self, token: Tensor, cache: Cache, n_decode: int) -> Tensor:
        """Continue greedily at full depth and leave the cache unchanged."""
        ends = self._ends()
        tokens = []
        for _ in range(n_decode):
            logits = self.lm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
            if token.item() in ends:
                break
        cache.crop(-len(tokens))
        return torch.cat(tokens, dim=1)[0]
