"""Policies on quantized weights, whose modules only know how to run themselves."""

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from diagnostics import FastKVPolicy, FullPolicy, ProjectedPolicy, SpeedPolicy, generate, prefill
from tests.tiny import N_LAYERS, random_ids, tiny_model

IDS = torch.tensor([random_ids(40)])
FASTKV = FastKVPolicy(2, tsp_rate=0.5, retention_rate=0.3, window=4, kernel=3)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantized():
    """A model with int8 weights, and the same numbers as float32 weights."""
    lm, plain = tiny_model("llama", seed=5), tiny_model("llama", seed=5)
    quantize_(lm.model, Int8WeightOnlyConfig())
    rounded = {name: p.dequantize() if hasattr(p, "dequantize") else p for name, p in lm.model.state_dict().items()}
    plain.model.load_state_dict(rounded)
    return lm.model, plain.model


@pytest.mark.parametrize(
    "policy", [FullPolicy(), SpeedPolicy(2), SpeedPolicy(N_LAYERS), ProjectedPolicy(3), FASTKV], ids=str
)
def test_policies_serve_int8_weights(quantized, policy):
    model, plain = quantized
    logits, _ = prefill(model, IDS, policy=policy)
    expected, _ = prefill(plain, IDS, policy=policy)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    with policy(model):
        stock = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(generate(model, IDS, policy=policy, max_new_tokens=6).token_ids, stock[:, 40:])
