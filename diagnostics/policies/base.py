"""The base class of policies: hyper-parameters that say which prompt tokens run where, and a ``with`` block.

This module does not import torch: a policy can be named, parsed, compared and priced without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diagnostics.policies.recommendation import recommended_cutoff
from diagnostics.support.errors import UserError
from diagnostics.support.overview import Overview

if TYPE_CHECKING:
    from torch import nn

    from diagnostics.models.anatomy import Anatomy
    from diagnostics.models.attention_tap import AttentionCall
    from diagnostics.policies.cache import PolicyCache
    from diagnostics.policies.call import Call
    from diagnostics.policies.columns import Pieces
    from diagnostics.policies.runtime import Runtime


@dataclass(frozen=True)
class Workload:
    """The cost of one prompt under a policy, per layer, for one row of a batch.

    Attributes
    ----------
    run
        Prompt tokens that run through the whole layer.
    held
        Prompt positions in the layer's cache afterwards.
    projected
        Prompt tokens for which the layer computes keys and values only.
    """

    run: Sequence[int]
    held: Sequence[int]
    projected: Sequence[int]


class Policy(ABC):
    """Which prompt tokens run through which layers, and which of their keys and values are cached.

    Subclasses are frozen dataclasses of hyper-parameters. Each is one file of this package, or comes from another
    distribution through the entry point group ``speed_diagnostics.policies``; `diagnostics.policies.registry` finds
    both. Every policy runs all prompt tokens through the layers below `depth` and the tokens of `runs_on` through the
    rest. Decode-phase tokens run through all layers; the last prompt token is the first of them.

    Use ``with policy(model): model.generate(...)``. A policy object holds no state and serves any number of models.

    Attributes
    ----------
    name
        The policy's name in commands and specs.
    title
        The policy's name in figures, tables and menus; ``name`` by default.
    rank
        The policy's order in menus and tables: ascending, then by name.
    chunked
        Whether a prompt may come in several calls.
    crops_prompt
        Whether a cache can be cropped inside its prompt.
    taps_attention
        Whether `after_attention` is called.
    later_prompts
        Whether prompt tokens of later turns are treated like those of the first.
    anchors, boundary
        Leading tokens that run through all layers, and trailing prompt tokens that are decode phase, including the last
        one: fields of the policies that have them.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    rank: ClassVar[int] = 9
    chunked: ClassVar[bool] = True
    crops_prompt: ClassVar[bool] = True
    taps_attention: ClassVar[bool] = False
    later_prompts: ClassVar[bool] = True

    anchors: int = 0
    boundary: int = 1
    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        # Without super(), which a class that travels by value, to a remote capture, does not have yet.
        if "name" in vars(cls) and "title" not in vars(cls):
            cls.title = cls.name

    def __call__(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Run ``model``, a transformers causal language model or a PEFT wrapper, under this policy inside the block.

        Raises
        ------
        UserError
            If the policy does not fit the model, the model cannot be served, or it already runs under a policy.
        """
        from diagnostics.policies.block import running  # it loads torch

        return running(self, model)

    # --- Running a prompt ---

    @abstractmethod
    def depth(self, n_layers: int) -> int:
        """Return the number of layers that all prompt tokens run through, 1 to ``n_layers``."""

    @abstractmethod
    def workload(self, n_prompt: int, n_layers: int) -> Workload:
        """Count the work and the cache of a prompt of ``n_prompt`` tokens."""

    def check(self, anatomy: Anatomy) -> None:
        """Raise UserError if the policy cannot serve this model.

        The policies of this package look at ``n_layers`` and ``layer_types`` alone, which are known before the weights.
        """
        if not 1 <= self.depth(anatomy.n_layers) <= anatomy.n_layers:
            raise UserError(f"{self} does not fit: the model has {anatomy.n_layers} layers")

    def runs_on(self, call: Call) -> Pieces:
        """Return the columns of this call that run on above `depth`; if there are none, the call ends there."""
        return call.deep_columns(self.anchors)

    def install(self, runtime: Runtime) -> None:
        """Add hooks of the policy's own through ``runtime.hook``, which removes them when the block ends."""
        return None

    def before_upper_layer(self, call: Call, layer: int, arguments: dict[str, Any]) -> None:
        """Act before a layer at or above `depth` runs, on the arguments that the model passed to it."""
        return None

    def after_attention(self, call: Call, layer: int, attention: AttentionCall) -> None:
        """Act after the attention of a layer, if ``taps_attention``."""
        return None

    def from_full(self, cache: PolicyCache) -> PolicyCache | None:
        """Derive this policy's cache of a prompt from the full-depth cache; None where that is impossible.

        ``cache`` holds prompt tokens only, no decode-phase token; it is not changed.
        """
        return None

    # --- Description ---

    @classmethod
    def takes_cutoff(cls) -> bool:
        """Whether the policy has a parameter ``cutoff``, the number of layers that prompt tokens run through."""
        return any(field.name == "cutoff" for field in fields(cls))

    @classmethod
    def follows_recommendation(cls) -> bool:
        """Whether `from_recommendation` can set the policy's layer."""
        overridden = cls.from_recommendation.__func__ is not Policy.from_recommendation.__func__  # type: ignore[attr-defined]
        return cls.takes_cutoff() or overridden

    @classmethod
    def from_recommendation(cls, path: str | Path) -> Self:
        """Read the cutoff from a ``recommendation.json``, or from the run folder that holds one.

        Raises
        ------
        UserError
            If the policy takes no cutoff, there is no such file, or it is not a recommendation.
        """
        if not cls.takes_cutoff():
            raise UserError(f"{cls.name} takes nothing from a recommendation")
        return cls(cutoff=recommended_cutoff(path))  # type: ignore[call-arg]

    @property
    def spec(self) -> str:
        """The policy as `diagnostics.policies.parse_policy` reads it, without defaults: ``speed:24``."""
        parts = [self.name]
        for position, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(str(value) if position == 0 else f"{field.name}={value}")
        return ":".join(parts)

    def _repr_html_(self) -> str:
        """Show the policy in a notebook; its ``repr`` is that of a dataclass, which Python reads again."""
        names = [field.name for field in fields(self)]
        return Overview(f"{self.title} ({self.spec})", facts={name: getattr(self, name) for name in names}).html()

    def __str__(self) -> str:
        return self.spec
