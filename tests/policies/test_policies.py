"""Every policy equals its slow definition, on every family: whole, in chunks, token by token, in padded batches."""

import pytest
import torch

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    ProjectedPolicy,
    SpeedPolicy,
    UserError,
    decode,
    load_cache,
    prefill,
    save_cache,
)
from tests.support import policy_reference
from tests.support.policy_cases import assert_close
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model

P, NEW = 40, 6
FASTKV = {"tsp_rate": 0.5, "retention_rate": 0.3, "window": 4, "kernel": 3}
ALL = [
    FullPolicy(),
    SpeedPolicy(3),
    SpeedPolicy(2, anchors=3, boundary=4),
    SpeedPolicy(3, anchors=0),
    ProjectedPolicy(3),
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    lm = tiny_model(request.param)
    return lm, policy_reference.SlowModel(lm), random_ids(P + NEW)


def run(lm, ids, policy, chunk_size=None):
    """Logits of the last prompt token and of a chunk of decode-phase tokens: [1 + NEW, vocabulary]."""
    tokens = torch.tensor([ids])
    first, cache = prefill(lm, tokens[:, :P], policy=policy, chunk_size=chunk_size)
    return torch.cat([first, decode(lm, tokens[:, P:], cache)[0]]), cache


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 39])
@pytest.mark.parametrize(("anchors", "boundary"), [(1, 1), (0, 1), (3, 4)])
def test_speed_is_the_masked_pass(case, anchors, boundary, chunk_size):
    lm, slow, ids = case
    for cutoff in range(1, N_LAYERS + 1) if chunk_size in (None, 7) else (2,):
        found, cache = run(lm, ids, SpeedPolicy(cutoff, anchors, boundary), chunk_size)
        letters = policy_reference.labels(P, NEW, anchors, boundary)
        assert_close(found, policy_reference.speed(slow, ids, letters, cutoff)[P - 1 :])
        if "sliding_attention" not in lm.anatomy.layer_types:
            held = sum(layer.n_slots for layer in cache.layers) - N_LAYERS * NEW
            assert held == cutoff * P + (N_LAYERS - cutoff) * (anchors + boundary)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_projected_is_its_definition(case, chunk_size):
    lm, slow, ids = case
    for cutoff in range(1, N_LAYERS + 1):
        found, _ = run(lm, ids, ProjectedPolicy(cutoff), chunk_size)
        letters = policy_reference.labels(P, NEW, 0, 1)
        assert_close(found, policy_reference.projected(slow, ids, letters, cutoff)[P - 1 :])


@pytest.mark.parametrize("tsp_layer", [1, 2, 4])
def test_fastkv_is_its_definition(case, tsp_layer):
    lm, slow, ids = case
    policy = FastKVPolicy(tsp_layer, **FASTKV)
    if "sliding_attention" in lm.anatomy.layer_types:
        with pytest.raises(UserError, match="not defined for sliding-window layers"):
            run(lm, ids, policy)
        return
    found, cache = run(lm, ids, policy)
    logits, kept, _ = policy_reference.fastkv(slow, ids, P, tsp_layer, **FASTKV)
    assert_close(found, logits[P - 1 :])
    for layer, heads in enumerate(kept):
        columns = cache.columns(layer)[0].columns
        assert [sorted(head) for head in columns[0].tolist()] == heads


def test_full_depth_is_the_stock_model(case):
    lm, _, ids = case
    with torch.no_grad():
        stock = lm.model(torch.tensor([ids])).logits[0, P - 1 :]
    for policy in (FullPolicy(), SpeedPolicy(N_LAYERS), ProjectedPolicy(N_LAYERS)):
        torch.testing.assert_close(run(lm, ids, policy)[0], stock, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_rows_of_a_padded_batch_are_as_alone(case, chunk_size):
    lm, _, _ = case
    rows = [random_ids(n, seed=n) for n in (40, 23, 9)]
    more = torch.tensor([random_ids(NEW, seed=n)[:NEW] for n in range(3)])
    ids = torch.tensor([[0] * (40 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (40 - len(row)) + [1] * len(row) for row in rows])
    policies = [*ALL] if "sliding_attention" in lm.anatomy.layer_types else [*ALL, FastKVPolicy(2, **FASTKV)]
    for policy in policies:
        chunk = chunk_size if policy.chunked else None
        first, cache = prefill(lm, ids, mask, policy=policy, chunk_size=chunk)
        then = [decode(lm, more[:, :4], cache), decode(lm, more[:, 4:5], cache), decode(lm, more[:, 5:], cache)]
        for index, row in enumerate(rows):
            alone, own = prefill(lm, torch.tensor([row]), policy=policy)
            assert_close(first[index], alone[0])
            assert_close(torch.cat(then, dim=1)[index], decode(lm, more[index : index + 1], own)[0])


@pytest.mark.parametrize("policy", [*ALL, FastKVPolicy(2, **FASTKV)], ids=str)
def test_saved_copied_and_cropped_caches_go_on_alike(policy, tmp_path):
    lm = tiny_model("llama")
    ids, more = torch.tensor([random_ids(P)] * 2), torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    _, cache = prefill(lm, ids, mask, policy=policy)
    save_cache(cache, tmp_path / "kv.safetensors", lm)
    loaded, copied = load_cache(tmp_path / "kv.safetensors", lm), cache.copy()
    decode(lm, more.flip(1), cache)
    cache.crop(-3)
    results = [decode(lm, more, each) for each in (cache, loaded, copied)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert cache.kv_bytes == loaded.kv_bytes == copied.kv_bytes <= cache.allocated_bytes
    with pytest.raises(UserError, match="filled by another model"):
        load_cache(tmp_path / "kv.safetensors", tiny_model("llama", seed=1))


def test_one_document_serves_many_questions():
    lm = tiny_model("llama")
    slow, policy = policy_reference.SlowModel(lm), SpeedPolicy(3)
    document, questions = random_ids(P), [random_ids(8, seed=1)[1:], random_ids(6, seed=2)[1:]]
    none, cache = prefill(lm, torch.tensor([document]), policy=policy, more=True)
    assert none is None
    for question in questions:
        ids = [*document, *question]
        shallow, _ = prefill(lm, torch.tensor([question]), cache=cache.copy())
        assert_close(shallow[0], policy_reference.speed(slow, ids, policy_reference.labels(len(ids), 0), 3)[-1])
        deep = decode(lm, torch.tensor([question]), cache.copy())[0]
        letters = ["a", *"p" * (P - 1), *"d" * len(question)]
        assert_close(deep, policy_reference.speed(slow, ids, letters, 3)[P:])


@pytest.mark.parametrize("policy", ALL, ids=str)
def test_workload_tells_what_the_cache_holds(policy):
    lm = tiny_model("llama")
    _, cache = prefill(lm, torch.tensor([random_ids(P)]), policy=policy)
    assert [layer.n_slots for layer in cache.layers] == list(policy.workload(P, N_LAYERS).held)
