"""Tiny GGUF files of random weights, with a byte-level tokenizer."""

import numpy as np
from tokenizers import pre_tokenizers

WIDTH, HEADS, KV_HEADS, HIDDEN, LAYERS = 64, 4, 2, 48, 2
HEAD_DIM = WIDTH // HEADS
N_FREQUENCIES = HEAD_DIM // 2
BASE = 500_000.0


def write_gguf(path, *, keys=None, tensors=None, architecture="llama", chat_template=None, seed=0):
    """Write a model of a Llama's shape; ``keys`` (without the architecture) and ``tensors`` come on top of it."""
    from gguf import GGUFWriter

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "th"]
    writer = GGUFWriter(path, architecture)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    if chat_template:
        writer.add_chat_template(chat_template)
    settings = {
        "context_length": 8192,
        "embedding_length": WIDTH,
        "block_count": LAYERS,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": BASE,
        "rope.dimension_count": HEAD_DIM,
        "vocab_size": len(tokens),
    }
    for key, value in (settings | (keys or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)
    rng = np.random.default_rng(seed)
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (KV_HEADS * HEAD_DIM, WIDTH), "attn_v": (KV_HEADS * HEAD_DIM, WIDTH)}
    shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (HIDDEN, WIDTH), "ffn_up": (HIDDEN, WIDTH)}
    shapes |= {"ffn_down": (WIDTH, HIDDEN)}
    held = {"token_embd": rng.standard_normal((len(tokens), WIDTH)), "output_norm": np.ones(WIDTH)}
    for layer in range(LAYERS):
        held |= {f"blk.{layer}.{name}": 0.2 * rng.standard_normal(shape) for name, shape in shapes.items()}
        held |= {f"blk.{layer}.{name}": np.ones(WIDTH) for name in ("attn_norm", "ffn_norm")}
    for name, values in ({f"{name}.weight": values for name, values in held.items()} | (tensors or {})).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
