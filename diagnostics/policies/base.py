"""What a policy is: hyper-parameters that say which prompt tokens run where, and a ``with`` block over a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.columns import Pieces
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from diagnostics.models.attention_tap import AttentionCall
    from diagnostics.policies.cache import PolicyCache
    from diagnostics.policies.runtime import Call, Runtime


@dataclass(frozen=True)
class Workload:
    """What one prompt costs under a policy, per layer, for one row of a batch.

    ``run``: prompt tokens that run through the whole layer; ``projected``: those of which the layer only makes keys and
    values; ``held``: prompt positions in the layer's cache afterwards.
    """

    run: Sequence[int]
    held: Sequence[int]
    projected: Sequence[int]


class Policy(ABC):
    """Which prompt tokens run through which layers, and what of them is cached.

    Subclasses are frozen dataclasses of hyper-parameters, one per file; `diagnostics.policies` finds them. Every
    policy runs all prompt tokens through the layers below `depth` and the tokens of `runs_on` through the rest.
    Decode-phase tokens, the last prompt token the first of them, run through all layers.

    Use ``with policy(model): model.generate(...)``. A policy object holds no state and serves any number of models.
    """

    name: ClassVar[str]
    chunked: ClassVar[bool] = True  # whether a prompt may come in several calls
    crops_prompt: ClassVar[bool] = True  # whether a cache can be cropped inside its prompt
    taps_attention: ClassVar[bool] = False  # whether `after_attention` wants to be called
    later_prompts: ClassVar[bool] = True  # whether prompt tokens of later turns are treated like those of the first

    # Trailing prompt tokens that are decode phase, the last one included, and leading ones that run through all
    # layers: fields of the policies that have them.
    boundary: int = 1
    anchors: int = 0
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Run ``model``, a transformers causal language model or a PEFT wrapper, under this policy inside the block.

        Raises
        ------
        UserError
            If the policy does not fit the model, the model cannot be served, or a policy is active on it already.
        """
        from diagnostics.policies.runtime import running

        return running(self, model)

    @abstractmethod
    def depth(self, n_layers: int) -> int:
        """Layers that all prompt tokens run through, 1 to ``n_layers``."""

    @abstractmethod
    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """Count the work and the cache of a prompt of ``n_prompt`` tokens."""

    def check(self, anatomy: Anatomy) -> None:
        """Raise UserError if the policy cannot serve this model."""
        if not 1 <= self.depth(anatomy.n_layers) <= anatomy.n_layers:
            raise UserError(f"{self} does not fit: the model has {anatomy.n_layers} layers")

    def runs_on(self, call: Call) -> Pieces:
        """Columns of this call that run on above `depth`; nothing ends the call there."""
        return call.kept_columns(self.anchors)

    def install(self, runtime: Runtime) -> None:
        """Add hooks of the policy's own, through ``runtime.hook``; they are removed with the others."""
        return None

    def before_upper_layer(self, call: Call, layer: int, arguments: dict[str, Any]) -> None:
        """Act before a layer at or above `depth` runs, on the arguments that the model passed to it."""
        return None

    def after_attention(self, call: Call, layer: int, attention: AttentionCall) -> None:
        """Act after the attention of a layer, if ``taps_attention``."""
        return None

    def from_full(self, cache: PolicyCache) -> PolicyCache | None:
        """Return this policy's cache of a prompt, given that of full depth, where the one follows from the other.

        ``cache`` holds prompt tokens alone, no decode-phase token; it stays as it is. None where it does not follow.
        """
        return None

    @property
    def spec(self) -> str:
        """The policy as `diagnostics.policies.parse_policy` reads it, without what is default: ``speed:24``."""
        parts = [self.name]
        for position, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(str(value) if position == 0 else f"{field.name}={value}")
        return ":".join(parts)

    def __str__(self) -> str:
        return self.spec


def require_whole(name: str, value: object, least: int) -> None:
    """Raise UserError unless ``value`` is a whole number of at least ``least``."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole and value >= least, f"{name} is {value}: give {least} or more")  # type: ignore[operator]


def require(condition: bool, message: str) -> None:
    """Raise UserError unless ``condition``."""
    if not condition:
        raise UserError(message)
