"""A stock transformers model under a policy: forward hooks that select rows, and their exact removal.

One call of the model is one `Call`. Before the decoder stack runs, the call gets the policy's cache in place of an
empty one, and its decode-phase tokens are determined. Each layer gets its own mask. After the last layer that all
prompt tokens run through, only the selected rows continue. The layers' own code, kernels and weights do all the work.

Which tokens are decode phase is never guessed from lengths. `Runtime.expect` announces it. Without an announcement, as
inside ``generate()``, decode-phase tokens are those whose logits are requested (``logits_to_keep``; in a first call at
least the last token), and the token right after logits were returned, since the model generated it. The rest is prompt.
In later calls that request all logits, as when a continuation is scored, every token is decode phase.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diagnostics.models.anatomy import PER_POSITION, Anatomy
from diagnostics.models.attention_tap import AttentionCall, attention_tap
from diagnostics.models.rope import frequencies_of_length, rope_lengths
from diagnostics.policies.arguments import (
    EditArguments,
    input_tokens,
    named_arguments,
    placeholder_mask,
    residual_of,
    spread_rows,
    take_rows,
    with_residual,
)
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.call import Call
from diagnostics.policies.columns import Pieces, as_tensor, join, rows_in
from diagnostics.policies.contract import PolicyTraits
from diagnostics.policies.entry import (
    Entrant,
    admit_cache,
    admit_options,
    admit_padding,
    admit_positions,
    positions,
)
from diagnostics.policies.frequencies import admit_length, begin_anew
from diagnostics.policies.request import Request, count_logits
from diagnostics.policies.segments import Phases, phases_of, require_anchors
from diagnostics.policies.stock_generate import follow_generate
from diagnostics.support.errors import UserError


class ShallowCallDone(Exception):
    """Ends a forward pass in which no row runs above the policy's depth."""


class RunnablePolicy(PolicyTraits, Protocol):
    """What the runtime needs of a policy; `diagnostics.policies.base.Policy` documents each method."""

    taps_attention: ClassVar[bool]

    def depth(self, n_layers: int) -> int:
        """Layers that all prompt tokens run through."""

    def check(self, anatomy: Anatomy) -> None:
        """Raise UserError if the model cannot be served."""

    def install(self, runtime: Runtime) -> None:
        """Add hooks of the policy's own."""

    def runs_on(self, call: Call) -> Pieces:
        """Columns that run on above the depth."""

    def before_upper_layer(self, call: Call, layer: int, arguments: dict[str, Any]) -> None:
        """Act before a layer above the depth."""

    def after_attention(self, call: Call, layer: int, attention: AttentionCall) -> None:
        """Act after the attention of a layer."""


class Runtime:
    """The hooks of one policy on one model: ``attach`` adds them, the exit stack removes them.

    Attributes
    ----------
    policy, model, anatomy, implementation
        The policy, the transformers model that runs under it, the model's parts, and its attention implementation.
    depth
        Layers that all prompt tokens run through.
    rope
        Which lengths of a text share their rotary frequencies.
    call
        The call that is running, None between calls.
    """

    def __init__(self, policy: RunnablePolicy, entrant: Entrant, stack: ExitStack) -> None:
        self.policy, self.model, self.anatomy = policy, entrant.model, entrant.anatomy
        self.implementation = entrant.implementation
        self.depth = policy.depth(self.anatomy.n_layers)
        self.rope = rope_lengths(self.anatomy.stack)
        self.call: Call | None = None
        self._stack = stack
        self._request = Request()
        self._length: int | None = None  # tokens of the text whose rotary frequencies a call uses, where it matters
        self._entry, self._thread = threading.Lock(), 0

    def __getstate__(self) -> Any:
        raise UserError(f"this model runs under {self.policy}: copy or pickle it outside of that `with` block")

    def expect(self, phases: Phases) -> None:
        """Announce which tokens of the next call are decode phase."""
        self._request.expected = phases

    def new_cache(self) -> PolicyCache:
        """Return an empty cache of this policy for this model."""
        return PolicyCache(self.policy, self.anatomy)

    # --- Adding hooks ---

    def hook(self, handle: RemovableHandle) -> None:
        """Remove a hook when the block ends."""
        self._stack.callback(handle.remove)

    def attach(self, model: nn.Module) -> None:
        """Add all hooks; ``model`` is the object that the user calls: the model itself, or a wrapper of it."""
        anatomy = self.anatomy
        self.rope.settle()
        self._stack.enter_context(frequencies_of_length(self.rope, lambda: self._length))
        for module in {m for m in (model, self.model) if isinstance(m, nn.Module)}:
            self.hook(module.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._edit(anatomy.stack, self._before_stack)
        self.hook(anatomy.stack.register_forward_hook(self._after_stack, always_call=True))
        for index, layer in enumerate(anatomy.layers):
            self._edit(layer, partial(self._before_layer, index))
        if self.depth < anatomy.n_layers:
            self.hook(anatomy.layers[self.depth - 1].register_forward_hook(self._select))
            self.hook(anatomy.layers[-1].register_forward_hook(self._spread))
        self.policy.install(self)
        if self.policy.taps_attention:
            self._stack.enter_context(attention_tap(self.model, anatomy.attentions, self._tapped()))
        on_drop = self._note_dropped if self.rope.switches else None
        follow_generate(self.model, self._stack, new_cache=self.new_cache, on_drop=on_drop)

    def _edit(self, module: nn.Module, edit: Any) -> None:
        self.hook(module.register_forward_pre_hook(EditArguments(module, edit), with_kwargs=True))

    def _tapped(self) -> Any:
        layers = {module: layer for layer, module in enumerate(self.anatomy.attentions)}

        def tapped(attention: AttentionCall) -> tuple[Tensor, Any]:
            output = attention.proceed()
            if self.call is not None:
                self.policy.after_attention(self.call, layers[attention.module], attention)
            return output

        return tapped

    def _note_dropped(self, cache: PolicyCache) -> None:
        self._request.dropped = cache

    # --- Hooks, in the order in which they run ---

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UserError("torch.nn.DataParallel cannot run a model under a policy: leave it out")
        arguments = named_arguments(module, args, kwargs)
        request = self._request
        request.logits_to_keep, request.labels = arguments.get("logits_to_keep", 0), arguments.get("labels")

    def _before_stack(self, _: nn.Module, arguments: dict[str, Any]) -> None:
        request = self._request
        keep, expected, dropped = request.logits_to_keep, request.expected, request.dropped
        request.logits_to_keep = request.expected = request.dropped = None
        self._enter()
        inputs = input_tokens(arguments)
        if inputs is None:
            return  # the model itself reports what is missing
        batch, n_new = inputs.shape[:2]
        if n_new == 0:
            raise UserError("the input has no tokens")
        selecting = self.policy if self.depth < self.anatomy.n_layers else None
        admit_options(arguments, self.model.config, self.anatomy, selecting)
        cache = arguments.get("past_key_values")
        cache = self.new_cache() if cache is None else admit_cache(cache, self.policy, self.anatomy.n_layers)
        admit_padding(cache, arguments.get("attention_mask"), batch, n_new, inputs.device)
        n_logits = count_logits(keep, n_new)
        if dropped is not None and cache.n_columns == 0:
            expected = Phases(0, begin_anew(cache, dropped, n_new, n_logits, self.rope))
        phases = expected or self._phases(cache, n_new, n_logits)
        self._length = admit_length(cache, n_new, self.rope)
        own_positions = positions(cache.n_columns, cache.n_columns + n_new, cache.padding, inputs.device)
        if (position_ids := arguments.get("position_ids")) is None:
            arguments["position_ids"] = own_positions.clamp(min=0)
        else:
            admit_positions(position_ids, own_positions)
        if cache.n_columns == 0:
            cache.batch = batch
            if expected is None:
                require_anchors(cache, n_new)
            cache.n_prompt = n_new if dropped is None else dropped.n_prompt
        elif cache.batch != batch:
            raise UserError(f"the KV cache holds {cache.batch} rows, the input {batch}")
        cache.writing = True
        self.call = Call(
            cache,
            n_new,
            phases,
            anatomy=self.anatomy,
            depth=self.depth,
            implementation=self.implementation,
            n_logits=n_logits if isinstance(keep, int) else 0,  # indices are counted from the first token
        )
        arguments["attention_mask"] = placeholder_mask(inputs.device)
        arguments |= {"past_key_values": cache, "use_cache": True}

    def _before_layer(self, index: int, _: nn.Module, arguments: dict[str, Any]) -> None:
        """Set the columns that a layer will hold, its mask, and the positions of the rows that run."""
        call = self.call
        if call is None or call.projecting:
            return
        if call.selected:
            self.policy.before_upper_layer(call, index, arguments)
        hidden = arguments["hidden_states"]
        arguments["attention_mask"] = call.mask(index, hidden.dtype, hidden.device)
        if call.selected:
            rows = rows_in(call.rows, call.start, hidden.device)
            for name in PER_POSITION & arguments.keys():
                arguments[name] = take_rows(arguments[name], rows)
        call.cache.layers[index].incoming = () if call.unheld and call.selected else call.rows

    def _select(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Drop the rows that do not run on."""
        call = self.call
        if call is None or not call.selects or call.projecting:
            return None
        call.hidden = residual_of(output)
        rows = self.policy.runs_on(call)
        if rows is call.rows:
            return None
        if not rows:
            self._finish()
            raise ShallowCallDone
        hidden = take_rows(call.hidden, rows_in(rows, call.start, call.hidden.device))
        call.rows, call.selected = rows, True
        del call.hidden
        return with_residual(output, hidden)

    def _spread(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Put rows back to their columns if the caller reads beyond the decode phase; NaN where no row ran."""
        call = self.call
        if call is None or not call.selected or call.projecting:
            return None
        last_rows_suffice = (call.n_logits and call.n_logits <= call.phases.tail) or call.unheld
        if last_rows_suffice and not self.anatomy.reshapes:
            return None
        hidden = residual_of(output)
        columns = as_tensor(call.rows, hidden.device) - call.start
        spread = spread_rows(hidden, columns, call.stop - call.start, torch.nan)
        # Test the last element: it is finite in a row that ran; other rows were never written.
        labels = self._request.labels
        if labels is not None and bool((spread[:, :-1, -1].isnan() & (labels[:, 1:] != -100)).any()):
            raise UserError(
                "labels ask for logits of prompt tokens, which there are not: set them to -100, "
                "or give the continuation against the prompt's cache"
            )
        return with_residual(output, spread)

    def _after_stack(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self._thread != threading.get_ident():
            return  # the call of another thread, which `_enter` refused
        if output is None:  # an error: the cache stays marked as being written
            self.call = None
        self._finish()
        self._request.labels, self._length, self._thread = None, None, 0

    def _finish(self) -> None:
        """Count the call's columns as seen."""
        call, self.call = self.call, None
        if call is not None:
            call.cache.n_columns, call.cache.writing = call.stop, False
            for layer in call.cache.layers:  # not earlier: a call's first query may be older than the keys it stores
                layer.slide()
            for columns in call.phases.columns(call.start, call.stop):
                call.cache.decoded = join(call.cache.decoded, columns)

    # --- One thread at a time; phases of a call ---

    def _enter(self) -> None:
        """Admit one thread at a time to the stack: a call keeps its state on the model."""
        thread = threading.get_ident()
        with self._entry:
            if self._thread not in (0, thread):
                raise UserError(
                    "this model is in a call of another thread: under a policy, threads have to take turns on it, "
                    "one call after the other"
                )
            self._thread = thread

    def _phases(self, cache: PolicyCache, n_new: int, n_logits: int) -> Phases:
        """Divide a call without an announcement; ``n_logits`` is 0 where logits of all its tokens are requested."""
        if cache.n_columns and not n_logits:
            return Phases(0, n_new)
        return phases_of(cache, n_new, max(n_logits, 1))
