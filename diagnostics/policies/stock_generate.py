"""What stock ``generate()`` does beside its calls of the model, for a model that runs under a policy.

It makes a KV cache of its own, it can prefill in chunks, and some families drop the cache and begin anew. Three methods
of the model learn of that inside the block, and refuse what a policy cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from transformers import DynamicCache

from diagnostics.policies.cache import PolicyCache
from diagnostics.support.errors import UserError


def follow_generate(
    model: Any,
    stack: ExitStack,
    *,
    new_cache: Callable[[], PolicyCache],
    on_drop: Callable[[PolicyCache], None] | None,
) -> None:
    """Wrap methods of a model until ``stack`` closes.

    ``new_cache`` makes the cache for a ``generate()`` that is given none. ``on_drop`` is called with a cache that
    ``generate()`` lets go of to begin anew with all tokens; None for models that never do.
    """
    wrappers: dict[str, Callable[[Any], Any]] = {
        "_prefill": _without_chunks,
        "_prepare_cache_for_generation": lambda stock: _with_own_cache(stock, new_cache),
    }
    if on_drop is not None:
        wrappers["prepare_inputs_for_generation"] = lambda stock: _noting_dropped_caches(stock, on_drop)
    for name, wrap in wrappers.items():
        if (stock := getattr(model, name, None)) is not None:
            vars(model)[name] = wrap(stock)
            stack.callback(vars(model).pop, name, None)


def _without_chunks(stock: Any) -> Any:
    """``generate(prefill_chunk_size=...)`` cannot tell a chunk's last token from the prompt's."""

    def prefill(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise UserError(
                "generate() cannot prefill in chunks under a policy: "
                "use diagnostics.prefill(..., chunk_size=...) and pass its cache"
            )
        return stock(input_ids, generation_config, *args, **kwargs)

    return prefill


def _with_own_cache(stock: Any, new_cache: Callable[[], PolicyCache]) -> Any:
    """Where ``generate()`` was given no cache, it gets the policy's in place of one of its own."""

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        given = model_kwargs.get("past_key_values")
        result = stock(generation_config, model_kwargs, *args, **kwargs)
        own: Any = model_kwargs.get("past_key_values")
        if given is None and type(own) is DynamicCache and not own.offloading:
            model_kwargs["past_key_values"] = new_cache()
        return result

    return prepare


def _noting_dropped_caches(stock: Any, on_drop: Callable[[PolicyCache], None]) -> Any:
    """Where rotary frequencies change, some families drop the cache and call the model on all tokens anew."""

    def prepare(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("past_key_values")
        inputs = stock(*args, **kwargs)
        if isinstance(given, PolicyCache) and given.n_columns and inputs.get("past_key_values") is None:
            on_drop(given)
        return inputs

    return prepare
