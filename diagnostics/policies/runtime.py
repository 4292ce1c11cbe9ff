"""A stock transformers model under a policy: forward hooks that select rows, and the undoing of them.

One call of the model is one `Call`. Before the decoder stack runs, it gets the policy's cache in place of an empty one
and learns which of its tokens are decode phase. Before each layer, the layer gets its own mask; after the last layer
that all prompt tokens run through, the others are let go. The layers' own code, kernels and weights do all the work.

Which tokens are decode phase is never guessed from lengths. `expect` announces it; without, as inside ``generate()``:
tokens whose logits are asked for (``logits_to_keep``) are, in a first call at least the last one, and so is the
token right after logits were given, since the model wrote it. The rest is prompt. In later calls that ask for all
logits, as when a continuation is scored, every token is decode phase.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

from diagnostics.models.anatomy import PER_POSITION, Anatomy, dissect, parameter_names, unwrapped
from diagnostics.models.attention_tap import PREFIX, AttentionCall, attention_tap
from diagnostics.models.libraries import stock_model
from diagnostics.models.rope import rope_lengths, said_length
from diagnostics.policies.base import Policy
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.call import Call, take_positions
from diagnostics.policies.columns import as_tensor, join, span, take
from diagnostics.policies.masks import SERVED
from diagnostics.policies.occupancy import holder_of, occupy, require_free
from diagnostics.support.errors import UserError


class ShallowCallDone(Exception):
    """Ends a forward pass of which no row runs on above the policy's depth."""


@contextmanager
def running(policy: Policy, model: Any) -> Iterator[Runtime]:
    """Run ``model`` under ``policy`` inside the block, and leave it as it was."""
    inner = stock_model(model)
    name = getattr(getattr(inner, "config", None), "_name_or_path", "") or type(inner).__name__
    if not hasattr(inner, "config") or not hasattr(inner.config, "get_text_config"):
        raise UserError(f"a policy runs transformers models, not {type(model).__name__}")
    anatomy = dissect(inner, name)
    require_free(inner)
    implementation = inner.config._attn_implementation
    if implementation.startswith(PREFIX):
        raise UserError(
            "the attention of a model that shares this one's configuration is tapped: leave that block first"
        )
    if implementation not in SERVED:
        raise UserError(
            f"attention implementation {implementation!r} takes no mask per layer: "
            'use model.set_attn_implementation("sdpa")'
        )
    policy.check(anatomy)
    if policy.taps_attention and any(unwrapped(attention) is not attention for attention in anatomy.attentions):
        raise UserError(
            f"{policy.name} has to see the attention, but a TransformerBridge computes attention itself: "
            "run it on the stock model"
        )
    from diagnostics.policies.self_test import require_runnable  # which runs policies itself

    require_runnable(inner, anatomy, name)
    with ExitStack() as stack:
        runtime = Runtime(policy, inner, anatomy, implementation, stack)
        stack.enter_context(occupy(inner, runtime))
        runtime.attach(model)
        yield runtime


def active(model: Any) -> Runtime | None:
    """Return the runtime of a model that is inside a policy's block, else None."""
    return holder_of(stock_model(model))


class Asked(threading.local):
    """What one thread has asked of its next call: threads may take turns on a model."""

    def __init__(self) -> None:
        self.logits_to_keep: int | Tensor | None = None
        self.labels: Tensor | None = None
        self.expected: tuple[int, int] | None = None
        self.dropped: PolicyCache | None = None  # by generate(), which begins anew with all tokens


class Runtime:
    """The hooks of one policy on one model.

    ``attach`` adds them; the exit stack removes them. ``projecting`` is the number of tokens of which a layer is just
    making keys and values, 0 otherwise.
    """

    def __init__(self, policy: Policy, model: Any, anatomy: Anatomy, implementation: str, stack: ExitStack) -> None:
        self.policy, self.model, self.anatomy, self.implementation = policy, model, anatomy, implementation
        self.depth = policy.depth(anatomy.n_layers)
        self.projecting = 0
        self.call: Call | None = None
        self._stack = stack
        self._stack_names = parameter_names(anatomy.stack)
        self.rope = rope_lengths(anatomy.stack)
        self._asked = Asked()
        self._length: int | None = None  # tokens of the text whose rotary frequencies a call uses, where it matters
        self._entry, self._thread = threading.Lock(), 0

    def hook(self, handle: RemovableHandle) -> None:
        """Have a hook removed when the block ends."""
        self._stack.callback(handle.remove)

    def expect(self, *, head: int = 0, tail: int) -> None:
        """Announce that of the next call's tokens the first ``head`` and the last ``tail`` are decode phase."""
        self._asked.expected = head, tail

    def new_cache(self) -> PolicyCache:
        """Return an empty cache of this policy for this model."""
        return PolicyCache(self.policy, self.anatomy)

    def attach(self, model: nn.Module) -> None:
        """Add all hooks; ``model`` is what the user calls: the model itself, or a wrapper of it."""
        self.rope.settle()
        self._stack.enter_context(said_length(self.rope, lambda: self._length))
        for module in {m for m in (model, self.model) if isinstance(m, nn.Module)}:
            before = partial(self._before_model, parameter_names(module))
            self.hook(module.register_forward_pre_hook(before, with_kwargs=True))
        self.hook(self.anatomy.stack.register_forward_pre_hook(self._before_stack, with_kwargs=True))
        self.hook(self.anatomy.stack.register_forward_hook(self._after_stack, always_call=True))
        for index, layer in enumerate(self.anatomy.layers):
            self.hook(layer.register_forward_pre_hook(_BeforeLayer(self, index, layer), with_kwargs=True))
        if self.depth < self.anatomy.n_layers:
            self.hook(self.anatomy.layers[self.depth - 1].register_forward_hook(self._select))
            self.hook(self.anatomy.layers[-1].register_forward_hook(self._spread))
        self.policy.install(self)
        if self.policy.taps_attention:
            layers = {module: layer for layer, module in enumerate(self.anatomy.attentions)}

            def tapped(attention: AttentionCall) -> tuple[Tensor, Any]:
                output = attention.proceed()
                if self.call is not None:
                    self.policy.after_attention(self.call, layers[attention.module], attention)
                return output

            self._stack.enter_context(attention_tap(self.model, self.anatomy.attentions, tapped))
        self._follow_generate()

    def __getstate__(self) -> Any:
        raise UserError(f"this model runs under {self.policy}: copy or pickle it outside of that `with` block")

    def _replace(self, name: str, make: Callable[[Any], Any]) -> None:
        """Put ``make(stock)`` before a method of the model, if it has one, until the block ends."""
        if (stock := getattr(self.model, name, None)) is not None:
            vars(self.model)[name] = make(stock)
            self._stack.callback(vars(self.model).pop, name, None)

    def _follow_generate(self) -> None:
        """Learn what stock ``generate()`` does beside its calls of the model, and refuse what cannot be served."""
        self._replace("_prefill", self._without_chunks)
        self._replace("_prepare_cache_for_generation", self._with_own_cache)
        if self.rope.switches:
            self._replace("prepare_inputs_for_generation", self._noting_dropped_caches)

    def _without_chunks(self, stock: Any) -> Any:
        """``generate(prefill_chunk_size=...)`` cannot tell a chunk's last token from the prompt's."""

        def prefill(input_ids: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            if generation_config.prefill_chunk_size is not None:
                raise UserError(
                    "generate() cannot prefill in chunks under a policy: "
                    "use diagnostics.prefill(..., chunk_size=...) and pass its cache"
                )
            return stock(input_ids, generation_config, *args, **kwargs)

        return prefill

    def _with_own_cache(self, stock: Any) -> Any:
        """The cache that ``generate()`` makes itself, where it was given none, is the policy's."""

        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given = model_kwargs.get("past_key_values")
            result = stock(generation_config, model_kwargs, *args, **kwargs)
            made: Any = model_kwargs.get("past_key_values")
            if given is None and type(made) is DynamicCache and not made.offloading:
                model_kwargs["past_key_values"] = self.new_cache()
            return result

        return prepare

    def _noting_dropped_caches(self, stock: Any) -> Any:
        """Where rotary frequencies change, some families drop the cache and call the model on all tokens anew."""

        def prepare(*args: Any, **kwargs: Any) -> Any:
            given = kwargs.get("past_key_values")
            inputs = stock(*args, **kwargs)
            if isinstance(given, PolicyCache) and given.n_columns and inputs.get("past_key_values") is None:
                self._asked.dropped = given
            return inputs

        return prepare

    # --- Hooks, in the order in which they run ---

    def _before_model(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UserError("torch.nn.DataParallel cannot run a model under a policy: leave it out")
        named = dict(zip(names, args, strict=False)) | kwargs
        self._asked.logits_to_keep, self._asked.labels = named.get("logits_to_keep", 0), named.get("labels")

    def _before_stack(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        asked = self._asked
        (keep, asked.logits_to_keep), (expected, asked.expected) = (asked.logits_to_keep, None), (asked.expected, None)
        dropped, asked.dropped = asked.dropped, None
        self._enter()
        kwargs = dict(zip(self._stack_names, args, strict=False)) | kwargs
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return None  # the model says itself what is missing
        batch, n_new = inputs.shape[:2]
        if n_new == 0:
            raise UserError("the input has no tokens")
        self._refuse(kwargs)
        cache = self._cache(kwargs.get("past_key_values"))
        mask = kwargs.get("attention_mask")
        self.see_padding(cache, mask, batch, n_new, inputs.device)
        wanted = _count_wanted(keep, n_new)
        if dropped is not None and cache.n_columns == 0:
            expected = 0, self._begin_anew(cache, dropped, n_new, wanted)
        head, tail = expected or self._phases(cache, n_new, wanted)
        self._keep_frequencies(cache, n_new)
        own = _positions(cache, n_new, inputs.device)
        if (positions := kwargs.get("position_ids")) is None:
            kwargs["position_ids"] = own.clamp(min=0)
        else:
            _require_positions(positions, own)
        if cache.n_columns == 0:
            cache.batch = batch
            if expected is None:
                self.require_anchors(n_new if cache.padding is None else n_new - int(cache.padding.max()))
            cache.n_prompt = n_new if dropped is None else dropped.n_prompt
        elif cache.batch != batch:
            raise UserError(f"the KV cache holds {cache.batch} rows, the input {batch}")
        cache.writing = True
        self.call = call = Call(self, cache, n_new, head, tail)
        call.notes["logits"] = wanted if isinstance(keep, int) else 0  # places are counted from the first token
        # A mask of four dimensions is passed on as it is: the model builds none. Layers get theirs in `_BeforeLayer`.
        kwargs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=inputs.device)
        kwargs |= {"past_key_values": cache, "use_cache": True}
        return (), kwargs

    def _enter(self) -> None:
        """Let one thread at a time into the stack: a call leaves its state on the model."""
        thread = threading.get_ident()
        with self._entry:
            if self._thread not in (0, thread):
                raise UserError(
                    "this model is in a call of another thread: under a policy, threads have to take turns on it, "
                    "one call after the other"
                )
            self._thread = thread

    def _refuse(self, given: dict[str, Any]) -> None:
        """Refuse what a call may bring along that a policy does not serve."""
        use_cache = given.get("use_cache")
        if use_cache is False or (use_cache is None and not getattr(self.model.config, "use_cache", True)):
            raise UserError("a policy needs the KV cache: leave out use_cache=False")
        if any(getattr(unwrapped(m), "gradient_checkpointing", False) and m.training for m in self.anatomy.layers):
            raise UserError(
                "in training mode, layers with gradient checkpointing forget the KV cache that a policy needs: "
                "call model.eval() or model.gradient_checkpointing_disable()"
            )
        if self.depth < self.anatomy.n_layers:
            for name in ("output_hidden_states", "output_attentions"):
                if given.get(name, getattr(self.model.config, name, False)):
                    raise UserError(
                        f"{name}: under {self.policy} the upper layers run some tokens only, and what they return is "
                        "not in the tokens' places; leave it out, or look at the model at full depth"
                    )

    def _begin_anew(self, cache: PolicyCache, dropped: PolicyCache, n_new: int, wanted: int) -> int:
        """Number of decode-phase tokens at the end of all tokens, with which stock ``generate()`` begins anew."""
        pieces = dropped.decoded
        if not self.policy.chunked or len(pieces) != 1 or pieces[0].stop != dropped.n_columns:
            raise UserError(
                f"{self.rope.reason}, where generate() runs all tokens anew, which {self.policy} cannot after this "
                "prompt: generate fewer tokens"
            )
        padding = 0 if cache.padding is None else int(cache.padding.min())
        if self.rope.mixes(n_new - max(wanted, 1) + 1 - padding, n_new - padding):
            raise UserError(
                f"{self.rope.reason}, and drafts of assisted generation cross that: leave out the assistant"
            )
        for layer, before in zip(cache.layers, dropped.layers, strict=True):
            layer.record_past, layer.room = before.record_past, before.room
        return n_new - pieces[0].start

    def _keep_frequencies(self, cache: PolicyCache, n_new: int) -> None:
        """Refuse texts whose length changes the rotary frequencies of keys that are held already, or of other rows."""
        if not self.rope:
            return
        columns = max(cache.n_columns + n_new, cache.length)
        padding = [0] if cache.padding is None else cache.padding.tolist()
        shortest, longest = columns - max(padding), columns - min(padding)
        factors = self.rope.factors(longest)
        if self.rope.mixes(shortest, longest):
            raise UserError(f"{self.rope.reason}: rows of {shortest} and of {longest} tokens do not fit into one batch")
        if cache.n_columns and cache.factors is not None and cache.factors != factors:
            text = "shorter" if cache.factors < factors else "longer"
            raise UserError(
                f"{self.rope.reason}, and this KV cache was filled for a {text} text than one of {longest} tokens: "
                "prefill all of its tokens anew"
            )
        cache.factors, self._length = factors, longest

    def before_layer(self, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """Give a layer the columns that it is to hold, its mask, and positions of the rows that run."""
        call = self.call
        assert call is not None
        if call.selected:
            self.policy.before_upper_layer(call, index, arguments)
        hidden = arguments["hidden_states"]
        changed: dict[str, Any] = {"attention_mask": call.mask(index, hidden.dtype, hidden.device)}
        if call.selected:
            for name in PER_POSITION:
                if name in arguments:
                    changed[name] = take_positions(arguments[name], call.rows, call.start)
        call.cache.layers[index].incoming = () if call.unheld and call.selected else call.rows
        return changed

    def _select(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Let go of the rows that do not run on."""
        call = self.call
        if call is None or not call.selects or self.projecting:
            return None
        call.hidden = _residual(output)
        rows = self.policy.runs_on(call)
        if rows is call.rows:
            return None
        if not rows:
            self.finish()
            raise ShallowCallDone
        hidden, call.rows, call.selected = take(call.hidden, rows, call.start), rows, True
        del call.hidden
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _spread(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Put rows back to their columns, where the caller looks beyond the decode phase; NaN where none ran."""
        call = self.call
        if call is None or not call.selected or self.projecting:
            return None
        wanted = call.notes["logits"]
        last_rows_do = (wanted and wanted <= call.tail) or call.unheld
        if last_rows_do and not self.anatomy.reshapes:
            return None
        hidden = _residual(output)
        columns = (as_tensor(call.rows, hidden.device) - call.start).expand(hidden.shape[0], -1)
        spread = hidden.new_full((hidden.shape[0], call.stop - call.start + 1, hidden.shape[2]), torch.nan)
        # Unused slots go to an extra column at the end.
        columns = columns.masked_fill(columns < 0, call.stop - call.start)
        spread.scatter_(1, columns[..., None].expand(-1, -1, hidden.shape[2]), hidden)
        spread = spread[:, :-1]
        # The last element: a row that ran is finite there, and others were never written.
        labels = self._asked.labels
        if labels is not None and bool((spread[:, :-1, -1].isnan() & (labels[:, 1:] != -100)).any()):
            raise UserError(
                "labels ask for logits of prompt tokens, which there are not: set them to -100, "
                "or give the continuation against the prompt's cache"
            )
        return (spread, *output[1:]) if isinstance(output, tuple) else spread

    def _after_stack(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._thread != threading.get_ident():
            return  # turned away
        if output is None:  # an error: the cache stays marked as written into
            self.call = None
        self.finish()
        self._asked.labels, self._length, self._thread = None, None, 0

    def finish(self) -> None:
        """Count the call's columns as seen."""
        call, self.call = self.call, None
        if call is not None:
            call.cache.n_columns, call.cache.writing = call.stop, False
            for layer in call.cache.layers:  # not before: a call's first query may be older than what it stores
                layer.slide()
            heads, tails = span(call.start, call.start + call.head), span(call.stop - call.tail, call.stop)
            call.cache.decoded = join(join(call.cache.decoded, heads), tails)

    # --- What a call is ---

    def require_anchors(self, n_prompt: int) -> None:
        """Raise UserError if the prompt is shorter than the anchors."""
        if self.policy.anchors > n_prompt:
            raise UserError(f"{self.policy}: the prompt has {n_prompt} tokens, fewer than the anchors")

    def require_boundary(self, cache: PolicyCache, n_new: int, tail: int) -> None:
        """Raise UserError if some of the last ``tail`` prompt tokens, decode phase, are in the cache as prompt."""
        if n_new < tail and cache.n_columns and not cache.awaits_token:
            raise UserError(
                f"{self.policy}: the last {tail} prompt tokens are decode phase, and of these only {n_new} are new: "
                "give them in one call"
            )

    def _phases(self, cache: PolicyCache, n_new: int, wanted: int | None) -> tuple[int, int]:
        """Decode-phase tokens at the head and at the tail of a call that nobody announced."""
        if cache.n_columns and (not wanted or not self.policy.later_prompts):
            return 0, n_new
        tail = max(wanted or 1, 1) + self.policy.boundary - 1
        self.require_boundary(cache, n_new, tail)
        tail = min(n_new, tail)
        return min(int(cache.n_columns > 0 and cache.awaits_token), n_new - tail), tail

    def _cache(self, given: Any) -> PolicyCache:
        """Return the cache of this call: the policy's own, or a new one where none is given."""
        if given is None:
            return self.new_cache()
        if not isinstance(given, PolicyCache):
            raise UserError(
                f"a policy runs with its own KV cache, not with a {type(given).__name__}: leave out past_key_values "
                "and cache_implementation, and go on with the past_key_values of the output"
            )
        if given.policy != self.policy:
            raise UserError(f"this KV cache was made under {given.policy}, the model runs under {self.policy}")
        if given.writing:
            raise UserError("a call was interrupted while it wrote into this KV cache: prefill anew")
        if len(given.layers) != self.anatomy.n_layers:
            raise UserError(f"this KV cache has {len(given.layers)} layers, the model {self.anatomy.n_layers}")
        return given

    def see_padding(self, cache: PolicyCache, mask: Any, batch: int, n_new: int, device: torch.device) -> None:
        """Learn the padding of the first call; refuse masks that are not left padding."""
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise UserError(
                "a policy makes the attention masks itself: give attention_mask as [batch, tokens], or none; where a "
                "class for text and other media makes them, use the class of its text model alone"
            )
        total = cache.n_columns + n_new
        if tuple(mask.shape) != (batch, total):
            raise UserError(
                f"attention_mask is {list(mask.shape)}, not {[batch, total]}: all tokens so far and the new"
            )
        real = mask.to(device) != 0
        if bool((real[:, 1:] < real[:, :-1]).any()):
            raise UserError(
                "attention_mask has padding after tokens: pad on the left (tokenizer.padding_side = 'left'); with "
                "prompt tuning, whose virtual tokens come before the padding, give texts of one length"
            )
        if not bool(real[:, -1].all()):
            raise UserError("attention_mask has a row without tokens")
        padding = (~real).sum(1)
        if cache.n_columns == 0:
            cache.padding = padding if bool(padding.any()) else None
        elif bool((padding != (0 if cache.padding is None else cache.padding.to(device))).any()):
            raise UserError(
                "attention_mask has other padding than the first call into this KV cache was told of: "
                "give the mask from the first call on"
            )


class _BeforeLayer:
    """Pre-hook of one layer; knows where in its signature the arguments are that it changes."""

    def __init__(self, runtime: Runtime, index: int, layer: nn.Module) -> None:
        self.runtime, self.index = runtime, index
        self.names = parameter_names(layer)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.runtime.call is None or self.runtime.projecting:
            return None
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        changed = self.runtime.before_layer(self.index, arguments)
        positional = tuple(changed.pop(name, value) for name, value in zip(self.names, args, strict=False))
        return positional, kwargs | changed


def _count_wanted(keep: int | Tensor | None, n_new: int) -> int:
    """From how many tokens of a call on, counted from its end, logits are asked for; 0 for all of them."""
    if isinstance(keep, Tensor):
        places = keep.reshape(-1)
        return n_new - int(torch.where(places < 0, places + n_new, places).min()) if len(places) else 0
    return keep or 0


def _positions(cache: PolicyCache, n_new: int, device: torch.device) -> Tensor:
    """Positions of a call's tokens, int64 [1 or batch, tokens]; negative at padding."""
    columns = torch.arange(cache.n_columns, cache.n_columns + n_new, device=device)[None]
    return columns if cache.padding is None else columns - cache.padding.to(device)[:, None]


def _require_positions(given: Tensor, own: Tensor) -> None:
    """Raise UserError where positions, [..., 1 or batch, tokens], are not the tokens' places in their rows."""
    if given.shape[-1] != own.shape[-1] or bool(((given.to(own.device) != own) & (own >= 0)).any()):
        raise UserError(
            "position_ids are not those of one text per row, from 0 on and through all calls of a KV cache (several "
            "texts in one row?): leave them out, and give each text a row of its own"
        )


def _residual(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
