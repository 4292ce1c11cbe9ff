"""RoPE that depends on the length: every split of a text into calls gives what one call gives, or is refused."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    LoadedModel,
    ProjectedPolicy,
    SpeedPolicy,
    decode,
    diagnose,
    generate,
    load_cache,
    prefill,
    save_cache,
)
from diagnostics.evaluate.policy_fidelity import fidelity
from diagnostics.evaluate.scoring import Encoded, SharedPrefill, score
from diagnostics.finetune import train_under
from diagnostics.generation.benchmarks import benchmark
from diagnostics.models.rope import rope_lengths
from diagnostics.prompts.prompt import Prompt, PromptSet
from diagnostics.support.errors import UserError
from tests.support import policy_reference
from tests.support.policy_cases import left_padded
from tests.support.tiny import COMMON, SLIDING_TYPES, random_ids, tiny_tokenizer

SWITCH = 32
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 4,
    "long_factor": [6.0, 9.0, 12.0, 15.0],
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
POLICIES = [FullPolicy(), SpeedPolicy(2), SpeedPolicy(3, 2, 2), ProjectedPolicy(2)]
CHANGING = "beyond 32 positions .*dynamic RoPE"
CROSSED = "rotary frequencies of this model change beyond 32 positions"


def made(kind, rope, **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | {"rope_parameters": rope, "eos_token_id": None} | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():  # the attention has to matter, else all frequencies are alike
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.mul_(1.5)
    return LoadedModel.wrap(model, tiny_tokenizer(), f"tiny-{kind}")


@pytest.fixture(scope="module")
def phi3():
    return made("phi3", LONGROPE, original_max_position_embeddings=SWITCH, sliding_window=None)


@pytest.fixture(scope="module")
def dynamic():
    return made("llama", DYNAMIC, max_position_embeddings=SWITCH)


@pytest.fixture(scope="module")
def reference(phi3):
    return policy_reference.SlowModel(phi3)


def one_call(slow, policy, ids, n_prompt):
    """Float64 logits [tokens, vocabulary] of a text, its prompt and its decode phase, in one masked pass."""
    letters = policy_reference.labels(n_prompt, len(ids) - n_prompt, policy.anchors, policy.boundary)
    if isinstance(policy, SpeedPolicy):
        return policy_reference.speed(slow, ids, letters, policy.cutoff)
    if isinstance(policy, ProjectedPolicy):
        return policy_reference.projected(slow, ids, letters, policy.cutoff)
    return slow.run(ids, lambda _, hidden, mask: (hidden, mask))


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-4, rtol=1e-4)


def tensor(ids):
    return torch.tensor([ids])


# --- What a model says of itself ---


def test_which_lengths_share_their_frequencies(phi3, dynamic):
    long, own = rope_lengths(phi3.anatomy.stack), rope_lengths(dynamic.anatomy.stack)
    assert [long.factors(n) for n in (1, SWITCH, SWITCH + 1, 500)] == [0, 0, 1, 1]
    assert long.mixes(SWITCH, SWITCH + 1)
    assert not long.mixes(1, SWITCH)
    assert own.factors(SWITCH) == 0
    with pytest.raises(UserError, match=CHANGING):
        own.factors(SWITCH + 1)
    assert not rope_lengths(made("llama", {"rope_type": "default", "rope_theta": 1e4}).anatomy.stack)


def test_frequencies_of_layer_types_are_found():
    kinds = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    lm = made("gemma3_text", kinds, layer_types=SLIDING_TYPES, sliding_window=9, query_pre_attn_scalar=8)
    assert rope_lengths(lm.anatomy.stack).switches == (SWITCH,)
    ids = random_ids(SWITCH + 6)
    wanted = lm.model(tensor(ids), use_cache=False).logits[0, -1]
    logits, _ = prefill(lm, tensor(ids), policy=FullPolicy(), chunk_size=5)
    close(logits[0], wanted)


# --- Every split ---


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("total", [SWITCH - 1, SWITCH, SWITCH + 1, SWITCH + 5])
def test_every_split_of_a_prompt_equals_one_call(phi3, reference, policy, total):
    ids = random_ids(total)
    wanted = one_call(reference, policy, ids, total)[-1]
    for chunk in (1, 2, 5, 11, *range(SWITCH - 2, total + 1)):
        close(prefill(phi3, tensor(ids), policy=policy, chunk_size=chunk)[0][0], wanted)
    for first in (1, 9, *range(SWITCH - 2, total)):  # a document, and the rest later
        _, cache = prefill(phi3, tensor(ids[:first]), policy=policy, more=True)
        if total - first < policy.boundary:
            with pytest.raises(
                UserError, match="the last 2 prompt tokens are decode phase, and of these only 1 are new"
            ):
                prefill(phi3, tensor(ids[first:]), cache=cache)
            continue
        if first <= SWITCH < total:
            with pytest.raises(UserError, match=CROSSED):
                prefill(phi3, tensor(ids[first:]), cache=cache)
        else:
            close(prefill(phi3, tensor(ids[first:]), cache=cache)[0][0], wanted)
        _, cache = prefill(phi3, tensor(ids[:first]), policy=policy, more=True, length=total)
        close(prefill(phi3, tensor(ids[first:]), cache=cache)[0][0], wanted)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_every_split_of_a_continuation_equals_one_call_or_is_refused(phi3, reference, policy):
    total = SWITCH + 4
    ids = random_ids(total)
    for n_prompt in (8, *range(SWITCH - 2, total)):
        wanted = one_call(reference, policy, ids, n_prompt)[n_prompt:]
        _, cache = prefill(phi3, tensor(ids[:n_prompt]), policy=policy)
        crosses = n_prompt <= SWITCH
        if crosses:
            with pytest.raises(UserError, match=CROSSED):
                decode(phi3, tensor(ids[n_prompt:]), cache)
            _, cache = prefill(phi3, tensor(ids[:n_prompt]), policy=policy, length=total)
        step = [decode(phi3, tensor([token]), cache)[0] for token in ids[n_prompt:]]
        close(torch.cat(step), wanted)


def test_a_cropped_cache_does_not_forget_its_frequencies(phi3, tmp_path):
    ids = random_ids(SWITCH + 6)
    wanted, cache = prefill(phi3, tensor(ids), policy=FullPolicy())
    cache.crop(-10)
    save_cache(cache, tmp_path / "cache.safetensors", phi3)
    for again in (cache.copy(), load_cache(tmp_path / "cache.safetensors", phi3)):
        with pytest.raises(UserError, match=CROSSED):
            prefill(phi3, tensor(ids[-10:-8]), cache=again)
        close(prefill(phi3, tensor(ids[-10:]), cache=again)[0], wanted)


@contextmanager
def suppress_crossing():
    try:
        yield
    except UserError as error:
        if CROSSED not in str(error):
            raise


def greedy(slow, policy, prompt, n):
    """Greedy tokens, every one from a masked pass over all before it."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(one_call(slow, policy, ids, len(prompt))[-1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("n_prompt", [SWITCH - 4, SWITCH, SWITCH + 1])
def test_generation_across_the_switch_begins_anew(phi3, reference, policy, n_prompt):
    ids = random_ids(n_prompt, seed=3)
    wanted = greedy(reference, policy, ids, 9)
    assert generate(phi3, tensor(ids), policy=policy, max_new_tokens=9).token_ids[0].tolist() == wanted
    with policy(phi3.model):
        found = phi3.model.generate(tensor(ids), max_new_tokens=9, do_sample=False)
        assert found[0, n_prompt:].tolist() == wanted
        found = None  # drafts may cross the switch
        with suppress_crossing():
            found = phi3.model.generate(tensor(ids), max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=2)
        assert found is None or found[0, n_prompt:].tolist() == wanted
    assert "prepare_inputs_for_generation" not in vars(phi3.model)


def test_fastkv_does_not_generate_across_the_switch(phi3):
    policy = FastKVPolicy(2, window=2, kernel=1)
    with policy(phi3.model), pytest.raises(UserError, match=CROSSED):
        phi3.model.generate(tensor(random_ids(SWITCH - 2)), max_new_tokens=6, do_sample=False)


def test_rows_on_both_sides_do_not_share_a_batch(phi3):
    ids, mask = left_padded([random_ids(SWITCH + 3), random_ids(SWITCH - 3)])
    with pytest.raises(UserError, match=f"{CROSSED}.*rows of 29 and of 35 tokens"):
        prefill(phi3, ids, mask, policy=SpeedPolicy(2))
    with SpeedPolicy(2)(phi3.model), pytest.raises(UserError, match=CROSSED):
        phi3.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2)


# --- What is built on them ---


@pytest.mark.parametrize("n_prompt", [SWITCH - 5, SWITCH, SWITCH + 1])
def test_diagnosis_across_the_switch_is_that_of_one_pass(phi3, reference, n_prompt):
    n = 8
    ids = random_ids(n_prompt, seed=5)
    text = " ".join(phi3.tokenizer.convert_ids_to_tokens(ids))
    run = diagnose(phi3, PromptSet((Prompt(id="a", text=text),), "x"), decode_tokens=n, lens_positions=n)
    found = run.tokens.token_id.tolist()
    assert found[:n_prompt] == ids
    stock = phi3.model.generate(tensor(ids), max_new_tokens=n, do_sample=False)[0].tolist()
    assert len(found) >= n_prompt + n - 1
    assert found[n_prompt:] == stock[n_prompt : len(found)]
    rows = slice(n_prompt - 1, None)
    full = reference.run(stock[:-1], lambda _, hidden, mask: (hidden, mask))[rows].log_softmax(-1)
    for cutoff in range(1, 6):
        speed = one_call(reference, SpeedPolicy(cutoff), stock[:-1], n_prompt)[rows].log_softmax(-1)
        kl = float((full.exp() * (full - speed)).sum(-1).mean())
        assert float(run.array("kl")[0, cutoff - 1]) == pytest.approx(kl, abs=1e-4, rel=1e-3)
    table = fidelity(phi3, PromptSet((Prompt(id="a", text=text),), "x"), [SpeedPolicy(2)], decode_tokens=n)
    assert float(table.kl[0]) == pytest.approx(float(run.array("kl")[0, 1]), abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_continuations_on_both_sides_are_scored_as_their_own_texts(phi3, reference, policy):
    context, shared = random_ids(SWITCH - 3), SharedPrefill(phi3)
    continuations = [random_ids(n, seed=n)[1:] for n in (2, 4, 5, 6, 9)]
    for used in (None, shared):
        scored = score(phi3, policy, Encoded((), tuple(context)), continuations, shared=used)
        for ids, one in zip(continuations, scored, strict=True):
            logits = one_call(reference, policy, context + ids[:-1], len(context))[len(context) - 1 :]
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()
            assert one.log_likelihood == pytest.approx(float(wanted), abs=1e-3)


def test_a_benchmark_that_would_begin_anew_is_refused(phi3):
    with pytest.raises(UserError, match=CROSSED):
        benchmark(phi3, lengths=[SWITCH - 2], policies=[SpeedPolicy(2)], new_tokens=6, repeats=1)


def test_training_batches_do_not_mix_lengths(phi3):
    long, short = random_ids(SWITCH + 4), random_ids(SWITCH - 4)
    model = copy.deepcopy(phi3.model)
    rows = torch.tensor([long, short + [0] * 8])
    mask = torch.tensor([[1] * (SWITCH + 4), [1] * (SWITCH - 4) + [0] * 8])
    labels = torch.where(mask == 1, rows, -100)
    labels[:, :6] = -100
    with train_under(SpeedPolicy(2), model):
        with pytest.raises(UserError, match=f"{CROSSED}.*rows of 28 tokens.*batch of 36"):
            model(input_ids=rows, attention_mask=mask, labels=labels)
        assert model(input_ids=rows[:1], labels=labels[:1]).loss.isfinite()


# --- Frequencies of every length ---


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_dynamic_rope_stays_within_its_positions(dynamic, policy):
    ids = random_ids(SWITCH)
    fresh = made("llama", DYNAMIC, max_position_embeddings=SWITCH)
    wanted = one_call(policy_reference.SlowModel(fresh), policy, ids, SWITCH)[-1]
    for chunk in (1, 7, SWITCH - 1, SWITCH):
        dynamic.model(tensor(random_ids(3 * SWITCH)))  # leaves its frequencies behind
        logits, cache = prefill(dynamic, tensor(ids), policy=policy, chunk_size=chunk)
        close(logits[0], wanted)
        with pytest.raises(UserError, match=CHANGING):
            decode(dynamic, tensor([5]), cache)
    with pytest.raises(UserError, match="dynamic RoPE"):
        prefill(dynamic, tensor(random_ids(SWITCH + 1)), policy=policy)


def test_a_diagnosis_does_not_depend_on_longer_calls_before_it(dynamic):
    prompt = PromptSet(
        (Prompt(id="a", text=" ".join(f"w{i}" for i in range(20, 48)), reference="w9 w8 w7 w6 w5"),), "x"
    )
    fresh = made("llama", DYNAMIC, max_position_embeddings=SWITCH)
    dynamic.model(tensor(random_ids(3 * SWITCH)))
    close(
        torch.tensor(diagnose(dynamic, prompt, decode_tokens=5).array("kl")),
        torch.tensor(diagnose(fresh, prompt, decode_tokens=5).array("kl")),
    )
