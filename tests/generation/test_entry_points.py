"""What the functions of the library take: texts, names and single things, or one line that says how to give them."""

import numpy as np
import pandas as pd
import pytest
import torch

from diagnostics import FullPolicy, Prompt, SpeedPolicy, UserError, decode, diagnose, generate, prefill
from diagnostics.evaluate import evaluate, fidelity
from diagnostics.evaluate.items import Context as Asked
from diagnostics.evaluate.items import GenerationItem, Task
from diagnostics.finetune.settings import Settings
from diagnostics.finetune.training import finetune
from diagnostics.generation.benchmarks import benchmark
from diagnostics.generation.inputs import encode_input
from diagnostics.prompts.encoding import encode_messages
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = "w5 w6 w7 w8 w9 w10"
TASK = Task("task", (GenerationItem("1", Asked(TEXT), ("w5",)),), "contains", max_new_tokens=2)


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


# --- Generating from a text ---


def test_a_text_is_generated_from_as_the_command_does(lm):
    ids = encode_input(lm, TEXT)
    expected = generate(lm, ids, policy=SpeedPolicy(3), max_new_tokens=5)
    for policy in (SpeedPolicy(3), "speed:3"):
        found = generate(lm, TEXT, policy=policy, max_new_tokens=5)
        assert torch.equal(found.token_ids, expected.token_ids)
        assert found.texts == (lm.tokenizer.decode(expected.token_ids[0], skip_special_tokens=True),)


def test_a_text_is_a_user_message_where_there_is_a_template(smollm):
    chat = [{"role": "user", "content": "Name a colour."}]
    ids = torch.tensor([encode_messages(chat, smollm.tokenizer)])
    plain = smollm.tokenizer("Name a colour.", return_tensors="pt")
    wanted = generate(smollm, ids, max_new_tokens=4).token_ids
    for given in ("Name a colour.", chat):
        assert torch.equal(generate(smollm, given, max_new_tokens=4).token_ids, wanted)
    raw = generate(smollm, plain["input_ids"], max_new_tokens=4).token_ids
    for given in (plain, dict(plain)):
        assert torch.equal(generate(smollm, given, max_new_tokens=4).token_ids, raw)
    assert torch.equal(generate(smollm, "Name a colour.", chat=False, max_new_tokens=4).token_ids, raw)


def test_a_tokenizers_padding_is_kept(lm):
    ids, pad = torch.tensor([random_ids(9)]), torch.zeros(1, 3, dtype=torch.long)
    padded = {"input_ids": torch.cat([pad, ids], 1), "attention_mask": torch.cat([pad, torch.ones_like(ids)], 1)}
    alone = generate(lm, ids, max_new_tokens=4).token_ids
    assert torch.equal(generate(lm, padded, max_new_tokens=4).token_ids, alone)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([1, 2, 3], "token ids are list: give a tensor of integers"),
        ([], "token ids are list"),
        (torch.tensor([1, 2]), r"token ids are a tensor \[2\]: give"),
        (torch.ones(1, 4), r"token ids are a tensor \[1, 4\]: give a tensor of integers"),
        (None, "token ids are NoneType"),
        ({"ids": 1}, "token ids are NoneType"),
    ],
)
def test_what_is_no_prompt_is_told_how(lm, given, said):
    with pytest.raises(UserError, match=said):
        generate(lm, given)


def test_prefill_and_a_bare_model_take_no_text(lm):
    with pytest.raises(UserError, match=r"token ids are str: give .* encode_input\(lm, text\)"):
        prefill(lm, TEXT)
    with pytest.raises(UserError, match="a text needs the model's tokenizer"):
        generate(lm.model, TEXT)
    with pytest.raises(UserError, match="no chat template"):
        generate(lm, [{"role": "user", "content": TEXT}])
    _, cache = prefill(lm, encode_input(lm, TEXT))
    with pytest.raises(UserError, match="token ids are list"):
        decode(lm, [1, 2], cache)


# --- One thing, or its name, in place of a list of things ---


def without_times(table):
    return table.drop(columns=[name for name in table if name.endswith("_s")])


def test_one_policy_or_its_name_is_enough(lm):
    prompts = [Prompt("a", text=TEXT)]
    for one in (SpeedPolicy(3), "speed:3", ["speed:3"], [SpeedPolicy(3)]):
        found = fidelity(lm, prompts, one, decode_tokens=3, progress=False)
        assert set(found["policy"]) == {"speed:3"}
        rows = benchmark(lm, one, lengths=12, repeats=1, new_tokens=2, progress=False).rows
        assert set(rows["policy"]) == {"full", "speed"}
        items = evaluate(lm, TASK, one, progress=False).items
        pd.testing.assert_frame_equal(items, evaluate(lm, [TASK], [SpeedPolicy(3)], progress=False).items)


def test_a_transformers_model_with_its_tokenizer_elsewhere_is_told_how(lm):
    for call in (
        lambda: diagnose(lm.model, TEXT),
        lambda: fidelity(lm.model, TEXT, FullPolicy()),
        lambda: benchmark(lm.model, FullPolicy(), lengths=8),
        lambda: evaluate(lm.model, TASK, FullPolicy()),
    ):
        with pytest.raises(UserError, match=r"without a tokenizer: use LoadedModel.wrap\(model, tokenizer\)"):
            call()


NAME = r"the model is a name, 'llama': load it first, with load_model\('llama'\)"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda lm: diagnose("llama", TEXT), NAME),
        (lambda lm: generate("llama", TEXT), NAME),
        (lambda lm: prefill("llama", torch.ones(1, 3, dtype=torch.long)), NAME),
        (lambda lm: benchmark("llama", [], lengths=[8]), NAME),
        (lambda lm: evaluate("llama", TASK, []), NAME),
        (lambda lm: fidelity("llama", TEXT, []), NAME),
        (lambda lm: finetune("llama", None, TEXT, None, out="nowhere"), NAME),
        (lambda lm: benchmark(lm, SpeedPolicy, lengths=[8]), "policies are .*SpeedPolicy.*: give SpeedPolicy"),
        (lambda lm: evaluate(lm, TASK, [24]), "a policy is 24: give SpeedPolicy"),
        (lambda lm: evaluate(lm, 5, []), "tasks are 5: give load_task"),
        (lambda lm: evaluate(lm, [5], []), "a task is 5: give load_task"),
        (lambda lm: fidelity(lm, 5, []), "prompts are a number: give load_prompts"),
        (lambda lm: generate(lm, TEXT, policy="speed=3"), "did you mean 'speed:3'"),
        (lambda lm: finetune(lm, ["a"], TEXT, Settings(cutoff=3), out="nowhere"), "the data are .*: give Source"),
        (lambda lm: diagnose(lm, TEXT, progress=3), "progress is 3: give True, False, or a function"),
    ],
)
def test_the_wrong_thing_is_told_how(lm, tmp_path, monkeypatch, call, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        call(lm)
    assert not list(tmp_path.iterdir())


# --- Signs of life ---


def test_a_bar_is_drawn_unless_it_is_not_asked_for(lm, capsys):
    calls = {
        "diagnosing": lambda **asked: diagnose(lm, [TEXT, TEXT], decode_tokens=2, **asked),
        "comparing": lambda **asked: fidelity(lm, TEXT, "speed:3", decode_tokens=2, **asked),
        "benchmarking": lambda **asked: benchmark(lm, "speed:3", lengths=8, repeats=1, new_tokens=2, **asked),
        "evaluating": lambda **asked: evaluate(lm, TASK, "speed:3", **asked),
    }
    for title, call in calls.items():
        call()
        shown = capsys.readouterr().err
        assert title in shown
        assert "100%" in shown
        seen = []
        call(progress=lambda done, total, what, seen=seen: seen.append(done / total))
        assert (seen[0], seen[-1]) == (0, 1)
        assert np.all(np.diff(seen) >= 0)
        call(progress=False)
        assert capsys.readouterr() == ("", "")
