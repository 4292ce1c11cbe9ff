"""Head gates against queries and keys that the stock model shows before it turns them, in float64."""

import copy
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diagnostics.diagnosis.capture.nnsight import NNsightCapture
from diagnostics.diagnosis.capture.transformer_lens import TransformerLensCapture
from diagnostics.diagnosis.probes import head_gates
from diagnostics.diagnosis.probes.head_gates import HeadGates
from diagnostics.models.loading import LoadedModel
from tests.support.observe import observe
from tests.support.tiny import COMMON, FAMILIES, N_LAYERS, random_ids, tiny_config, tiny_model, tiny_tokenizer

N_PROMPT, N_DECODE = 45, 6
ROWS = slice(N_PROMPT - 32, None)  # the window of 32 prompt queries, and the decode phase
SLIDING = {"mistral": range(N_LAYERS), "gemma2": (0, 2, 3), "gemma3": (0, 2, 3), "gpt_oss": (0, 2, 3)}


def gates_of(lm, ids, **options):
    _, _, heads, _ = observe(lm, ids[:N_PROMPT], ids[N_PROMPT:], probes=[HeadGates], **options)
    return heads["head_gate"]


def before_turning(lm, ids):
    """Queries and keys of every layer before rotary embedding, float64 [heads, rows, head_dim]."""
    model = copy.deepcopy(lm.model).double()
    model.set_experts_implementation("eager")  # the grouped kernels know no float64
    seen = []
    names = {id(module): name for name, module in lm.model.named_modules()}
    attentions = [model.get_submodule(names[id(attention)]) for attention in lm.anatomy.attentions]
    file = sys.modules[type(attentions[0]).__module__]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if hasattr(file, "apply_rotary_pos_emb"):
            turn = file.apply_rotary_pos_emb

            def note(q, k, *angles, **options):
                seen.append((q[0], k[0]))
                return turn(q, k, *angles, **options)

            patch.setattr(file, "apply_rotary_pos_emb", note)
            model(torch.tensor([ids[:-1]]))
        else:  # GPT-2

            def note(_module, _args, output):
                q, k, _ = output[0].split(32, dim=-1)
                seen.append((q.unflatten(-1, (4, 8)).transpose(0, 1), k.unflatten(-1, (4, 8)).transpose(0, 1)))

            handles = [attention.c_attn.register_forward_hook(note) for attention in attentions]
            model(torch.tensor([ids[:-1]]))
            for handle in handles:
                handle.remove()
    return seen


def turned(vector, position, base, n_turned):
    """One vector at one position: number i and number i + half are a pair."""
    out, half = vector.copy(), n_turned // 2
    for i in range(half):
        angle = position * base ** (-2 * i / n_turned)
        a, b = vector[i], vector[i + half]
        out[i], out[i + half] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return out


def gate(query, key, base, n_turned, scaling, softcap=None):
    last = turned(query, 499, base, n_turned)
    scores = np.array([last @ turned(key, position, base, n_turned) for position in range(500)]) * scaling
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    return np.mean(np.cumsum(weights / weights.sum()))


def expected_gates(lm, ids, layer, seen, still=False):
    config = lm.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get(getattr(config, "layer_types", ["full_attention"] * N_LAYERS)[layer], rope)
    n_turned = 0 if still or not rope else int(8 * rope.get("partial_rotary_factor", 1))
    scaling = {"gemma2": 8**-0.5, "gemma3_text": 8**-0.5, "granite": 1.0}.get(config.model_type, 8**-0.5)
    query, key = (part.numpy() for part in seen[layer])
    query, key = query[:, ROWS].mean(1), key[:, 1 : N_PROMPT - 1].mean(1)
    group = len(query) // len(key)
    cap = 5.0 if config.model_type == "gemma2" else None
    base = rope.get("rope_theta", 1.0)
    return [gate(q, key[head // group], base, n_turned, scaling, cap) for head, q in enumerate(query)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_gates_of_every_family(family):
    lm, ids = tiny_model(family), random_ids(N_PROMPT + N_DECODE)
    found, seen = gates_of(lm, ids), before_turning(lm, ids)
    for layer in range(N_LAYERS):
        if layer in SLIDING.get(family, ()):
            assert np.isnan(found[layer]).all()
        else:
            np.testing.assert_allclose(found[layer], expected_gates(lm, ids, layer, seen), atol=1e-4)


def test_layers_without_rotary_embedding():
    """SmolLM3 turns some layers only, and hands the angles to all."""
    config = AutoConfig.for_model("smollm3", **COMMON, no_rope_layers=[1, 0, 1, 0, 1])
    torch.manual_seed(0)
    lm = LoadedModel.wrap(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny")
    ids = random_ids(N_PROMPT + N_DECODE)
    found, seen = gates_of(lm, ids), before_turning(lm, ids)
    for layer, index in zip((0, 2, 4), range(3), strict=True):
        expected = expected_gates(lm, ids, layer, {layer: seen[index]})
        np.testing.assert_allclose(found[layer], expected, atol=1e-4)
    np.testing.assert_allclose(found[1], 0.501, atol=1e-6)  # every position alike: the mean of 1/500 .. 1
    assert len(seen) == 3


@pytest.mark.parametrize("kind", ["yarn", "partial_longrope"])
def test_scaled_rotations_turn_back(kind):
    """Rotations that also scale: what is turned back is what the projection gave."""
    config = tiny_config("phi3" if kind == "partial_longrope" else "llama")
    if kind == "yarn":
        config.rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 64,
        }
    else:
        config.rope_parameters = {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0] * 2,
            "long_factor": [3.0] * 2,
            "original_max_position_embeddings": 64,
        }
        config.original_max_position_embeddings = 64
    torch.manual_seed(0)
    lm = LoadedModel.wrap(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny")
    ids = random_ids(N_PROMPT + N_DECODE)
    means = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head_gates, "looks_back", lambda _, __, query, key: means.append((query, key)) or query[:, 0])
        gates_of(lm, ids)
    for (query, key), (q, k) in zip(means, before_turning(lm, ids), strict=True):
        torch.testing.assert_close(query.double(), q[:, ROWS].mean(1), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(key.double(), k[:, 1 : N_PROMPT - 1].mean(1), atol=1e-5, rtol=1e-4)


def test_a_rotation_that_is_not_understood_gives_no_number(monkeypatch):
    lm, ids = tiny_model("llama"), random_ids(N_PROMPT + N_DECODE)
    file = sys.modules[type(lm.anatomy.attentions[0]).__module__]
    own, during_the_pass = file.apply_rotary_pos_emb, []

    def twice(q, k, cos, sin, **options):
        during_the_pass.append(1)
        turned = own(q, k, cos, sin, **options)
        return own(*turned, cos, sin, **options) if len(during_the_pass) % 2 else turned

    monkeypatch.setattr(file, "apply_rotary_pos_emb", twice)
    assert np.isnan(gates_of(lm, ids)[0]).all()


def test_half_precision_is_close_to_float32():
    ids = random_ids(N_PROMPT + N_DECODE)
    full, half = (gates_of(tiny_model("llama", dtype=dtype), ids) for dtype in (torch.float32, torch.bfloat16))
    np.testing.assert_allclose(half, full, atol=0.03)


@pytest.mark.parametrize("n_prompt", [1, 2, 3, 9])
def test_short_prompts(n_prompt):
    lm, ids = tiny_model("llama"), random_ids(n_prompt + 4)
    _, _, heads, _ = observe(lm, ids[:n_prompt], ids[n_prompt:], probes=[HeadGates])
    assert np.isnan(heads["head_gate"]).all() == (n_prompt <= 2)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gpt_neox"])
def test_a_greedy_reference_and_nnsight_give_the_same(family):
    lm, prompt = tiny_model(family), random_ids(40, seed=2)
    outcome, _, heads, _ = observe(lm, prompt, probes=[HeadGates])
    reference = outcome.reference_ids.tolist()
    for options in ({"capture": NNsightCapture}, {"reference_ids": reference}):
        _, _, again, _ = observe(lm, prompt, probes=[HeadGates], **options)
        np.testing.assert_allclose(again["head_gate"], heads["head_gate"], atol=1e-5)
    _, _, unseen, _ = observe(lm, prompt, probes=[HeadGates], capture=TransformerLensCapture)
    assert np.isnan(unseen["head_gate"]).all()
