"""The capture leaves no trace, gives the same numbers either way it runs, and refuses what it does not understand."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import scipy.spatial
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from diagnostics import UserError, diagnose, load_prompts
from diagnostics.diagnosis.attended import attend
from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention, visible_keys
from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.probes import all_probes
from diagnostics.diagnosis.readout import Readout
from diagnostics.models import attention_tap
from diagnostics.policies.segments import Layout
from tests.support.examples import examples
from tests.support.observe import observe
from tests.support.tiny import FAMILIES, random_ids, tiny_model


def fingerprint(model):
    """Everything a capture could leave behind: hooks of every kind on every module, attributes, configuration."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")
    hooks = {name: [len(getattr(module, kind)) for kind in kinds] for name, module in model.named_modules()}
    attributes = {name: sorted(vars(module)) for name, module in model.named_modules()}
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    return hooks, attributes, forwards, model.config.to_dict(), model.config._attn_implementation


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_capture_undoes_everything(family):
    lm = tiny_model(family)
    ids = torch.tensor([random_ids(30)])
    before, weights = fingerprint(lm.model), copy.deepcopy(lm.model.state_dict())
    with torch.no_grad():
        logits = lm.model(ids).logits
        observe(lm, ids[0].tolist())
        again = lm.model(ids).logits
    assert fingerprint(lm.model) == before
    assert torch.equal(logits, again)
    assert all(torch.equal(weights[name], value) for name, value in lm.model.state_dict().items())
    assert not attention_tap._RECORDERS


class Failing:
    """An observer that fails in the middle of a layer, while branches run."""

    def on_context(self, rows):
        pass

    def on_decode(self, rows):
        if rows.layer == 2:
            rows.branch(rows.residual_out[None])
            raise RuntimeError("failed on purpose")

    def on_outcome(self, outcome):
        raise AssertionError("not reached")


@pytest.mark.parametrize("reference", [None, [5, 6, 7]])
def test_capture_undoes_everything_after_an_error(reference):
    lm = tiny_model("llama")
    before = fingerprint(lm.model)
    with pytest.raises(RuntimeError, match="on purpose"):
        HooksCapture(lm).run(random_ids(20), reference, [Failing()], n_decode=3, n_anchors=1)
    assert fingerprint(lm.model) == before
    assert not attention_tap._RECORDERS


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt2", "gpt_oss", "mistral"])
def test_a_given_reference_and_the_same_one_generated_give_the_same_numbers(family):
    """One forward pass against prefill, generation, roll-back and decode chunk."""
    lm, prompt = tiny_model(family), random_ids(40, seed=2)
    outcome, *generated = observe(lm, prompt, evidence=((5, 9),))
    _, *given_ = observe(lm, prompt, outcome.reference_ids.tolist(), evidence=((5, 9),))
    for ours, theirs in zip(generated, given_, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, err_msg=name)


def test_generation_stops_at_the_end_token_and_counts_it():
    lm, prompt = tiny_model("llama"), random_ids(12)
    free, *_ = observe(lm, prompt, n_decode=6)
    ids = free.reference_ids.tolist()
    lm.model.generation_config.eos_token_id = [ids[2]]
    stopped, _, _, cutoffs = observe(lm, prompt, n_decode=6)
    end = ids.index(ids[2]) + 1
    assert stopped.reference_ids.tolist() == ids[:end]
    assert len(stopped.logits) == end
    assert np.isfinite(cutoffs["kl"]).all()


def test_two_models_in_one_process_do_not_meet():
    first, second = tiny_model("llama"), tiny_model("qwen3", seed=1)
    alone = [observe(lm, random_ids(25))[1]["mass_prompt"] for lm in (first, second)]
    again = [observe(lm, random_ids(25))[1]["mass_prompt"] for lm in (first, second)]
    np.testing.assert_array_equal(alone, again)
    assert not np.allclose(alone[0], alone[1])


def test_probes_are_found_by_their_files():
    expected = {"attention_mass", "attention_cosine", "angular_distance", "cka", "cutoff_sweep", "drift", "logit_lens"}
    assert expected <= set(all_probes())


def biased_attention(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention with a distance penalty that no probe knows (ALiBi)."""
    rows, columns = query.shape[2], key.shape[2]
    distance = torch.arange(columns)[None] - torch.arange(columns - rows, columns)[:, None]
    bias = torch.where(distance > 0, -math.inf, distance * 0.5)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.transpose(2, 3) * scaling + bias).softmax(-1)
    return (weights @ value).transpose(1, 2), None


def test_attention_that_is_not_understood_is_refused():
    AttentionInterface.register("biased", biased_attention)
    AttentionMaskInterface.register("biased", sdpa_mask)
    lm = tiny_model("llama")
    lm.model.set_attn_implementation("biased")
    with pytest.raises(UserError, match="in layer 0 its attention output differs"):
        observe(lm, random_ids(20))


def test_logits_that_are_not_understood_are_refused():
    lm = tiny_model("llama")
    wrong = dataclasses.replace(lm, anatomy=dataclasses.replace(lm.anatomy, logit_scale=1.1))
    with pytest.raises(UserError, match="miss its own logits"):
        observe(wrong, random_ids(20))


def test_half_precision_is_close_to_float32():
    lm, half = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    ids = random_ids(60)
    _, layers, _, cutoffs = observe(lm, ids[:48], ids[48:])
    _, low, _, cutoffs_low = observe(half, ids[:48], ids[48:])
    np.testing.assert_allclose(low["mass_prompt"], layers["mass_prompt"], atol=0.05)
    np.testing.assert_allclose(cutoffs_low["kl"], cutoffs["kl"], rtol=0.3, atol=0.05)


@pytest.mark.parametrize("window", [None, 1, 4, 12])
def test_visible_keys_without_a_mask_are_causal_within_the_window(window):
    """Rows 2 to 6 of a pass that begins at position 3, against 12 keys."""
    seen = visible_keys(None, 3, 9, 12, window, slice(2, 7))
    for row, position in enumerate(range(5, 10)):
        first = 0 if window is None else max(0, position - window + 1)  # itself and window - 1 before it
        assert seen[row].nonzero().flatten().tolist() == list(range(first, position + 1))


@examples(40)
@given(
    n_prompt=st.integers(1, 40),
    n_decode=st.integers(1, 9),
    anchors=st.integers(0, 4),
    group=st.integers(1, 3),
    tile_bytes=st.sampled_from([1, 700, 1 << 20]),
    keep_bytes=st.sampled_from([0, 1 << 28]),
    window=st.sampled_from([None, 3, 11]),
    seed=st.integers(0, 1000),
)
def test_attention_by_tiles_equals_attention_at_once(
    n_prompt, n_decode, anchors, group, tile_bytes, keep_bytes, window, seed
):
    generator = torch.Generator().manual_seed(seed)
    total, anchors = n_prompt + n_decode - 1, min(anchors, n_prompt - 1)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    distance = torch.arange(n_prompt - 1, total)[:, None] - torch.arange(total)[None]
    visible = (distance >= 0) & (distance < (window or total))
    query, key, value = draw(2 * group, n_decode, 4), draw(2, total, 4), draw(2, total, 4)
    rows = RecomputedAttention(query, key, value, visible, 0.5, None, None, draw(n_decode, 2 * group, 4), lambda x: x)
    layout = Layout(anchors, n_prompt)
    attended = attend(rows, layout, (), tile_bytes, keep_bytes, per_token=True)
    columns, output = attended.columns, attended.output

    scores = query.double() @ key.double().repeat_interleave(group, 0).transpose(1, 2) * 0.5
    weights = torch.from_numpy(scipy.special.softmax(scores.masked_fill(~visible, -np.inf).numpy(), axis=-1))
    values = value.double().repeat_interleave(group, 0)
    torch.testing.assert_close(output.double(), (weights @ values).transpose(0, 1), atol=1e-5, rtol=0)
    part = weights[..., layout.prompt]
    torch.testing.assert_close(
        attended.from_prompt.double(), (part @ values[:, layout.prompt]).transpose(0, 1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(columns["mass_prompt"].double(), part.sum(-1).mean(-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(attended.received, part.mean(1), atol=1e-5, rtol=0)
    torch.testing.assert_close(attended.peak.double(), part.amax(0), atol=1e-5, rtol=0)
    torch.testing.assert_close(attended.mass_rest.double(), 1 - part.sum(-1).T, atol=1e-5, rtol=0)
    variation = (part - part.mean(1, keepdim=True)).abs().mean(1) / 2
    torch.testing.assert_close(attended.selective, variation, atol=1e-5, rtol=0)
    torch.testing.assert_close(columns["selectivity"].double(), variation.sum(-1), atol=1e-5, rtol=0)
    assert (columns["mass_anchor"] + columns["mass_prompt"] + columns["mass_decode"]).allclose(torch.ones(()))


@examples(15)
@given(positions=st.integers(1, 5), candidates=st.integers(1, 6), scale=st.floats(0.1, 30), seed=st.integers(0, 999))
def test_comparison_equals_scipy(positions, candidates, scale, seed):
    lm = tiny_model("llama")
    generator = torch.Generator().manual_seed(seed)
    final = torch.randn(positions, 32, generator=generator) * scale
    rows = torch.randn(positions, candidates, 32, generator=generator) * scale
    targets = torch.randint(0, 211, (positions,), generator=generator)
    with torch.no_grad():
        reader = Readout(lm.anatomy)
        found = reader.compare(reader.logits(final), rows, targets, consecutive=True)
        norm, head = copy.deepcopy(lm.model.model.norm).double(), lm.model.lm_head.weight.double()
        p = (norm(final.double()) @ head.T).log_softmax(-1).numpy()
        q = (norm(rows.double()) @ head.T).log_softmax(-1).numpy()
    for i in range(positions):
        for j in range(candidates):
            expected = scipy.special.rel_entr(np.exp(p[i]), np.exp(q[i, j])).sum()
            assert found.kl[i, j] == pytest.approx(expected, abs=1e-4, rel=1e-5)
            assert found.nll[i, j] == pytest.approx(-q[i, j, targets[i]], abs=1e-4, rel=1e-5)
            assert found.rank[i, j] == (q[i, j] > q[i, j, p[i].argmax()]).sum()
            if j:
                expected = scipy.spatial.distance.jensenshannon(np.exp(q[i, j]), np.exp(q[i, j - 1]))
                assert found.js[i, j] == pytest.approx(expected, abs=1e-3)


def test_memory_does_not_grow_over_diagnoses():
    """Tensors alive after the tenth diagnosis are as many as after the second."""
    import gc

    lm, prompts = tiny_model("llama"), load_prompts(context_length=300, max_prompts=1)

    def alive():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    counts = []
    for _ in range(10):
        diagnose(lm, prompts, decode_tokens=4)
        counts.append(alive())
    assert counts[-1] == counts[1]
