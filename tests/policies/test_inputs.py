"""What a user hands to a model under a policy is used, or refused in one line: never swapped, never left out."""

import copy
import pickle
import threading

import pytest
import torch
from transformers import DynamicCache

from diagnostics import FullPolicy, ProjectedPolicy, SpeedPolicy, generate, load_cache, prefill, save_cache
from diagnostics.finetune import train_under
from diagnostics.support.errors import UserError
from tests.support.policy_cases import left_padded, load, tokens
from tests.support.tiny import random_ids, tiny_model

N, NEW = 24, 6
POLICIES = [FullPolicy(), SpeedPolicy(2), ProjectedPolicy(2)]
every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)


@pytest.fixture(scope="module")
def model():
    return load("llama").model


def greedy(model, ids, **options):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)[:, ids.shape[1] :].tolist()


def refused(message):
    return pytest.raises(UserError, match=message)


# --- Caches ---


@every_policy
def test_an_empty_cache_of_the_users_own_is_refused(model, policy):
    with policy(model):
        expected = greedy(model, tokens(N))
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            with refused("own KV cache, not with a DynamicCache: .*go on with the past_key_values of the output"):
                model(tokens(N), past_key_values=cache)
            with refused("own KV cache, not with a DynamicCache"):
                greedy(model, tokens(N), past_key_values=cache)
            assert cache.get_seq_length() == 0
        assert greedy(model, tokens(N)) == expected
    assert not {"_prefill", "_prepare_cache_for_generation"} & vars(model).keys()


@every_policy
def test_a_cache_made_in_inference_mode_goes_on_outside(model, policy):
    ids = tokens(N)
    expected = generate(model, ids, policy=policy, max_new_tokens=NEW).token_ids.tolist()
    with torch.inference_mode():
        _, cache = prefill(model, ids[:, :10], policy=policy, more=True)
    assert generate(model, ids[:, 10:], cache=cache, max_new_tokens=NEW).token_ids.tolist() == expected


def test_a_cache_is_read_into_an_offloaded_model(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ids, lm = tokens(N), tiny_model("llama")
    expected = generate(lm, ids, policy=SpeedPolicy(2), max_new_tokens=NEW).token_ids.tolist()
    _, cache = prefill(lm, ids[:, :10], policy=SpeedPolicy(2), more=True)
    save_cache(cache, tmp_path / "cache.safetensors", lm)
    accelerate.cpu_offload(lm.model, torch.device("cpu"))
    assert next(lm.anatomy.layers[0].parameters()).is_meta
    loaded = load_cache(tmp_path / "cache.safetensors", lm)
    assert generate(lm, ids[:, 10:], cache=loaded, max_new_tokens=NEW).token_ids.tolist() == expected


# --- Masks and positions ---


@every_policy
@pytest.mark.parametrize("first", [10, 20, N - 1])
def test_padding_told_first_in_a_later_call_is_refused(model, policy, first):
    ids, mask = left_padded([random_ids(N), random_ids(N - 7)])
    expected = generate(model, ids, mask, policy=policy, max_new_tokens=NEW).token_ids
    _, late = prefill(model, ids[:, :first], policy=policy, more=True)
    with refused("other padding than the first call.*from the first call on"):
        generate(model, ids[:, first:], mask, cache=late, max_new_tokens=NEW)
    _, cache = prefill(model, ids[:, :first], mask[:, :first], policy=policy, more=True)
    assert torch.equal(generate(model, ids[:, first:], mask, cache=cache, max_new_tokens=NEW).token_ids, expected)


@every_policy
def test_positions_of_several_texts_in_a_row_are_refused(model, policy):
    restart = torch.cat([torch.arange(10), torch.arange(N - 10)])[None]
    with policy(model):
        wanted = model(tokens(N)).logits[0, -1]
        for positions in (restart, torch.arange(N)[None] + 1, torch.arange(N)[None].flip(1)):
            with refused("position_ids are not those of one text per row"):
                model(tokens(N), position_ids=positions)
        output = model(tokens(N), position_ids=torch.arange(N)[None])
        assert torch.equal(output.logits[0, -1], wanted)
        token = torch.tensor([[7]])
        with refused("position_ids are not those"):
            model(token, past_key_values=output.past_key_values, position_ids=torch.tensor([[0]]))
        model(token, past_key_values=output.past_key_values, position_ids=torch.tensor([[N]]))


def test_a_boundary_in_two_calls_is_refused(model):
    policy, ids = SpeedPolicy(2, boundary=3), tokens(N)
    wanted, _ = prefill(model, ids, policy=policy)
    for first in (N - 3, N - 2):
        _, cache = prefill(model, ids[:, :first], policy=policy, more=True)
        if first == N - 3:
            torch.testing.assert_close(prefill(model, ids[:, first:], cache=cache)[0], wanted, atol=1e-5, rtol=1e-4)
            continue
        with refused("the last 3 prompt tokens are decode phase, and of these only 2 are new"):
            prefill(model, ids[:, first:], cache=cache)
        with policy(model), refused("the last 3 prompt tokens are decode phase"):
            greedy(model, ids, past_key_values=cache)


# --- Arguments of the model ---


def test_labels_by_position_are_seen(model):
    labels = tokens(N)
    with SpeedPolicy(2)(model), refused("labels ask for logits of prompt tokens"):
        model(tokens(N), None, None, None, None, labels)


@torch.no_grad()
def test_logits_to_keep_as_places(model):
    ids, more = tokens(N), tokens(5, seed=2)
    with SpeedPolicy(2)(model):
        whole = model(ids, logits_to_keep=1)
        found = model(ids, logits_to_keep=torch.tensor([N - 1])).logits
        torch.testing.assert_close(found, whole.logits)
        # The new tokens are prompt but for the last, as with logits_to_keep=1.
        wanted = model(more, past_key_values=whole.past_key_values.copy(), logits_to_keep=1).logits
        for place in (4, -1):
            cache = whole.past_key_values.copy()
            found = model(more, past_key_values=cache, logits_to_keep=torch.tensor([place])).logits
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_layer_are_refused_where_rows_were_dropped(model, name):
    with SpeedPolicy(2)(model):
        with refused(f"{name}: under speed:2 the upper layers run some tokens only"):
            model(tokens(N), **{name: True})
        with refused(name):
            greedy(model, tokens(N), **{name: True, "return_dict_in_generate": True})
    if name == "output_hidden_states":
        wanted = model(tokens(N), output_hidden_states=True).hidden_states
        with FullPolicy()(model):
            found = model(tokens(N), output_hidden_states=True).hidden_states
        torch.testing.assert_close(found[2], wanted[2])


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 2.0},
        {"guidance_scale": 2.0, "negative_prompt_ids": tokens(9, seed=4)},
        {"num_beams": 2, "num_return_sequences": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_ways_to_generate_equal_stock_at_full_depth(model, options):
    wanted = greedy(model, tokens(N), **options)
    with FullPolicy()(model):
        assert greedy(model, tokens(N), **options) == wanted


# --- The model ---


def test_layers_that_forget_the_cache_are_refused():
    model = tiny_model("llama").model
    wanted = generate(model, tokens(N), policy=SpeedPolicy(2), max_new_tokens=NEW).token_ids
    model.gradient_checkpointing_enable()
    assert torch.equal(generate(model, tokens(N), policy=SpeedPolicy(2), max_new_tokens=NEW).token_ids, wanted)
    model.train()
    with refused("gradient checkpointing forget the KV cache.*call model.eval"):
        generate(model, tokens(N), policy=SpeedPolicy(2), max_new_tokens=NEW)


@pytest.mark.parametrize("make", [copy.deepcopy, pickle.dumps])
def test_copies_inside_a_block_are_refused(make):
    model = tiny_model("llama").model
    with SpeedPolicy(2)(model), refused("copy or pickle it outside of that `with` block"):
        make(model)
    with train_under(SpeedPolicy(2), model), refused("copy or pickle it outside of train_under"):
        make(model)
    make(model)


@pytest.mark.parametrize("how", ["torch.compile", "compile()", "forward"])
def test_compiled_models_are_refused(how):
    model = tiny_model("llama").model
    if how == "compile()":
        model.compile(backend="eager")
    elif how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
    with refused("is compiled, and compiled code leaves out hooks"), SpeedPolicy(2)(compiled):
        pass


def test_a_call_inside_a_call_of_another_thread_is_refused():
    model, inside, go_on = tiny_model("llama").model, threading.Event(), threading.Event()
    made, errors = [], []

    def first():
        made.append(greedy(model, tokens(N)))

    with SpeedPolicy(2)(model):
        wanted = greedy(model, tokens(N))

        def wait(*_):
            inside.set()
            go_on.wait(30)

        handle = model.model.layers[1].register_forward_hook(wait)
        thread = threading.Thread(target=first)
        thread.start()
        assert inside.wait(30)
        try:
            greedy(model, tokens(N))
        except UserError as error:
            errors.append(str(error))
        handle.remove()
        go_on.set()
        thread.join()
        assert len(errors) == 1
        assert "in a call of another thread" in errors[0]
        assert made == [wanted], "the call that came first goes on"
        assert greedy(model, tokens(N)) == wanted, "and others after it"


def test_threads_that_take_turns_share_a_model(model):
    with SpeedPolicy(2)(model):
        wanted = greedy(model, tokens(N))
        for _ in range(2):
            made = []
            thread = threading.Thread(target=lambda made=made: made.append(greedy(model, tokens(N))))
            thread.start()
            thread.join()
            assert made == [wanted]


# --- Prompt tuning ---


def test_prompt_tuning_with_padding_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(tiny_model("llama").model, config).eval()
    ids = tokens(N)

    def run(ids, mask):
        return tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[
            :, ids.shape[1] :
        ]

    wanted = run(ids, torch.ones_like(ids))
    padded = left_padded([random_ids(N), random_ids(9)])
    with FullPolicy()(tuned):
        assert torch.equal(run(ids, torch.ones_like(ids)), wanted)
        with refused("with prompt tuning, whose virtual tokens come before the padding, give texts of one length"):
            run(*padded)
