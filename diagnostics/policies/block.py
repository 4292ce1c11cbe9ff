"""The ``with policy(model):`` block: the model runs under the policy inside and is unchanged afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diagnostics.models.anatomy import unwrapped
from diagnostics.models.libraries import stock_model
from diagnostics.policies.entry import admit
from diagnostics.policies.occupancy import holder_of, occupy
from diagnostics.policies.runtime import RunnablePolicy, Runtime
from diagnostics.support.errors import UserError


@contextmanager
def running(policy: RunnablePolicy, model: Any) -> Iterator[Runtime]:
    """Run ``model`` under ``policy`` inside the block, and restore it afterwards."""
    entrant = admit(model)
    policy.check(entrant.anatomy)
    if policy.taps_attention and any(unwrapped(attention) is not attention for attention in entrant.anatomy.attentions):
        raise UserError(
            f"{policy.name} has to see the attention, but a TransformerBridge computes attention itself: "
            "run it on the stock model"
        )
    from diagnostics.policies.self_test import require_runnable  # it runs policies itself

    require_runnable(entrant.model, entrant.anatomy, entrant.name)
    with ExitStack() as stack:
        runtime = Runtime(policy, entrant, stack)
        stack.enter_context(occupy(entrant.model, runtime))
        runtime.attach(model)
        yield runtime


def active(model: Any) -> Runtime | None:
    """Return the runtime of a model that is inside a policy's block, else None."""
    return holder_of(stock_model(model))
