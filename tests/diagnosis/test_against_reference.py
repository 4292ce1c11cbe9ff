"""Every number of a diagnosis against the float64 reference, on tiny random models of all families."""

import numpy as np
import pytest
import torch

from diagnostics.diagnosis.probes.logit_lens import spaced
from tests.support.observe import observe
from tests.support.reference import Reference, assert_sweep_equals_masked_pass, js_distance, kl
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model

N_PROMPT, N_DECODE = 45, 12
EVIDENCE = ((7, 10), (20, 22))
TOLERANCE = 1e-4


def readout(family):
    def head(model, rows):
        norm = {"gpt2": lambda: model.transformer.ln_f, "gpt_neox": lambda: model.gpt_neox.final_layer_norm}
        logits = model.get_output_embeddings()(norm.get(family, lambda: model.model.norm)()(rows))
        if family == "gemma2":
            logits = 8.0 * torch.tanh(logits / 8.0)
        return logits / 3.0 if family == "granite" else logits

    return head


def reference_of(lm, ids, n_prompt=N_PROMPT, n_anchors=1):
    return Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids, n_prompt, n_anchors)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    lm = tiny_model(request.param)
    ids = random_ids(N_PROMPT + N_DECODE)
    prompt, target = ids[:N_PROMPT], ids[N_PROMPT:]
    _, layers, heads, cutoffs = observe(lm, prompt, target, evidence=EVIDENCE)
    return request.param, lm, reference_of(lm, ids[:-1]), target, layers, heads, cutoffs


def test_attention_mass(case):
    _, _, reference, _, layers, heads, _ = case
    for layer in range(N_LAYERS):
        for name, expected in reference.masses(layer).items():
            np.testing.assert_allclose(heads[name][layer], expected, atol=TOLERANCE)
            np.testing.assert_allclose(layers[name][layer], expected.mean(), atol=TOLERANCE)


def test_masses_and_sinks_sum_to_one(case):
    _, _, _, _, _, heads, _ = case
    total = heads["mass_anchor"] + heads["mass_prompt"] + heads["mass_decode"] + heads["mass_sink"]
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_selectivity_and_sharpness(case):
    _, _, reference, _, layers, heads, _ = case
    for layer in range(N_LAYERS):
        expected = reference.selectivity(layer)
        np.testing.assert_allclose(heads["selectivity"][layer], expected, atol=TOLERANCE)
        np.testing.assert_allclose(layers["selectivity_max"][layer], expected.max(), atol=TOLERANCE)
        np.testing.assert_allclose(heads["prompt_entropy"][layer], reference.entropy(layer), atol=TOLERANCE)
        np.testing.assert_allclose(heads["prompt_top5"][layer], reference.top5(layer), atol=TOLERANCE)
        np.testing.assert_allclose(
            heads["evidence_mass"][layer], reference.evidence_mass(layer, EVIDENCE), atol=TOLERANCE
        )


def test_prompt_contribution(case):
    _, _, reference, _, layers, _, _ = case
    for layer in range(N_LAYERS):
        expected = reference.contribution(layer)
        assert layers["prompt_contribution"][layer] == pytest.approx(expected, rel=TOLERANCE)


def test_drift(case):
    _, _, reference, _, layers, _, _ = case
    prompt, decode = reference.prompt, reference.decode
    for layer in range(N_LAYERS):
        expected = {
            "drift_prompt": reference.drift(layer, prompt),
            "drift_prompt_centred": reference.drift(layer, prompt, centred=True),
            "drift_decode": reference.drift(layer, decode),
            "update_prompt": reference.update(layer, prompt),
            "update_decode": reference.update(layer, decode),
            "to_final_prompt": reference.to_final(layer, prompt),
            "to_final_decode": reference.to_final(layer, decode),
        }
        for name, value in expected.items():
            assert layers[name][layer] == pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE), name


def test_logit_lens(case):
    family, _, reference, _, layers, _, _ = case
    positions = spaced(N_DECODE, 8).tolist()
    read = readout(family)
    log_p = reference.lens_log_probs(N_LAYERS - 1, read, positions)
    np.testing.assert_allclose(log_p, reference.logits[reference.decode][positions].log_softmax(-1), atol=1e-9)
    top = log_p.argmax(-1)
    agree, previous = [], None
    for layer in range(N_LAYERS):
        log_q = reference.lens_log_probs(layer, read, positions)
        translated = reference.lens_log_probs(layer, read, positions, translated=True)
        rank = (log_q > log_q.gather(-1, top[:, None])).sum(-1)
        assert layers["lens_kl"][layer] == pytest.approx(kl(log_p, log_q), rel=TOLERANCE, abs=TOLERANCE)
        assert layers["lens_kl_translated"][layer] == pytest.approx(kl(log_p, translated), rel=TOLERANCE, abs=TOLERANCE)
        assert layers["lens_rank"][layer] == rank.median()
        assert layers["lens_top1"][layer] == (log_q.argmax(-1) == top).double().mean()
        if previous is not None:
            assert layers["lens_js"][layer] == pytest.approx(js_distance(previous, log_q), abs=TOLERANCE)
        agree.append((log_q.argmax(-1) == top).numpy())
        previous = log_q
    for layer in range(N_LAYERS):
        assert layers["lens_settled"][layer] == np.all(agree[layer:], axis=0).mean()


def test_saliency(case):
    _, _, reference, _, layers, _, _ = case
    scores = np.stack([reference.saliency(layer) for layer in range(N_LAYERS)])
    count = int(0.2 * scores.shape[1])
    tops = [set(np.argsort(-row, kind="stable")[:count]) for row in scores]
    for layer in range(N_LAYERS - 1):
        overlaps = [len(tops[layer] & tops[later]) / count for later in range(layer + 1, N_LAYERS)]
        # Max-pooling makes exact ties, and which of them is kept is arbitrary.
        slack = 2 / count
        assert layers["saliency_overlap"][layer] == pytest.approx(np.mean(overlaps), abs=slack)
        assert layers["saliency_overlap_next"][layer] == pytest.approx(overlaps[0], abs=slack)


def test_sweep(case):
    _, _, reference, target, _, _, cutoffs = case
    assert len(cutoffs["kl"]) == N_LAYERS
    assert_sweep_equals_masked_pass(reference, target, cutoffs, range(1, N_LAYERS + 1))
    assert cutoffs["kl"][-1] == 0
    assert cutoffs["kl"][0] > 0.01, "a cutoff of 1 must hurt, or this test cannot fail"


@pytest.mark.parametrize("n_anchors", [0, 3, 60])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_sweep_with_other_anchors(family, n_anchors):
    lm, ids = tiny_model(family), random_ids(N_PROMPT + N_DECODE, seed=3)
    target = ids[N_PROMPT:]
    _, layers, _, cutoffs = observe(lm, ids[:N_PROMPT], target, n_anchors=n_anchors)
    effective = min(n_anchors, N_PROMPT - 1)
    reference = reference_of(lm, ids[:-1], n_anchors=effective)
    assert_sweep_equals_masked_pass(reference, target, cutoffs, range(1, N_LAYERS + 1))
    np.testing.assert_allclose(layers["mass_anchor"][2], reference.masses(2)["mass_anchor"].mean(), atol=TOLERANCE)
    if n_anchors == 60:  # everything is anchor, so nothing is cut
        assert cutoffs["kl"].max() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("n_prompt", [1, 2, 3, 8, 9])
def test_short_prompts(n_prompt):
    lm, ids = tiny_model("llama"), random_ids(n_prompt + 4, seed=1)
    _, layers, heads, cutoffs = observe(lm, ids[:n_prompt], ids[n_prompt:])
    reference = reference_of(lm, ids[:-1], n_prompt=n_prompt, n_anchors=min(1, n_prompt - 1))
    assert_sweep_equals_masked_pass(reference, ids[n_prompt:], cutoffs, range(1, N_LAYERS + 1))
    for layer in range(N_LAYERS):
        for name, expected in reference.masses(layer).items():
            np.testing.assert_allclose(heads[name][layer], expected, atol=TOLERANCE)
    assert np.isnan(layers["drift_prompt"]).all() == (n_prompt <= 2)
    if n_prompt <= 2:  # nothing between the anchor and the first decode-phase token: nothing to cut
        assert cutoffs["kl"].max() == pytest.approx(0, abs=1e-5)
