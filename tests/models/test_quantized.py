"""Policies on quantized weights, whose modules only know how to run themselves."""

import copy

import pytest
import torch

from diagnostics import FastKVPolicy, FullPolicy, ProjectedPolicy, SpeedPolicy, generate, prefill
from tests.support.tiny import N_LAYERS, random_ids, tiny_model

IDS = torch.tensor([random_ids(40)])
FASTKV = FastKVPolicy(2, tsp_rate=0.5, retention_rate=0.3, window=4, kernel=3)
POLICIES = [FullPolicy(), SpeedPolicy(2), SpeedPolicy(N_LAYERS), ProjectedPolicy(3), FASTKV]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def int8():
    """PyTorch's own: weights and, at every call, activations in 8 bits."""
    with pytest.warns((UserWarning, DeprecationWarning)):
        return torch.ao.quantization.quantize_dynamic(tiny_model("llama").model, {torch.nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_policies_serve_modules_without_plain_weights(int8, policy):
    stock = int8.generate(IDS, max_new_tokens=6, do_sample=False)
    with policy(int8):
        found = int8.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(generate(int8, IDS, policy=policy, max_new_tokens=6).token_ids, found[:, 40:])
    if policy.depth(N_LAYERS) == N_LAYERS:
        assert torch.equal(found, stock)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_torchao_weights_give_what_the_rounded_weights_give(policy):
    torchao = pytest.importorskip("torchao.quantization", reason="pip install torchao")
    model, plain = tiny_model("llama", seed=5).model, tiny_model("llama", seed=5).model
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    rounded = copy.deepcopy(model.state_dict())
    plain.load_state_dict({name: p.dequantize() if hasattr(p, "dequantize") else p for name, p in rounded.items()})
    logits, _ = prefill(model, IDS, policy=policy)
    expected, _ = prefill(plain, IDS, policy=policy)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
