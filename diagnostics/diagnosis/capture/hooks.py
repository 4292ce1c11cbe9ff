"""The default capture: module hooks for residuals, the attention interface for queries and keys.

The model's own fused attention does the work; only the few rows that the probes look at are recomputed.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention, Rows, after_window, visible_keys
from diagnostics.diagnosis.capture.passes import Pass, PassCapture, Watch
from diagnostics.diagnosis.capture.queries import known_query_projection
from diagnostics.diagnosis.capture.residual_path import Addition, ResidualPath, Shown
from diagnostics.models.anatomy import PER_POSITION
from diagnostics.models.attention_tap import AttentionCall, attention_tap, eager_attention
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.arguments import residual_of, take_rows
from diagnostics.support.errors import UserError


class HooksCapture(PassCapture):
    """Capture with plain PyTorch hooks on the stock transformers model."""

    name = "hooks"

    def __init__(self, lm: LoadedModel) -> None:
        super().__init__(lm)
        # Last context queries of each layer and what they may see, from a pass that ended before the decode rows.
        self.windows: dict[int, Rows] = {}

    def forward(self, watch: Watch, ids: Tensor, first_row: int, cache: Cache | None, n_logits: int) -> Tensor | None:
        """Run a pass with hooks on every layer; see `PassCapture.forward`."""
        model, anatomy = self.lm.model, self.lm.anatomy
        taps = _Taps(watch, watch.over(first_row, ids.shape[1]), self.windows, self.paths)
        # Without logits the head need not run.
        runs, options = (model, {"logits_to_keep": n_logits}) if n_logits else (model.base_model, {})
        with ExitStack() as stack:
            for layer, module in enumerate(anatomy.layers):
                stack.callback(_after(anatomy.output_projections[layer], layer, taps.on_projection))
                stack.callback(_after(self.paths[layer].adder, layer, taps.on_added))
                stack.callback(_after(module, layer, taps.on_layer))
                if (queries := known_query_projection(anatomy.attentions[layer])) is not None:
                    stack.callback(_after(queries, layer, taps.on_queries))
            stack.enter_context(attention_tap(model, anatomy.attentions, taps.on_attention))
            output = runs(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **options)
        return output.logits[0] if n_logits else None


class _Taps:
    """The hooks of one forward pass."""

    def __init__(self, watch: Watch, over: Pass, windows: dict[int, Rows], paths: tuple[ResidualPath, ...]) -> None:
        self.watch, self.over, self.windows, self.paths = watch, over, windows, paths
        self.anatomy = watch.anatomy
        self.index = {module: layer for layer, module in enumerate(self.anatomy.attentions)}
        # Of the layer that is running: its attention call with what that gave, and what its later modules showed: what
        # entered and left the output projection, of the decode rows, and what was added to the residual, of all rows.
        self.ran: set[int] = set()
        self.call: tuple[AttentionCall, Tensor] | None = None
        self.shown: dict[str, Tensor] = {}
        self.added: Tensor | None = None
        self.projected: Tensor | None = None
        # Attention of its decode rows, once it has run.
        self.attention: RecomputedAttention | None = None
        self.branching = self.sees_prompt = False

    def on_attention(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Let the attention run; keep the queries of the window, and the attention of the decode rows."""
        if self.branching:
            return self._branch_attention(call)
        output, weights = call.proceed()
        layer, over = self.index[call.module], self.over
        if layer in self.ran:
            raise UserError(
                f"model {self.watch.name!r} cannot be diagnosed: layer {layer} calls its attention function more than "
                "once in a pass, and what its heads give is not understood"
            )
        self.ran.add(layer)
        if over.n_context:
            # clone: a view would keep all queries of the layer alive.
            self.windows[layer] = call.query[0, :, over.window].clone(), self._visible(call, over.window)
        if over.has_decode:
            self.call = call, output[0, over.decode]
        return output, weights

    def on_queries(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note the queries of the decode rows as their projection gives them."""
        if not self.branching:
            self.projected = output[:, self.over.decode]

    def on_projection(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what entered and left the output projection."""
        if not self.branching:
            self.shown |= {"entered": args[0][0, self.over.decode], "left": output[0, self.over.decode]}

    def on_added(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Note what is added to the residual; of a module that runs twice, as shared ones do, the first time."""
        if not self.branching:
            self.added = residual_of(output)[0] if self.added is None else self.added

    def on_layer(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Show the layer that has run."""
        if self.branching:
            return

        def branch(hidden: Tensor, sees_prompt: bool = False) -> Tensor:
            return self._branch(layer, args, kwargs, hidden, sees_prompt)

        before = args[0] if args else kwargs["hidden_states"]
        self.attention = self._attention_rows(layer) if self.call is not None else None
        assert self.added is not None
        self.watch.layer(layer, self.over, before[0], residual_of(output)[0], self.added, self.attention, branch)
        self.call, self.attention, self.shown, self.added, self.projected = None, None, {}, None, None

    def _visible(self, call: AttentionCall, rows: slice) -> Tensor:
        n_rows, n_keys = call.query.shape[2], call.key.shape[2]
        window = call.options.get("sliding_window")
        return visible_keys(call.mask, self.over.first_row, n_rows, n_keys, window, rows).to(call.query.device)

    def _attention_rows(self, layer: int) -> RecomputedAttention:
        assert self.call is not None
        assert self.added is not None
        call, heads = self.call
        rows = self.over.decode
        decode = call.query[0, :, rows], self._visible(call, rows)
        query, visible = after_window(self.windows.pop(layer, None), decode)
        projection = self.anatomy.output_projections[layer]
        shown = Shown(**self.shown, added=self.added[rows])
        return RecomputedAttention(
            query=query,
            key=call.key[0],
            value=call.value[0],
            visible=visible,
            scaling=call.options.get("scaling") or query.shape[-1] ** -0.5,
            softcap=call.options.get("softcap"),
            sinks=call.options.get("s_aux"),
            output=heads,
            adds=Addition.of(projection, self.paths[layer].multiplier, heads.flatten(1), shown),
            projected=self.projected,
        )

    def _branch(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, sees_prompt: bool
    ) -> Tensor:
        """Run ``layer`` on [branches, n_decode, width] as the pass ran its decode rows; no cache."""
        arguments = [None if isinstance(a, Cache) else a for a in args]
        options = {k: None if isinstance(v, Cache) else v for k, v in kwargs.items()}
        for name in PER_POSITION & options.keys():
            options[name] = take_rows(options[name], self.over.decode)
        if arguments:
            arguments[0] = hidden
        else:
            options["hidden_states"] = hidden
        self.branching, self.sees_prompt = True, sees_prompt
        try:
            return residual_of(self.anatomy.layers[layer](*arguments, **options))
        finally:
            self.branching = False

    def _branch_attention(self, call: AttentionCall) -> tuple[Tensor, Any]:
        """Attention of upper-layer SPEED: anchors' keys from the full model, then the branch's own.

        Anchors are the first tokens and see only each other, so their upper keys do not depend on the cutoff. A branch
        that sees the prompt has the keys of the whole context before its own.
        """
        full = self.attention
        assert full is not None
        before = slice(0, self.watch.n_context if self.sees_prompt else self.watch.n_anchors)
        branches = call.query.shape[0]
        key = torch.cat([full.key[:, before].expand(branches, -1, -1, -1), call.key], dim=2)
        value = torch.cat([full.value[:, before].expand(branches, -1, -1, -1), call.value], dim=2)
        visible = full.visible[-full.n_decode :]
        mask = torch.cat([visible[:, before], visible[:, self.watch.n_context :]], dim=1)[None, None]
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
