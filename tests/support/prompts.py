"""A real chat prompt of a given length, and the evidence of an encoded prompt as text."""


def real_prompt(lm, n_tokens, question="What does the text say? Answer in one sentence."):
    from pydoc_data.topics import topics

    document = lm.tokenizer.decode(lm.tokenizer(topics["compound"])["input_ids"][: n_tokens - 60])
    chat = [{"role": "user", "content": f"{document}\n\n{question}"}]
    text = lm.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def evidence_texts(tokenizer, encoded) -> list[str]:
    """The evidence, as the tokens say it."""
    return [tokenizer.decode(encoded.token_ids[start:stop]) for start, stop in encoded.evidence]
