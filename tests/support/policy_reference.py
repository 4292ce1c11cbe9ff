"""Policies as slow float64 passes over the whole sequence, written from their definitions; no code is shared.

Every token runs through every layer with full attention matrices; per-layer masks hide what a policy drops.
"""

import copy
import inspect
from contextlib import contextmanager

import torch

ANCHOR, PROMPT, DECODE = "a", "p", "d"


def labels(n_prompt, n_decode, anchors=1, boundary=1):
    """One letter per token; the last ``boundary`` prompt tokens are decode phase and win over anchors."""
    boundary = min(boundary, n_prompt)
    letters = [PROMPT] * (n_prompt - boundary) + [DECODE] * (boundary + n_decode)
    for i in range(min(anchors, n_prompt - boundary)):
        letters[i] = ANCHOR
    return letters


class SlowModel:
    """A float64 eager copy of a loaded model; its layers can be given masks and inputs of one's choice."""

    def __init__(self, lm):
        self.model = copy.deepcopy(lm.model).double()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation("eager")
        names = {id(m): n for n, m in lm.model.named_modules()}
        modules = dict(self.model.named_modules())
        self.layers = [modules[names[id(layer)]] for layer in lm.anatomy.layers]
        self.groups = lm.anatomy.n_heads // lm.anatomy.n_kv_heads
        self.n_heads = lm.anatomy.n_heads

    def run(self, ids, change, weights=False):
        """One pass; ``change(layer, hidden, mask)`` returns both for a layer, [1, T, W] and [1, 1|H, T, T]."""
        with self._changing(change), torch.no_grad():
            out = self.model(torch.tensor([ids]), output_attentions=weights, use_cache=False)
        return (out.logits[0], [w[0] for w in out.attentions]) if weights else out.logits[0]

    @contextmanager
    def _changing(self, change):
        def hook(layer):
            def replace(module, args, kwargs):
                bound = inspect.signature(module.forward).bind(*args, **kwargs)
                named = bound.arguments
                named["hidden_states"], named["attention_mask"] = change(
                    layer, named["hidden_states"], named["attention_mask"]
                )
                return bound.args, bound.kwargs

            return replace

        handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in enumerate(self.layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def hide(mask, where):
    return mask.masked_fill(where, torch.finfo(mask.dtype).min)


def speed(slow, ids, letters, cutoff):
    """Upper layers: decode-phase rows see anchors and decode-phase tokens up to themselves. Logits [T, V]."""
    decode = torch.tensor([c == DECODE for c in letters])
    prompt = torch.tensor([c == PROMPT for c in letters])
    where = decode[:, None] & prompt[None, :]
    # Anchors of a later prompt position never see prompt tokens either: they run on without them.
    anchor = torch.tensor([c == ANCHOR for c in letters])
    where |= anchor[:, None] & prompt[None, :]

    def change(layer, hidden, mask):
        return hidden, hide(mask, where) if layer >= cutoff else mask

    return slow.run(ids, change)


def projected(slow, ids, letters, cutoff):
    """Upper layers: the prompt rows enter every layer with the state that entered layer ``cutoff``."""
    resting = torch.tensor([c != DECODE for c in letters])
    state = {}

    def change(layer, hidden, mask):
        if layer == cutoff:
            state["h"] = hidden.clone()
        if layer > cutoff:
            hidden = torch.where(resting[None, :, None], state["h"], hidden)
        return hidden, mask

    return slow.run(ids, change)


def fastkv(slow, ids, n_prompt, tsp_layer, tsp_rate, retention_rate, window, kernel):
    """Published FastKV by three masked passes; also the columns kept per layer and KV head, and those propagated."""
    n, n_layers = n_prompt, len(slow.layers)
    prompt = ids[:n]
    stock = slow.run(prompt, lambda layer, hidden, mask: (hidden, mask), weights=True)[1]
    count = int(n * tsp_rate)
    chosen = list(range(n))
    if window <= count < n and tsp_layer < n_layers - 1:
        score = scores(stock[tsp_layer], list(range(n)), window, kernel, slow.groups)
        chosen = best({j: sum(score[g][j] for g in range(len(score))) for j in range(n - window)}, count - window)
        chosen = sorted(chosen + list(range(n - window, n)))
    dropped = torch.ones(n, dtype=torch.bool)
    dropped[chosen] = False
    # Rows of dropped tokens see themselves: nothing looks at them, but a softmax over nothing would be NaN.
    gone_above = dropped[None, :] & ~torch.eye(n, dtype=torch.bool)

    def propagate(layer, hidden, mask):
        return hidden, hide(mask, gone_above) if layer > tsp_layer else mask

    weights = slow.run(prompt, propagate, weights=True)[1]
    kept = []
    for layer in range(n_layers):
        columns = list(range(n)) if layer <= tsp_layer else chosen
        rate = retention_rate if layer <= tsp_layer else retention_rate / tsp_rate
        capacity = int(len(columns) * rate)
        if not window <= capacity < len(columns):
            kept.append([columns] * (slow.n_heads // slow.groups))
            continue
        score = scores(weights[layer], columns, window, kernel, slow.groups)
        kept.append([sorted(best(dict(enumerate(s)), capacity - window, columns) + columns[-window:]) for s in score])

    total = len(ids)

    def decode(layer, hidden, mask):
        where = torch.zeros(slow.n_heads, total, total, dtype=torch.bool)
        if layer > tsp_layer:
            where[:, :n, :n] |= gone_above
        for head in range(slow.n_heads):
            gone = torch.ones(n, dtype=torch.bool)
            gone[kept[layer][head // slow.groups]] = False
            where[head, n:, :n] = gone
        return hidden, hide(mask.expand(-1, slow.n_heads, -1, -1), where[None])

    return slow.run(ids, decode), kept, chosen


def scores(weights, columns, window, kernel, groups):
    """Per KV head, one score per token of ``columns`` before the window: plain loops."""
    n, half = len(columns), kernel // 2
    result = []
    for first in range(0, weights.shape[0], groups):
        total = [0.0] * (n - window)
        for head in range(first, first + groups):
            rows = weights[head][columns[-window:]][:, columns].sum(0).tolist()[: n - window]
            for j in range(n - window):
                total[j] += max(rows[max(0, j - half) : j + half + 1])
        result.append(total)
    return result


def best(score, count, columns=None):
    order = sorted(score, key=lambda j: -score[j])[:count]
    return [columns[j] for j in order] if columns else order
