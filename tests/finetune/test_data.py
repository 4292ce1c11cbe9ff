"""What is trained on is what inference would read and write: tokens, labels, counts, and the model's own answers."""

import copy
import functools
import gzip
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from diagnostics import FullPolicy, SpeedPolicy, UserError, generate
from diagnostics.finetune import (
    Conversation,
    Counts,
    collate,
    decode_phase,
    encode_conversation,
    encode_examples,
    read_conversations,
    with_answers,
)
from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import encode_messages, encode_prompts
from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet
from tests.support.tiny import tiny_config
from tests.support.tokenizers import byte_tokenizer, smollm_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

LOOP = "{% for m in messages %}"
CHATML = (
    LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGGED = (
    LOOP + "{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>" + LOOP + "<|start|>{{ m['role'] }}<|stop|>\n\n{{ m['content'] | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|stop|>\n\n{% endif %}"
)
LLAMA2 = (
    LOOP + "{% if m['role'] == 'assistant' %} {{ m['content'] | trim }} </s>"
    "{% else %}<s>[INST] {{ m['content'] | trim }} [/INST]{% endif %}{% endfor %}"
)
# The end of text is written only where nothing is to follow.
PHI3 = (
    LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)
# The last answer begins with something that earlier ones lose.
THINKING = (
    LOOP + "<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = LOOP + "{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"

SPECIAL = [
    "<|im",
    "<|im_start|>",
    "<|im_end|>",
    "<|start|>",
    "<|stop|>",
    "<|eot|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
]
TALK = [("user", "Hi there"), ("assistant", "One."), ("user", " more?\n"), ("assistant", "k")]


def tokenizer_with(template):
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    return tokenizer


def like_smollm(template):
    tokenizer = copy.deepcopy(smollm_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns, name="c"):
    return Conversation(name, tuple({"role": role, "content": content} for role, content in turns))


def answers_of(ids, labels, tokenizer):
    """Text of every run of targets."""
    texts, run = [], []
    for token, label in [*zip(ids, labels, strict=True), (0, -100)]:
        if label != -100:
            assert label == token
            run.append(token)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def prompts_of(one, tokenizer):
    """What inference would read before each answer."""
    return [
        encode_messages(one.messages[:n], tokenizer) for n, m in enumerate(one.messages) if m["role"] == "assistant"
    ]


# --- The file ---


def written(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


USER, SAID = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def test_a_file_plain_or_compressed(tmp_path):
    path = written(
        tmp_path / "talk.jsonl",
        {"id": "a", "messages": [USER, SAID], "category": "x"},
        "",
        {"messages": [USER], "id": None},
    )
    first, second = read_conversations(path)
    assert (first.id, first.messages, first.category) == ("a", (USER, SAID), "x")
    assert (second.id, second.messages, second.category) == ("line-3", (USER,), "default")
    packed = tmp_path / "talk.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_conversations(packed) == [first, second]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "must be a JSON object, not a list"),
        ({"messages": [USER], "text": "x"}, "unknown field 'text'; the fields are id, messages, category"),
        ({}, 'field "messages": must be a list of at least one'),
        ({"messages": "Hi"}, 'field "messages": must be a list of at least one'),
        ({"messages": ["Hi"]}, 'field "messages": a message must be an object, not text'),
        ({"messages": [USER | {"name": "Bo"}]}, "unknown field 'name' of a message"),
        ({"messages": [USER | {"role": "tool"}]}, "role 'tool' is none of system, user, assistant"),
        ({"messages": [{"role": "user"}]}, 'field "messages": must be text, not null'),
        ({"messages": [USER | {"content": ""}]}, 'field "messages": is empty'),
        ({"messages": [SAID]}, "must follow a message from the user"),
        ({"messages": [USER, SAID, SAID]}, "must follow a message from the user"),
        ({"messages": [USER, SAID | {"content": " \n"}]}, "an answer is blank"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "the last must be from the user or the assistant"),
        ({"messages": [USER], "id": 3}, 'field "id": must be text, not a number'),
        ({"messages": [USER], "id": "first"}, "'first' is already the id"),
        ({"messages": [USER], "category": ""}, 'field "category": is empty'),
    ],
)
def test_refused_lines_are_named(tmp_path, line, message):
    path = written(tmp_path / "talk.jsonl", {"id": "first", "messages": [USER]}, line)
    with pytest.raises(UserError) as refused:
        read_conversations(path)
    assert str(refused.value).startswith(f"{path}:2: ")
    assert message in str(refused.value)


def test_refused_files(tmp_path):
    with pytest.raises(UserError, match=r"cannot read conversations .*: No such file"):
        read_conversations(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="has no conversations"):
        read_conversations(written(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_conversations(tmp_path / "binary.jsonl")
    (tmp_path / "half.jsonl.gz").write_bytes(gzip.compress(b'{"messages": []}' * 99)[:-20])
    with pytest.raises(UserError, match="cannot read conversations"):
        read_conversations(tmp_path / "half.jsonl.gz")


# --- Tokens and labels ---


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["One.<|im_end|>", "k<|im_end|>"]),
        (TAGGED, ["One.<|im_end|>", "k<|im_end|>"]),
        (LLAMA3, ["One.<|eot|>", "k<|eot|>"]),
        (LLAMA2, [" One. </s>", " k </s>"]),
        (PHI3, ["One.<|end|>", "k<|end|>"]),
        (THINKING, ["One.<|im_end|>", "<think>\n\n</think>\n\nk<|im_end|>"]),
        (PLAIN, ["One.", "k"]),
    ],
    ids=["chatml", "tagged", "llama3", "llama2", "phi3", "thinking", "plain"],
)
def test_answers_with_their_end_of_turn_are_the_targets(template, answers):
    tokenizer, talk = tokenizer_with(template), conversation(*TALK)
    ids, labels = encode_conversation(talk, tokenizer)
    assert answers_of(ids, labels, tokenizer) == answers
    assert labels[-1] == ids[-1]  # nothing is behind the last answer
    whole = tokenizer(tokenizer.apply_chat_template(list(talk.messages), tokenize=False), add_special_tokens=False)
    assert whole["input_ids"][: len(ids)] == ids
    starts = [n for n in range(len(ids)) if labels[n] != -100 == labels[n - 1]]
    assert [tuple(ids[:start]) for start in starts] == prompts_of(talk, tokenizer)


def test_generation_tags_mark_the_same_tokens():
    tokenizer, talk = tokenizer_with(TAGGED), conversation(*TALK)
    marked = tokenizer.apply_chat_template(list(talk.messages), return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = encode_conversation(talk, tokenizer)
    assert marked["input_ids"][: len(ids)] == ids
    assert [label != -100 for label in labels] == [bool(m) for m in marked["assistant_masks"][: len(ids)]]
    assert not any(marked["assistant_masks"][len(ids) :])


@pytest.mark.parametrize("template", [CHATML, LLAMA3, LLAMA2, PHI3, THINKING, PLAIN])
def test_phases_of_several_turns(template):
    """Each answer is decode phase from the last token of its prompt on; every other token is prompt."""
    tokenizer, talk = tokenizer_with(template), conversation(*TALK)
    ids, labels = encode_conversation(talk, tokenizer)
    phase = decode_phase(torch.tensor([labels]))[0].tolist()
    first, second = (len(prompt) for prompt in prompts_of(talk, tokenizer))
    end = next(n for n in range(first, len(ids)) if labels[n] == -100)
    assert phase == [first - 1 <= n < end or second - 1 <= n for n in range(len(ids))]


def test_a_prompt_alone_ends_with_the_generation_prompt():
    tokenizer = tokenizer_with(CHATML)
    alone = conversation(*TALK[:1])
    assert encode_conversation(alone, tokenizer) == (
        list(encode_messages(alone.messages, tokenizer)),
        [-100] * len(encode_messages(alone.messages, tokenizer)),
    )
    later = conversation(*TALK[:3])
    ids, labels = encode_conversation(later, tokenizer)
    assert tuple(ids) == encode_messages(later.messages, tokenizer)
    assert answers_of(ids, labels, tokenizer) == ["One.<|im_end|>"]
    assert labels[-1] == -100


@pytest.mark.parametrize("content", ["k", "<think>", "im_end", "a\n", "  b", "é\u2028ü"])
def test_contents_that_look_like_the_template(content):
    tokenizer = tokenizer_with(CHATML)
    talk = conversation(("user", content), ("assistant", content), ("user", content), ("assistant", content))
    ids, labels = encode_conversation(talk, tokenizer)
    assert answers_of(ids, labels, tokenizer) == [content + "<|im_end|>"] * 2


@pytest.mark.parametrize(("template", "answer"), [(LLAMA3, "a b<|eot|>"), (CHATML, " a b\n<|im_end|>")])
def test_white_space_around_an_answer_is_the_templates_choice(template, answer):
    tokenizer = tokenizer_with(template)
    ids, labels = encode_conversation(conversation(("user", "Hi"), ("assistant", " a b\n")), tokenizer)
    assert answers_of(ids, labels, tokenizer) == [answer]


def test_the_embedded_models_tokenizer():
    tokenizer = smollm_tokenizer()
    talk = conversation(("system", "Be brief."), *TALK)
    ids, labels = encode_conversation(talk, tokenizer)
    assert answers_of(ids, labels, tokenizer) == ["One.<|im_end|>", "k<|im_end|>"]
    *_, prompt = prompts_of(talk, tokenizer)
    assert tuple(ids[: len(prompt)]) == prompt
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert tokenizer.decode(ids) + "\n" == tokenizer.apply_chat_template(list(talk.messages), tokenize=False)


@pytest.mark.parametrize(("template", "answer"), [(None, "\n\nHello"), (PLAIN, "Hello")])
def test_an_answer_is_not_joined_to_its_prompt(template, answer):
    """A line's end, or a space, at the end of the generation prompt would be one token with what is after it."""
    tokenizer = smollm_tokenizer() if template is None else like_smollm(template)
    talk = conversation(("user", "Hi"), ("assistant", answer))
    (prompt,) = prompts_of(talk, tokenizer)
    text = tokenizer.apply_chat_template(list(talk.messages), tokenize=False)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tuple(whole[: len(prompt)]) != prompt
    ids, labels = encode_conversation(talk, tokenizer)
    assert tuple(ids[: len(prompt)]) == prompt
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]
    assert text.startswith(tokenizer.decode(ids))
    assert tokenizer.decode(ids[len(prompt) :]).startswith(answer)


def spacing_tokenizer():
    """A space goes before whatever it is given, as in sentencepiece."""
    words = {word: n for n, word in enumerate(["<unk>", "▁user:", "▁assistant:", "▁", "▁hi", "▁user:▁hi"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", name_or_path="made/up")
    tokenizer.chat_template = PLAIN.replace("\n", " ")
    return tokenizer


LAST_ONLY = "{{ messages[-1]['content'] }}{% if add_generation_prompt %}: {% endif %}"
LOUD = CHATML.replace("m['content']", "m['content'] | upper")
SILENT = LOOP + "{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
ENDING_ONCE = (
    LOOP
    + "[{{ m['role'] }}]{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)
ENDING_ONCE += "{% if add_generation_prompt %}[assistant]{% endif %}"
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}", "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
)
STRICT = "{{ raise_exception('no\nsystem') }}"


@pytest.mark.parametrize(
    ("tokenizer", "turns", "message"),
    [
        (tokenizer_with(None), TALK, "the tokenizer has no chat template"),
        (tokenizer_with(STRICT), TALK, r"the chat template refuses its messages \(no system\)"),
        (tokenizer_with(LAST_ONLY), TALK, "writes a turn differently when others follow it"),
        (tokenizer_with(LOUD), TALK, "does not show answers as they are"),
        (tokenizer_with(SILENT), TALK, "does not show answers as they are"),
        (tokenizer_with(THINKING), [TALK[0], ("assistant", "Hm</think>Ah"), *TALK[2:]], "does not show message 2 as"),
        (tokenizer_with(ENDING_ONCE), TALK, "does not show message 2 as it is, with '</s>' after it"),
        (tokenizer_with(FORGETFUL), [*TALK, *TALK[2:]], "does not show message 2 as it is"),
        (tokenizer_with(FORGETFUL), TALK[2:] * 2, "does not show message 2 as it is"),
        (spacing_tokenizer(), [("user", "hi"), ("assistant", "hi")], "of 'made/up' joins an answer"),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(tokenizer, turns, message):
    with pytest.raises(UserError, match=message):
        encode_conversation(conversation(*turns), tokenizer)


# --- Examples and batches ---


def test_what_is_cut_and_what_is_dropped_is_counted():
    tokenizer = tokenizer_with(CHATML)
    talk, alone, open_ended = conversation(*TALK, name="talk"), conversation(TALK[0]), conversation(*TALK[:3])
    ids, labels = encode_conversation(talk, tokenizer)
    first = labels.index(-100, next(n for n, label in enumerate(labels) if label != -100))  # end of the first answer

    def counted(one, max_length, kept_length):
        examples, counts = encode_examples([one], tokenizer, max_length)
        wanted = {"id": one.id, "input_ids": ids[:kept_length], "labels": labels[:kept_length]}
        assert examples == ([wanted] if kept_length else [])
        return counts

    targets = sum(label != -100 for label in labels)
    assert counted(talk, len(ids), len(ids)) == Counts(1, 1, 0, 0, 0, len(ids) - targets, targets)
    for length in (len(ids) - 1, first):
        assert counted(talk, length, first) == Counts(1, 1, 1, 0, 0, first - 5, 5)
    assert counted(open_ended, len(ids), first) == Counts(1, 1, 1, 0, 0, first - 5, 5)
    assert counted(talk, first - 1, 0) == Counts(1, 0, 0, 1, 0, 0, 0)
    assert counted(alone, first - 1, 0) == Counts(1, 0, 0, 0, 1, 0, 0)
    examples, counts = encode_examples([talk, alone, talk], tokenizer, first)
    assert [example["id"] for example in examples] == ["talk", "talk"]
    assert counts == Counts(3, 2, 2, 0, 1, 2 * (first - 5), 10)


def test_counts_in_a_line():
    counts = Counts(1000, 900, 20, 70, 30, 1234567, 8901) + Counts(500, 500)
    assert counts.said() == (
        "1,500 loaded: 1,400 kept (20 of them cut at the end), 70 dropped as too long, 30 without an answer; "
        "1,234,567 prompt tokens, 8,901 target tokens"
    )


tokens = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=9)


@settings(deadline=None)
@given(rows=st.lists(tokens, min_size=1, max_size=4), pad=st.integers(0, 9))
def test_batches_hold_every_row_and_nothing_else(rows, pad):
    """The padding token may well be one that ends answers: it counts as a target wherever it is not padding."""
    examples = [
        {"id": "x", "input_ids": [token for token, _ in row], "labels": [t if target else -100 for t, target in row]}
        for row in rows
    ]
    batch = functools.partial(collate, pad_token_id=pad)(examples)
    width = max(map(len, rows))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == {
        name: ((len(rows), width), torch.int64) for name in ("input_ids", "attention_mask", "labels")
    }
    for n, example in enumerate(examples):
        size = len(example["input_ids"])
        assert batch["input_ids"][n].tolist() == example["input_ids"] + [pad] * (width - size)
        assert batch["labels"][n].tolist() == example["labels"] + [-100] * (width - size)
        assert batch["attention_mask"][n].tolist() == [1] * size + [0] * (width - size)


# --- The model's own answers ---


@pytest.fixture(scope="module")
def talker():
    """A tiny model over the bytes of a chat."""
    tokenizer = tokenizer_with(CHATML)
    config = tiny_config("llama")
    config.vocab_size = len(tokenizer)
    torch.manual_seed(3)
    return LoadedModel.wrap(AutoModelForCausalLM.from_config(config), tokenizer, "talker")


def alone(lm, ids, **settings):
    """The model's answer to one prompt, without any batch."""
    return generate(lm, torch.tensor([ids]), policy=FullPolicy(), **settings).token_ids[0].tolist()


QUESTIONS = [conversation(("user", "x" * n), name=f"q{n}") for n in (3, 20, 1, 8, 14)]


def test_answers_are_those_of_each_prompt_alone(talker, monkeypatch):
    asked = [list(encode_messages(one.messages, talker.tokenizer)) for one in QUESTIONS]
    free = [alone(talker, ids, max_new_tokens=9, eos_token_id=()) for ids in asked]
    # Ends with a token that some answers have early, and others have never.
    end = next(t for t in free[1] if 0 < sum(t in one for one in free) < len(free))
    monkeypatch.setattr(talker.model.generation_config, "eos_token_id", end)
    wanted = [alone(talker, ids, max_new_tokens=9) for ids in asked]
    assert len({len(one) for one in wanted}) > 1
    calls = []
    examples, counts = with_answers(
        talker, QUESTIONS, max_new_tokens=9, batch_size=2, progress=lambda *said: calls.append(said)
    )
    assert [example["id"] for example in examples] == [one.id for one in QUESTIONS]
    for example, ids, answer in zip(examples, asked, wanted, strict=True):
        assert example["input_ids"] == ids + answer
        assert example["labels"] == [-100] * len(ids) + answer
    unended = sum(answer[-1] != end for answer in wanted)
    assert 0 < unended < len(wanted)
    assert counts == Counts(5, 5, unended, 0, 0, sum(map(len, asked)), sum(map(len, wanted)))
    assert calls == [(0, 5, "q20"), (2, 5, "q8"), (4, 5, "q1"), (5, 5, "")]


def test_the_last_answer_is_replaced_and_earlier_ones_stay(talker):
    given, _ = with_answers(talker, [conversation(*TALK)], max_new_tokens=4)
    missing, _ = with_answers(talker, [conversation(*TALK[:3])], max_new_tokens=4)
    assert given == missing
    ids, labels = encode_conversation(conversation(*TALK[:3]), talker.tokenizer)
    answer = alone(talker, ids, max_new_tokens=4)
    assert given == [{"id": "c", "input_ids": ids + answer, "labels": labels + answer}]
    assert sum(label != -100 for label in labels) == len("One.") + 1


def test_drawn_answers_depend_on_the_seed(talker):
    def drawn(**settings):
        made, _ = with_answers(talker, QUESTIONS, max_new_tokens=6, batch_size=3, **settings)
        return [example["input_ids"] for example in made]

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    # Of the smallest share of the probability only the most likely token is left.
    assert drawn(temperature=1.0, top_p=1e-6, seed=1) == drawn()


def test_what_leaves_no_room_for_an_answer_is_dropped(talker):
    sizes = sorted(len(encode_messages(one.messages, talker.tokenizer)) for one in QUESTIONS)
    examples, counts = with_answers(talker, QUESTIONS, max_new_tokens=3, max_length=sizes[2] + 3)
    assert [example["id"] for example in examples] == ["q3", "q1", "q8"]
    assert (counts.loaded, counts.kept, counts.dropped_too_long) == (5, 3, 2)
    assert counts.prompt_tokens == sum(sizes[:3])
    positions = talker.anatomy.max_positions
    long = conversation(("user", "x" * positions))
    assert with_answers(talker, [long], max_new_tokens=3) == ([], Counts(loaded=1, dropped_too_long=1))


PROMPTS = (
    Prompt("text", text="some text"),
    Prompt("cut", messages=({"role": "user", "content": "Read {document}!"},), document="long word " * 30),
    Prompt("whole", text="Read {document}!", document="short"),
    Prompt("long", text="x" * 200),
)


def test_prompts_are_a_source(talker):
    examples, counts = with_answers(talker, PromptSet(PROMPTS, "file"), max_new_tokens=4, max_length=84)
    encoded = encode_prompts(PromptSet(PROMPTS[:3], "file"), talker.tokenizer, limit=80)
    assert [example["id"] for example in examples] == ["text", "cut", "whole"]
    for example, prompt in zip(examples, encoded, strict=True):
        answer = alone(talker, list(prompt.token_ids), max_new_tokens=4)
        assert example["input_ids"] == [*prompt.token_ids, *answer]
        assert example["labels"] == [-100] * prompt.n_prompt + answer
    assert (counts.loaded, counts.kept, counts.dropped_too_long) == (4, 3, 1)


def test_documents_of_a_file_that_are_cut_are_counted(talker, monkeypatch):
    """Those of a generated set are made to be cut. Here every token ends an answer, so that none is cut itself."""
    monkeypatch.setattr(talker.model.generation_config, "eos_token_id", list(range(len(talker.tokenizer))))
    for seed, cut in [(None, 1), (0, 0)]:
        examples, counts = with_answers(talker, PromptSet(PROMPTS, "set", seed=seed), max_new_tokens=4, max_length=84)
        assert counts == Counts(4, 3, cut, 1, 0, sum(len(one["input_ids"]) for one in examples) - 3, 3)


def test_refusals_of_answering(talker):
    for settings_, message in [
        ({"batch_size": 0}, "batch size is 0"),
        ({"max_new_tokens": 8, "max_length": 8}, "8 new tokens leave no room for a prompt in 8"),
        ({"max_new_tokens": 0}, "max new tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
    ]:
        with pytest.raises(UserError, match=message):
            with_answers(talker, QUESTIONS[:1], **{"max_new_tokens": 4} | settings_)
    with SpeedPolicy(2)(talker.model), pytest.raises(UserError, match="leave that `with` block"):
        with_answers(talker, QUESTIONS[:1], max_new_tokens=4)


def test_the_embedded_model_answers_the_builtin_prompts(smollm):
    prompts = load_prompts("builtin", max_prompts=3, context_length=192)
    examples, counts = with_answers(smollm, prompts, max_new_tokens=6, batch_size=3)
    encoded = encode_prompts(prompts, smollm.tokenizer)
    assert (counts.loaded, counts.kept, counts.dropped_too_long) == (3, 3, 0)
    for example, prompt in zip(examples, encoded, strict=True):
        assert example["input_ids"][: prompt.n_prompt] == list(prompt.token_ids)
        assert example["labels"][prompt.n_prompt :] == alone(smollm, list(prompt.token_ids), max_new_tokens=6)
    question = conversation(("user", "What is the capital of France? One word."))
    (example,), counts = with_answers(smollm, [question], max_new_tokens=24)
    assert counts.cut == 0
    assert example["labels"][-1] == smollm.tokenizer.eos_token_id  # it ends by itself, and learns to
