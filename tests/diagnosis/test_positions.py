"""How many tokens fit a model is one rule: the last new token is predicted and never run."""

import numpy as np
import pytest

from diagnostics import SpeedPolicy, UserError, diagnose
from diagnostics.evaluate.policy_fidelity import fidelity
from diagnostics.evaluate.scoring import Encoded, score
from diagnostics.finetune.own_answers import with_answers
from diagnostics.generation.benchmarks import benchmark
from diagnostics.generation.inputs import encode_input
from diagnostics.models.positions import prompt_room
from diagnostics.prompts.prompt import Prompt, PromptSet
from tests.support.tiny import random_ids, tiny_model

POSITIONS, NEW = 512, 8

pytestmark = pytest.mark.usefixtures("one_thread")


def words(n):
    return " ".join(["<s>", *(f"w{i}" for i in random_ids(n)[1:])])


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


def test_a_prompt_that_fills_the_positions_is_taken_by_all_and_one_more_by_none(lm):
    assert lm.anatomy.room(NEW) == prompt_room(POSITIONS, NEW) == POSITIONS - NEW + 1 == 505
    assert lm.anatomy.room(0) == lm.anatomy.room(1) == POSITIONS
    assert prompt_room(None, NEW) is None
    for size, fits in ((505, True), (506, False)):
        prompts = PromptSet((Prompt("p", text=words(size)),), "set")
        for use in (
            lambda prompts=prompts: diagnose(lm, prompts, decode_tokens=NEW),
            lambda prompts=prompts: fidelity(lm, prompts, [SpeedPolicy(2)], decode_tokens=NEW),
            lambda size=size: encode_input(lm, words(size), max_new_tokens=NEW),
            lambda size=size: score(lm, SpeedPolicy(2), Encoded((), tuple(random_ids(size))), [random_ids(NEW)]),
            lambda size=size: benchmark(lm, [SpeedPolicy(2)], lengths=[size], new_tokens=NEW, repeats=1),
        ):
            if fits:
                use()
            else:
                with pytest.raises(UserError, match=r"505 fit|exceed the 512 positions"):
                    use()


def test_training_runs_the_last_token_of_an_answer_too(lm):
    for size, kept in ((504, 1), (505, 0)):
        prompts = PromptSet((Prompt("p", text=words(size)),), "set")
        examples, counts = with_answers(lm, prompts, max_new_tokens=NEW)
        assert (len(examples), counts.dropped_too_long) == (kept, 1 - kept)
        assert all(len(example["input_ids"]) <= POSITIONS for example in examples)


def test_fidelity_is_the_sweep_where_the_document_is_cut(lm):
    prompts = PromptSet(
        (Prompt("p", text="<s> {document} w5", document=words(600)[4:], reference="w7 w8 w9 w10 w11 w12 w13 w14"),),
        "set",
    )
    run = diagnose(lm, prompts, decode_tokens=NEW)
    table = fidelity(lm, prompts, [SpeedPolicy(k) for k in (1, 3, 5)], decode_tokens=NEW)
    assert table["n_prompt"].tolist() == [int(run.prompts["n_prompt"][0])] * 3
    np.testing.assert_allclose(table["kl"], run.array("kl")[0][[0, 2, 4]], rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(("evidence", "part"), [("<s>", "all"), ("w9 w10", "some"), ("w10", "all"), ("w8", None)])
def test_evidence_outside_the_prompt_segment_is_said(lm, evidence, part):
    prompts = PromptSet((Prompt("p", text="<s> w8 w9 w10", evidence=(evidence,), reference="w7"),), "set")
    run = diagnose(lm, prompts, decode_tokens=1)
    note = run.prompts["notes"][0]
    assert (f"{part} of the evidence is anchor or the last prompt token" in note) if part else note == ""
    assert run.layers["evidence_mass"].isna().all() == (part == "all")
