"""The default capture: module hooks for residuals, the attention interface for queries and keys.

Two forward passes share one KV cache. The *context pass* runs all prompt tokens but the last, with the model's own
fused attention; the *decode pass* runs the decode-phase rows as one chunk against the cache, so its queries are exactly
the rows that the probes want. A reference, when none is given, is generated from the same cache in between and rolled
back. The context pass runs once, whatever follows.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diagnostics.capture.attention_tap import AttentionCall, attention_tap, eager_attention
from diagnostics.capture.base import AttentionRows, ContextRows, DecodeRows, Observer, Outcome
from diagnostics.errors import UserError
from diagnostics.models import LoadedModel

# Query rows before the first decode row that are kept for the saliency window: FastKV's window of 8, less the last.
N_WINDOW = 8


class HooksCapture:
    """Capture with plain PyTorch hooks on the stock transformers model."""

    name = "hooks"

    def __init__(self, lm: LoadedModel) -> None:
        self.lm = lm

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
        """Take one prompt through the model; see `diagnostics.capture.base.Capture`."""
        prompt = torch.tensor([prompt_ids], device=self.lm.device)
        # A plain cache keeps every position in every layer, also where the model's own would forget (sliding windows).
        cache = DynamicCache()
        taps = _Taps(self.lm, observers, n_context=prompt.shape[1] - 1, n_anchors=n_anchors)
        if prompt.shape[1] > 1:
            with taps.context_pass():
                self.lm.model.base_model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
        if reference_ids is None:
            reference = self._greedy(prompt[:, -1:], cache, n_decode)
        else:
            reference = torch.tensor(list(reference_ids)[:n_decode], device=self.lm.device)
        rows = torch.cat([prompt[0, -1:], reference[:-1]])[None]
        with taps.decode_pass():
            logits = self.lm.model(input_ids=rows, past_key_values=cache, use_cache=True).logits[0]
        outcome = Outcome(logits.float(), reference)
        for observer in observers:
            observer.on_outcome(outcome)
        return outcome

    def _greedy(self, token: Tensor, cache: Cache, n_decode: int) -> Tensor:
        """Continue greedily at full depth and leave the cache as it was found."""
        ends = self.lm.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        start, tokens = token, []
        for _ in range(n_decode):
            logits = self.lm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
            if token.item() in ends:
                break
        if start is not token:
            cache.crop(-len(tokens))
        return torch.cat(tokens, dim=1)[0]


class _Taps:
    """The hooks of one prompt: what each pass reads, and what the decode pass needs from the context pass."""

    def __init__(self, lm: LoadedModel, observers: Sequence[Observer], *, n_context: int, n_anchors: int) -> None:
        self.anatomy, self.model, self.name = lm.anatomy, lm.model, lm.name
        self.observers = observers
        self.n_context, self.n_anchors = n_context, n_anchors
        self.index = {module: layer for layer, module in enumerate(self.anatomy.attentions)}
        # Per layer: the last context queries and, if the mask is not plainly causal, what they may see.
        self.window: dict[int, tuple[Tensor, Tensor]] = {}
        self.attention: AttentionRows | None = None
        self.anchor_kv: tuple[Tensor, Tensor, Tensor] | None = None
        self.branching = False

    @contextmanager
    def context_pass(self) -> Iterator[None]:
        """Feed ``on_context`` and keep the last query rows of every layer."""

        def on_attention(call: AttentionCall) -> tuple[Tensor, Any]:
            n_rows = min(N_WINDOW - 1, self.n_context)
            visible = _visible(call, first_row=0, rows=slice(self.n_context - n_rows, self.n_context))
            # clone: a view would keep all queries of the layer alive.
            self.window[self.index[call.module]] = call.query[0, :, -n_rows:].clone(), visible
            return call.proceed()

        def on_layer(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rows = ContextRows(layer, _residual_in(args, kwargs)[0], _residual_out(output)[0])
            for observer in self.observers:
                observer.on_context(rows)

        with self._hooked(on_attention, on_layer):
            yield
        self._require_all(self.window)

    @contextmanager
    def decode_pass(self) -> Iterator[None]:
        """Feed ``on_decode``; inside it, observers may run branches through the same layer."""
        seen: dict[int, bool] = {}

        def on_attention(call: AttentionCall) -> tuple[Tensor, Any]:
            if self.branching:
                return self._branch_attention(call)
            layer = self.index[call.module]
            seen[layer] = True
            output, weights = call.proceed()
            self.attention = self._attention_rows(layer, call, output)
            self.anchor_kv = (
                call.key[:, :, : self.n_anchors],
                call.value[:, :, : self.n_anchors],
                self.attention.visible[-output.shape[1] :],
            )
            return output, weights

        def on_layer(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.branching:
                return
            assert self.attention is not None
            rows = DecodeRows(
                layer,
                _residual_in(args, kwargs)[0],
                _residual_out(output)[0],
                self.attention,
                lambda hidden: self._branch(layer, args, kwargs, hidden),
            )
            for observer in self.observers:
                observer.on_decode(rows)

        with self._hooked(on_attention, on_layer):
            yield
        self._require_all(seen)

    def _attention_rows(self, layer: int, call: AttentionCall, output: Tensor) -> AttentionRows:
        query, visible = call.query[0], _visible(call, first_row=self.n_context)
        if layer in self.window:
            early_query, early_visible = self.window[layer]
            query = torch.cat([early_query, query], dim=1)
            # Context rows cannot see the decode-phase keys that came after them.
            early_visible = nn.functional.pad(early_visible, (0, visible.shape[1] - early_visible.shape[1]))
            visible = torch.cat([early_visible, visible])
        return AttentionRows(
            query=query,
            key=call.key[0],
            value=call.value[0],
            visible=visible,
            scaling=call.options.get("scaling") or query.shape[-1] ** -0.5,
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux"),
            output=output[0],
            project=_without_bias(self.anatomy.output_projections[layer]),
        )

    def _branch(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor) -> Tensor:
        """Run ``layer`` on [branches, n_decode, width] with the arguments of the decode pass, but no cache."""
        place = {"args": tuple(None if isinstance(a, Cache) else a for a in args)}
        options = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        if "hidden_states" in options:
            options["hidden_states"] = hidden
        else:
            place["args"] = (hidden, *place["args"][1:])
        self.branching = True
        try:
            return _residual_out(self.anatomy.layers[layer](*place["args"], **options))
        finally:
            self.branching = False

    def _branch_attention(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Attention of upper-layer SPEED: anchors' keys from the full model, then the branch's own.

        Anchors are the first tokens and see only each other, so their upper keys do not depend on the cutoff.
        """
        assert self.anchor_kv is not None
        keys, values, visible = self.anchor_kv
        branches = call.query.shape[0]
        key = torch.cat([keys.expand(branches, -1, -1, -1), call.key], dim=2)
        value = torch.cat([values.expand(branches, -1, -1, -1), call.value], dim=2)
        mask = torch.cat([visible[:, : self.n_anchors], visible[:, self.n_context :]], dim=1)[None, None]
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if call.options.get("softcap") is not None or call.options.get("s_aux") is not None:
            # Fused attention knows neither; eager attention adds its mask to the scores.
            attend = eager_attention(call.module)
            mask = torch.where(mask, 0.0, torch.finfo(key.dtype).min).to(key.dtype)
        options = call.options | {"is_causal": False}
        return attend(call.module, call.query, key, value, mask, **options)

    @contextmanager
    def _hooked(
        self,
        on_attention: Callable[[AttentionCall], tuple[Tensor, Any]],
        on_layer: Callable[[int, tuple[Any, ...], dict[str, Any], Any], None],
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for layer, module in enumerate(self.anatomy.layers):

                def hook(
                    _: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    output: Any,
                    layer: int = layer,
                ) -> None:
                    on_layer(layer, args, kwargs, output)

                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            stack.enter_context(attention_tap(self.model, self.anatomy.attentions, on_attention))
            yield

    def _require_all(self, seen: dict[int, Any]) -> None:
        missing = [layer for layer in range(self.anatomy.n_layers) if layer not in seen]
        if missing:
            raise UserError(
                f"model {self.name!r} cannot be diagnosed: the attention of layer {missing[0]} "
                "did not run through transformers' attention interface"
            )


def _visible(call: AttentionCall, first_row: int, rows: slice = slice(None)) -> Tensor:
    """Return which keys the query rows may see, bool [rows, keys], from whatever mask the model passed."""
    n_keys = call.key.shape[2]
    if isinstance(call.mask, Tensor) and call.mask.ndim == 4:
        mask = call.mask[0, 0, rows, :n_keys]
        # Additive masks hold 0 or the lowest number; half of it is safely between.
        return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    device = call.query.device
    positions = first_row + torch.arange(call.query.shape[2], device=device)[rows, None]
    keys = torch.arange(n_keys, device=device)[None]
    visible = keys <= positions
    if window := call.options.get("sliding_window"):
        visible &= keys > positions - window
    return visible


def _without_bias(projection: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the linear part of a projection; by difference, so that quantised and adapted modules work too."""

    def project(x: Tensor) -> Tensor:
        x = x.to(next(projection.parameters()).dtype)
        return (projection(x) - projection(torch.zeros_like(x[:1]))).float()

    return project


def _residual_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _residual_out(output: Any) -> Tensor:
    """Unwrap a layer's output: a plain tensor in transformers 5, a tuple before; never a row of the batch."""
    residual = output[0] if isinstance(output, tuple) else output
    assert residual.ndim == 3, f"expected [batch, position, width], got {tuple(residual.shape)}"
    return residual
