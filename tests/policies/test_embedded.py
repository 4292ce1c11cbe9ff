"""Policies on the embedded model, for real: against stock, against float64 references, and against the cutoff sweep."""

import functools

import pytest
import torch

from diagnostics import FastKVPolicy, FullPolicy, ProjectedPolicy, SpeedPolicy, decode, load_prompts, prefill
from diagnostics.prompts.encoding import encode_prompts
from tests.support.examples import mostly_slow
from tests.support.observe import observe
from tests.support.policy_cases import assert_close, reference_logits
from tests.support.policy_reference import SlowModel
from tests.support.prompts import real_prompt
from tests.support.reference import kl

N_LAYERS, N_DECODE = 30, 32
CUTOFFS = (8, 15, 22, 25, 29)
TOLERANCE = 1e-4
STOCK_TOLERANCE = 1e-5


@pytest.fixture(scope="module", autouse=True)
def _endless(smollm):
    """Generation goes on past end tokens."""
    config = smollm.model.generation_config
    ends, config.eos_token_id = config.eos_token_id, None
    yield
    config.eos_token_id = ends


@pytest.fixture(scope="module")
def stock(smollm):
    """Of the first built-in prompts, by number, what the stock model makes: (ids, logits of every step, all tokens)."""
    encoded = encode_prompts(load_prompts("builtin", context_length=192, max_prompts=8), smollm.tokenizer)

    @functools.cache
    def continued(number):
        ids = torch.tensor([encoded[number].token_ids])
        return ids, *greedy(smollm.model, ids, 64)

    return continued


def greedy(model, ids, new):
    """Logits of every step, the prompt's last token first, [new, vocabulary], and all tokens [prompt + new]."""
    options = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return torch.cat(out.logits), out.sequences[0].tolist()


@pytest.mark.parametrize("policy", [FullPolicy(), SpeedPolicy(N_LAYERS)], ids=str)
@pytest.mark.parametrize("number", mostly_slow(range(8), 0, 1))
def test_full_depth_equals_stock(smollm, stock, policy, number):
    ids, logits, tokens = stock(number)
    with policy(smollm.model), torch.no_grad():
        ours, found = greedy(smollm.model, ids, 64)
    torch.testing.assert_close(ours, logits, atol=STOCK_TOLERANCE, rtol=STOCK_TOLERANCE)
    assert found == tokens


@pytest.fixture(scope="module")
def slow(smollm):
    return SlowModel(smollm)


@pytest.fixture(scope="module")
def prompt(smollm):
    ids = real_prompt(smollm, 317)
    assert 290 < len(ids) < 310
    return ids


@pytest.mark.parametrize(
    "policy",
    mostly_slow(
        [*map(SpeedPolicy, CUTOFFS), SpeedPolicy(22, anchors=4, boundary=8), ProjectedPolicy(22), FastKVPolicy()],
        *(SpeedPolicy(22, anchors=4, boundary=8), ProjectedPolicy(22), FastKVPolicy()),
    ),
    ids=str,
)
def test_policies_equal_their_references(smollm, slow, prompt, policy):
    with policy(smollm.model):
        logits, tokens = greedy(smollm.model, torch.tensor([prompt]), N_DECODE + 1)
    expected = reference_logits(slow, policy, tokens[:-1], n_prompt=len(prompt))
    assert_close(logits, expected, 1e-5)
    assert tokens[len(prompt) :] == expected.argmax(-1).tolist()


@pytest.fixture(scope="module")
def sweep(smollm, prompt):
    """The sweep's columns, its reference tokens, and the log-probabilities of full depth."""
    outcome, *_, cutoffs = observe(smollm, prompt, n_decode=N_DECODE)
    target = outcome.reference_ids
    return cutoffs, target, log_probs(smollm, prompt, target, FullPolicy())


def log_probs(lm, prompt, target, policy):
    """Prefill, then decode the reference: float64 [tokens, vocabulary]."""
    first, cache = prefill(lm, torch.tensor([prompt]), policy=policy)
    rest = decode(lm, target[None, :-1], cache)[0]
    return torch.cat([first, rest]).double().log_softmax(-1)


@pytest.mark.parametrize("cutoff", [8, 15, 22, 24, 25, 29])
def test_the_sweep_predicts_inference(smollm, prompt, sweep, cutoff):
    cutoffs, target, full = sweep
    speed = log_probs(smollm, prompt, target, SpeedPolicy(cutoff))
    nll = -float(speed[torch.arange(len(target)), target].mean())
    agreement = float((speed.argmax(-1) == full.argmax(-1)).double().mean())
    assert cutoffs["kl"][cutoff - 1] == pytest.approx(kl(full, speed), rel=TOLERANCE, abs=TOLERANCE)
    assert cutoffs["nll"][cutoff - 1] == pytest.approx(nll, rel=TOLERANCE)
    assert cutoffs["top1_agreement"][cutoff - 1] == pytest.approx(agreement, abs=1e-6)
    assert kl(full, speed) > 1e-3, "a cutoff must cost something, or this test cannot fail"
