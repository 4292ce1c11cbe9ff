"""What a number belongs to: two models, or two inputs, that could give different numbers are told apart."""

import copy

import pytest
import torch
from torch import nn

from diagnostics.models.identity import ModelIdentity, configuration, configuration_digest
from diagnostics.support.sameness import difference
from tests.support.tiny import FAMILIES, random_ids, tiny_model


def weights(model):
    return ModelIdentity.of(model).weights


class Bare(nn.Module):
    """The least that has an identity."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.config = tiny_model("llama").model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_changes_nothing(family):
    model = tiny_model(family).model
    before = ModelIdentity.of(model)
    model(torch.tensor([random_ids(30)]))
    assert ModelIdentity.of(model) == before
    assert ModelIdentity.of(tiny_model(family).model) == before
    assert configuration_digest(model) == configuration_digest(tiny_model(family, seed=1).model)


def test_every_value_of_every_tensor_counts():
    model = tiny_model("gpt_oss").model
    seen = {weights(model)}
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for index in {0, 1, len(flat) // 2, len(flat) - 1}:
            flat[index] = -flat[index]  # through .data: the tensor's version does not tell
            seen.add(weights(model))
            flat[index] = -flat[index]
    assert len(seen) == 1 + sum(len({0, 1, p.numel() // 2, p.numel() - 1}) for p in model.parameters())


def test_ablated_heads_are_seen():
    base = tiny_model("llama").model
    ablated = copy.deepcopy(base)
    for layer in ablated.model.layers:
        layer.self_attn.o_proj.weight.data[:, 8:] = 0
    assert weights(ablated) != weights(base)


def test_pieces_of_large_tensors_and_their_order_count(monkeypatch):
    monkeypatch.setattr("diagnostics.models.tensor_digests.PIECE", 64)
    values = torch.arange(100.0)
    seen = {weights(Bare(values)), weights(Bare(values.flip(0)))}
    swapped = values.reshape(10, 10).clone()
    swapped[[0, 9]] = swapped[[9, 0]]
    last = values.clone()
    last[-1] = 0  # beyond the first piece
    seen |= {weights(Bare(swapped.reshape(-1))), weights(Bare(values.reshape(10, 10))), weights(Bare(last))}
    assert len(seen) == 5
    assert weights(Bare(values.reshape(10, 10).T.contiguous().T)) == weights(Bare(values.reshape(10, 10)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_types(dtype):
    values = torch.zeros(33).to(dtype)
    other = values.clone()
    other.view(torch.uint8)[-1] = 1
    assert len({weights(Bare(values)), weights(Bare(other)), weights(Bare(torch.zeros(33)))}) == 3


def test_types_of_the_same_bytes():
    zeros = [torch.zeros(33, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.int16)]
    assert len({weights(Bare(values)) for values in zeros}) == 3


def test_what_is_set_on_a_module_counts_and_says_so():
    model = tiny_model("llama").model
    before = configuration_digest(model)
    kept = {"identity": ModelIdentity.of(model).entries(), "configuration": configuration(model)}
    model.model.norm.variance_epsilon = 0.1
    assert configuration_digest(model) != before
    asked = {"identity": ModelIdentity.of(model).entries(), "configuration": configuration(model)}
    assert difference(kept, asked) == "configuration differs: numbers or classes in its modules"
    model.config.rms_norm_eps = 0.1
    asked = {"identity": ModelIdentity.of(model).entries(), "configuration": configuration(model)}
    assert difference(kept, asked) == "configuration differs: rms_norm_eps is 1e-06, not 0.1"
    assert difference(asked, asked) is None


def test_rotary_frequencies_count():
    model = tiny_model("llama").model
    before = ModelIdentity.of(model)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    after = ModelIdentity.of(model)
    assert (after.weights, after.configuration) == (before.weights, before.configuration)
    assert after.entries()["buffers"] != before.entries()["buffers"]
    assert after.digest != before.digest
