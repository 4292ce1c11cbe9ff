"""All that a policy could leave behind on a model, to compare before and after."""

import copy

import torch

from diagnostics.models import attention_tap
from diagnostics.policies import occupancy
from tests.support.policy_cases import tokens

N = 24


def fingerprint(model):
    """Everything a policy could leave behind on a model; weights by identity and content."""
    modules = dict(model.named_modules())
    hooks = {name: {k: len(v) for k, v in vars(m).items() if "hooks" in k and v} for name, m in modules.items()}
    attributes = {name: {k: id(v) for k, v in vars(m).items()} for name, m in modules.items()}
    forwards = {name: (m.forward.__func__, type(m)) for name, m in modules.items()}
    configs = {name: (id(m.config), m.config.to_dict()) for name, m in modules.items() if hasattr(m, "config")}
    internal = [m.config._attn_implementation for m in modules.values() if hasattr(m, "config")]
    flags = {name: (m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for name, m in modules.items()}
    return hooks, attributes, forwards, configs, internal, flags, model.generation_config.to_dict(), dir(model)


def assert_nothing_is_left():
    assert not occupancy._HELD
    assert not attention_tap._RECORDERS


def greedy(model, ids=None):
    return model.generate(tokens(N) if ids is None else ids, max_new_tokens=4, do_sample=False)


class Snapshot:
    """What a model is and says, to compare with later."""

    def __init__(self, model):
        self.model, self.print = model, fingerprint(model)
        self.weights = copy.deepcopy(model.state_dict())
        self.logits, self.text = self.speaks()

    def speaks(self):
        with torch.no_grad():
            return self.model(tokens(N)).logits, greedy(self.model)

    def assert_same(self):
        for before, after in zip(self.print, fingerprint(self.model), strict=True):
            assert after == before
        state = self.model.state_dict()
        assert state.keys() == self.weights.keys()
        assert all(torch.equal(state[name], value) for name, value in self.weights.items())
        logits, text = self.speaks()
        assert torch.equal(logits, self.logits)
        assert torch.equal(text, self.text)
        assert_nothing_is_left()
