"""Training steps to compare with: the masked pass with gradients, labels of conversations, gradients by name."""

import torch
from transformers import TrainerCallback

from tests.support.policy_cases import letters_of
from tests.support.policy_reference import SlowModel, speed
from tests.support.tiny import tiny_model


def labels_of(ids, *turns):
    """Targets of a conversation: its answers."""
    labels, start = [-100] * len(ids), 0
    for n_prompt, n_answer in turns:
        start += n_prompt
        labels[start : start + n_answer] = ids[start : start + n_answer]
        start += n_answer
    assert start == len(ids)
    return labels


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual, expected, relative):
    assert actual.keys() == expected.keys()
    scale = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max()
        assert error <= relative * max(gradient.abs().max(), 1e-3 * scale), name


class SlowTrainer(SlowModel):
    """The masked pass with gradients."""

    def run(self, ids, change):
        with self._changing(change):
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def step(self, policy, conversations):
        """Loss and gradients of conversations, each a pair of token ids and turns, one after another."""
        losses, count = 0, 0
        for ids, turns in conversations:
            logits = speed(self, ids, letters_of(policy, *turns), policy.cutoff)
            targets = torch.tensor(labels_of(ids, *turns))[1:]
            losses += torch.nn.functional.cross_entropy(logits[:-1], targets, reduction="sum")
            count += (targets != -100).sum()
        loss = losses / count
        loss.backward()
        return loss.detach(), gradients(self.model)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def double(family):
    lm = tiny_model(family)
    slow = SlowTrainer(lm)
    model = lm.model.double()
    model.set_experts_implementation("eager")
    return model, slow


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        self.steps.append(gradients(model))
