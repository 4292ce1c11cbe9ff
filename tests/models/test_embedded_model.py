"""The embedded model, for real: every number against the float64 reference at 500 tokens."""

import numpy as np
import pytest
import torch

from diagnostics.diagnosis.probes.logit_lens import spaced
from tests.support.examples import mostly_slow
from tests.support.observe import observe
from tests.support.prompts import real_prompt
from tests.support.reference import Reference, assert_sweep_equals_masked_pass, kl

N_DECODE = 24
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def case(smollm):
    prompt = real_prompt(smollm, 500 - N_DECODE)
    outcome, layers, heads, cutoffs = observe(smollm, prompt, n_decode=N_DECODE)
    target = outcome.reference_ids.tolist()
    anatomy = smollm.anatomy
    reference = Reference(smollm.model, anatomy.layers, anatomy.attentions, [*prompt, *target[:-1]], len(prompt), 1)
    assert 450 < reference.total <= 500
    return smollm, reference, target, layers, heads, cutoffs


def test_generated_reference_is_the_greedy_continuation(case):
    lm, reference, target, *_ = case
    ids = torch.tensor([reference.ids[0, : reference.n_prompt].tolist()])
    stock = lm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=N_DECODE, do_sample=False)
    assert stock[0, ids.shape[1] :].tolist() == target


def test_probes(case):
    _, reference, _, layers, heads, _ = case
    prompt = reference.prompt
    for layer in range(30):
        for name, expected in reference.masses(layer).items():
            np.testing.assert_allclose(heads[name][layer], expected, atol=TOLERANCE)
        np.testing.assert_allclose(heads["selectivity"][layer], reference.selectivity(layer), atol=TOLERANCE)
        np.testing.assert_allclose(heads["prompt_entropy"][layer], reference.entropy(layer), atol=TOLERANCE)
        expected = {
            "prompt_contribution": reference.contribution(layer),
            "drift_prompt": reference.drift(layer, prompt),
            "drift_prompt_centred": reference.drift(layer, prompt, centred=True),
            "drift_decode": reference.drift(layer, reference.decode),
        }
        for name, value in expected.items():
            assert layers[name][layer] == pytest.approx(value, abs=TOLERANCE), (name, layer)


def test_logit_lens(case):
    _, reference, target, layers, _, _ = case

    def head(model, rows):
        return model.lm_head(model.model.norm(rows))

    positions = spaced(len(target), 8).tolist()
    log_p = reference.lens_log_probs(29, head, positions)
    for layer in range(30):
        log_q = reference.lens_log_probs(layer, head, positions)
        translated = reference.lens_log_probs(layer, head, positions, translated=True)
        # Early layers diverge by 20 nats, of which float32 keeps a share.
        near = {"rel": TOLERANCE, "abs": TOLERANCE}
        assert layers["lens_kl"][layer] == pytest.approx(kl(log_p, log_q), **near)
        assert layers["lens_kl_translated"][layer] == pytest.approx(kl(log_p, translated), **near)
        assert layers["lens_top1"][layer] == (log_q.argmax(-1) == log_p.argmax(-1)).double().mean()


@pytest.mark.parametrize("cutoff", mostly_slow([8, 15, 22, 24, 25, 29, 30], 15, 24))
def test_sweep(case, cutoff):
    _, reference, target, _, _, cutoffs = case
    assert_sweep_equals_masked_pass(reference, target, cutoffs, [cutoff])
