"""lm-eval under a policy: as its own model at full depth, as masked float64 passes below; what is refused."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from functools import cache

import pytest
import torch

from tests.support.paths import ROOT

pytest.importorskip("lm_eval")

import lm_eval as harness
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from diagnostics import FastKVPolicy, FullPolicy, LoadedModel, ProjectedPolicy, SpeedPolicy, UserError
from diagnostics.evaluate import lm_eval as adapter
from diagnostics.evaluate.lm_eval import PolicyLM, chosen_policy
from tests.support import policy_reference
from tests.support.policy_cases import letters_of, load, masked_pass
from tests.support.tiny import N_LAYERS, random_ids, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 1e-4
FULL = [FullPolicy(), SpeedPolicy(N_LAYERS)]
CUT = [SpeedPolicy(2), SpeedPolicy(3, 2), SpeedPolicy(1, 0), ProjectedPolicy(2)]


def words(n, seed):
    return " ".join(f"w{i}" for i in random_ids(n + 1, seed)[1:])


A, B, C = words(17, 1), words(30, 2), words(3, 3)
# Contexts out of order and shared, one with a space at its end, one token alone, and none at all.
PAIRS = [
    (A, " w7"),
    (B, " w8 w9"),
    (A, f" {words(6, 4)}"),
    ("", "w5 w6"),
    ("w9", " w10 w11"),
    (B, " w8"),
    (f"{C} ", "w12"),
    (A, " w9"),
    ("", "w7"),
    (C, f" {words(4, 5)}"),
]


def asked(pairs, kind="loglikelihood"):
    return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]


def stock(lm, **settings):
    return HFLM(lm.model, tokenizer=lm.tokenizer, **settings)


def under(lm, policy, **settings):
    return PolicyLM(lm, policy=policy, **settings)


def scores(model, pairs=PAIRS):
    return model.loglikelihood(asked(pairs), disable_tqdm=True)


def tokens_of(lm, context, continuation):
    """What the tiny tokenizer, one token per word, makes of a pair; no context is the beginning of text."""
    return (tuple(lm.tokenizer(text)["input_ids"]) for text in (context or "<s>", continuation))


# --- Log-likelihoods ---


@pytest.mark.parametrize("policy", FULL, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_full_depth_scores_as_lm_evals_own_model(family, policy):
    lm = load(family)
    ours, theirs = scores(under(lm, policy)), scores(stock(lm))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in theirs], abs=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert len({round(value, 3) for value, _ in theirs}) == len(PAIRS), "answers in another order would show"


@pytest.mark.parametrize("policy", CUT, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_policy_scores_as_masked_passes(family, policy):
    lm = load(family)
    pairs = [pair for pair in PAIRS if len(pair[0].split()) >= policy.anchors or policy.anchors < 2]
    ours = scores(under(lm, policy), pairs)
    wanted = []
    for context, continuation in pairs:
        prompt, rest = tokens_of(lm, context, continuation)
        letters = letters_of(policy, (len(prompt), len(rest) - 1))
        logits = masked_pass(family, policy, [*prompt, *rest[:-1]], letters)[len(prompt) - 1 :]
        log_p = logits.log_softmax(-1)
        value = sum(float(row[token]) for row, token in zip(log_p, rest, strict=True))
        wanted.append((value, log_p.argmax(-1).tolist() == list(rest)))
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in wanted], abs=TOLERANCE)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in wanted]
    if policy.name == "speed":
        assert [v for v, _ in ours] != pytest.approx([v for v, _ in scores(stock(lm), pairs)], abs=0.01)


def test_the_greedy_continuation_is_known():
    lm = load("llama")
    policy = SpeedPolicy(2)
    with policy(lm.model):
        made = lm.model.generate(torch.tensor([lm.tokenizer(A)["input_ids"]]), max_new_tokens=3, do_sample=False)
    greedy = " " + lm.tokenizer.decode(made[0, -3:])
    assert [found for _, found in scores(under(lm, policy), [(A, greedy), (A, " w7 w8 w9")])] == [True, False]


def test_continuations_of_a_context_share_one_prefill(monkeypatch):
    lm = load("llama")
    called = []

    def spy(lm, policy, context, continuations, **options):
        called.append((context.ids, len(continuations)))
        return adapted(lm, policy, context, continuations, **options)

    adapted = adapter.score
    monkeypatch.setattr(adapter, "score", spy)
    run = [0]
    handle = lm.model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: run.append(args[0].numel()))
    try:
        scores(under(lm, SpeedPolicy(2)), [(B, f" w{i}") for i in range(5, 45)])
    finally:
        handle.remove()
    assert called == [(tuple(lm.tokenizer(B)["input_ids"]), 40)]
    assert sum(run) == 30  # one-token continuations need nothing but the context's own pass
    called.clear()
    scores(under(lm, SpeedPolicy(2)))
    assert [(len(ids), n) for ids, n in called] == [(30, 2), (17, 3), (3, 2), (1, 2), (1, 1)]  # the longest first


def test_chunks_change_nothing():
    whole, parts = (scores(under(load("llama"), SpeedPolicy(2), chunk_size=size)) for size in (None, 4))
    assert [value for value, _ in parts] == pytest.approx([value for value, _ in whole], abs=TOLERANCE)


# --- Generation ---

STOPS = {"until": ["w0"], "max_gen_toks": 12, "do_sample": False}
GENERATED = [(words(n, n), STOPS) for n in (19, 4, 11, 25, 1)]


def texts(model):
    return model.generate_until(asked(GENERATED, "generate_until"), disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("policy", FULL, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_depth_generates_as_lm_evals_own_model(family, policy, batch_size):
    lm = load(family)
    theirs = texts(stock(lm, batch_size=batch_size))
    assert texts(under(lm, policy, batch_size=batch_size)) == theirs
    assert len(set(theirs)) == len(GENERATED)


@cache
def masked_text(policy, context):
    """The most likely tokens one after another, each found by a masked pass over all before it."""
    tokenizer = load("llama").tokenizer
    ids = tokenizer(context)["input_ids"]
    n_prompt = len(ids)
    while len(ids) < n_prompt + 12 and ids[-1] != tokenizer.eos_token_id:
        logits = masked_pass("llama", policy, ids, letters_of(policy, (n_prompt, len(ids) - n_prompt)))
        ids.append(int(logits[-1].argmax()))
    return tokenizer.decode(ids[n_prompt:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("policy", [SpeedPolicy(2), SpeedPolicy(1, 0), ProjectedPolicy(2)], ids=str)
def test_a_policy_generates_what_masked_passes_find_most_likely(policy, batch_size):
    lm = load("llama")
    made = texts(under(lm, policy, batch_size=batch_size))
    assert made == [masked_text(policy, context) for context, _ in GENERATED]
    assert made != texts(stock(lm))


def test_stop_strings_end_a_text():
    lm = load("llama")
    model = under(lm, SpeedPolicy(2))
    (whole,) = model.generate_until(asked(GENERATED[:1], "generate_until"), disable_tqdm=True)
    word = whole.split()[5]
    stopping = [(GENERATED[0][0], STOPS | {"until": [word]})]
    (text,) = model.generate_until(asked(stopping, "generate_until"), disable_tqdm=True)
    assert text == whole[: whole.index(word)]


# --- What is refused ---


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": "auto"}, "batch size is 'auto'"),
        ({"batch_size": "auto:4"}, "batch size is 'auto:4'"),
        ({"batch_size": 0}, "batch size is 0"),
        ({"peft": "adapter"}, "'peft' is no argument"),
        ({"parallelize": True}, "'parallelize' is no argument"),
        ({"policy": "speed:2", "cutoff": 3}, "give one"),
        ({"cutoff": 3, "recommendation": "runs/x"}, "give one"),
        ({"anchors": 0}, "anchors go with cutoff"),
        ({"policy": "speed:2", "anchors": 0}, "anchors go with cutoff"),
        ({"policy": "shallow"}, "policy 'shallow' is not one of"),
        ({"cutoff": N_LAYERS + 1}, f"the model has {N_LAYERS} layers"),
        ({"cutoff": "deep"}, "cutoff is deep"),
        ({"recommendation": "nowhere.json"}, "no recommendation in 'nowhere.json'"),
        ({"chunk_size": 0}, "chunk size is 0"),
        ({"pretrained": "./nowhere"}, "no model folder './nowhere'"),
        ({"pretrained": "./nowhere", "device": "cuda:0"}, "no model folder './nowhere'|cannot be used"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        PolicyLM(**{"pretrained": load("llama")} | settings)


def test_a_model_that_cannot_be_served_is_refused_at_once():
    with pytest.raises(UserError, match="sliding"):
        PolicyLM(load("mistral"), policy=FastKVPolicy(2))


def test_what_would_run_without_a_phase_is_refused():
    model = under(load("llama"), SpeedPolicy(2))
    with pytest.raises(UserError, match="perplexity over whole texts has no prompt"):
        model.loglikelihood_rolling(asked([(A,)], "loglikelihood_rolling"))
    with pytest.raises(UserError, match="cannot say which tokens are prompt"):
        model._model_call(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([(C, " w5"), (A, f" {words(20, 6)}")], "17 tokens of context and 20 of continuation, too many for the 35"),
        ([(C, " w5"), ("   ", "w5")], "the context of an item has no tokens: '   w5'"),
        ([(C, " w5"), (C, "  ")], f"the continuation of an item has no tokens: '{C}"),
        ([("w5", " w6")], "1 tokens of context, fewer than the anchors of speed:2:anchors=2: 'w5'"),
    ],
    ids=["too long", "no context", "no continuation", "fewer than anchors"],
)
def test_items_that_cannot_be_scored_are_refused_before_any_is(pairs, said, monkeypatch):
    model = under(load("llama"), SpeedPolicy(2, anchors=2), max_length=35)
    monkeypatch.setattr(adapter, "score", None)
    with pytest.raises(UserError, match=said):
        scores(model, pairs)


def test_no_context_is_cut():
    # As long as it can be: the last token of a continuation is never run.
    fits = [(A, f" {words(19, 6)}")]
    lm = load("llama")
    ours, theirs = (scores(model, fits) for model in (under(lm, "full", max_length=35), stock(lm, max_length=35)))
    assert ours[0][0] == pytest.approx(theirs[0][0], abs=TOLERANCE)
    model = under(lm, SpeedPolicy(2), max_length=30)
    for n, fails in ((18, False), (19, True)):
        request = asked([(words(n, 3), STOPS)], "generate_until")
        if fails:
            with pytest.raises(UserError, match=r"19 tokens of context and 12 to generate, .* the 30 .*: 'w\d+ "):
                model.generate_until(request, disable_tqdm=True)
        else:
            assert model.generate_until(request, disable_tqdm=True)[0]


# --- How it is named ---


def test_every_way_to_name_a_policy(tmp_path):
    file = tmp_path / "recommendation.json"
    file.write_text(json.dumps({"cutoff": 3, "anchors": 2}))
    for settings, policy in (
        ({}, FullPolicy()),
        ({"policy": "speed:2:anchors=0"}, SpeedPolicy(2, 0)),
        ({"policy": ProjectedPolicy(4)}, ProjectedPolicy(4)),
        ({"cutoff": 2}, SpeedPolicy(2)),
        ({"cutoff": 2, "anchors": 0}, SpeedPolicy(2, 0)),
        ({"recommendation": str(file)}, SpeedPolicy(3, 2)),
    ):
        assert chosen_policy(**settings) == policy
        assert PolicyLM(load("llama"), **settings).policy == policy


def test_lm_eval_finds_the_model_by_its_name():
    assert get_model("speed-diagnostics") is PolicyLM
    # Releases after 0.4.13 read this; the value must be the class that registers itself.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "lm_eval.models"
    ((name, value),) = project["entry-points"][group].items()
    assert name == "speed-diagnostics"
    assert value == f"{PolicyLM.__module__}:{PolicyLM.__qualname__}"
    assert importlib.metadata.EntryPoint(name, value, group).load() is PolicyLM


def test_the_tokenizer_given_stays_as_it_is():
    lm = load("gpt2")
    bare = tiny_tokenizer()
    bare.pad_token = None
    given = LoadedModel.wrap(lm.model, bare)
    assert under(given, "full").tokenizer.pad_token is not None
    assert bare.pad_token is None


# --- lm-eval's cache of responses ---


def cached(path, policy, family="llama"):
    return CachingLM(under(load(family), policy), str(path))


def test_a_response_cache_belongs_to_one_model_and_policy(tmp_path):
    path = tmp_path / "cache.db"
    first = cached(path, SpeedPolicy(2))
    made = first.loglikelihood(asked(PAIRS))
    again = cached(path, SpeedPolicy(2))
    again.lm._loglikelihood_tokens = None  # nothing is left to ask
    assert again.loglikelihood(asked(PAIRS)) == made
    for policy, family, said in (
        (SpeedPolicy(3), "llama", ""),
        (FullPolicy(), "llama", ""),
        (SpeedPolicy(2), "gpt2", r" \(configuration differs: .*\)"),
    ):
        with pytest.raises(UserError, match=rf"cache\.db has responses of speed:2{said}, not of this model under"):
            cached(path, policy, family)


def test_a_response_cache_of_another_model_is_refused(tmp_path):
    path = tmp_path / "cache.db"
    CachingLM(stock(load("llama")), str(path)).loglikelihood(asked(PAIRS[:1]))
    with pytest.raises(UserError, match="responses of another model"):
        cached(path, FullPolicy())


def test_responses_are_cached_one_by_one(tmp_path, monkeypatch):
    path = tmp_path / "cache.db"
    adapted = adapter.score

    def killed(lm, policy, context, continuations, **options):
        if len(context.ids) == 3:
            raise KeyboardInterrupt
        return adapted(lm, policy, context, continuations, **options)

    monkeypatch.setattr(adapter, "score", killed)
    with pytest.raises(KeyboardInterrupt):
        cached(path, SpeedPolicy(2)).loglikelihood(asked(PAIRS))
    left = []
    monkeypatch.setattr(adapter, "score", lambda *a, **o: left.append(len(a[2].ids)) or adapted(*a, **o))
    resumed = cached(path, SpeedPolicy(2)).loglikelihood(asked(PAIRS))
    assert left == [3, 1, 1]  # not the contexts of 30 and 17 tokens
    assert [v for v, _ in resumed] == pytest.approx([v for v, _ in scores(under(load("llama"), "speed:2"))], abs=1e-6)


# --- Whole runs ---


def write_task(folder):
    """Write a multiple-choice task of six documents, with how far each choice is from its unconditional likelihood."""
    rows = [
        {"q": words(9, n), "choices": [words(2, 100 + n), words(3, 200 + n)], "gold": n % 2, "ask": words(5, n)}
        for n in range(6)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}],
    }
    (folder / "tiny_choice.yaml").write_text(yaml.safe_dump(task))
    return task


def responses(model, task):
    # Without lm-eval's own tasks, which take ten seconds to list.
    manager = TaskManager(include_defaults=False)
    result = harness.simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return result, [sample["resps"] for sample in result["samples"][task["task"]]]


def test_a_task_in_python_says_what_ran(tmp_path):
    task = write_task(tmp_path)
    lm = load("llama")
    ours, answers = responses(under(lm, "speed:2:anchors=0"), task)
    config = ours["config"]
    assert config["policy"] == "speed:2:anchors=0"
    assert (config["pretrained"], config["model_weight_hash"]) == (lm.name, lm.weight_hash)
    assert (config["n_layers"], config["model_dtype"]) == (N_LAYERS, "float32")
    json.dumps(config, default=None)
    full, (theirs, expected) = responses(under(lm, "full"), task), responses(stock(lm), task)
    assert full[0]["results"]["tiny_choice"] == theirs["results"]["tiny_choice"]
    values = [[value for ((value, _),) in sample] for sample in full[1]]
    assert values == [pytest.approx([value for ((value, _),) in sample], abs=TOLERANCE) for sample in expected]
    assert len(values[0]) == 4, "two choices, and the same two without a context"
    assert answers != full[1]


def test_the_command_runs_a_task_offline(tmp_path):
    lm = load("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    task = write_task(tmp_path)
    made = subprocess.run(
        [
            *(sys.executable, "-m", "diagnostics.evaluate.lm_eval", "run", "--model", "speed-diagnostics"),
            *("--model_args", f"pretrained={tmp_path / 'model'},policy=speed:2:anchors=0", "--log_samples"),
            *("--include_path", str(tmp_path), "--tasks", "tiny_choice", "--output_path", str(tmp_path / "out")),
        ],
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    (file,) = (tmp_path / "out").glob("*/results_*.json")
    result = json.loads(file.read_text())
    assert result["config"]["policy"] == "speed:2:anchors=0"
    assert result["config"]["model_args"]["policy"] == "speed:2:anchors=0"
    assert result["config"]["model_weight_hash"] == lm.weight_hash
    here, _ = responses(under(lm, "speed:2:anchors=0"), task)
    assert result["results"]["tiny_choice"]["acc,none"] == here["results"]["tiny_choice"]["acc,none"]


def test_the_command_ends_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr(adapter, "cli_evaluate", lambda: PolicyLM(load("llama"), cutoff=2, policy="full"))
    with pytest.raises(SystemExit) as left:
        adapter.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: policy, cutoff and recommendation each say how the model runs: give one\n"


# --- The embedded model ---

ITEMS = [
    ("Question: What do plants take in from the air?\nAnswer:", [" carbon dioxide", " gold", " stones"]),
    ("Water boils at a temperature of one hundred degrees. The steam that rises is", [" hot.", " cold."]),
]
REAL = [(context, choice) for context, choices in ITEMS for choice in choices]
STORY = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"


def test_the_embedded_model_at_full_depth(smollm):
    theirs, ours = stock(smollm, batch_size=2), under(smollm, FullPolicy(), batch_size=2)
    wanted, found = scores(theirs, REAL), scores(ours, REAL)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=TOLERANCE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]
    options = {"until": ["\n\n"], "max_gen_toks": 16, "do_sample": False}
    requests = [(STORY, options), (ITEMS[1][0], options)]
    texts = [m.generate_until(asked(requests, "generate_until"), disable_tqdm=True) for m in (ours, theirs)]
    assert texts[0] == texts[1]
    assert all(texts[0])


@pytest.fixture(scope="module")
def slow(smollm):
    return policy_reference.SlowModel(smollm)


@pytest.mark.parametrize("cutoff", [15, 22])
def test_the_embedded_model_at_a_cutoff(smollm, slow, cutoff):
    policy = SpeedPolicy(cutoff)
    found = scores(PolicyLM(smollm, cutoff=cutoff), REAL)
    tokenizer = smollm.tokenizer
    for (context, continuation), (value, _) in zip(REAL, found, strict=True):
        prompt = tokenizer(context)["input_ids"]
        rest = tokenizer(context + continuation)["input_ids"][len(prompt) :]
        letters = letters_of(policy, (len(prompt), len(rest) - 1))
        log_p = policy_reference.speed(slow, [*prompt, *rest[:-1]], letters, cutoff).log_softmax(-1)
        wanted = sum(float(row[token]) for row, token in zip(log_p[len(prompt) - 1 :], rest, strict=True))
        assert value == pytest.approx(wanted, abs=TOLERANCE)
    stock_values = [value for value, _ in scores(stock(smollm), REAL)]
    assert [value for value, _ in found] != pytest.approx(stock_values, abs=0.1)
