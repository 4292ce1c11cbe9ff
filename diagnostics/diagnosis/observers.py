"""The data that a capture passes to its observers, the same for every backend.

A capture runs one prompt through the model and passes it on layer by layer. It keeps nothing of a layer, so memory
grows with the number of tokens, not with layers x tokens x tokens.

Positions: ``P`` prompt tokens, ``T = P + n_decode - 1`` tokens in total. Rows 0..P-2 are the *context* (anchors, then
prompt); rows P-1..T-1 are the ``n_decode`` decode-phase rows. Row P-1, the last prompt token, is the first of them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from diagnostics.support.sums import total

Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class ContextRows:
    """The context rows in layer ``layer``: residuals before and after the layer, each [P-1, width].

    ``attention`` is what the attention adds to the residual, norms after it and multipliers included.
    """

    layer: int
    residual_in: Tensor
    residual_out: Tensor
    attention: Tensor


class Adds(Protocol):
    """What a part of one layer's head outputs, [n_decode, heads * head_dim], adds to the residual, [n_decode, width].

    For parts that sum to the head outputs, these additions sum to the addition of the attention minus ``constant``, its
    bias.
    """

    def __call__(self, part: Tensor) -> Tensor:
        """Return the addition of a part, float32."""

    def constant(self, heads: Tensor) -> Tensor:
        """Return the addition that does not depend on the head outputs."""


class AttentionRows(ABC):
    """Attention of a few query rows of one layer: the last ``n_window`` - 1 context positions, then the decode rows.

    ``value`` has shape [kv_heads, T, head_dim]. ``output`` [n_decode, heads, head_dim] is the output of the model's own
    attention for the decode rows. ``adds`` maps a part of it, [n_decode, heads * head_dim], to its addition to the
    residual of the decode rows, [n_decode, width].
    """

    value: Tensor
    output: Tensor
    adds: Adds

    @property
    @abstractmethod
    def n_rows(self) -> int:
        """Number of query rows."""

    @property
    @abstractmethod
    def has_sinks(self) -> bool:
        """Whether rows sum to less than 1 because the model has learned sinks."""

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return self.output.shape[1]

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads, a divisor of ``n_heads``."""
        return self.value.shape[0]

    @property
    def n_decode(self) -> int:
        """Number of decode-phase rows."""
        return self.output.shape[0]

    @property
    def n_window(self) -> int:
        """Number of last prompt positions among the rows; the first decode row is one of them."""
        return self.n_rows - self.n_decode + 1

    @abstractmethod
    def weights(self, kv_head: int, rows: slice, n_keys: int | None = None) -> Tensor:
        """Return attention weights of the query heads of one KV head, float32 [group, rows, keys].

        The softmax runs over the first ``n_keys`` keys (default all) and the model's sinks, whose column is left out:
        rows sum to 1 without sinks, to less with them. The caller may modify the result.
        """

    def weights_and_sinks(self, kv_head: int, rows: slice, n_keys: int | None = None) -> tuple[Tensor, Tensor]:
        """Return `weights`, and the weight of each row on the model's sinks, [group, rows]: 0 without sinks."""
        weights = self.weights(kv_head, rows, n_keys)
        seen = total(weights)
        return weights, (1 - seen).clamp_min(0) if self.has_sinks else torch.zeros_like(seen)


class Branch(Protocol):
    """Runs one layer on other residuals of the decode rows, at the same positions.

    These see the anchors' keys and those of their own branch, and nothing of the prompt, as in an upper layer of SPEED;
    with ``sees_prompt`` also the keys of the prompt, as at full depth.
    """

    def __call__(self, hidden: Tensor, sees_prompt: bool = False) -> Tensor:
        """Return the residuals after the layer, both [branches, n_decode, width].

        Raises UserError for ``sees_prompt`` where a backend cannot do so.
        """


@dataclass(frozen=True)
class DecodeRows:
    """The decode-phase rows in layer ``layer``: residuals before and after the layer, each [n_decode, width].

    ``branch`` runs the same layer on other residuals. ``shared`` holds what several probes compute of these rows, once.
    """

    layer: int
    residual_in: Tensor
    residual_out: Tensor
    attention: AttentionRows
    branch: Branch
    shared: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Outcome:
    """The result of one prompt: the model's logits at the decode rows, float32 [n_decode, vocab], and reference ids.

    ``measured`` has the measurements of each observer, in their order; it is empty while the observers look at the
    outcome. Logits of a remote run stay on the remote machine, and are empty here.
    """

    logits: Tensor
    reference_ids: Tensor
    measured: tuple["Measured", ...] = ()


@dataclass(frozen=True)
class Measured:
    """Columns of one prompt: per layer [L], per layer and head [L, heads], per cutoff 1..L [L], and single numbers.

    For prompts kept in detail also ``tokens``, per token of the prompt segment and layer [tokens, L]; ``lens``, per
    decode position, from the first on, and layer [positions, L]; and ``head_tokens``, the positions of some tokens and
    what was measured there, per layer and head [L, heads, n].
    """

    layers: Columns = field(default_factory=dict)
    heads: Columns = field(default_factory=dict)
    cutoffs: Columns = field(default_factory=dict)
    prompt: dict[str, float] = field(default_factory=dict)
    tokens: Columns = field(default_factory=dict)
    lens: Columns = field(default_factory=dict)
    head_tokens: Columns = field(default_factory=dict)


class Observer(Protocol):
    """The interface of a probe. Layers come in ascending order, and in each ``on_context`` before ``on_decode``."""

    def on_context(self, rows: ContextRows) -> None:
        """Look at the context rows of one layer; not called when the prompt is a single token."""

    def on_decode(self, rows: DecodeRows) -> None:
        """Look at the decode-phase rows of one layer."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Look at the logits, after the last layer."""

    def measured(self) -> Measured:
        """Return the columns of this prompt, after `on_outcome`."""


class Capture(Protocol):
    """A backend: runs one prompt and feeds the observers."""

    name: ClassVar[str]

    def run(
        self,
        prompt_ids: Sequence[int],
        reference_ids: Sequence[int] | None,
        observers: Sequence[Observer],
        *,
        n_decode: int,
        n_anchors: int,
    ) -> Outcome:
        """Run one prompt through the model, and return its outcome with the observers' measurements.

        Without ``reference_ids`` the reference is the model's greedy continuation, at most ``n_decode`` tokens, up to
        and including the end-of-sequence token. In both cases the prompt runs through the model once.
        """
