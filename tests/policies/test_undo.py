"""A policy leaves nothing behind: not on the model, not in the package, not in memory, whatever ended its block."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import LlamaForCausalLM

from diagnostics import FastKVPolicy, FullPolicy, SpeedPolicy, UserError, generate
from tests.support.fingerprints import N, Snapshot, fingerprint, greedy
from tests.support.policy_cases import FASTKV, POLICIES, each, served, tokens
from tests.support.tiny import N_LAYERS, tiny_config, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@each(served(["llama", "gemma2", "gpt2", "gpt_oss"]))
def test_the_block_undoes_everything(family, policy):
    model = tiny_model(family).model
    before = Snapshot(model)
    with policy(model), torch.no_grad():
        assert fingerprint(model) != before.print, "or the fingerprint sees nothing"
        greedy(model)
        model.generate(tokens(N), max_new_tokens=3, num_beams=2)
        model(tokens(N))
        generate(model, tokens(N), max_new_tokens=3)
    generate(model, tokens(N), policy=policy, max_new_tokens=3)
    before.assert_same()


@every_policy
@pytest.mark.parametrize(
    ("place", "calls", "error"),
    [
        ("", 0, KeyboardInterrupt),
        ("model.embed_tokens", 1, UserError),
        ("model.layers.0.mlp", 1, KeyboardInterrupt),
        ("model.layers.4.self_attn.o_proj", 1, ValueError),
        ("model.layers.4.mlp", 3, KeyboardInterrupt),
        ("lm_head", 1, ValueError),
    ],
    ids=["block", "embedding", "lower layer", "upper attention", "decode", "head"],
)
def test_an_error_anywhere_undoes_everything(policy, place, calls, error):
    """Raised in the block, or by a module when it runs for the nth time."""
    model = tiny_model("llama").model
    before = Snapshot(model)
    seen = []

    def fail(*_):
        seen.append(1)
        if len(seen) == calls:
            raise error("on purpose")

    with contextlib.ExitStack() as stack:
        if place:
            stack.callback(model.get_submodule(place).register_forward_hook(fail).remove)
        with pytest.raises(error, match="on purpose"), policy(model):  # noqa: PT012
            greedy(model)
            raise error("on purpose")
    assert len(seen) == calls
    before.assert_same()


@every_policy
def test_the_block_works_on_after_an_error_inside(policy):
    model = tiny_model("llama").model
    with policy(model):
        expected = greedy(model)
        cache = model(tokens(N)).past_key_values
        handle = model.model.layers[4].mlp.register_forward_hook(lambda *_: 1 / 0)
        for fail in (lambda: greedy(model), lambda: model(tokens(N)[:, :1], past_key_values=cache)):
            with pytest.raises(ZeroDivisionError):
                fail()
        handle.remove()
        with pytest.raises(UserError, match="interrupted"):
            model(tokens(N)[:, :1], past_key_values=cache)
        assert torch.equal(greedy(model), expected)
        assert torch.equal(generate(model, tokens(N), max_new_tokens=4).token_ids, expected[:, N:])


@pytest.mark.parametrize("policy", [SpeedPolicy(N_LAYERS + 1), FastKVPolicy(tsp_layer=9)], ids=str)
def test_a_refusal_undoes_everything(policy):
    model = tiny_model("llama").model
    before = Snapshot(model)
    with pytest.raises(UserError, match="layers"), policy(model):
        pass
    before.assert_same()


def test_a_policy_that_fails_to_install_undoes_everything(monkeypatch):
    model = tiny_model("llama").model
    before = Snapshot(model)
    monkeypatch.setattr(FullPolicy, "install", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), FullPolicy()(model):
        pass
    before.assert_same()


def test_hooks_of_others_stay_and_keep_working():
    model, seen = tiny_model("llama").model, []
    model.model.layers[4].register_forward_hook(lambda *_: seen.append(1))
    with SpeedPolicy(3)(model):
        greedy(model)
    greedy(model)
    assert len(seen) == 8


def test_a_model_in_training_mode_stays_there():
    model = tiny_model("llama").model.train()
    before = fingerprint(model)
    with SpeedPolicy(3)(model):
        greedy(model)
    assert fingerprint(model) == before


# --- Policy objects ---


@every_policy
def test_policy_objects_are_values(policy):
    model, same = tiny_model("llama").model, copy.deepcopy(policy)
    before = vars(policy).copy()
    with policy(model):
        greedy(model)
    assert vars(policy) == before
    assert policy == same == pickle.loads(pickle.dumps(policy))
    assert hash(policy) == hash(same)
    assert len({policy, same, *POLICIES}) == len(POLICIES)
    with pytest.raises(AttributeError):
        policy.cutoff = 2


# --- Models side by side ---


@every_policy
def test_two_models_under_two_policies(policy):
    first, second = tiny_model("llama").model, tiny_model("qwen3", seed=1).model
    snapshots = [Snapshot(first), Snapshot(second)]
    with policy(first):
        expected_first = greedy(first)
    with FASTKV(second):
        expected_second = greedy(second)
    with policy(first):
        with FASTKV(second):
            assert torch.equal(greedy(first), expected_first)
            assert torch.equal(greedy(second), expected_second)
        assert torch.equal(greedy(second), snapshots[1].text)
        assert torch.equal(greedy(first), expected_first)
    for snapshot in snapshots:
        snapshot.assert_same()


@pytest.mark.parametrize("other", [None, SpeedPolicy(3)], ids=str)
def test_models_that_share_a_configuration(other):
    """FastKV taps the attention of one of them; the other goes on, as it is or under a policy of its own."""
    config = tiny_config("llama")
    first, second = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    snapshots = [Snapshot(first), Snapshot(second)]
    with contextlib.ExitStack() as stack:
        if other is not None:
            stack.enter_context(other(second))
        expected = greedy(second)
        with FASTKV(first):
            assert torch.equal(greedy(second), expected)
    for snapshot in snapshots:
        snapshot.assert_same()


def test_blocks_that_end_in_another_order():
    """Two models, the first to enter is the first to leave."""
    models = [tiny_model("llama", seed=seed).model for seed in (0, 1)]
    snapshots = [Snapshot(model) for model in models]
    blocks = [FASTKV(model) for model in models]
    for block in blocks:
        block.__enter__()
    blocks[0].__exit__(None, None, None)
    assert torch.equal(greedy(models[0]), snapshots[0].text)
    greedy(models[1])
    blocks[1].__exit__(None, None, None)
    for snapshot in snapshots:
        snapshot.assert_same()


# --- Memory ---


@every_policy
def test_memory_does_not_grow(policy):
    """Tensors alive after the last of 8 blocks are as many as after the third."""
    model = tiny_model("llama").model

    def alive():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    counts = []
    for repetition in range(8):
        with policy(model), torch.no_grad():
            greedy(model, tokens(N, repetition))
            model(tokens(N, repetition))
            with pytest.raises(UserError):
                model(tokens(N), use_cache=False)
        if repetition in (2, 7):
            counts.append(alive())
    assert len(set(counts)) == 1, counts


@every_policy
def test_a_model_is_freed_after_its_block(policy):
    model = tiny_model("llama").model
    with policy(model):
        greedy(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
