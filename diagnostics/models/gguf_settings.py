"""Settings of a GGUF file that transformers does not read: added to the configuration, or refused by name.

transformers maps a few keys of each architecture and silently drops the others, including rotary scaling, which may be
a key or a tensor. Here every key and every tensor of the architecture is used, checked against the configuration, or
neutral; any other one ends the loading.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from diagnostics.support.errors import UserError

FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
SCALING = "rope.scaling."
# Names of a key's value in configurations; the first one that a configuration has must agree with the file.
SAME = {
    "rope.dimension_count": ("rotary width",),
    "rope.freq_base": ("rope_theta",),
    "rope.freq_base_swa": ("local rope_theta",),
    "attention.sliding_window_pattern": ("sliding layers",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.sliding_window": ("sliding_window",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "use_parallel_residual": ("use_parallel_residual",),
    "block_count": ("num_hidden_layers", "n_layer"),
    "embedding_length": ("hidden_size", "n_embd"),
    "feed_forward_length": ("intermediate_size", "n_inner"),
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads",),
    "context_length": ("max_position_embeddings", "n_positions"),
    "vocab_size": ("vocab_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
# Keys that transformers drops; they are set in the configuration where the file has them.
REBUILT = (
    *("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "use_parallel_residual"),
    *("expert_feed_forward_length", "expert_shared_feed_forward_length"),
)
# Values of keys that have no effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention.clamp_kqv", "attention.max_alibi_bias", "attention.scale"), (0,)),
    **dict.fromkeys(("expert_count", "expert_used_count", "expert_shared_count"), (0,)),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale"), (0, 1)),
    **{"attention.causal": (True,), "rope.scale_linear": (1,)},
}
# Keys that describe the file or only its training.
SILENT = ("tensor_data_layout", f"{SCALING}finetuned")
# llama.cpp's rule: all models of these families but the largest scale queries by the width of a head.
LARGEST = {"gemma2": 46, "gemma3": 62}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rebuild(config: Any, keys: dict[str, Any], tensors: dict[str, Tensor], architecture: str, name: str) -> Any:
    """Return the configuration with the settings of a file's keys and rotary tensors.

    ``keys`` are those of the architecture, without its name as prefix; ``tensors`` are the rotary ones, float32. Raises
    a UserError that names the key or tensor if the configuration cannot be shown to agree with it.
    """
    settings = {k: v for k, v in config.to_dict().items() if k not in ("quantization_config", "_name_or_path", "dtype")}
    for key in (key for key in REBUILT if key in keys):
        attribute = next((candidate for candidate in SAME[key] if candidate in settings), None)
        if attribute and not (key == "expert_feed_forward_length" and attribute == "intermediate_size"):
            settings[attribute] = keys[key]
    if architecture in LARGEST:
        largest = keys["block_count"] == LARGEST[architecture]
        width = keys["embedding_length"] // keys["attention.head_count"]
        settings["query_pre_attn_scalar"] = width if largest else keys.get("attention.key_length", width)
    if scaling := _scaling(config, keys, tensors, name):
        settings["rope_parameters"] = _into(settings.get("rope_parameters"), scaling, name)
        if scaling["rope_type"] == "longrope" and "original_max_position_embeddings" in settings:
            settings["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    settings.pop("transformers_version", None)
    rebuilt = type(config)(**settings)
    _require_same(rebuilt, keys, name)
    return rebuilt


def require_used(in_file: Collection[str], used: Collection[str], name: str) -> None:
    """Refuse a file with tensors that the model does not use; rotary ones are checked elsewhere."""
    unused = sorted(set(in_file) - set(used) - {FREQUENCIES, LONG, SHORT})
    if unused:
        raise UserError(
            f"model {name!r} cannot be loaded: {len(unused)} of its tensors have no place in the model that "
            f"transformers makes of it ({unused[0]}, ...)"
        )


def require_frequencies(rotary: Any, tensors: dict[str, Tensor], name: str) -> None:
    """Raise UserError unless a model's rotary frequencies equal those that the file's tensor defines."""
    if FREQUENCIES not in tensors:
        return
    base = _setting(rotary.config, "rope_theta")
    width = 2 * len(tensors[FREQUENCIES])
    plain = 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
    if not torch.allclose(rotary.inv_freq.double(), plain / tensors[FREQUENCIES].double(), rtol=1e-4, atol=0):
        raise UserError(f"model {name!r} cannot be loaded: {FREQUENCIES} scales rotary frequencies in no known way")


def _scaling(config: Any, keys: dict[str, Any], tensors: dict[str, Tensor], name: str) -> dict[str, Any] | None:
    """Return the rotary scaling that keys or tensors define, in transformers' terms; None if none."""
    kind = str(keys.get(f"{SCALING}type", "none"))
    original = keys.get(f"{SCALING}original_context_length", keys.get("context_length"))
    factor = float(keys.get(f"{SCALING}factor", 1.0))
    known = {f"{SCALING}{key}" for key in ("type", "factor", "original_context_length", "finetuned", "attn_factor")}
    if unknown := sorted(key for key in keys if key.startswith(SCALING) and key not in known):
        raise UserError(f"model {name!r} cannot be loaded: its key {unknown[0]!r} is not understood")
    if (LONG in tensors) != (SHORT in tensors):
        raise UserError(f"model {name!r} cannot be loaded: it has one of {LONG} and {SHORT}, not both")
    if LONG in tensors:
        scaling: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": original}
        scaling |= {"long_factor": tensors[LONG].tolist(), "short_factor": tensors[SHORT].tolist()}
        attention = keys.get(f"{SCALING}attn_factor")
        return (
            scaling
            | {"factor": keys["context_length"] / original}
            | ({} if attention is None else {"attention_factor": float(attention)})
        )
    if FREQUENCIES in tensors:
        if kind not in ("none", "llama3", "linear") or factor not in (1.0, float(tensors[FREQUENCIES].max())):
            raise UserError(f"model {name!r} cannot be loaded: it has {FREQUENCIES} and scaling {kind!r} in its keys")
        return _of_factors(tensors[FREQUENCIES], config)
    if f"{SCALING}attn_factor" in keys and float(keys[f"{SCALING}attn_factor"]) != 1.0:
        raise UserError(f"model {name!r} cannot be loaded: its key '{SCALING}attn_factor' is not understood")
    if kind == "none" or (factor == 1.0 and kind in ("linear", "yarn")):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise UserError(f"model {name!r} cannot be loaded: its rotary scaling {kind!r} is not understood")


def _of_factors(factors: Tensor, config: Any) -> dict[str, Any] | None:
    """Return the rotary scaling for a tensor of factors, one per pair of dimensions; None where all are 1."""
    if bool((factors == 1).all()):
        return None
    largest = float(factors.max())
    if torch.allclose(factors, llama3_factors(len(factors), _setting(config, "rope_theta"), largest), rtol=1e-4):
        return {"rope_type": "llama3", "factor": largest, **LLAMA3}
    # Any other factors: the same for every length.
    values = factors.tolist()
    limit = config.max_position_embeddings
    return {
        **{"rope_type": "longrope", "long_factor": values, "short_factor": values, "factor": 1.0},
        **{"attention_factor": 1.0, "original_max_position_embeddings": limit},
    }


def llama3_factors(n: int, base: float, factor: float) -> Tensor:
    """Return Llama 3.1's divisors of ``n`` rotary frequencies: 1 for short waves, ``factor`` for long ones; float32."""
    low, high, original = (
        LLAMA3["low_freq_factor"],
        LLAMA3["high_freq_factor"],
        LLAMA3["original_max_position_embeddings"],
    )
    factors = []
    for index in range(n):
        wavelength = 2 * math.pi * base ** (index / n)
        smooth = min(1.0, max(0.0, (original / wavelength - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors)


def _into(parameters: Any, scaling: dict[str, Any], name: str) -> dict[str, Any]:
    """Add a scaling to rotary parameters; where layer types have their own, to those of full attention."""
    if "rope_theta" in (parameters or {}):
        return parameters | scaling
    if "full_attention" in (parameters or {}):
        full = parameters["full_attention"] | scaling
        return parameters | {"full_attention": full}
    raise UserError(f"model {name!r} cannot be loaded: transformers' configuration has no place for its rotary scaling")


def _require_same(config: Any, keys: dict[str, Any], name: str) -> None:
    """Refuse keys that are neither in the configuration nor neutral."""
    for key, value in keys.items():
        if key in SILENT or key.startswith(SCALING) or value in NEUTRAL.get(key, ()):
            continue
        names = SAME.get(key)
        settings = (_setting(config, candidate) for candidate in names or ())
        setting = next((candidate for candidate in settings if candidate is not None), None)
        if setting is None and key == "attention.sliding_window" and value >= keys.get("context_length", math.inf):
            continue
        if setting is None:
            raise UserError(f"model {name!r} cannot be loaded: transformers leaves out its key {key!r} ({value})")
        if not _equal(setting, value):
            raise UserError(f"model {name!r} cannot be loaded: its key {key!r} is {value}, the model's is {setting}")


def _setting(config: Any, name: str) -> Any:
    if name == "rotary width":
        parameters = getattr(config, "rope_parameters", None) or {}
        share = parameters.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1.0
        return int(_head_dim(config) * share)
    if name in ("rope_theta", "local rope_theta"):
        parameters = getattr(config, "rope_parameters", None) or {}
        own = parameters.get("full_attention" if name == "rope_theta" else "sliding_attention") or {}
        return parameters.get("rope_theta", own.get("rope_theta"))
    if name == "sliding layers":
        return [kind == "sliding_attention" for kind in getattr(config, "layer_types", None) or ()] or None
    return _head_dim(config) if name == "head_dim" else getattr(config, name, None)


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _equal(setting: Any, value: Any) -> bool:
    if isinstance(setting, list):
        # The key is a list with an entry per layer, or a period: the last layer of each period has full attention.
        period = (
            [(layer + 1) % value != 0 for layer in range(len(setting))] if isinstance(value, int) and value else value
        )
        return setting == [bool(slides) for slides in period] if isinstance(period, list) else False
    if isinstance(value, list):
        return bool(value) and all(_equal(setting, entry) for entry in value)
    if isinstance(value, float) or isinstance(setting, float):
        return math.isclose(float(setting), float(value), rel_tol=1e-5)
    return bool(setting == value)
