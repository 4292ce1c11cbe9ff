"""Finds the parts of a transformers decoder, and refuses decoders that cannot be served.

The rest of the package refers to *layer l*, *its attention*, *its output projection*, *the final norm* and *the
unembedding*; only this file knows their names in each model family. A family is recognised by structure, not by a list
of names, so a new one usually works without changes. No result is trusted blindly: each capture checks the recomputed
attention and the last logit lens against the model's own.
"""

import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from diagnostics.models.libraries import is_compiled
from diagnostics.models.positions import prompt_room
from diagnostics.support.errors import UserError

ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
OUTPUT_PROJECTION_NAMES = ("o_proj", "c_proj", "dense", "out_proj", "wo")
FINAL_NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")
# Families whose stack reshapes the output of its layers to the shape of its input.
RESHAPING = {"gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen"}
# Per-position arguments of layers besides their input; any other one fails by its shape.
PER_POSITION = {"position_embeddings", "position_ids"}
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one decoder-only model, in layer order.

    ``stack`` is the module that runs the layers; ``layers``, ``attentions`` and ``output_projections`` have one entry
    per layer. Logits are ``softcap(unembedding(final_norm(h)) * logit_scale)``. ``max_positions`` is None where
    positions are unbounded. ``reshapes`` says that the stack requires as many rows after its layers as before.
    ``expert_share`` is the share of a layer's experts that a token runs through, 1 without experts.
    """

    stack: nn.Module
    layers: tuple[nn.Module, ...]
    attentions: tuple[nn.Module, ...]
    output_projections: tuple[nn.Module, ...]
    final_norm: nn.Module
    unembedding: Any
    n_heads: int
    n_kv_heads: int
    head_dim: int
    width: int
    max_positions: int | None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    layer_types: tuple[str, ...] = field(default=())
    sliding_window: int | None = None
    reshapes: bool = False
    expert_share: float = 1.0

    def room(self, n_new: int) -> int | None:
        """Number of prompt tokens that fit together with ``n_new`` further tokens; see `prompt_room`."""
        return prompt_room(self.max_positions, n_new)

    def window(self, layer: int) -> int | None:
        """Width of a layer's sliding window in positions, None for full attention."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers L."""
        return len(self.layers)

    @property
    def shape(self) -> dict[str, Any]:
        """Plain numbers that determine compute and memory, for predictions without the model.

        ``layer_parameters``: weights used per token in each layer; in a mixture of experts, those of the chosen ones.
        ``head_parameters``: weights of the unembedding.
        ``bytes_per_value``: bytes of a value in weights and cache.
        """
        return {
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "width": self.width,
            "layer_parameters": [_used_parameters(layer, self.expert_share) for layer in self.layers],
            "head_parameters": sum(p.numel() for p in self.unembedding.parameters()),
            "bytes_per_value": next(self.layers[0].parameters()).element_size(),
            "layer_types": list(self.layer_types),
            "sliding_window": self.sliding_window,
        }


def refuse_config(config: object, name: str) -> None:
    """Raise UserError when the configuration alone shows that the model cannot be served.

    Cheap: called before any weight is read. The message names the model and the reason.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kind = getattr(text, "model_type", type(text).__name__)

    def refuse(reason: str) -> None:
        raise UserError(f"model {name!r} ({kind}) cannot be diagnosed: {reason}; use a decoder-only attention model")

    if getattr(config, "is_encoder_decoder", False):
        refuse("it is an encoder-decoder model")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(text, "is_decoder", False):
        refuse("it is an encoder: its attention is not causal")
    if getattr(text, "kv_lora_rank", None):
        refuse("its attention keeps latent vectors (MLA) instead of keys and values")
    if getattr(text, "num_kv_shared_layers", None):
        refuse("its upper layers share the keys and values of lower ones")
    kinds = set(getattr(text, "layer_types", None) or ())
    if "chunked_attention" in kinds:
        refuse("it has layers that see their own chunk of the positions only (chunked attention)")
    foreign = sorted(kinds - SERVED_LAYER_TYPES)
    if foreign:
        refuse(f"it has layers that are not attention ({', '.join(foreign)})")
    if not getattr(text, "num_attention_heads", None) or not getattr(text, "num_hidden_layers", None):
        refuse("it has no attention layers (a state-space or recurrent model?)")
    if getattr(text, "add_cross_attention", False):
        refuse("it has cross-attention")


def dissect(model: Any, name: str) -> Anatomy:
    """Find the parts of a transformers causal language model; raise UserError, naming the model, if one is missing."""
    config = model.config.get_text_config(decoder=True)
    refuse_config(model.config, name)

    if is_compiled(model):
        raise UserError(f"model {name!r} is compiled, and compiled code leaves out hooks: give it as it was before")

    def refuse(reason: str) -> UserError:
        return UserError(
            f"model {name!r} ({config.model_type}) cannot be diagnosed: {reason}; "
            "use a model that runs through transformers' attention interface"
        )

    if not getattr(model, "_supports_attention_backend", False):
        raise refuse("its attention does not run through transformers' attention interface")
    stack = _layer_stack(model, config.num_hidden_layers)
    if stack is None:
        raise refuse(f"no stack of {config.num_hidden_layers} decoder layers was found in it")
    parent, layers = stack
    attentions = _children(layers, ATTENTION_NAMES)
    if attentions is None:
        raise refuse("not every layer has attention")
    if any(getattr(attention, "is_causal", True) is False for attention in attentions):
        raise refuse("its attention is not causal (an encoder)")
    projections = _children(attentions, OUTPUT_PROJECTION_NAMES)
    if projections is None:
        raise refuse("not every attention has an output projection")
    norm, unembedding = _child(parent, FINAL_NORM_NAMES), model.get_output_embeddings()
    if norm is None:
        raise refuse("no final norm was found after the last layer")
    if unembedding is None:
        raise refuse("it has no language-model head")

    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = float(config.logit_scale)
    try:
        n_heads, n_kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    except RuntimeError:  # transformers raises it where the setting differs between layers
        raise refuse("the shape of its attention changes from layer to layer") from None
    return Anatomy(
        stack=parent,
        layers=layers,
        attentions=attentions,
        output_projections=tuple(unwrapped(projection) for projection in projections),
        final_norm=unwrapped(norm),
        unembedding=unwrapped(unembedding),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads or n_heads,
        head_dim=head_dim,
        width=config.hidden_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        logit_scale=scale,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        layer_types=layer_types(config),
        sliding_window=getattr(config, "sliding_window", None),
        reshapes=config.model_type in RESHAPING,
        expert_share=_expert_share(config),
    )


def layer_types(config: Any) -> tuple[str, ...]:
    """Return the type of attention of every layer, as transformers names it, by the configuration of the text model."""
    if listed := getattr(config, "layer_types", None):
        return tuple(listed)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ("sliding_attention" if slides else "full_attention",) * int(config.num_hidden_layers)


def unwrapped(module: Any) -> Any:
    """Return the model's own module for a component of TransformerLens's bridge, and any other module unchanged."""
    while (inner := getattr(module, "original_component", None)) is not None:
        module = inner
    return module


def parameter_names(module: Any) -> list[str]:
    """Return the parameter names of a module's forward, from its class: libraries replace the method of the object."""
    return list(inspect.signature(type(unwrapped(module)).forward).parameters)[1:]


def _expert_share(config: Any) -> float:
    """Share of its experts that a token runs through; 1 without experts."""
    counts = (getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((n for n in counts if n), None)
    chosen = getattr(config, "num_experts_per_tok", None)
    return chosen / experts if experts and chosen else 1.0


def _used_parameters(layer: nn.Module, expert_share: float) -> int:
    """Number of a layer's weights that one token is multiplied with."""
    shares = ((p, expert_share if ".experts." in f".{name}" else 1.0) for name, p in layer.named_parameters())
    return round(sum(p.numel() * share for p, share in shares))


def _layer_stack(model: nn.Module, n_layers: int) -> tuple[nn.Module, tuple[nn.Module, ...]] | None:
    """Return the module that owns the decoder layers, and the layers."""
    for parent in model.modules():
        for child in parent.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and _child(child[0], ATTENTION_NAMES):
                return parent, tuple(child)
    return None


def _children(modules: tuple[nn.Module, ...], names: tuple[str, ...]) -> tuple[nn.Module, ...] | None:
    """Find one child in every module; None where one of them has no such child."""
    children = tuple(child for module in modules if (child := _child(module, names)) is not None)
    return children if len(children) == len(modules) else None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((m for n in names if isinstance(m := getattr(module, n, None), nn.Module)), None)
