import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from diagnostics.prompts.encoding import PromptTooLong, encode_prompt, encode_prompts
from diagnostics.prompts.inserts import Insert
from diagnostics.prompts.load import load_prompts
from diagnostics.prompts.prompt import Prompt, PromptSet
from diagnostics.support.errors import UserError
from tests.support.prompts import evidence_texts
from tests.support.tokenizers import CHAT_TEMPLATE, byte_tokenizer, smollm_tokenizer, word_tokenizer

BYTES = byte_tokenizer()
BARE = byte_tokenizer(bos=False)
CHAT = byte_tokenizer(chat_template=CHAT_TEMPLATE)


def user(content: str, **fields) -> Prompt:
    return Prompt("p", messages=({"role": "user", "content": content},), **fields)


# --- Special tokens and templates ---


def test_text_gets_bos_and_nothing_after_it():
    plain = encode_prompt(Prompt("p", text="abc"), BYTES)
    assert BYTES.decode(plain.token_ids) == "<s>abc"
    assert plain.has_bos
    assert plain.notes == ()
    assert (plain.n_prompt, plain.category, plain.prompt_id, plain.text) == (4, "default", "p", "abc")

    closed = encode_prompt(Prompt("p", text="abc"), byte_tokenizer(eos_after=True))
    assert closed.token_ids == plain.token_ids
    assert "closing special token(s) left out" in closed.notes[0]


def test_special_tokens_the_author_wrote_are_kept_and_not_doubled():
    assert BYTES.decode(encode_prompt(Prompt("p", text="<s>ab</s>"), BYTES).token_ids) == "<s>ab</s>"
    both = byte_tokenizer(eos_after=True)
    assert both.decode(encode_prompt(Prompt("p", text="ab</s>"), both).token_ids) == "<s>ab</s>"


def test_without_bos_the_first_token_is_the_text():
    encoded = encode_prompt(Prompt("p", text="abc"), BARE)
    assert not encoded.has_bos
    assert BARE.decode(encoded.token_ids) == "abc"
    assert not encode_prompt(Prompt("p", text="abc"), byte_tokenizer(bos=False, chat_template="x")).has_bos


def test_one_token_prompts():
    assert encode_prompt(Prompt("p", text="a"), BARE).n_prompt == 1
    assert encode_prompt(Prompt("p", text="a"), BARE, limit=1).n_prompt == 1


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(UserError, match="'p' has no tokens"):
        encode_prompt(Prompt("p", text="  "), word_tokenizer())


def test_chat_template_is_applied_once():
    encoded = encode_prompt(user("hello"), CHAT)
    assert encoded.text == "<s>[user] hello [assistant] "
    assert CHAT.decode(encoded.token_ids) == encoded.text
    assert encoded.has_bos
    assert encoded.notes == ()


def test_without_a_template_messages_become_paragraphs():
    prompt = Prompt("p", messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}))
    encoded = encode_prompt(prompt, BYTES)
    assert encoded.text == "system: Be brief.\n\nuser: Hi\n\nassistant:"
    assert BYTES.decode(encoded.token_ids) == "<s>" + encoded.text
    assert encoded.notes == ("no chat template: the messages are joined as plain paragraphs",)


def test_a_template_that_refuses_says_so_in_one_line():
    strict = byte_tokenizer(chat_template="{{ raise_exception('System role\nnot supported') }}")
    with pytest.raises(UserError, match=r"'p': the chat template refuses .*\(System role not supported\)$"):
        encode_prompt(user("x"), strict)


def test_the_real_template():
    encoded = encode_prompt(user("What is {x}?"), smollm_tokenizer())
    assert encoded.has_bos
    assert encoded.text.startswith("<|im_start|>system\n")
    assert encoded.text.endswith("<|im_start|>user\nWhat is {x}?<|im_end|>\n<|im_start|>assistant\n")
    assert smollm_tokenizer().decode(encoded.token_ids) == encoded.text
    assert not encode_prompt(Prompt("p", text="What?"), smollm_tokenizer()).has_bos


# --- References ---


def test_reference_is_tokenized_bare_and_cut():
    prompt = Prompt("p", text="abc", reference="defg")
    assert BYTES.decode(encode_prompt(prompt, BYTES).reference_ids) == "defg"
    encoded = encode_prompt(prompt, BYTES, max_reference_tokens=3)
    assert BYTES.decode(encoded.reference_ids) == "def"
    assert encoded.notes == ("reference cut from 4 to 3 tokens",)
    assert encode_prompt(Prompt("p", text="abc"), BYTES).reference_ids is None
    with pytest.raises(UserError, match="the reference has no tokens"):
        encode_prompt(Prompt("p", text="the", reference="  "), word_tokenizer())


# --- Too long ---


def test_a_text_that_fits_exactly_is_taken_and_one_more_is_refused():
    assert encode_prompt(Prompt("p", text="a" * 9), BYTES, limit=10).n_prompt == 10
    with pytest.raises(PromptTooLong, match=r"^prompt 'p' has 11 tokens, but 10 fit: shorten it, decode fewer"):
        encode_prompt(Prompt("p", text="a" * 10), BYTES, limit=10, context_length=20)
    with pytest.raises(PromptTooLong, match="ask for a context length of at least 11"):
        encode_prompt(Prompt("p", text="a" * 10), BYTES, limit=20, context_length=10)


def test_a_prompt_too_long_without_its_document_names_the_least_length():
    prompt = Prompt("p", text="a" * 30 + "{document}", document="b" * 100)
    with pytest.raises(PromptTooLong, match="has 31 tokens, even without its document, but 30 fit") as caught:
        encode_prompt(prompt, BYTES, context_length=30)
    assert (caught.value.prompt_id, caught.value.needed) == ("p", 31)
    assert encode_prompt(prompt, BYTES, context_length=31).n_prompt == 31


def test_a_set_names_its_longest_prompt():
    prompts = tuple(Prompt(name, text="a" * size) for name, size in [("x", 40), ("y", 90), ("z", 5)])
    with pytest.raises(UserError, match=r"^prompt 'y' has 91 tokens.* at least 91 \(2 of 3 prompts do not fit\)$"):
        encode_prompts(PromptSet(prompts, "set", context_length=20), BYTES)
    with pytest.raises(PromptTooLong, match=r"^prompt 'x' has 41 tokens, but 20 fit: ask[^()]*$"):
        encode_prompts(PromptSet(prompts[::2], "set", context_length=20), BYTES)
    assert [e.n_prompt for e in encode_prompts(PromptSet(prompts, "set"), BYTES)] == [41, 91, 6]
    with pytest.raises(UserError, match="shorten it"):
        encode_prompts(PromptSet(prompts, "set", context_length=100), BYTES, limit=50)


def test_builtin_below_its_minimum_says_the_minimum():
    with pytest.raises(UserError, match="ask for a context length of at least") as caught:
        encode_prompts(load_prompts(context_length=64), smollm_tokenizer())
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert least <= 256
    assert len(encode_prompts(load_prompts(context_length=least), smollm_tokenizer())) == 28


# --- The cut ---


def test_the_document_is_cut_at_its_end_and_it_is_said():
    prompt = Prompt("p", text="Read: {document} Now answer.", document="word " * 100)
    encoded = encode_prompt(prompt, BYTES, limit=60)
    assert encoded.text == "Read: " + "word " * 7 + "word Now answer."
    assert encoded.notes == ("document cut from 500 to 39 characters to fit the model's limit of 60 tokens",)
    assert encode_prompt(prompt, BYTES, limit=70, context_length=60).notes == (
        "document cut from 500 to 39 characters to fit 60 tokens",
    )


def test_a_document_that_fits_is_not_touched():
    # At four characters per token, which is what the search expects, its first guess is within the tolerance.
    prompt = Prompt("p", text="{document}", document="the code is " * 1000)
    encoded = encode_prompt(prompt, word_tokenizer(), limit=3001)
    assert (encoded.n_prompt, encoded.notes) == (3001, ())
    assert encode_prompt(prompt, word_tokenizer(), limit=3000).n_prompt < 3001


@pytest.mark.parametrize(
    ("cut", "expected"),
    [("word", "a b\nc d\n\ne"), ("line", "a b\nc d"), ("paragraph", "a b\nc d")],
)
def test_the_document_is_cut_between_its_parts(cut, expected):
    prompt = Prompt("p", text="{document}", document="a b\nc d\n\ne fgh\n\ni", cut=cut)
    assert encode_prompt(prompt, BARE, limit=12).text == expected


def test_text_without_spaces_is_cut_anywhere():
    prompt = Prompt("p", text="{document}", document="\u6c34" * 1000)
    encoded = encode_prompt(prompt, BARE, limit=600)
    assert 597 <= encoded.n_prompt <= 600
    assert set(encoded.text) == {"\u6c34"}


words = st.text(alphabet="ab\u00e9.", min_size=1, max_size=10)
documents = st.builds(
    lambda words, n, line: line.join([" ".join(words)] * n),
    st.lists(words, min_size=1, max_size=10),
    st.integers(1, 30),
    st.sampled_from([" ", "\n", "\n\n"]),
)


@settings(deadline=None)
@given(documents, st.integers(1, 900), st.sampled_from([BYTES, BARE, CHAT]), st.sampled_from(["word", "line"]))
def test_never_above_the_limit_and_never_much_below(document, limit, tokenizer, cut):
    inserts = (Insert(0.2, "Needle one."), Insert(0.9, "Needle two."))
    prompt = user("Front {document} back?", document=document, inserts=inserts, cut=cut, evidence=("Needle two.",))
    least = encode_prompt(Prompt("p", messages=prompt.fill("")), tokenizer).n_prompt
    if limit < least:
        with pytest.raises(PromptTooLong, match=f"has {least} tokens, even without its document, but {limit} "):
            encode_prompt(prompt, tokenizer, limit=limit)
        return
    encoded = encode_prompt(prompt, tokenizer, limit=limit)
    assert encoded.n_prompt <= limit
    front, _, back = encode_prompt(user("Front \0 back?"), tokenizer).text.partition("\0")
    assert encoded.text.startswith(front)
    assert encoded.text.endswith(back)
    assert encoded.text.count("Needle one.") == 1
    assert evidence_texts(tokenizer, encoded) == ["Needle two."]
    whole = encode_prompt(prompt, tokenizer)
    if whole.n_prompt <= limit:
        assert encoded == whole
    elif cut == "word":
        # The tolerance, the next word in bytes, and what the inserts' separators may change by.
        assert limit - encoded.n_prompt <= 4 + 22 + 8


class CountingWords:
    """A tokenizer with one token per word, which counts its calls."""

    bos_token = bos_token_id = chat_template = None
    is_fast = False
    calls = 0

    def __call__(self, text, **options):
        self.calls += 1
        words = text.split()
        return {"input_ids": [len(word) for word in words], "special_tokens_mask": [0] * len(words)}


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.83, 0.97, 0.99])
@pytest.mark.parametrize("dense_first", [True, False])
def test_uneven_text_is_cut_in_a_few_steps(share, dense_first):
    dense, thin = "a " * 200_000, ("x" * 39 + " ") * 10_000
    prompt = Prompt("p", text="{document}", document=dense + thin if dense_first else thin + dense)
    limit = int(share * 210_000)
    tokenizer = CountingWords()
    assert 0.99 * limit <= encode_prompt(prompt, tokenizer, limit=limit).n_prompt <= limit
    assert tokenizer.calls <= 15


def test_a_long_context_is_filled_with_a_real_tokenizer():
    prompts = load_prompts(context_length=32_768, max_prompts=2)
    for encoded in encode_prompts(prompts, smollm_tokenizer(), limit=30_000):
        assert 0.99 * 30_000 <= encoded.n_prompt <= 30_000
        assert len(encoded.evidence) == 1
        assert "the model's limit of 30000" in encoded.notes[0]


# --- Evidence ---


def test_evidence_as_strings_and_as_characters():
    text = "caf\u00e9 is open; the caf\u00e9 is red"
    prompt = Prompt("p", text=text, evidence=("caf\u00e9", (8, 12), (8, 9)))
    encoded = encode_prompt(prompt, BYTES)
    assert evidence_texts(BYTES, encoded) == ["caf\u00e9", "open", "caf\u00e9"]
    assert encoded.evidence == ((1, 6), (10, 14), (20, 25))


def test_evidence_in_a_chat_with_a_real_tokenizer():
    prompt = user("{document}\nWhich?", document="One is red. Two is blue. Three", evidence=("Two is blue.",))
    (found,) = evidence_texts(smollm_tokenizer(), encode_prompt(prompt, smollm_tokenizer()))
    assert found.strip() == "Two is blue."


def test_evidence_that_is_cut_off_is_dropped_and_said():
    prompt = Prompt("p", text="{document}?", document="red " * 20 + "blue " * 20, evidence=("red", "blue"))
    encoded = encode_prompt(prompt, BARE, limit=50)
    assert set(evidence_texts(BARE, encoded)) == {"red"}
    assert encoded.notes[1] == "1 of 2 evidence strings are not in the prompt as encoded"


def test_a_slow_tokenizer_serves_without_evidence():
    slow = ByT5Tokenizer()
    prompt = Prompt("p", text="{document}?", document="word " * 50, evidence=("word",))
    encoded = encode_prompt(prompt, slow, limit=40)
    assert not slow.is_fast
    assert (encoded.n_prompt, encoded.text) == (40, "word " * 7 + "word?")
    assert encoded.evidence == ()
    assert not encoded.has_bos
    assert encoded.notes[1:] == (
        "1 closing special token(s) left out: the model goes on from the text",
        "evidence not used: the tokenizer cannot tell the characters of a token",
    )
