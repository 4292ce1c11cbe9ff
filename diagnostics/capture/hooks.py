"""The default capture: module hooks for residuals, the attention interface for queries and keys.

With a given reference, prompt and reference run as one forward pass. Without one, the context runs first into a KV
cache; the greedy continuation is generated from that cache and rolled back; then the decode-phase rows run as one chunk
against it. The prompt runs through the model once either way, with the model's own fused attention.
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
# What layers get per position besides their input; anything else unknown fails by its shape.
PER_POSITION = {"position_embeddings", "position_ids"}


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
        model, prompt = self.lm.model, torch.tensor([prompt_ids], device=self.lm.device)
        taps = _Taps(self.lm, observers, n_prompt=prompt.shape[1], n_anchors=n_anchors)
        # A plain cache keeps every position in every layer, also where the model's own would forget (sliding windows).
        cache = None if reference_ids is not None else DynamicCache()
        if cache is None:
            first_row = 0
            reference = torch.tensor(list(reference_ids or ())[:n_decode], device=self.lm.device)
            rows = torch.cat([prompt[0], reference[:-1]])[None]
        else:
            first_row = prompt.shape[1] - 1
            if first_row > 0:
                with taps.forward_pass(first_row=0):
                    model.base_model(input_ids=prompt[:, :-1], past_key_values=cache, use_cache=True)
            reference = self._greedy(prompt[:, -1:], cache, n_decode)
            rows = torch.cat([prompt[0, -1:], reference[:-1]])[None]
        with taps.forward_pass(first_row):
            logits = model(
                input_ids=rows, past_key_values=cache, use_cache=cache is not None, logits_to_keep=len(reference)
            ).logits[0]
        taps.require_all_layers()
        outcome = Outcome(logits.float(), reference)
        for observer in observers:
            observer.on_outcome(outcome)
        return outcome

    def _greedy(self, token: Tensor, cache: Cache, n_decode: int) -> Tensor:
        """Continue greedily at full depth and leave the cache as it was found."""
        ends = self.lm.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        tokens = []
        for _ in range(n_decode):
            logits = self.lm.model(input_ids=token, past_key_values=cache, use_cache=True).logits
            token = logits[:, -1:].argmax(-1)
            tokens.append(token)
            if token.item() in ends:
                break
        cache.crop(-len(tokens))
        return torch.cat(tokens, dim=1)[0]


class _Taps:
    """The hooks of one prompt, over one forward pass or two."""

    def __init__(self, lm: LoadedModel, observers: Sequence[Observer], *, n_prompt: int, n_anchors: int) -> None:
        self.anatomy, self.model, self.name = lm.anatomy, lm.model, lm.name
        self.observers = observers
        self.n_context, self.n_anchors = n_prompt - 1, n_anchors
        self.index = {module: layer for layer, module in enumerate(self.anatomy.attentions)}
        # Last context queries of each layer and what they may see, from a pass that ended before the decode rows.
        self.window: dict[int, tuple[Tensor, Tensor]] = {}
        # Attention of the decode rows in the layer that is running.
        self.attention: AttentionRows | None = None
        self.seen: set[int] = set()
        self.branching = False

    @contextmanager
    def forward_pass(self, first_row: int) -> Iterator[None]:
        """Watch a forward pass whose first input row is this position."""
        n_rows_before = max(0, self.n_context - first_row)  # context rows of this pass

        def on_attention(call: AttentionCall) -> tuple[Tensor, Any]:
            if self.branching:
                return self._branch_attention(call)
            output, weights = call.proceed()
            layer, early = self.index[call.module], slice(max(0, n_rows_before - N_WINDOW + 1), n_rows_before)
            if n_rows_before:
                # clone: a view would keep all queries of the layer alive.
                self.window[layer] = call.query[0, :, early].clone(), _visible(call, first_row, early)
            if n_rows_before < call.query.shape[2]:
                rows = slice(n_rows_before, call.query.shape[2])
                self.attention = self._attention_rows(layer, call, output, first_row, rows)
                self.seen.add(layer)
            return output, weights

        def on_layer(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.branching:
                return
            before, after = _residual_in(args, kwargs)[0], _residual_out(output)[0]
            if n_rows_before:
                context = ContextRows(layer, before[:n_rows_before], after[:n_rows_before])
                for observer in self.observers:
                    observer.on_context(context)
            if self.attention is not None:

                def branch(hidden: Tensor) -> Tensor:
                    return self._branch(layer, args, kwargs, hidden, n_rows_before)

                decode = DecodeRows(layer, before[n_rows_before:], after[n_rows_before:], self.attention, branch)
                for observer in self.observers:
                    observer.on_decode(decode)
                self.attention = None

        with ExitStack() as stack:
            for layer, module in enumerate(self.anatomy.layers):
                stack.callback(_after(module, layer, on_layer))
            stack.enter_context(attention_tap(self.model, self.anatomy.attentions, on_attention))
            yield

    def require_all_layers(self) -> None:
        """Refuse a model in which a layer's attention was not seen; raise UserError."""
        missing = sorted(set(range(self.anatomy.n_layers)) - self.seen)
        if missing:
            raise UserError(
                f"model {self.name!r} cannot be diagnosed: the attention of layer {missing[0]} "
                "did not run through transformers' attention interface"
            )

    def _attention_rows(
        self, layer: int, call: AttentionCall, output: Tensor, first_row: int, rows: slice
    ) -> AttentionRows:
        query, visible = call.query[0, :, rows], _visible(call, first_row, rows)
        if layer in self.window:
            early_query, early_visible = self.window.pop(layer)
            query = torch.cat([early_query, query], dim=1)
            # Context rows cannot see the keys of a later pass.
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
            output=output[0, rows],
            project=_without_bias(self.anatomy.output_projections[layer]),
        )

    def _branch(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, first: int) -> Tensor:
        """Run ``layer`` on [branches, n_decode, width] as the pass ran its rows from ``first`` on; no cache."""
        arguments = [None if isinstance(a, Cache) else a for a in args]
        options = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        for name in PER_POSITION & options.keys():
            options[name] = _rows_from(options[name], first)
        if arguments:
            arguments[0] = hidden
        else:
            options["hidden_states"] = hidden
        self.branching = True
        try:
            return _residual_out(self.anatomy.layers[layer](*arguments, **options))
        finally:
            self.branching = False

    def _branch_attention(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Attention of upper-layer SPEED: anchors' keys from the full model, then the branch's own.

        Anchors are the first tokens and see only each other, so their upper keys do not depend on the cutoff.
        """
        full = self.attention
        assert full is not None
        anchors, branches = slice(0, self.n_anchors), call.query.shape[0]
        key = torch.cat([full.key[:, anchors].expand(branches, -1, -1, -1), call.key], dim=2)
        value = torch.cat([full.value[:, anchors].expand(branches, -1, -1, -1), call.value], dim=2)
        visible = full.visible[-full.n_decode :]
        mask = torch.cat([visible[:, anchors], visible[:, self.n_context :]], dim=1)[None, None]
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        if call.options.get("softcap") is not None or call.options.get("s_aux") is not None:
            # Fused attention knows neither; eager attention adds its mask to the scores.
            attend = eager_attention(call.module)
            mask = torch.where(mask, 0.0, torch.finfo(key.dtype).min).to(key.dtype)
        options = call.options | {"is_causal": False}
        return attend(call.module, call.query, key, value, mask, **options)


def _after(
    module: nn.Module, layer: int, act: Callable[[int, tuple[Any, ...], dict[str, Any], Any], None]
) -> Callable[[], None]:
    """Call ``act(layer, args, kwargs, output)`` after every call of ``module``; return what undoes it."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        act(layer, args, kwargs, output)

    return module.register_forward_hook(hook, with_kwargs=True).remove


def _rows_from(value: Any, first: int) -> Any:
    """Drop the first rows of what a layer gets per position: [batch, position, ...], or a tuple of such."""
    if isinstance(value, tuple):
        return tuple(_rows_from(part, first) for part in value)
    return value[:, first:] if isinstance(value, Tensor) else value


def _visible(call: AttentionCall, first_row: int, rows: slice) -> Tensor:
    """Return which keys these query rows may see, bool [rows, keys], from whatever mask the model passed."""
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
