"""Cutoffs of one model against the full depth of another: from slow prefill and decode, and what is refused."""

import json

import pandas as pd
import pytest
import torch
from torch.nn import functional

from diagnostics import FullPolicy, SpeedPolicy, UserError, decode, diagnose, load_prompts, prefill
from diagnostics.diagnosis.teacher import observe_teacher
from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import encode_prompts
from tests.support.runs import write_prompts
from tests.support.tiny import N_LAYERS, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
DECODE = 5
COLUMNS = ["kl", "top1_agreement", "nll", "nll_full"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = write_prompts(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", n_prompts=3, n_tokens=26)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1]["reference"] = "w7 w9 w11 w13 w15 w17 w19"  # cut at five
    lines[2]["reference"] = "w8 w10"
    path.write_text("\n".join(map(json.dumps, lines)))
    return load_prompts(path)


def tuned(family, name="tuned"):
    """A model not far from the tiny one of its family."""
    lm = tiny_model(family)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03 * parameter.std())
    return LoadedModel.wrap(lm.model, lm.tokenizer, name)


def under(lm, policy, ids, reference):
    """Float64 logits of inference at the decode positions."""
    with torch.no_grad():
        first, cache = prefill(lm.model, torch.tensor([ids]), policy=policy)
        rows = [first.reshape(1, -1)]
        if len(reference) > 1:
            rows.append(decode(lm.model, torch.tensor([reference[:-1]]), cache)[0])
    return torch.cat(rows).double()


def greedy(lm, ids, n):
    with torch.no_grad():
        out = []
        for _ in range(n):
            out.append(int(lm.model(torch.tensor([[*ids, *out]])).logits[0, -1].argmax()))
    return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "gpt2", "mistral"])
def test_every_cutoff_against_the_teachers_full_depth(prompts, family):
    base, other = tiny_model(family), tuned(family)
    teacher = observe_teacher(base, prompts, decode_tokens=DECODE)
    run = diagnose(other, prompts, decode_tokens=DECODE, teacher=teacher)
    found = run.cutoffs.set_index(["prompt_id", "cutoff"])
    encoded = encode_prompts(prompts, base.tokenizer, max_reference_tokens=DECODE)
    assert [len(prompt.reference_ids or ()) for prompt in encoded] == [0, 5, 2]
    for prompt in encoded:
        reference = list(prompt.reference_ids or greedy(base, prompt.token_ids, DECODE))
        assert teacher.references[prompt.prompt_id] == tuple(reference)
        targets = torch.tensor(reference)
        full = under(base, FullPolicy(), prompt.token_ids, reference)
        p = full.log_softmax(-1)
        for cutoff in range(1, N_LAYERS + 1):
            logits = under(other, SpeedPolicy(cutoff), prompt.token_ids, reference)
            q = logits.log_softmax(-1)
            wanted = {
                "kl": float((p.exp() * (p - q)).sum(-1).mean()),
                "top1_agreement": float((full.argmax(-1) == logits.argmax(-1)).double().mean()),
                "nll": float(functional.nll_loss(q, targets)),
                "nll_full": float(functional.nll_loss(p, targets)),
            }
            row = found.loc[prompt.prompt_id, cutoff]
            assert row[COLUMNS].to_dict() == pytest.approx(wanted, abs=2e-4), (prompt.prompt_id, cutoff)
    assert found.xs(N_LAYERS, level="cutoff")["kl"].min() > 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_model_that_is_its_own_teacher(prompts, family):
    lm = tiny_model(family)
    alone = diagnose(lm, prompts, decode_tokens=DECODE)
    teacher = observe_teacher(lm, prompts, decode_tokens=DECODE)
    taught = diagnose(lm, prompts, decode_tokens=DECODE, teacher=teacher)
    for name in alone.tables:
        found, wanted = taught.tables[name], alone.tables[name]
        if name == "prompts":  # greedy references are given now
            found, wanted = found.drop(columns="reference"), wanted.drop(columns="reference")
        pd.testing.assert_frame_equal(found, wanted, atol=1e-5, rtol=1e-4)


def test_the_manifest_says_so(prompts):
    base, other = tiny_model("llama"), tuned("llama")
    teacher = observe_teacher(base, prompts, decode_tokens=DECODE)
    manifest = diagnose(other, prompts, decode_tokens=DECODE, teacher=teacher).manifest
    assert manifest["notes"].count("every cutoff, full depth too, is compared with tiny-llama at full depth") == 1
    assert manifest["identity"]["teacher"] == base.weight_hash
    assert manifest["identity"]["weight_hash"] == other.weight_hash
    alone = diagnose(other, prompts, decode_tokens=DECODE).manifest
    assert alone["identity"]["teacher"] is None
    assert not [note for note in alone["notes"] if "compared" in note]


def test_a_teacher_that_has_not_seen_the_prompts(prompts):
    lm = tiny_model("llama")
    teacher = observe_teacher(lm, prompts[:2], decode_tokens=DECODE)
    with pytest.raises(UserError, match="has not seen prompt 'p2'"):
        diagnose(lm, prompts, decode_tokens=DECODE, teacher=teacher)
    assert len(diagnose(lm, prompts[:1], decode_tokens=DECODE, teacher=teacher).prompts) == 1


def test_a_run_is_not_continued_with_another_teacher(prompts, tmp_path):
    base, other = tiny_model("llama"), tuned("llama")
    teachers = [observe_teacher(lm, prompts, decode_tokens=DECODE) for lm in (base, other)]
    whole = diagnose(other, prompts, decode_tokens=DECODE, teacher=teachers[0])

    def stop(done, total, prompt_id):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose(other, prompts, decode_tokens=DECODE, teacher=teachers[0], out=tmp_path / "run", progress=stop)
    for wrong in (teachers[1], None):
        with pytest.raises(UserError, match="teacher is"):
            diagnose(other, prompts, decode_tokens=DECODE, teacher=wrong, out=tmp_path / "run", resume=True)
    run = diagnose(other, prompts, decode_tokens=DECODE, teacher=teachers[0], out=tmp_path / "run", resume=True)
    pd.testing.assert_frame_equal(run.cutoffs, whole.cutoffs)


def test_observing_says_how_far_it_is(prompts):
    calls = []
    observe_teacher(tiny_model("llama"), prompts, decode_tokens=2, progress=lambda *call: calls.append(call))
    assert calls == [(0, 3, "p0"), (1, 3, "p1"), (2, 3, "p2"), (3, 3, "")]


def test_a_teacher_that_saw_fewer_tokens_gives_fewer(prompts):
    """References are the teacher's, however many are asked for."""
    lm = tiny_model("llama")
    few = observe_teacher(lm, prompts, decode_tokens=3)
    assert set(diagnose(lm, prompts, decode_tokens=DECODE, teacher=few).prompts["n_decode"]) == {3, 2}
