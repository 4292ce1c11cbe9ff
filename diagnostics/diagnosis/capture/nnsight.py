"""Capture through nnsight: a trace that reads stable module inputs and outputs, and reduces them as it goes.

Read are each layer's inputs and output, the output of its query projection and the input of its output projection,
never generated ``.source`` labels. Keys and values come from the KV cache; the few queries that are looked at are
turned as the model turns them (`diagnostics.diagnosis.capture.queries`). The model's own attention implementation
does the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention, Rows, after_window, visible_keys
from diagnostics.diagnosis.capture.branch import AnchorRows
from diagnostics.diagnosis.capture.passes import Pass, PassCapture, Watch
from diagnostics.diagnosis.capture.queries import query_projection, turned_queries, unturned_queries
from diagnostics.diagnosis.capture.residual_path import Addition, Shown, multiplier_of
from diagnostics.models.libraries import NNSIGHT, twin
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.arguments import named_arguments, residual_of
from diagnostics.support.errors import UserError


@dataclass(frozen=True)
class Sites:
    """nnsight's envoys of what is read of one layer."""

    layer: Any
    queries: Any
    projection: Any
    adder: Any


class NNsightCapture(PassCapture):
    """Capture inside nnsight traces, on this machine."""

    name = "nnsight"
    reads_cache = True

    def __init__(self, lm: LoadedModel) -> None:
        self.traced = lm.wrapper if lm.library == NNSIGHT else traced_over(lm)
        super().__init__(lm if lm.library == NNSIGHT else LoadedModel.wrap(self.traced, lm.tokenizer, lm.name))
        anatomy = self.lm.anatomy
        names = {module: name for name, module in self.lm.model.named_modules()}
        places = zip(
            anatomy.layers,
            (query_projection(attention) for attention in anatomy.attentions),
            anatomy.output_projections,
            (path.adder for path in self.paths),
            strict=True,
        )
        self.sites = [Sites(*(self._envoy(names[module]) for module in place)) for place in places]
        self.shown = Layers(0)

    def forward(self, watch: Watch, ids: Tensor, first_row: int, cache: Cache | None, n_logits: int) -> Tensor | None:
        """Run a pass in one trace; see `PassCapture.forward`."""
        if first_row == 0:
            self.shown = Layers(watch.n_anchors)
        over, sites, shown, traced = watch.over(first_row, ids.shape[1]), self.sites, self.shown, self.traced
        with traced.trace(ids, past_key_values=cache, use_cache=True, logits_to_keep=n_logits or 1):
            shown.show(watch, over, sites, cache)
            logits = traced.output.logits.save()
        return logits[0] if n_logits else None

    def _envoy(self, path: str) -> Any:
        """Find nnsight's envoy of a module by its path in the model."""
        envoy = self.traced
        for name in path.split("."):
            envoy = envoy[int(name)] if name.isdigit() else getattr(envoy, name)
        return envoy


class Layers:
    """Shows the layers of one prompt, in its passes, from inside a trace: here, or where the model is served."""

    def __init__(self, n_anchors: int) -> None:
        self.anchors = AnchorRows(n_anchors)
        # Last context queries of each layer and what they may see, from a pass that ended before the decode rows.
        self.windows: dict[int, Rows] = {}

    @torch.no_grad()
    def show(self, watch: Watch, over: Pass, sites: Sequence[Sites], cache: Any) -> None:
        """Read all layers of a pass, in the order in which the model computes them: nnsight serves no other."""
        for layer, site in enumerate(sites):
            arguments = named_arguments(watch.anatomy.layers[layer], *site.layer.inputs)
            queries = site.queries.output
            heads = site.projection.input
            left = site.projection.output
            added = residual_of(site.adder.output)
            after = residual_of(site.layer.output)
            shown = Shown(heads[0, over.decode], left[0, over.decode], added[0, over.decode])
            attention = self._attention(watch, over, layer, arguments, queries, shown, cache.layers[layer])
            branch = self.anchors.branch(site.layer, layer, over, arguments, watch.anatomy.window(layer))
            watch.layer(layer, over, arguments["hidden_states"][0], after[0], added[0], attention, branch)

    def _attention(
        self,
        watch: Watch,
        over: Pass,
        layer: int,
        arguments: dict[str, Any],
        queries: Tensor,
        shown: Shown,
        held: Any,
    ) -> RecomputedAttention | None:
        """Attention of the decode rows, from raw queries [1, rows, ...], what later modules showed, and the cache."""
        anatomy = watch.anatomy
        attention, window, n_keys = anatomy.attentions[layer], anatomy.window(layer), held.keys.shape[2]
        projection = anatomy.output_projections[layer]

        def rows_of(rows: slice) -> Rows:
            unturned = unturned_queries(attention, anatomy, queries[:, rows])
            query = turned_queries(attention, unturned, arguments, rows)
            visible = visible_keys(arguments.get("attention_mask"), over.first_row, over.n_rows, n_keys, window, rows)
            return query, visible.to(query.device)

        if over.n_context:
            self.windows[layer] = rows_of(over.window)
        if not over.has_decode:
            return None
        query, visible = after_window(self.windows.pop(layer, None), rows_of(over.decode))
        return RecomputedAttention(
            query=query,
            key=held.keys[0],
            value=held.values[0],
            visible=visible,
            scaling=getattr(attention, "scaling", None) or query.shape[-1] ** -0.5,
            softcap=getattr(attention, "attn_logit_softcapping", None),
            sinks=getattr(attention, "sinks", None),
            output=shown.entered.unflatten(-1, (anatomy.n_heads, -1)),
            adds=Addition.of(projection, multiplier_of(anatomy.layers[layer]), shown.entered, shown),
            projected=queries[:, over.decode],
        )


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
