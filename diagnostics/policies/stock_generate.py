"""Adapts stock ``generate()`` to a model under a policy, beyond its calls of the model.

``generate()`` creates its own KV cache and can prefill in chunks, and some families drop the cache and begin anew.
Inside the block three methods of the model are wrapped to handle this and to refuse what a policy cannot serve.
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

    ``new_cache`` creates the cache if ``generate()`` gets none. ``on_drop`` is called with a cache that ``generate()``
    drops to begin anew with all tokens; None for models that never do so.
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
    """Refuse ``generate(prefill_chunk_size=...)``: it cannot tell a chunk's last token from the prompt's."""

    def prefill(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if generation_config.prefill_chunk_size is not None:
            raise UserError(
                "generate() cannot prefill in chunks under a policy: "
                "use diagnostics.prefill(..., chunk_size=...) and pass its cache"
            )
        return stock(input_ids, generation_config, *args, **kwargs)

    return prefill


def _with_own_cache(stock: Any, new_cache: Callable[[], PolicyCache]) -> Any:
    """Replace the cache that ``generate()`` creates by the policy's; a cache from the caller stays."""

    def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        passed = model_kwargs.get("past_key_values")
        result = stock(generation_config, model_kwargs, *args, **kwargs)
        created: Any = model_kwargs.get("past_key_values")
        if passed is None and type(created) is DynamicCache and not created.offloading:
            model_kwargs["past_key_values"] = new_cache()
        return result

    return prepare


def _noting_dropped_caches(stock: Any, on_drop: Callable[[PolicyCache], None]) -> Any:
    """Report dropped caches: where rotary frequencies change, some families run all tokens anew without the cache."""

    def prepare(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        inputs = stock(*args, **kwargs)
        if isinstance(cache, PolicyCache) and cache.n_columns and inputs.get("past_key_values") is None:
            on_drop(cache)
        return inputs

    return prepare
