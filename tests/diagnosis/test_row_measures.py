"""What is measured of residual rows and of the lens, against the float64 reference and by hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from diagnostics.diagnosis.observers import ContextRows
from diagnostics.diagnosis.probes.attention_cosine import AttentionCosine
from diagnostics.diagnosis.probes.cka import N_ROWS, Cka
from diagnostics.diagnosis.probes.logit_lens import EXIT_GAP
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.policies.segments import Layout
from diagnostics.support.divergence import probability_gaps
from tests.support.observe import observe
from tests.support.reference import Reference
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model

N_PROMPT, N_DECODE = 45, 8
TOLERANCE = 1e-4
COLUMNS = ("attention_cosine", "attention_update_prompt", "angular_to_last", "cka_to_final")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    """Measured columns and their reference, for a prompt with two anchors."""
    lm, ids = tiny_model(request.param), random_ids(N_PROMPT + N_DECODE, seed=4)
    _, layers, _, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:], n_anchors=2, n_decode=N_DECODE)
    return layers, Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids[:-1], N_PROMPT, 2)


def test_attention_cosine(case):
    layers, reference = case
    rows = reference.prompt
    for layer in range(N_LAYERS):
        x = reference.residual[layer][rows].numpy()
        added = reference.attention_added[layer][rows].numpy()
        cosines = [a @ b / math.sqrt((a @ a) * (b @ b)) for a, b in zip(x, x + added, strict=True)]
        sizes = [math.sqrt((b @ b) / (a @ a)) for a, b in zip(x, added, strict=True)]
        assert layers["attention_cosine"][layer] == pytest.approx(np.mean(cosines), abs=TOLERANCE)
        assert layers["attention_update_prompt"][layer] == pytest.approx(np.mean(sizes), rel=TOLERANCE)
    assert layers["attention_cosine"].min() < 0.99, "nothing turns, so this test could not fail"


def test_angle_to_the_last_layer(case):
    layers, reference = case
    last = reference.residual[N_LAYERS - 1][N_PROMPT - 1].numpy()
    for layer in range(N_LAYERS - 1):
        state = reference.residual[layer][N_PROMPT - 1].numpy()
        cosine = state @ last / (np.linalg.norm(state) * np.linalg.norm(last))
        assert layers["angular_to_last"][layer] == pytest.approx(math.acos(cosine) / math.pi, abs=TOLERANCE)
    assert layers["angular_to_last"][-1] == 0


def test_cka(case):
    """From the features, [width, width], where the probe goes by the rows."""
    layers, reference = case
    y = reference.residual[-1][reference.prompt].numpy()
    y = y - y.mean(0)
    for layer in range(N_LAYERS):
        x = reference.residual[layer][reference.prompt].numpy()
        x = x - x.mean(0)
        squares = [np.sum((a.T @ b) ** 2) for a, b in ((y, x), (x, x), (y, y))]
        expected = squares[0] / math.sqrt(squares[1] * squares[2])
        assert layers["cka_to_final"][layer] == pytest.approx(expected, abs=TOLERANCE)
    assert layers["cka_to_final"].max() < 0.999


def context_of(n_prompt, n_layers, n_anchors=1):
    lm = tiny_model("llama")
    return PromptContext(Layout.of(n_prompt, n_anchors), n_layers, Readout(lm.anatomy), "tiny")


def test_long_prompts_are_measured_in_blocks_and_by_evenly_spaced_rows():
    """More rows than a block, and than the rows of a Gram matrix; of half-precision residuals."""
    generator = torch.Generator().manual_seed(0)
    n_prompt, width, n_layers = 1500, 24, 3
    context = context_of(n_prompt, n_layers)
    probes = AttentionCosine(context), Cka(context)
    scale = torch.rand(width, generator=generator) * 3
    states = [(torch.randn(n_prompt - 1, width, generator=generator) * scale).bfloat16() for _ in range(n_layers + 1)]
    added = [torch.randn(n_prompt - 1, width, generator=generator).bfloat16() for _ in range(n_layers)]
    for layer in range(n_layers):
        for probe in probes:
            probe.on_context(ContextRows(layer, states[layer], states[layer + 1], added[layer]))
    cosine, cka = (probe.measured().layers for probe in probes)
    picked = 1 + np.linspace(0, n_prompt - 3, N_ROWS).round().astype(int)
    y = states[-1].double().numpy()[picked]
    y -= y.mean(0)
    for layer in range(n_layers):
        x, step = states[layer].double().numpy()[1:], added[layer].double().numpy()[1:]
        turned = x + step
        cosines = (x * turned).sum(1) / np.sqrt((x * x).sum(1) * (turned * turned).sum(1))
        assert cosine["attention_cosine"][layer] == pytest.approx(cosines.mean(), abs=1e-6)
        rows = states[layer].double().numpy()[picked]
        rows -= rows.mean(0)
        squares = [np.sum((a.T @ b) ** 2) for a, b in ((y, rows), (rows, rows), (y, y))]
        assert cka["cka_to_final"][layer] == pytest.approx(squares[0] / math.sqrt(squares[1] * squares[2]), rel=1e-5)


def test_the_grams_go_with_the_last_layer():
    context = context_of(20, 2)
    probe, rows = Cka(context), torch.randn(19, 8)
    probe.on_context(ContextRows(0, rows, rows, rows))
    assert [gram.shape for gram in probe.grams] == [(18, 18)]
    probe.on_context(ContextRows(1, rows, rows, rows))
    assert not probe.grams
    np.testing.assert_allclose(probe.measured().layers["cka_to_final"], 1, atol=1e-6)


def test_equal_states_resemble_nothing():
    probe, rows = Cka(context_of(20, 2)), torch.randn(19, 8)
    probe.on_context(ContextRows(0, rows[:1].expand(19, -1), rows, rows))  # as embeddings of one token, repeated
    probe.on_context(ContextRows(1, rows, rows, rows))
    np.testing.assert_allclose(probe.measured().layers["cka_to_final"], [np.nan, 1], atol=1e-6)


def test_a_residual_that_is_not_turned_has_cosine_one():
    probe, rows = AttentionCosine(context_of(5, 1)), torch.randn(4, 8)
    probe.on_context(ContextRows(0, rows, rows, rows * 0.5))
    assert probe.measured().layers["attention_cosine"][0] == pytest.approx(1, abs=1e-6)
    assert probe.measured().layers["attention_update_prompt"][0] == pytest.approx(0.5)


@pytest.mark.parametrize("generated", [False, True])
@pytest.mark.parametrize("n_prompt", [1, 2, 3, 4])
def test_short_prompts(n_prompt, generated):
    """Without a prompt segment nothing is said of prompt rows; CKA needs two rows; the last prompt token is there."""
    lm, ids = tiny_model("llama"), random_ids(n_prompt + 4, seed=1)
    _, layers, _, _ = observe(lm, ids[:n_prompt], None if generated else ids[n_prompt:])
    segment = max(0, n_prompt - 2)
    assert np.isnan(layers["attention_cosine"]).all() == (segment < 1)
    assert np.isnan(layers["attention_update_prompt"]).all() == (segment < 1)
    assert np.isnan(layers["cka_to_final"]).all() == (segment < 2)
    assert np.isfinite(layers["angular_to_last"]).all()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_given_and_generated_references_give_the_same(family):
    lm, prompt = tiny_model(family), random_ids(30, seed=2)
    outcome, generated, *_ = observe(lm, prompt, n_decode=5)
    _, given, *_ = observe(lm, prompt, outcome.reference_ids.tolist(), n_decode=5)
    for column in (*COLUMNS, "lens_exited"):
        np.testing.assert_allclose(generated[column], given[column], atol=TOLERANCE, err_msg=column)


# --- Early exit ---


def test_gaps_of_slices_equal_those_of_all_logits():
    logits = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(1)) * 3
    logits[0, 0, :2] = 20  # two that are equal
    slices = [logits[..., :1], logits[..., 1:30], logits[..., 30:]]
    found = probability_gaps(slices, logits.double().logsumexp(-1))
    ordered = np.sort(logits.double().softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(found, ordered[..., -1] - ordered[..., -2], atol=1e-6)
    assert found[0, 0] == 0


def test_layers_count_as_exited_from_the_first_sure_one_on():
    """With logits made sharp, so that some positions are sure in a layer and not in the next."""
    lm, ids = tiny_model("llama", seed=3), random_ids(60, seed=5)
    with torch.no_grad():
        lm.model.lm_head.weight.mul_(5)
    _, layers, _, _ = observe(lm, ids[:45], ids[45:], n_decode=15, lens_positions=15)
    reference = Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids[:-1], 45, 1)
    sure = []
    for layer in range(N_LAYERS):
        rows = reference.residual[layer + 1][reference.decode]
        with torch.no_grad():
            p = reference.model.lm_head(reference.model.model.norm(rows)).softmax(-1).numpy()
        ordered = np.sort(p, axis=-1)
        sure.append(ordered[:, -1] - ordered[:, -2] >= EXIT_GAP)
    expected = [np.any(sure[: layer + 1], axis=0).mean() for layer in range(N_LAYERS)]
    np.testing.assert_allclose(layers["lens_exited"], expected)
    assert 0 < expected[0] < expected[-1] < 1
    assert any((~after & before).any() for before, after in itertools.pairwise(sure))
