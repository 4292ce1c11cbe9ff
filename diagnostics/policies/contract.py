"""Protocols of policies and of what runs them, for the KV cache and the registry of occupied models.

Policies import the machinery that runs them, so the machinery is typed against these protocols.
"""

from __future__ import annotations

from typing import ClassVar, Protocol


class PolicyTraits(Protocol):
    """The attributes of a policy; `diagnostics.policies.base.Policy` documents them."""

    name: ClassVar[str]
    chunked: ClassVar[bool]
    crops_prompt: ClassVar[bool]
    later_prompts: ClassVar[bool]

    @property
    def anchors(self) -> int:
        """Leading tokens that run through all layers."""

    @property
    def boundary(self) -> int:
        """Trailing prompt tokens that are decode phase."""

    @property
    def spec(self) -> str:
        """The policy as `diagnostics.policies.parse_policy` reads it."""


class Holder(Protocol):
    """What runs a model under a policy: inference or training."""

    @property
    def policy(self) -> PolicyTraits:
        """The policy."""
