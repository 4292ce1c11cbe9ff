"""Log-likelihoods by phase: equal to masked float64 passes, whatever is shared, and wherever the query is placed."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import FullPolicy, ProjectedPolicy, Prompt, PromptSet, SpeedPolicy, UserError, diagnose
from diagnostics.evaluate import fidelity, scoring
from diagnostics.evaluate.items import Context
from diagnostics.evaluate.scoring import Encoded, SharedPrefill, encode_context, encode_pair, prefill_context, score
from tests.support.examples import examples
from tests.support.policy_cases import FASTKV, each, letters_of, load, masked_pass, served
from tests.support.tiny import FAMILIES, VOCAB, random_ids

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = random_ids(21, seed=3)
CONTINUATIONS = [random_ids(n, seed=n)[-n:] for n in (1, 4, 2, 7)]
POLICIES = [FullPolicy(), SpeedPolicy(2), SpeedPolicy(3, 2), ProjectedPolicy(2)]


def by_masks(family, policy, context, continuation, n_document=0):
    """Log-likelihood of a continuation from one masked float64 pass; with a document the query is decode phase."""
    ids = [*context, *continuation[:-1]]
    if n_document:
        letters = letters_of(policy, (n_document, len(ids) - n_document))
        # The document is prefilled with more to follow: its last token is prompt as well.
        letters[n_document - 1] = letters[n_document - 2]
    else:
        letters = letters_of(policy, (len(context), len(continuation) - 1))
    log_p = masked_pass(family, policy, ids, letters).log_softmax(-1)
    rows = log_p[len(context) - 1 :]
    best = rows.argmax(-1).tolist() == list(continuation)
    return sum(float(row[token]) for row, token in zip(rows, continuation, strict=True)), best


@each(served(FAMILIES, POLICIES))
def test_continuations_of_one_context_equal_masked_passes(family, policy):
    scored = score(load(family), policy, Encoded((), tuple(CONTEXT)), CONTINUATIONS)
    for found, continuation in zip(scored, CONTINUATIONS, strict=True):
        wanted, greedy = by_masks(family, policy, CONTEXT, continuation)
        assert found.log_likelihood == pytest.approx(wanted, abs=1e-4)
        assert (found.n_tokens, found.is_greedy) == (len(continuation), greedy)


@pytest.mark.parametrize("policy", [*POLICIES, FASTKV], ids=str)
def test_sharing_a_prefill_changes_nothing(policy):
    context = Encoded((), tuple(CONTEXT))
    together = score(load("llama"), policy, context, CONTINUATIONS)
    for found, continuation in zip(together, CONTINUATIONS, strict=True):
        (alone,) = score(load("llama"), policy, context, [continuation])
        assert found.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-5)


@pytest.mark.parametrize("query", ["prompt", "later", "decode"])
@each(served(FAMILIES, [FullPolicy(), SpeedPolicy(2), SpeedPolicy(3, 0), SpeedPolicy(2, 2, 3), ProjectedPolicy(2)]))
def test_what_full_depth_computed_serves_other_policies(family, policy, query):
    lm, context = load(family), Encoded(tuple(CONTEXT[:13]), tuple(CONTEXT[13:]))
    shared = SharedPrefill(lm, chunk_size=5)
    for first in (FullPolicy(), SpeedPolicy(1), policy):  # whatever went on from the same storage before
        found = score(lm, first, context, CONTINUATIONS, query=query, shared=shared)
    alone = score(lm, policy, context, CONTINUATIONS, query=query)
    assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in alone], abs=1e-4)
    assert [s.is_greedy for s in found] == [s.is_greedy for s in alone]


@pytest.mark.parametrize("length", range(1, 6))
def test_contexts_about_as_short_as_the_anchors_can_share(length):
    lm, context = load("llama"), Encoded((), tuple(CONTEXT[:length]))
    for policy in (SpeedPolicy(2), SpeedPolicy(2, 3), SpeedPolicy(2, 2, 2)):
        if policy.anchors > length:
            with pytest.raises(UserError, match="fewer than the anchors"):
                score(lm, policy, context, CONTINUATIONS, shared=SharedPrefill(lm))
            continue
        found = score(lm, policy, context, CONTINUATIONS, shared=SharedPrefill(lm))
        alone = score(lm, policy, context, CONTINUATIONS)
        assert [s.log_likelihood for s in found] == pytest.approx([s.log_likelihood for s in alone], abs=1e-5)


def test_all_cutoffs_cost_one_prefill(monkeypatch):
    lm, prompts = load("llama"), []

    def counting(model, ids, *arguments, **options):
        prompts.append(ids.shape[1])
        return prefill(model, ids, *arguments, **options)

    prefill = scoring.prefill
    monkeypatch.setattr(scoring, "prefill", counting)
    shared = SharedPrefill(lm)
    for policy in [FullPolicy(), *(SpeedPolicy(k, anchors) for k in (1, 2, 3, 4) for anchors in (0, 1))]:
        score(lm, policy, Encoded((), tuple(CONTEXT)), CONTINUATIONS, shared=shared)
    assert prompts == [len(CONTEXT) - 1]
    score(lm, ProjectedPolicy(2), Encoded((), tuple(CONTEXT)), CONTINUATIONS, shared=shared)
    assert prompts == [len(CONTEXT) - 1, len(CONTEXT)]


@pytest.mark.parametrize("policy", [SpeedPolicy(2), SpeedPolicy(2, 0), FASTKV], ids=str)
def test_continuations_run_as_many_at_once_as_there_is_room_for(policy, monkeypatch):
    lm, context, sizes = load("llama"), Encoded((), tuple(CONTEXT)), []

    def counting(model, ids, cache):
        sizes.append(len(ids))
        return decode(model, ids, cache)

    decode = scoring.decode
    together = score(lm, policy, context, CONTINUATIONS)
    _, cache = prefill_context(lm, policy, context)
    one = cache.kv_bytes + 6 * VOCAB * 4
    monkeypatch.setattr(scoring, "decode", counting)
    for room, expected in ((0, [1, 1, 1, 1]), (3 * one, [3, 1]), (4 * one, [4])):
        monkeypatch.setattr(scoring, "BATCH_BYTES", room)
        sizes.clear()
        apart = score(lm, policy, context, CONTINUATIONS)
        assert sizes == expected
        assert [s.log_likelihood for s in apart] == pytest.approx([s.log_likelihood for s in together], abs=1e-5)


def test_what_just_fits_the_positions_is_scored():
    lm, context = load("llama"), Encoded((), tuple(random_ids(500, 1)))
    assert lm.anatomy.max_positions == 512
    assert score(lm, SpeedPolicy(2), context, [[5] * 13])[0].n_tokens == 13
    with pytest.raises(UserError, match="exceed the 512 positions"):
        score(lm, SpeedPolicy(2), context, [[5] * 14])


def test_what_decoding_writes_is_greedy():
    lm, context = load("llama"), Encoded((), tuple(CONTEXT))
    logits, _ = prefill_context(lm, SpeedPolicy(3), context)
    best = int(logits[0].argmax())
    (likely, other) = score(lm, SpeedPolicy(3), context, [[best], [(best + 1) % VOCAB]])
    assert (likely.is_greedy, other.is_greedy) == (True, False)
    assert likely.log_likelihood > other.log_likelihood


@pytest.mark.parametrize("policy", [FullPolicy(), SpeedPolicy(2), SpeedPolicy(3, 2)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_query_may_be_prompt_or_decode_phase(family, policy):
    document, query = tuple(CONTEXT[:13]), tuple(CONTEXT[13:])
    scored = {
        q: [s.log_likelihood for s in score(load(family), policy, Encoded(document, query), CONTINUATIONS, query=q)]
        for q in ("prompt", "later", "decode")
    }
    assert scored["later"] == pytest.approx(scored["prompt"], abs=1e-4)
    wanted = [by_masks(family, policy, CONTEXT, c, n_document=13)[0] for c in CONTINUATIONS]
    assert scored["decode"] == pytest.approx(wanted, abs=1e-4)
    if policy.name == "speed":
        assert scored["decode"] != pytest.approx(scored["prompt"], abs=1e-3)


def test_fastkv_chooses_without_the_query_if_that_comes_later():
    lm = load("llama")
    document, query = tuple(CONTEXT[:13]), tuple(CONTEXT[13:])
    by_place = {
        q: [s.log_likelihood for s in score(lm, FASTKV, Encoded(document, query), CONTINUATIONS, query=q)]
        for q in ("prompt", "later", "decode")
    }
    assert by_place["later"] == pytest.approx(by_place["decode"], abs=1e-4)  # later tokens run at full depth
    assert by_place["later"] != pytest.approx(by_place["prompt"], abs=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
def test_chunks_change_nothing(chunk_size):
    context = Encoded(tuple(CONTEXT[:13]), tuple(CONTEXT[13:]))
    for query in ("prompt", "later", "decode"):
        whole = score(load("llama"), SpeedPolicy(2), context, CONTINUATIONS, query=query)
        parts = score(load("llama"), SpeedPolicy(2), context, CONTINUATIONS, query=query, chunk_size=chunk_size)
        assert [s.log_likelihood for s in parts] == pytest.approx([s.log_likelihood for s in whole], abs=1e-4)


def test_what_cannot_be_scored_is_refused():
    lm = load("llama")
    for context, continuations, said in (
        (Encoded((), ()), [[5]], "a context has no tokens"),
        (Encoded((), (5,)), [[5], []], "a continuation has no tokens"),
        (Encoded((), tuple(CONTEXT)), [[5] * 500], "exceed the 512 positions"),
    ):
        with pytest.raises(UserError, match=said):
            score(lm, SpeedPolicy(2), context, continuations)
    with pytest.raises(UserError, match="query is 'first'"):
        score(lm, SpeedPolicy(2), Encoded((5,), (6,)), [[5]], query="first")


@examples(80)
@given(
    document=st.text(alphabet="ab \né中.", max_size=12),
    query=st.text(alphabet="ab \né中.", min_size=1, max_size=12).filter(lambda t: t.strip()),
    continuation=st.text(alphabet="ab é.", min_size=1, max_size=8).filter(lambda t: t.strip()),
)
def test_pairs_are_split_as_lm_eval_splits_them(smollm, document, query, continuation):
    tokenizer = smollm.tokenizer
    context, cut = encode_pair(tokenizer, Context(query, document), continuation, special=False)
    text = document + query
    spaces = len(text) - len(text.rstrip())
    stripped, moved = text.rstrip(), text[len(text) - spaces :] + continuation
    whole, alone = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (stripped + moved, stripped))
    assert list(context.ids) == alone
    assert list(cut) == whole[len(alone) :]
    assert tokenizer.decode(context.document) == "" or document.startswith(tokenizer.decode(context.document)[:1])
    assert len(tokenizer.decode(context.document)) <= len(document)


def test_a_context_to_generate_from_keeps_its_last_line(smollm):
    tokenizer = smollm.tokenizer
    encoded = encode_context(tokenizer, Context("```python\n", "A task.\n"), special=False)
    assert list(encoded.ids) == tokenizer("A task.\n```python\n")["input_ids"]
    assert tokenizer.decode(encoded.document) == "A task.\n"
    assert encode_context(tokenizer, Context("x"), special=False) == Encoded((), tuple(tokenizer("x")["input_ids"]))


def test_log_likelihoods_of_every_token_sum_to_one(smollm):
    context = Encoded((), tuple(smollm.tokenizer("The capital of France is")["input_ids"]))
    scored = score(smollm, SpeedPolicy(24), context, [[i] for i in range(0, 49152, 64)])
    assert 0 < sum(math.exp(s.log_likelihood) for s in scored) < 1
    logits, _ = prefill_context(smollm, SpeedPolicy(24), context)
    log_p = logits[0].double().log_softmax(-1)
    assert [s.log_likelihood for s in scored] == pytest.approx(log_p[::64].tolist(), abs=1e-4)
    paris, banana = (smollm.tokenizer(t)["input_ids"] for t in (" Paris", " banana"))
    better, worse = score(smollm, SpeedPolicy(24), context, [paris, banana])
    assert better.log_likelihood > worse.log_likelihood
    torch.testing.assert_close(torch.tensor(1.0), log_p.exp().sum().float())


# --- Fidelity ---


@pytest.mark.parametrize("reference", [None, "w5 w9 w12 w7 w30"])
def test_fidelity_of_speed_is_the_cutoff_sweep(reference):
    lm = load("llama")
    texts = ("w4 w9 w5 w6 w7 w8 w10 w11 w40 w41", "w6 w7 w8 w21 w22 w23 w24 w25")
    prompts = PromptSet(
        tuple(Prompt(str(i), text=t, reference=reference, category="c") for i, t in enumerate(texts)), "m"
    )
    swept = diagnose(lm, prompts, decode_tokens=5).cutoffs.set_index(["prompt_id", "cutoff"])
    n_layers = lm.anatomy.n_layers
    table = fidelity(lm, prompts, [SpeedPolicy(k) for k in range(1, n_layers + 1)], decode_tokens=5)
    assert len(table) == 2 * n_layers
    for row in table.itertuples():
        wanted = swept.loc[(row.prompt_id, int(row.policy.partition(":")[2]))]
        assert (row.kl, row.top1_agreement) == pytest.approx((wanted["kl"], wanted["top1_agreement"]), abs=1e-4)
        assert (row.nll, row.nll_full) == pytest.approx((wanted["nll"], wanted["nll_full"]), abs=1e-4)
        assert (row.n_decode, row.category) == (5, "c")


def test_fidelity_of_other_policies_is_their_own():
    prompts = PromptSet((Prompt("a", text=" ".join(f"w{i}" for i in CONTEXT)),), "made")
    policies = [FullPolicy(), ProjectedPolicy(2), ProjectedPolicy(3), ProjectedPolicy(4), FASTKV]
    table = fidelity(load("llama"), prompts, policies, decode_tokens=6).set_index("policy")
    assert table.loc["full", ["kl", "top1_agreement"]].tolist() == pytest.approx([0, 1], abs=1e-5)
    assert table.loc["projected:2", "kl"] > table.loc["projected:3", "kl"] > 1e-4
    # The state at the cutoff is what the last layer makes its keys from anyway.
    assert table.loc["projected:4", "kl"] == pytest.approx(0, abs=1e-5)
    assert table.loc[FASTKV.spec, "kl"] > 1e-4
    with pytest.raises(UserError, match="decode tokens is 0"):
        fidelity(load("llama"), prompts, policies, decode_tokens=0)
    with pytest.raises(UserError, match="does not fit"):
        fidelity(load("llama"), prompts, [SpeedPolicy(99)])
