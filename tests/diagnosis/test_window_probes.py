"""What rules read from attention weights, against slow float64 versions written from the formulas alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from diagnostics.diagnosis.attended import attend
from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention
from diagnostics.diagnosis.probes import lazy_share as lazy
from diagnostics.diagnosis.probes.rank_variance import rank_variance
from diagnostics.diagnosis.probes.removal_effect import without_prompt
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.segments import Layout
from tests.support.examples import examples
from tests.support.observe import observe
from tests.support.reference import Reference
from tests.support.tiny import FAMILIES, N_LAYERS, SLIDING_WINDOW, random_ids, tiny_config, tiny_model, tiny_tokenizer

N_PROMPT, N_DECODE = 45, 12
TOLERANCE = 1e-4


def reference_of(lm, ids, n_prompt=N_PROMPT, n_anchors=1):
    return Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids, n_prompt, n_anchors)


def wrapped(config):
    """A random model of a configuration of its own."""
    torch.manual_seed(0)
    return LoadedModel.wrap(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny")


def sees_all(family, layer, n_rows, width=SLIDING_WINDOW):
    sliding = {"mistral": range(N_LAYERS), "gemma2": (0, 2, 3), "gemma3": (0, 2, 3), "gpt_oss": (0, 2, 3)}
    return layer not in sliding.get(family, ()) or n_rows <= width


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    lm = tiny_model(request.param)
    ids = random_ids(N_PROMPT + N_DECODE)
    _, layers, heads, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    return request.param, reference_of(lm, ids[:-1]), layers, heads


# --- The formulas, one number at a time ---


def window(reference, layer, n_queries):
    """Weights of the last prompt queries over the prompt, [heads, queries, n_prompt]."""
    n = reference.n_prompt
    return reference.weights[layer][:, n - n_queries : n, :n].numpy()


def statistics(reference, layer):
    """Entropy, top share and variance of StructKV's window attention."""
    p = window(reference, layer, 8).mean((0, 1))[:-8]
    p = p / p.sum()
    top = sorted(p, reverse=True)[: max(1, int(0.2 * len(p)))]
    return -sum(x * np.log(x) for x in p), sum(top), np.mean([(x - 1 / len(p)) ** 2 for x in p])


def lazy_share(reference, layer, first=4):
    row = window(reference, layer, 1)[:, 0]
    recent = reference.n_prompt // 8
    return np.mean([sum(head[:first]) + sum(head[len(head) - recent :]) for head in row])


def ranks(reference, layer):
    """ASL's ranks: each token's place among the scores of all."""
    received = window(reference, layer, 32).sum((0, 1))[:-32]
    n = len(received)
    scores = [sum(received[max(0, j - 3) : j + 4]) / 7 for j in range(n)]
    return np.array(
        [1 + sum(s > score or (s == score and i < j) for i, s in enumerate(scores)) for j, score in enumerate(scores)]
    )


def rank_variances(reference, family, first, n_observed):
    found = np.full(len(reference.weights), np.nan)
    for layer in range(first, len(found)):
        observed = range(layer - n_observed + 1, layer + 1)
        if all(sees_all(family, o, reference.n_prompt) for o in observed):
            of_layers = [ranks(reference, o) for o in observed]
            found[layer] = np.mean([(r - np.mean(of_layers, axis=0)) ** 2 for r in of_layers])
    return found / found[first]


def top_tokens(scores):
    """Indices of the top tenth after averaging over seven neighbours."""
    n = len(scores)
    smooth = [sum(scores[max(0, j - 3) : j + 4]) / 7 for j in range(n)]
    return set(sorted(range(n), key=lambda j: (-smooth[j], j))[: max(1, n // 10)])


def oracle_recalls(reference, family, n_anchors=1, width=SLIDING_WINDOW):
    """Recall of CLAA's oracle by each layer's window, and by the largest scores of the last four."""
    n, total, n_layers = reference.n_prompt, reference.total, len(reference.weights)
    tokens = slice(n_anchors, n - 8)
    read = [
        reference.weights[o][:, n - 1 :, tokens].numpy() for o in range(n_layers) if sees_all(family, o, total, width)
    ]
    one, four = np.full(n_layers, np.nan), np.full(n_layers, np.nan)
    if not read:
        return one, four
    oracle = top_tokens(np.mean(np.max(np.concatenate(read), axis=0), axis=0))

    def of_kv_heads(layer):
        groups = np.split(window(reference, layer, 8)[:, :, tokens].sum(1), len(reference.values[layer]))
        return [[sum(g[max(0, j - 3) : j + 4]) / 7 for j in range(len(g))] for g in (group.sum(0) for group in groups)]

    def recall(layers):
        scores = np.max([head for layer in layers for head in of_kv_heads(layer)], axis=0)
        best = sorted(range(len(scores)), key=lambda j: (-scores[j], j))[: len(oracle)]
        return len(oracle & set(best)) / len(oracle)

    for layer in range(n_layers):
        if sees_all(family, layer, n, width):
            one[layer] = recall([layer])
        if layer >= 3 and all(sees_all(family, o, n, width) for o in range(layer - 3, layer + 1)):
            four[layer] = recall(range(layer - 3, layer + 1))
    return one, four


# --- The probes against them ---


def test_removal_effect(case):
    _, reference, layers, _ = case
    for layer in range(N_LAYERS):
        expected = reference.removal_effect(layer)
        assert layers["removal_effect"][layer] == pytest.approx(expected, rel=TOLERANCE)


def test_window_statistics(case):
    family, reference, layers, _ = case
    for layer in range(N_LAYERS):
        seen = sees_all(family, layer, N_PROMPT)
        expected = statistics(reference, layer) if seen else [np.nan] * 3
        for name, number in zip(("window_entropy", "window_top20", "window_variance"), expected, strict=True):
            assert layers[name][layer] == pytest.approx(number, rel=TOLERANCE, nan_ok=not seen), name


def test_lazy_share(case):
    family, reference, layers, _ = case
    for layer in range(N_LAYERS):
        seen = sees_all(family, layer, N_PROMPT)
        expected = lazy_share(reference, layer) if seen else np.nan
        assert layers["lazy_share"][layer] == pytest.approx(expected, rel=TOLERANCE, nan_ok=not seen)


def test_rank_variance(case):
    family, reference, layers, _ = case
    expected = rank_variances(reference, family, first=2, n_observed=3)  # 10 and 8 of 32 layers, scaled to 5
    np.testing.assert_allclose(layers["rank_variance_ratio"], expected, rtol=TOLERANCE)
    if family not in ("mistral", "gemma2", "gemma3", "gpt_oss"):
        assert np.isfinite(expected[2:]).all()


def test_oracle_agreement(case):
    family, reference, layers, _ = case
    one, four = oracle_recalls(reference, family)
    np.testing.assert_allclose(layers["oracle_recall"], one, atol=1e-6)
    np.testing.assert_allclose(layers["oracle_recall_4"], four, atol=1e-6)


@pytest.mark.parametrize(("n_prompt", "n_anchors"), [(9, 0), (9, 1), (10, 1), (12, 20), (120, 0), (120, 5)])
def test_oracle_agreement_of_other_prompts(n_prompt, n_anchors):
    lm, ids = tiny_model("llama"), random_ids(n_prompt + N_DECODE, seed=5)
    _, layers, _, _ = observe(lm, ids[:n_prompt], ids[n_prompt:], n_anchors=n_anchors)
    if n_prompt - 8 <= n_anchors:  # no token between anchors and window
        assert np.isnan(layers["oracle_recall"]).all()
        return
    one, four = oracle_recalls(reference_of(lm, ids[:-1], n_prompt, n_anchors), "llama", n_anchors)
    np.testing.assert_allclose(layers["oracle_recall"], one, atol=1e-6)
    np.testing.assert_allclose(layers["oracle_recall_4"], four, atol=1e-6)
    if n_prompt == 120:
        assert 0 <= np.nanmin(one) < np.nanmax(one) < 1


def test_a_window_that_hides_the_prompt_from_some_decode_rows_hides_a_layer_from_the_oracle():
    """Prompts as long as the sliding window: the window of the prompt sees all, later rows do not."""
    config = tiny_config("gemma3")
    config.sliding_window = N_PROMPT
    lm, ids = wrapped(config), random_ids(N_PROMPT + N_DECODE, seed=2)
    _, layers, _, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    one, four = oracle_recalls(reference_of(lm, ids[:-1]), "gemma3", width=N_PROMPT)
    np.testing.assert_allclose(layers["oracle_recall"], one, atol=1e-6)
    np.testing.assert_allclose(layers["oracle_recall_4"], four, atol=1e-6)
    assert np.isfinite(one).all()
    everywhere = oracle_recalls(reference_of(lm, ids[:-1]), "gemma3", width=1000)[0]
    assert not np.allclose(one, everywhere), "the sliding layers must matter, or this test cannot fail"


def test_rank_variance_of_a_deep_model_has_the_published_numbers():
    config = tiny_config("llama")
    config.num_hidden_layers = 18
    lm, ids = wrapped(config), random_ids(N_PROMPT + 2)
    _, layers, _, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    expected = rank_variances(reference_of(lm, ids[:-1]), "llama", first=10, n_observed=8)
    np.testing.assert_allclose(layers["rank_variance_ratio"], expected, rtol=TOLERANCE)
    assert np.isfinite(expected[10:]).all()


@examples(30)
@given(n_layers=st.integers(1, 5), n_tokens=st.integers(1, 20), n_kept=st.integers(1, 25), seed=st.integers(0, 999))
def test_rank_variance_counts_the_tokens_that_a_layer_would_keep(n_layers, n_tokens, n_kept, seed):
    drawn = np.random.default_rng(seed)
    of_layers = np.stack([drawn.permutation(n_tokens) + 1 for _ in range(n_layers)])
    kept = {j for ranks in of_layers for j in range(n_tokens) if ranks[j] <= n_kept}
    expected = np.mean([(r[j] - of_layers[:, j].mean()) ** 2 for r in of_layers for j in kept])
    assert rank_variance(torch.from_numpy(of_layers).double(), n_kept) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("n_prompt", "expected"), [(1, 0), (7, 0), (8, 1), (100, 12), (1029, 128), (1030, 1024), (9000, 1024)]
)
def test_recent_tokens_of_a_prompt(n_prompt, expected):
    assert lazy.n_recent(n_prompt) == expected


# --- Short prompts, windows, anchors ---


@pytest.mark.parametrize("n_prompt", [1, 2, 8, 9, 10, 32, 33])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_short_prompts(family, n_prompt):
    lm, ids = tiny_model(family), random_ids(n_prompt + 4, seed=1)
    _, layers, _, _ = observe(lm, ids[:n_prompt], ids[n_prompt:])
    reference = reference_of(lm, ids[:-1], n_prompt, n_anchors=min(1, n_prompt - 1))
    for layer in range(N_LAYERS):
        seen = sees_all(family, layer, n_prompt)
        assert layers["removal_effect"][layer] == pytest.approx(
            reference.removal_effect(layer), rel=TOLERANCE, abs=1e-6
        )
        expected = lazy_share(reference, layer) if seen and n_prompt >= 8 else np.nan
        assert layers["lazy_share"][layer] == pytest.approx(expected, rel=TOLERANCE, nan_ok=True)
        expected = statistics(reference, layer)[0] if seen and n_prompt > 8 else np.nan
        assert layers["window_entropy"][layer] == pytest.approx(expected, rel=TOLERANCE, abs=1e-6, nan_ok=True)
    # One token, or none, has one rank in all layers: no variance to be relative to.
    assert np.isnan(layers["rank_variance_ratio"]).all()
    if n_prompt <= 2:  # nothing between anchor and decode phase
        np.testing.assert_array_equal(layers["removal_effect"], 0)


@pytest.mark.parametrize("n_anchors", [0, 3, 60])
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_other_anchors(family, n_anchors):
    lm, ids = tiny_model(family), random_ids(N_PROMPT + N_DECODE, seed=3)
    _, layers, _, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:], n_anchors=n_anchors)
    reference = reference_of(lm, ids[:-1], n_anchors=min(n_anchors, N_PROMPT - 1))
    for layer in range(N_LAYERS):
        assert layers["removal_effect"][layer] == pytest.approx(
            reference.removal_effect(layer), rel=TOLERANCE, abs=1e-6
        )


@examples(40)
@given(
    n_prompt=st.integers(3, 30),
    n_decode=st.integers(1, 6),
    pull=st.floats(-40, 40),
    with_sinks=st.booleans(),
    seed=st.integers(0, 999),
)
def test_heads_without_the_prompt_however_little_it_leaves(n_prompt, n_decode, pull, with_sinks, seed):
    """Prompt keys that take all but 1e-17 of the weight, or nearly none: the change is exact at both ends."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    total, layout = n_prompt + n_decode - 1, Layout(1, n_prompt)
    query, key, value = draw(2, n_decode, 4), draw(1, total, 4), draw(1, total, 4)
    query[..., 0], key[..., 0] = 1, 0
    key[:, layout.prompt, 0] = pull
    visible = torch.arange(total)[None] <= torch.arange(n_prompt - 1, total)[:, None]
    sinks = draw(2) if with_sinks else None
    rows = RecomputedAttention(query, key, value, visible, 1.0, None, sinks, draw(n_decode, 2, 4), lambda x: x)
    change = without_prompt(attend(rows, layout))

    scores = (query.double() @ key.double().mT).masked_fill(~visible, -torch.inf)
    sink = (
        torch.full((2, n_decode, 1), -torch.inf)
        if sinks is None
        else sinks.double()[:, None, None].expand(-1, n_decode, 1)
    )
    hidden = scores.clone()
    hidden[..., layout.prompt] = -torch.inf
    full, without = (torch.cat([s, sink], -1).softmax(-1)[..., :-1] @ value.double() for s in (scores, hidden))
    torch.testing.assert_close(change.double(), (without - full).transpose(0, 1), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_removal_effect_is_the_change_of_a_masked_layer(family):
    """The same number without any weight: what the stock layer's attention gives with the prompt masked out."""
    lm, ids = tiny_model(family), random_ids(N_PROMPT + N_DECODE)
    _, layers, _, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:])
    reference = reference_of(lm, ids[:-1])
    rows, given_by = reference.decode, []
    for layer in range(N_LAYERS):
        handle = reference.attentions[layer].register_forward_hook(lambda _, __, out: given_by.append(out[0][0, rows]))
        reference.logits_without([layer])
        handle.remove()
        change = given_by[-1] - reference.attention_out[layer][rows]
        expected = (change.norm(dim=-1) / reference.residual[layer][rows].norm(dim=-1)).mean()
        assert layers["removal_effect"][layer] == pytest.approx(float(expected), rel=TOLERANCE)
