"""Slow float64 references, written from the formulas and sharing no code with the package.

One full forward pass with every attention matrix kept; SPEED as the same pass under a per-layer 4-D mask.
"""

import copy
import inspect
from contextlib import contextmanager

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from transformers import DynamicCache

TOLERANCE = 1e-4


# The first module of a layer that reads the residual with the attention added, by family; other families: the norm
# before the MLP, of the usual name.
AFTER_ATTENTION = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "gpt2": "ln_2",
}


class Reference:
    """All activations of one prompt + reference[:-1], float64, full attention matrices."""

    def __init__(self, model, layers, attentions, ids, n_prompt, n_anchors):
        self.model = copy.deepcopy(model).double()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation("eager")  # the grouped kernels know no float64
        index = {id(m): n for n, m in model.named_modules()}
        modules = dict(self.model.named_modules())
        self.layers = [modules[index[id(layer)]] for layer in layers]
        self.attentions = [modules[index[id(attention)]] for attention in attentions]
        self.ids = torch.tensor([ids])
        self.n_prompt, self.n_anchors, self.total = n_prompt, n_anchors, len(ids)

        self.residual = []  # h_0 .. h_L, each [T, width]
        self.projected_input = []  # concatenated head outputs of each layer, [T, heads * head_dim]
        self.attention_out = []  # what each attention gives, before any norm after it
        self.attention_added = []  # what the residual gained when each attention was added to it, [T, width]
        handles = [layer.register_forward_hook(self._keep, with_kwargs=True) for layer in self.layers]
        handles += [module.register_forward_hook(self._keep_attention) for module in self.attentions]
        handles += [hook for layer in self.layers for hook in self._hooks_of_added(layer)]
        with torch.no_grad():
            out = self.model(self.ids, output_attentions=True, past_key_values=DynamicCache())
        for handle in handles:
            handle.remove()
        self.logits = out.logits[0]
        self.weights = [w[0].double() for w in out.attentions]
        cache = out.past_key_values
        self.values = [layer.values[0] for layer in cache.layers]

    def _keep(self, _module, args, kwargs, output):
        if not self.residual:
            self.residual.append((args[0] if args else kwargs["hidden_states"])[0])
        self.residual.append((output[0] if isinstance(output, tuple) else output)[0])

    def _keep_attention(self, _module, _args, output):
        self.attention_out.append((output[0] if isinstance(output, tuple) else output)[0])

    def _hooks_of_added(self, layer):
        """Keep what the attention of a layer, and nothing else, has changed in the residual."""
        shown = {}

        def before(_module, args, kwargs):
            shown["before"] = (args[0] if args else kwargs["hidden_states"])[0]

        def after_attention(_module, args):
            self.attention_added.append(args[0].view(1, self.total, -1)[0] - shown["before"])

        def mlp(_module, _args, output):
            shown["mlp"] = output[0]

        def after_both(_module, _args, output):
            after = (output[0] if isinstance(output, tuple) else output)[0]
            self.attention_added.append(after - shown["before"] - shown["mlp"])

        yield layer.register_forward_pre_hook(before, with_kwargs=True)
        kind = self.model.config.model_type
        if kind == "gpt_neox":  # attention and MLP side by side
            yield layer.mlp.register_forward_hook(mlp)
            yield layer.register_forward_hook(after_both)
        else:
            reader = getattr(layer, AFTER_ATTENTION.get(kind, "post_attention_layernorm"))
            yield reader.register_forward_pre_hook(after_attention)

    @property
    def decode(self):
        return slice(self.n_prompt - 1, self.total)

    @property
    def prompt(self):
        return slice(self.n_anchors, self.n_prompt - 1)

    def masses(self, layer):
        rows = self.weights[layer][:, self.decode]
        parts = {
            "mass_anchor": rows[:, :, : self.n_anchors],
            "mass_prompt": rows[:, :, self.prompt],
            "mass_decode": rows[:, :, self.n_prompt - 1 :],
        }
        return {name: part.sum(-1).mean(-1).numpy() for name, part in parts.items()}

    def evidence_mass(self, layer, spans):
        rows = self.weights[layer][:, self.decode]
        return sum(rows[:, :, a:b].sum(-1).mean(-1) for a, b in spans).numpy()

    def selectivity(self, layer):
        rows = self.weights[layer][:, self.decode, self.prompt].numpy()
        out = np.zeros(rows.shape[0])
        for h in range(rows.shape[0]):
            mean = rows[h].mean(0)
            out[h] = np.mean([0.5 * np.abs(rows[h, i] - mean).sum() for i in range(rows.shape[1])])
        return out

    def token_selectivity(self, layer):
        """A token's part of the selectivity, mean over heads and queries: [tokens of the prompt segment]."""
        rows = self.weights[layer][:, self.decode, self.prompt].numpy()
        parts = np.zeros(rows.shape[2])
        for head in rows:
            for t in range(rows.shape[2]):
                parts[t] += 0.5 * np.abs(head[:, t] - head[:, t].mean()).mean()
        return parts / len(rows)

    def head_attention(self, layer):
        """What each token of the prompt segment gets of each head, mean over queries: [heads, tokens]."""
        return self.weights[layer][:, self.decode, self.prompt].mean(1).numpy()

    def entropy(self, layer):
        rows = self.weights[layer][:, self.decode, self.prompt].numpy()
        out = np.full(rows.shape[0], np.nan)
        for h in range(rows.shape[0]):
            values = []
            for row in rows[h]:
                if row.sum() > 0:
                    p = row / row.sum()
                    p = p[p > 0]
                    values.append(-(p * np.log(p)).sum() / np.log(len(row)))
            if values:
                out[h] = np.mean(values)
        return out

    def top5(self, layer):
        rows = self.weights[layer][:, self.decode, self.prompt].mean(1).numpy()
        count = max(1, round(0.05 * rows.shape[1]))
        total = rows.sum(1)
        return np.divide(
            np.sort(rows, axis=1)[:, -count:].sum(1), total, out=np.full(len(rows), np.nan), where=total > 0
        )

    def contribution(self, layer):
        """What the layer adds to the residual from the prompt, family by family.

        A norm after the attention counts with the scale that the whole attention output gave it.
        """
        weights = self.weights[layer][:, self.decode, self.prompt]
        values = self.values[layer][:, self.prompt]
        values = values.repeat_interleave(weights.shape[0] // values.shape[0], dim=0)
        return self._added(layer, torch.einsum("hij,hjd->ihd", weights, values))

    def removal_effect(self, layer):
        """What the layer's attention changes if its weights on the prompt move to all else that it sees, sinks too."""
        weights, values = self.weights[layer][:, self.decode], self.values[layer]
        values = values.repeat_interleave(weights.shape[0] // values.shape[0], dim=0)
        without = weights.clone()
        without[..., self.prompt] = 0
        on_sinks = 1 - weights.sum(-1, keepdim=True) if self.model.config.model_type == "gpt_oss" else 0
        without /= without.sum(-1, keepdim=True) + on_sinks
        return self._added(layer, torch.einsum("hij,hjd->ihd", without - weights, values))

    def _added(self, layer, heads):
        """Norm of what head outputs [n_decode, heads, head_dim] add, relative to that of the residual: mean."""
        heads = heads.flatten(1)
        attention, block = self.attentions[layer], self.layers[layer]
        projection = next(
            module for name in ("o_proj", "c_proj", "dense") if (module := getattr(attention, name, None)) is not None
        )
        matrix = projection.weight if projection.__class__.__name__ == "Conv1D" else projection.weight.T
        written = heads @ matrix.detach()
        kind = self.model.config.model_type
        if kind in ("gemma2", "gemma3_text", "olmo2"):
            output = self.attention_out[layer][self.decode]
            variance = output.pow(2).mean(-1, keepdim=True) + self.model.config.rms_norm_eps
            gain = block.post_attention_layernorm.weight.detach()
            written = written / variance.sqrt() * (gain if kind == "olmo2" else 1 + gain)
        if kind == "granite":
            written = written * self.model.config.residual_multiplier
        norms = written.norm(dim=-1) / self.residual[layer][self.decode].norm(dim=-1)
        return float(norms.mean())

    def drift(self, layer, rows, centred=False):
        x, y = self.residual[layer][rows], self.residual[layer + 1][rows]
        if centred:
            x, y = x - x.mean(0), y - y.mean(0)
        return float((1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())

    def update(self, layer, rows):
        x, y = self.residual[layer][rows], self.residual[layer + 1][rows]
        return float(((y - x).norm(dim=-1) / x.norm(dim=-1)).mean())

    def to_final(self, layer, rows):
        x, y = self.residual[layer + 1][rows], self.residual[-1][rows]
        return float(((x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))).mean())

    def lens_log_probs(self, layer, readout, positions, translated=False):
        """[positions, vocab] after layer; ``readout`` maps a float64 residual to logits by the family's own rule."""
        rows = self.residual[layer + 1][self.decode][positions]
        if translated:
            prompt = self.prompt
            rows = rows + (self.residual[-1][prompt].mean(0) - self.residual[layer + 1][prompt].mean(0))
        with torch.no_grad():
            return readout(self.model, rows).log_softmax(-1)

    def saliency(self, layer, window=8, kernel=7):
        """FastKV's score, token by token, over the prompt's own columns."""
        n, groups = self.n_prompt, self.weights[layer].shape[0] // self.values[layer].shape[0]
        rows = self.weights[layer][:, n - window : n, : n - window].sum(1).numpy()
        half, kept = kernel // 2, n - window
        pooled = np.array([[r[max(0, j - half) : j + half + 1].max() for j in range(kept)] for r in rows])
        assert groups >= 1
        return pooled.sum(0)

    def speed_logits(self, cutoff):
        """Logits of the decode rows when layers >= cutoff hide the prompt from decode-phase tokens."""
        return self.logits_without(range(cutoff, len(self.layers)))

    def logits_without(self, layers):
        """Logits of the decode rows when these layers hide the prompt from decode-phase tokens."""
        hide = torch.zeros(self.total, self.total, dtype=torch.bool)
        hide[self.decode, self.prompt] = True
        with self._hiding([self.layers[layer] for layer in layers], hide), torch.no_grad():
            return self.model(self.ids).logits[0, self.decode]

    @contextmanager
    def _hiding(self, layers, hide):
        def replace(module, args, kwargs):
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            mask = bound.arguments["attention_mask"]
            assert mask.shape[-2:] == hide.shape
            bound.arguments["attention_mask"] = mask.masked_fill(hide, torch.finfo(mask.dtype).min)
            return bound.args, bound.kwargs

        handles = [layer.register_forward_pre_hook(replace, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def kl(log_p, log_q):
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def js_distance(log_p, log_q):
    pairs = zip(log_p.exp().numpy(), log_q.exp().numpy(), strict=True)
    return float(np.mean([scipy.spatial.distance.jensenshannon(p, q) for p, q in pairs]))


def assert_sweep_equals_masked_pass(reference, target, cutoffs, which):
    full = reference.logits[reference.decode].log_softmax(-1)
    rows, target = torch.arange(len(target)), torch.tensor(target)
    for k in which:
        speed = reference.speed_logits(k).log_softmax(-1)
        assert cutoffs["kl"][k - 1] == pytest.approx(kl(full, speed), rel=TOLERANCE, abs=TOLERANCE)
        agreement = (full.argmax(-1) == speed.argmax(-1)).double().mean()
        assert cutoffs["top1_agreement"][k - 1] == pytest.approx(float(agreement), abs=1e-6)
        assert cutoffs["nll"][k - 1] == pytest.approx(-float(speed[rows, target].mean()), rel=TOLERANCE, abs=TOLERANCE)
        assert cutoffs["nll_full"][k - 1] == pytest.approx(
            -float(full[rows, target].mean()), rel=TOLERANCE, abs=TOLERANCE
        )
