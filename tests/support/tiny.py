"""Tiny random models of every family served, and an offline tokenizer to go with them."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from diagnostics.models.loading import LoadedModel

VOCAB = 211
N_LAYERS = 5
SLIDING_WINDOW = 9

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
SLIDING_TYPES = [
    "sliding_attention",
    "full_attention",
    "sliding_attention",
    "sliding_attention",
    "full_attention",
]
GPT2 = {
    "n_embd": 32,
    "n_layer": N_LAYERS,
    "n_head": 4,
    "n_positions": 512,
    "vocab_size": VOCAB,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}

FAMILIES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", COMMON),
    "qwen2": ("qwen2", COMMON),
    "qwen3": ("qwen3", COMMON),
    "mistral": ("mistral", COMMON | {"sliding_window": SLIDING_WINDOW}),
    "gemma2": (
        "gemma2",
        COMMON
        | {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": SLIDING_TYPES,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        COMMON | {"sliding_window": SLIDING_WINDOW, "layer_types": SLIDING_TYPES, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("phi3", COMMON),
    "olmo2": ("olmo2", COMMON),
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": (
        "gpt_neox",
        {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")},
    ),
    "granite": (
        "granite",
        COMMON | {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.22},
    ),
    "gpt_oss": (
        "gpt_oss",
        COMMON
        | {
            "sliding_window": SLIDING_WINDOW,
            "layer_types": SLIDING_TYPES,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


def tiny_config(family: str) -> object:
    kind, settings = FAMILIES[family]
    return AutoConfig.for_model(kind, **settings)


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LoadedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family), dtype=dtype)
    # Biases, norms and sinks start at constants that would hide a mistake about them.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            assert parameter.isfinite().all(), name
    return LoadedModel.wrap(model, tiny_tokenizer(), f"tiny-{family}")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def random_ids(n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [1, *torch.randint(4, VOCAB, (n - 1,), generator=generator).tolist()]
