"""Capture through nnsight: a trace that reads stable module inputs and outputs, and reduces them as it goes.

Read are each layer's inputs and output, the output of its query projection and the input of its output projection,
never generated ``.source`` labels. Keys and values come from the KV cache; the few queries that are looked at are
turned as the model turns them (`diagnostics.capture.queries`). The model's own attention implementation does the work.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from diagnostics.capture.attention_rows import RecomputedAttention, visible_keys, without_bias
from diagnostics.capture.branch import AnchorRows, named_arguments, residual_out
from diagnostics.capture.passes import Pass, PassCapture, Watch
from diagnostics.capture.queries import query_projection, turned_queries
from diagnostics.errors import UserError
from diagnostics.libraries import NNSIGHT, twin
from diagnostics.models import LoadedModel


class NNsightCapture(PassCapture):
    """Capture inside nnsight traces, on this machine."""

    name = "nnsight"
    reads_cache = True

    def __init__(self, lm: LoadedModel) -> None:
        self.traced = lm.wrapper if lm.library == NNSIGHT else traced_over(lm)
        super().__init__(lm if lm.library == NNSIGHT else LoadedModel.wrap(self.traced, lm.tokenizer, lm.name))
        anatomy = self.lm.anatomy
        paths = {module: path for path, module in self.lm.model.named_modules()}
        self.layers = [self._envoy(paths[layer]) for layer in anatomy.layers]
        self.queries = [self._envoy(paths[query_projection(attention)]) for attention in anatomy.attentions]
        self.outputs = [self._envoy(paths[projection]) for projection in anatomy.output_projections]
        self.anchors = AnchorRows(0)
        # Last context queries of each layer and what they may see, from a pass that ended before the decode rows.
        self.windows: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, watch: Watch, ids: Tensor, first_row: int, cache: Cache | None, n_logits: int) -> Tensor | None:
        """Run a pass in one trace; see `PassCapture.forward`."""
        over = watch.over(first_row, ids.shape[1])
        if first_row == 0:
            self.anchors, self.windows = AnchorRows(watch.n_anchors), {}
        with self.traced.trace(ids, past_key_values=cache, use_cache=True, logits_to_keep=n_logits or 1):
            for layer in range(watch.anatomy.n_layers):
                # In the order in which the model computes them: nnsight serves no other.
                arguments = named_arguments(watch.anatomy.layers[layer], *self.layers[layer].inputs)
                queries = self.queries[layer].output
                heads = self.outputs[layer].input
                after = residual_out(self.layers[layer].output)
                self._show(watch, over, layer, arguments, queries, heads, after, cache)
            logits = self.traced.output.logits.save()
        return logits[0] if n_logits else None

    def _show(
        self,
        watch: Watch,
        over: Pass,
        layer: int,
        arguments: dict[str, Any],
        queries: Tensor,
        heads: Tensor,
        after: Tensor,
        cache: Any,
    ) -> None:
        """Show a layer that has run: raw queries [1, rows, ...], head outputs and residual [1, rows, width]."""
        anatomy, held = watch.anatomy, cache.layers[layer]
        attention, window = anatomy.attentions[layer], anatomy.window(layer)

        def rows_of(rows: slice) -> tuple[Tensor, Tensor]:
            query = turned_queries(attention, anatomy, queries, arguments, rows)
            mask, n_keys = arguments.get("attention_mask"), held.keys.shape[2]
            visible = visible_keys(mask, over.first_row, over.n_rows, n_keys, window, rows)
            return query, visible.to(query.device)

        if over.n_context:
            self.windows[layer] = rows_of(over.window)
        rows = None
        if over.has_decode:
            query, visible = rows_of(over.decode)
            if layer in self.windows:
                early, early_visible = self.windows.pop(layer)
                query = torch.cat([early, query], dim=1)
                # Context rows cannot see the keys of a later pass.
                early_visible = nn.functional.pad(early_visible, (0, visible.shape[1] - early_visible.shape[1]))
                visible = torch.cat([early_visible, visible])
            rows = RecomputedAttention(
                query=query,
                key=held.keys[0],
                value=held.values[0],
                visible=visible,
                scaling=getattr(attention, "scaling", None) or query.shape[-1] ** -0.5,
                softcap=getattr(attention, "attn_logit_softcapping", None),
                sinks=getattr(attention, "sinks", None),
                output=heads[0, over.decode].unflatten(-1, (anatomy.n_heads, -1)),
                project=without_bias(anatomy.output_projections[layer]),
            )
        call: Callable[..., Any] = self.layers[layer]
        branch = self.anchors.branch(call, layer, over, arguments, window)
        watch.layer(layer, over, arguments["hidden_states"][0], after[0], rows, branch)

    def _envoy(self, path: str) -> Any:
        """Find nnsight's envoy of a module by its path in the model."""
        envoy = self.traced
        for name in path.split("."):
            envoy = envoy[int(name)] if name.isdigit() else getattr(envoy, name)
        return envoy


def traced_over(lm: LoadedModel) -> Any:
    """Put an nnsight model over one that is loaded, without changing it: same weights, modules of its own.

    Raises
    ------
    UserError
        If nnsight is not installed.
    """
    try:
        from nnsight import TransformersModel
    except ImportError:
        raise UserError("the nnsight backend needs nnsight 0.8: pip install 'speed-diagnostics[nnsight]'") from None
    return TransformersModel(twin(lm.model), tokenizer=lm.tokenizer)
