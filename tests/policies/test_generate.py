"""Stock ``model.generate()`` and ``model(...)`` under every policy: every way of generating, and every refusal."""

import copy
import functools
import json
from contextlib import contextmanager

import peft
import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    TextStreamer,
)

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    ProjectedPolicy,
    SpeedPolicy,
    UserError,
    diagnose,
    generate,
    load_prompts,
    parse_policy,
    recommend,
)
from diagnostics.runs.places import RECOMMENDATION
from tests.support import policy_reference
from tests.support.policy_cases import assert_close, reference_logits
from tests.support.runs import FALLING, make_run, region_layers, spread, write_prompts
from tests.support.tiny import N_LAYERS, random_ids, tiny_model

N, NEW = 24, 8
FASTKV = FastKVPolicy(tsp_rate=0.5, retention_rate=0.3, window=4)
POLICIES = [FullPolicy(), SpeedPolicy(3), ProjectedPolicy(3), FASTKV]
STOCK = [FullPolicy(), SpeedPolicy(N_LAYERS), ProjectedPolicy(N_LAYERS), FastKVPolicy(tsp_rate=1, retention_rate=1)]
FAMILIES = ["llama", "gemma2", "gpt2", "gpt_neox", "gpt_oss"]
SLIDING = ("gemma2", "gpt_oss")

every_policy = pytest.mark.parametrize("policy", POLICIES, ids=str)
like_stock = pytest.mark.parametrize("policy", STOCK, ids=str)


@functools.cache
def tiny(family="llama", seed=0):
    """A tiny model that never ends by itself, and has no token that looks like padding."""
    lm = tiny_model(family, seed=seed)
    lm.model.generation_config.eos_token_id = lm.model.generation_config.pad_token_id = None
    return lm


@functools.cache
def slow(family="llama"):
    return policy_reference.SlowModel(tiny(family))


@pytest.fixture
def model():
    return tiny().model


def prompt_ids(n=N, seed=0):
    return torch.tensor([random_ids(n, seed)])


def greedy(model, ids=None, **options):
    options = {"max_new_tokens": NEW, "do_sample": False} | options
    return model.generate(ids, **options) if ids is not None else model.generate(**options)


def continuation(model, ids, **options):
    """What was generated greedily after one prompt."""
    return greedy(model, ids, **options)[0, ids.shape[1] :].tolist()


def of_options(value):
    """Name a case by its option: ids with addresses in them would differ from worker to worker."""
    return "+".join(value) if isinstance(value, dict) else None


@contextmanager
def refused(match):
    with pytest.raises(UserError, match=match) as caught:
        yield
    assert "\n" not in str(caught.value)


# --- Ways to generate ---


@every_policy
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_the_second_implementation(family, policy):
    if family in SLIDING and policy is FASTKV:
        pytest.skip("refused")
    model, ids = tiny(family).model, prompt_ids(seed=1)
    with policy(model):
        out = greedy(model, ids, return_dict_in_generate=True, output_logits=True, output_scores=True)
    tokens = out.sequences[0].tolist()
    expected = reference_logits(slow(family), policy, tokens[:-1], n_prompt=N)
    assert tokens[N:] == expected.argmax(-1).tolist()
    assert_close(torch.cat(out.logits), expected)
    assert_close(torch.cat(out.scores), expected)
    assert out.past_key_values.get_seq_length() == N + NEW - 1


def test_the_policies_differ_from_stock_and_each_other(model):
    """Or the tests of this file could not fail."""
    texts = [continuation(model, prompt_ids())]
    for policy in POLICIES[1:]:
        with policy(model):
            texts.append(continuation(model, prompt_ids()))
    assert len({tuple(text) for text in texts}) == 4


@like_stock
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.3, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.8},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2, "min_new_tokens": 3, "bad_words_ids": [[14]]},
        {"prompt_lookup_num_tokens": 3},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_full_depth_equals_stock(model, policy, options):
    ids = torch.cat([prompt_ids(), prompt_ids(seed=1)]) if "prompt_lookup_num_tokens" not in options else prompt_ids()
    options = {"max_new_tokens": 12, "do_sample": False} | options
    torch.manual_seed(5)
    expected = model.generate(ids, **options)
    torch.manual_seed(5)
    with policy(model):
        assert torch.equal(model.generate(ids, **options), expected)


@every_policy
def test_sampling_draws_from_the_second_implementation(model, policy):
    with policy(model):
        torch.manual_seed(3)
        tokens = model.generate(prompt_ids(), do_sample=True, top_k=0, max_new_tokens=NEW)[0].tolist()
    logits = reference_logits(slow(), policy, tokens[:-1], n_prompt=N)
    torch.manual_seed(3)
    assert tokens[N:] == [int(torch.multinomial(row.float().softmax(-1), 1)) for row in logits]


@every_policy
def test_repetition_penalty(model, policy):
    with policy(model):
        tokens = greedy(model, prompt_ids(), repetition_penalty=3.0)[0]
    logits = reference_logits(slow(), policy, tokens[:-1].tolist(), n_prompt=N).float()
    penalty = RepetitionPenaltyLogitsProcessor(3.0)
    expected = [int(penalty(tokens[None, : N + i], logits[i : i + 1].clone()).argmax()) for i in range(NEW)]
    assert tokens[N:].tolist() == expected
    assert expected != logits.argmax(-1).tolist()


def search(policy, prompt, width, new):
    """Beam search as the textbook has it, without an end token."""
    beams = [((), 0.0)]
    for _ in range(new):
        grown = []
        for tokens, score in beams:
            log_p = reference_logits(slow(), policy, [*prompt, *tokens], n_prompt=N)[-1].log_softmax(-1)
            grown += [((*tokens, t), score + float(log_p[t])) for t in log_p.topk(width).indices.tolist()]
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    return [list(tokens) for tokens, _ in beams]


@every_policy
def test_beam_search(model, policy):
    with policy(model):
        found = greedy(model, prompt_ids(), num_beams=3, num_return_sequences=3, max_new_tokens=5)[:, N:].tolist()
    assert found == search(policy, prompt_ids()[0].tolist(), 3, 5)


@pytest.mark.parametrize("drafts", ["prompt_lookup", "same", "other"])
@pytest.mark.parametrize("policy", POLICIES[:3], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral"])
def test_assisted_generation_equals_greedy(family, policy, drafts):
    """Prompts repeat themselves, so that drafts are taken; 150 tokens, so that sliding layers forget."""
    model, ids = tiny(family).model, prompt_ids(12).repeat(1, 3)
    helpers = {
        "prompt_lookup": lambda: {"prompt_lookup_num_tokens": 4},
        "same": lambda: {"assistant_model": copy.deepcopy(model)},
        "other": lambda: {"assistant_model": tiny_model("llama", seed=1).model},
    }
    options, new = helpers[drafts](), 150 if drafts == "prompt_lookup" else 20
    with policy(model):
        expected = continuation(model, ids, max_new_tokens=new)
        assert continuation(model, ids, max_new_tokens=new, **options) == expected


@pytest.mark.parametrize("seed", range(4))
def test_assisted_fastkv_equals_greedy_or_is_refused(seed):
    """Drafted tokens are no prompt: they must not choose which of its tokens stay."""
    model, assistant, ids = tiny(seed=seed).model, copy.deepcopy(tiny(seed=seed).model), prompt_ids(seed=seed)
    settings = {"num_assistant_tokens": 2, "num_assistant_tokens_schedule": "constant"}
    assistant.generation_config.update(**settings, assistant_confidence_threshold=0)
    with FastKVPolicy(tsp_rate=0.9, retention_rate=0.8, window=4)(model):
        expected = continuation(model, ids)
        try:
            found = continuation(model, ids, assistant_model=assistant)
        except UserError:
            return
    assert found == expected


@every_policy
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_padded_batches_equal_their_rows_alone(family, policy):
    if family in SLIDING and policy is FASTKV:
        pytest.skip("refused")
    model, prompts = tiny(family).model, [random_ids(n, seed=n) for n in (N, 15, 5)]
    ids, mask = padded(prompts)
    with policy(model):
        together = greedy(model, ids, attention_mask=mask)[:, N:].tolist()
        beams = greedy(model, ids, attention_mask=mask, num_beams=3)[:, N:].tolist()
        alone = [torch.tensor([prompt]) for prompt in prompts]
        assert together == [continuation(model, one) for one in alone]
        assert beams == [continuation(model, one, num_beams=3) for one in alone]
    assert together != beams


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])


class Recorder:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, ids):
        self.got.append(ids.tolist())

    def end(self):
        self.ended += 1


@every_policy
def test_streamers(model, policy, capsys):
    ids, recorder, tokenizer = prompt_ids(), Recorder(), tiny().tokenizer
    with policy(model):
        tokens = continuation(model, ids, streamer=recorder)
        greedy(model, ids, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert recorder.got == [ids.tolist(), *([token] for token in tokens)]
    assert recorder.ended == 1
    assert capsys.readouterr().out.split() == tokenizer.decode(tokens).split()


@every_policy
def test_generation_stops_where_it_is_told_to(model, policy):
    ids = prompt_ids()
    with policy(model):
        free = continuation(model, ids)
        end = free[3]
        assert continuation(model, ids, eos_token_id=end) == free[: free.index(end) + 1]
        enough = StoppingCriteriaList([lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= N + 2)])
        assert continuation(model, ids, stopping_criteria=enough) == free[:2]
        assert continuation(model, ids, max_new_tokens=1) == free[:1]


@every_policy
def test_embeddings_instead_of_tokens(model, policy):
    ids, mask = padded([random_ids(N), random_ids(11, seed=1)])
    embedded = model.get_input_embeddings()(ids).detach()
    with policy(model):
        assert torch.equal(
            greedy(model, inputs_embeds=embedded, attention_mask=mask), greedy(model, ids, attention_mask=mask)[:, N:]
        )


@every_policy
def test_a_conversation_goes_on_with_its_cache(model, policy):
    """Turn by turn against one reference pass; FastKV runs later turns at full depth."""
    question, letters = random_ids(7, seed=4)[1:], policy_reference.labels(N, NEW, policy.anchors)
    with policy(model):
        first = greedy(model, prompt_ids(), return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.tensor([question])], dim=1)
        tokens = greedy(model, ids, past_key_values=first.past_key_values)[0].tolist()
    letters += ["p"] * (len(question) - 1) + ["d"] * NEW
    expected = reference_logits(slow(), policy, tokens[:-1], letters, n_prompt=N).argmax(-1).tolist()
    assert tokens[N : N + NEW] == expected[:NEW]
    assert tokens[-NEW:] == expected[-NEW:]


@every_policy
def test_padded_conversations_equal_each_alone(model, policy):
    prompts, questions = [random_ids(N), random_ids(13, seed=1)], [random_ids(6, seed=2), random_ids(6, seed=3)]

    def talk(prompts, questions):
        ids, mask = padded(prompts)
        out = greedy(model, ids, attention_mask=mask, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor(questions)], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(ids), NEW + 6)], dim=1)
        return greedy(model, ids, attention_mask=mask, past_key_values=out.past_key_values)[:, -NEW:].tolist()

    with policy(model):
        alone = [talk([prompt], [question])[0] for prompt, question in zip(prompts, questions, strict=True)]
        assert talk(prompts, questions) == alone


# --- diagnostics.generation.generation ---


@every_policy
def test_own_generate_equals_stock_generate(model, policy):
    ids, mask = padded([random_ids(N), random_ids(15, seed=1), random_ids(6, seed=2)])
    with policy(model):
        free = greedy(model, ids, attention_mask=mask)[:, N:]
        end = int(free[1, 2])
        ended = greedy(model, ids, attention_mask=mask, eos_token_id=end)[:, N:]
        recorder, inside = Recorder(), generate(model, ids, mask, max_new_tokens=NEW)
    outside = generate(model, ids, mask, policy=policy, max_new_tokens=NEW, streamer=recorder)
    assert inside.token_ids.tolist() == outside.token_ids.tolist() == free.tolist()
    assert recorder.got == [ids.tolist(), *free.T.tolist()]
    assert recorder.ended == 1
    stopped = generate(model, ids, mask, policy=policy, max_new_tokens=NEW, eos_token_id=end)
    assert stopped.token_ids.tolist() == ended.tolist()
    assert ended.tolist() != free.tolist()


@every_policy
def test_own_generate_draws_by_its_generator(model, policy):
    def draw(seed, **options):
        generator = torch.Generator().manual_seed(seed)
        options |= {"policy": policy, "temperature": 1.5, "generator": generator, "max_new_tokens": NEW}
        return generate(model, prompt_ids(), **options).token_ids.tolist()

    assert draw(0) == draw(0) != draw(1)
    assert draw(0, top_p=1e-6) == generate(model, prompt_ids(), policy=policy, max_new_tokens=NEW).token_ids.tolist()


# --- PEFT ---


@pytest.fixture(scope="module", params=["CAUSAL_LM", None])
def adapted(request):
    """A LoRA wrapper whose adapter does something, and the same model merged."""
    config = peft.LoraConfig(task_type=request.param, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    wrapper = peft.get_peft_model(copy.deepcopy(tiny().model), config).eval()
    return wrapper, copy.deepcopy(wrapper).merge_and_unload()


@every_policy
def test_peft_wrapper_equals_the_merged_model(model, adapted, policy):
    wrapper, merged = adapted
    ids = prompt_ids()
    with policy(merged), torch.no_grad():
        expected, tokens = merged(ids, logits_to_keep=1).logits, greedy(merged, ids)
        own = generate(merged, ids, max_new_tokens=NEW).token_ids
    with policy(wrapper), torch.no_grad():
        logits = wrapper(input_ids=ids, logits_to_keep=1).logits
        assert torch.equal(greedy(wrapper, input_ids=ids), tokens)
        assert torch.equal(generate(wrapper, ids, max_new_tokens=NEW).token_ids, own)
        every = wrapper(input_ids=ids).logits[:, -1:]
    assert logits.shape == expected.shape
    assert_close(logits, expected)
    assert_close(every, expected)
    with policy(model), torch.no_grad():
        assert (model(ids, logits_to_keep=1).logits - expected).abs().max() > 0.1


# --- Calling the model directly ---


RUNS_ON = {"full": range(N), "speed": [0, N - 1], "projected": [N - 1]}


@every_policy
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_direct_call_has_nan_where_nothing_ran(family, policy):
    model, ids = tiny(family).model, prompt_ids(N + 4)
    with policy(model), torch.no_grad():
        out = model(ids[:, :N])
        last = model(ids[:, :N], logits_to_keep=1).logits
        later = model(ids[:, N:], past_key_values=out.past_key_values).logits[0]
        states = model.base_model(ids[:, :N]).last_hidden_state
    logits = out.logits[0]
    chosen = RUNS_ON.get(policy.name)
    if chosen is None:
        rates = policy.tsp_rate, policy.retention_rate, policy.window, policy.kernel
        chosen = policy_reference.fastkv(slow(family), ids[0, :N].tolist(), N, 1, *rates)[2]
    assert logits.isfinite().all(-1).nonzero()[:, 0].tolist() == sorted(chosen)
    assert states.isfinite().all(-1)[0].tolist() == logits.isfinite().all(-1).tolist()
    expected = reference_logits(slow(family), policy, ids[0].tolist(), n_prompt=N)
    assert_close(logits[-1], expected[0])
    assert_close(later, expected[1:])
    assert_close(last[0], logits[-1:], 5e-6)
    head = model.get_output_embeddings()(states[0, -1])
    assert_close(head, logits[-1], 5e-6)


@pytest.mark.parametrize("way", ["logits_to_keep", "boundary", "cache"])
@pytest.mark.parametrize("policy", [SpeedPolicy(3), ProjectedPolicy(3)], ids=str)
def test_loss_of_what_follows_the_prompt(model, policy, way):
    """Labels of -100 on the prompt, whichever way the model learns what is decode phase."""
    ids, new = prompt_ids(N + 4), 4
    labels = ids.masked_fill(torch.arange(N + new) < N, -100)
    policy = type(policy)(3, boundary=new + 1) if way == "boundary" else policy
    with policy(model), torch.no_grad():
        if way == "logits_to_keep":
            loss = model(ids, labels=labels[:, -new - 1 :], logits_to_keep=new + 1).loss
        elif way == "cache":
            cache = model(ids[:, : N - 1], logits_to_keep=1).past_key_values
            loss = model(ids[:, N - 1 :], labels=labels[:, N - 1 :], past_key_values=cache).loss
        else:
            loss = model(ids, labels=labels).loss
    letters = policy_reference.labels(N, new, policy.anchors)
    if way == "cache":  # its first call ended with a decode-phase token, as every first call does
        letters[N - 2] = policy_reference.DECODE
    expected = reference_logits(slow(), policy, ids[0].tolist(), letters, n_prompt=N)[:-1]
    expected = torch.nn.functional.cross_entropy(expected, ids[0, N:])
    assert loss.isfinite()
    assert float(loss) == pytest.approx(float(expected), rel=5e-5)


def test_labels_of_tokens_that_did_not_run_are_refused(model):
    ids = prompt_ids()
    with refused("labels ask for logits of prompt tokens"), SpeedPolicy(3)(model):
        model(ids, labels=ids)


# --- What is refused ---


def test_cutoffs_beyond_the_model(model):
    for policy in (SpeedPolicy(N_LAYERS + 1), ProjectedPolicy(N_LAYERS + 1), FastKVPolicy(tsp_layer=N_LAYERS)):
        with refused(f"{policy.name}.*the model has {N_LAYERS} layers"), policy(model):
            pass


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        (SpeedPolicy, {"cutoff": 0}),
        (SpeedPolicy, {"cutoff": -1}),
        (SpeedPolicy, {"cutoff": 3, "anchors": -1}),
        (SpeedPolicy, {"cutoff": 3, "boundary": 0}),
        (ProjectedPolicy, {"cutoff": 0}),
        (ProjectedPolicy, {"cutoff": 3, "boundary": 0}),
        (FastKVPolicy, {"tsp_layer": -1}),
        (FastKVPolicy, {"tsp_rate": 0}),
        (FastKVPolicy, {"tsp_rate": 1.1}),
        (FastKVPolicy, {"tsp_rate": float("nan")}),
        (FastKVPolicy, {"retention_rate": 0}),
        (FastKVPolicy, {"retention_rate": 0.3, "tsp_rate": 0.2}),
        (FastKVPolicy, {"window": 0}),
        (FastKVPolicy, {"kernel": 4}),
        (FastKVPolicy, {"kernel": 0}),
        (SpeedPolicy, {"cutoff": 2.5}),
        (ProjectedPolicy, {"cutoff": 2.5}),
        (FastKVPolicy, {"tsp_layer": 1.5}),
        (FastKVPolicy, {"window": 4.5}),
    ],
)
def test_bad_parameters(policy, settings):
    name, value = list(settings.items())[0 if len(settings) == 1 or "retention_rate" in settings else 1]
    with refused(f"{name} is {value}: give"):
        policy(**settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of: fastkv, full, projected, speed"),
        ("magic", "'magic' is not one of"),
        ("SPEED:3", "'SPEED' is not one of"),
        ("speed", "needs a cutoff: write speed:CUTOFF"),
        ("speed:anchors=1", "needs a cutoff"),
        ("speed:", "cutoff .* must be a number, not ''"),
        ("speed:all", "must be a number, not 'all'"),
        ("speed:2.5", "must be a number, not '2.5'"),
        ("speed:3:4", "has no '4'; it has: cutoff, anchors, boundary"),
        ("speed:3:depth=4", "has no 'depth'; it has: cutoff, anchors, boundary"),
        ("full:3", "has no '3'; it has: no parameters"),
        ("speed:0", "cutoff is 0"),
        ("fastkv:tsp_rate=nan", "tsp_rate is nan"),
        ("fastkv:kernel=4", "kernel is 4"),
    ],
)
def test_texts_that_are_no_policy(text, message):
    with refused(message):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("full", FullPolicy()),
        (" speed:24 ", SpeedPolicy(24)),
        ("speed:24:anchors=0:boundary=3", SpeedPolicy(24, anchors=0, boundary=3)),
        ("projected:cutoff=7", ProjectedPolicy(7)),
        ("fastkv", FastKVPolicy()),
        ("fastkv:4:tsp_rate=.5:kernel=3", FastKVPolicy(4, 0.5, kernel=3)),
    ],
)
def test_texts_that_are_policies(text, policy):
    assert parse_policy(text) == policy == parse_policy(policy.spec)


def test_models_that_cannot_be_served(model):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    mamba = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4))
    for served, message in (
        (t5, "encoder-decoder"),
        (mamba, "not attention|no attention"),
        (torch.nn.Linear(2, 2), "runs transformers models, not Linear"),
        (tiny("mistral").model, "not defined for sliding-window layers"),
    ):
        with refused(message), FASTKV(served):
            pass


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_that_takes_no_mask_per_layer(implementation):
    model = tiny_model("llama").model
    model.config._attn_implementation_internal = implementation
    with refused(f"'{implementation}' takes no mask per layer"), SpeedPolicy(3)(model):
        pass
    assert model.config._attn_implementation == implementation


def test_nested_blocks(model):
    with SpeedPolicy(3)(model):
        expected = greedy(model, prompt_ids())
        for policy in (SpeedPolicy(3), FASTKV):
            with refused("runs under speed.*leave that `with` block first"), policy(model):
                pass
        with refused("runs under speed.*leave that `with` block"):
            generate(model, prompt_ids(), policy=FullPolicy())
        assert torch.equal(greedy(model, prompt_ids()), expected)


def test_a_prompt_shorter_than_its_anchors(model):
    ids, mask = padded([random_ids(N), random_ids(9)])
    with SpeedPolicy(3, anchors=10)(model):
        assert greedy(model, ids).shape == (2, N + NEW)
        for refuse in (
            lambda: greedy(model, ids[:, -9:]),
            lambda: greedy(model, ids, attention_mask=mask),
            lambda: model(ids[:, -9:]),
            lambda: generate(model, ids, mask),
        ):
            with refused("the prompt has 9 tokens, fewer than the anchors"):
                refuse()


def static_cache(model):
    return StaticCache(model.config, max_cache_len=64)


def filled_cache(model):
    """A cache that stock filled."""
    cache = DynamicCache()
    cache.update(*torch.ones(2, 1, 2, 1, 8), 0)
    return cache


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "needs the KV cache"),
        ({"cache_implementation": "static"}, "its own KV cache, not with a StaticCache"),
        ({"cache_implementation": "offloaded"}, "its own KV cache, not with a DynamicCache"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, "not with a QuantizedCache"),
        ({"past_key_values": static_cache}, "its own KV cache, not with a StaticCache"),
        ({"past_key_values": filled_cache}, "its own KV cache, not with a DynamicCache"),
        ({"prefill_chunk_size": 8}, "cannot prefill in chunks under a policy"),
        ({"prefill_chunk_size": 8, "num_beams": 2}, "cannot prefill in chunks under a policy"),
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 4] * 2)}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0] + [1] * 13] * 2)}, "pad on the left"),
        ({"attention_mask": torch.tensor([[1] * N, [0] * N])}, "a row without tokens"),
    ],
    ids=of_options,
)
@every_policy
def test_generate_options_that_are_refused(model, policy, options, message):
    ids = torch.cat([prompt_ids(), prompt_ids(seed=1)])
    options = {name: value(model) if callable(value) else value for name, value in options.items()}
    with policy(model):
        expected = greedy(model, ids)
        with refused(message):
            greedy(model, ids, **options)
        assert torch.equal(greedy(model, ids), expected), "a refusal must not spoil the block"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "needs the KV cache"),
        ({"past_key_values": static_cache}, "its own KV cache, not with a StaticCache"),
        ({"past_key_values": filled_cache}, "its own KV cache, not with a DynamicCache"),
        ({"attention_mask": torch.tensor([[1] * 20 + [0] * 4])}, "pad on the left"),
        ({"attention_mask": torch.tensor([[0, 1, 0] + [1] * 21])}, "pad on the left"),
        ({"attention_mask": torch.zeros(1, N)}, "pad on the left|a row without tokens"),
        ({"attention_mask": torch.ones(1, N - 1)}, r"attention_mask is \[1, 23\], not \[1, 24\]"),
        ({"attention_mask": torch.ones(2, N)}, r"attention_mask is \[2, 24\], not \[1, 24\]"),
        ({"attention_mask": torch.ones(1, 1, N, N)}, r"give attention_mask as \[batch, tokens\]"),
        ({"attention_mask": {"full_attention": torch.ones(1, 1, N, N)}}, r"give attention_mask as \[batch, tokens\]"),
    ],
    ids=of_options,
)
@every_policy
def test_direct_calls_that_are_refused(model, policy, options, message):
    options = {name: value(model) if callable(value) else value for name, value in options.items()}
    with policy(model):
        with refused(message):
            model(prompt_ids(), **options)
        assert model(prompt_ids()).logits[0, -1].isfinite().all()


def test_configurations_without_a_cache_are_refused():
    model = tiny_model("llama").model
    model.generation_config.use_cache = False
    with SpeedPolicy(3)(model), refused("needs the KV cache"):
        greedy(model, prompt_ids())
    model.config.use_cache = False
    with SpeedPolicy(3)(model), refused("needs the KV cache"):
        model(prompt_ids())


def test_caches_of_others_are_refused(model):
    with SpeedPolicy(3)(model):
        cache = model(prompt_ids()).past_key_values
        with refused("holds 1 rows, the input 2"):
            model(prompt_ids().expand(2, -1), past_key_values=cache)
    with FullPolicy()(model), refused("made under speed.*runs under full"):
        model(prompt_ids(), past_key_values=cache)
    with refused("belongs to a policy"):
        model(prompt_ids(), past_key_values=cache)


# --- Following a recommendation ---


def test_policies_follow_a_recommendation(tmp_path):
    recommendation = recommend(make_run(spread(FALLING), layers=region_layers(2, 4, 5), anchors=2))
    recommendation.save(tmp_path / RECOMMENDATION)
    for place in (tmp_path, str(tmp_path), tmp_path / RECOMMENDATION):
        assert SpeedPolicy.from_recommendation(place) == SpeedPolicy(6, anchors=2)
        assert FastKVPolicy.from_recommendation(place) == FastKVPolicy(tsp_layer=5)


def test_a_policy_follows_a_real_run(tmp_path, model):
    prompts = load_prompts(write_prompts(tmp_path / "prompts.jsonl", n_prompts=2))
    recommendation = recommend(diagnose(tiny(), prompts, decode_tokens=4, out=tmp_path / "run"), kv_budget=0.7)
    with refused("no recommendation in .*recommend"):
        SpeedPolicy.from_recommendation(tmp_path / "run")
    recommendation.save(tmp_path / "run" / RECOMMENDATION)
    policy = SpeedPolicy.from_recommendation(tmp_path / "run")
    assert policy == SpeedPolicy(3)
    with policy(model):
        assert greedy(model, prompt_ids()).shape == (1, N + NEW)


@pytest.mark.parametrize("policy", [SpeedPolicy, FastKVPolicy])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no recommendation in .*make one with `recommend`"),
        (b"", "is not a recommendation, or damaged"),
        (b"{cutoff: 3}", "is not a recommendation, or damaged"),
        (b"\xff\xfe", "is not a recommendation, or damaged"),
        (b"[]", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"{}", "is not a recommendation|no stabilization region"),
    ],
)
def test_files_that_are_no_recommendation(tmp_path, policy, content, message):
    place = tmp_path / "recommendation.json"
    if content is not None:
        place.write_bytes(content)
    with refused(message):
        policy.from_recommendation(place)


def test_a_name_too_long_for_a_file_is_no_recommendation():
    with refused("no recommendation"):
        SpeedPolicy.from_recommendation("x" * 5000)


@pytest.mark.parametrize(
    "data",
    [
        {"cutoff": 3},
        {"anchors": 1},
        {"cutoff": "many", "anchors": 1},
        {"cutoff": None, "anchors": 1},
        {"cutoff": [3], "anchors": 1},
        {"cutoff": {}, "anchors": 1},
        {"cutoff": 3, "anchors": None},
        {"cutoff": float("nan"), "anchors": 1},
        {"cutoff": float("inf"), "anchors": 1},
        {"cutoff": 2.7, "anchors": 1},
        {"cutoff": True, "anchors": 1},
        {"cutoff": 0, "anchors": 1},
    ],
    ids=str,
)
def test_recommendations_without_a_cutoff(tmp_path, data):
    (tmp_path / RECOMMENDATION).write_text(json.dumps(data))
    with refused("not a recommendation|cutoff is 0"):
        SpeedPolicy.from_recommendation(tmp_path)


@pytest.mark.parametrize(
    "region",
    [None, {}, {"last": 4}, {"first": None}, {"first": "early"}, {"first": [1]}, {"first": 1.5}, "4 to 5", [4, 5], 4],
    ids=str,
)
def test_recommendations_without_a_stable_region(tmp_path, region):
    data = {"cutoff": 3, "anchors": 1, "stabilization_region": region}
    (tmp_path / RECOMMENDATION).write_text(json.dumps(data))
    with refused("not a recommendation|no stabilization region"):
        FastKVPolicy.from_recommendation(tmp_path)
