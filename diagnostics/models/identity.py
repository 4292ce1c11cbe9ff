"""What a number belongs to: one identity for a model, one for what it reads.

A result may be continued, and a cache loaded, only where both are the same. A model is told apart by

- its **weights**: SHA-256 over every byte of every tensor that takes part, wherever it lies;
- its **buffers**: tensors made when it was built, such as rotary frequencies;
- its **configuration**: what its settings and the numbers in its modules say (norm epsilons, scalings, windows);
- its **adapters**: which are active or merged, and at which scale;
- the **libraries** that run it.

Nothing here is kept from one call to the next: an edit through ``.data`` leaves no trace on a tensor, so there is no
sign by which an older hash could be trusted.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diagnostics.models.libraries import stock_model
from diagnostics.support.versions import versions

if TYPE_CHECKING:
    from diagnostics.prompts.encoding import EncodedPrompt

PIECE = 2**25  # bytes that are hashed as one; a device's tensors come here in such pieces
LIBRARIES = ("torch", "transformers")
# Of a configuration: where it comes from, how its files are written, what only training or output formats use.
NOT_NUMBERS = {
    *("_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("initializer_range", "router_aux_loss_coef", "gradient_checkpointing", "_from_model_config", "model_name"),
}
# Of a module: what training, calls and libraries change without changing what it computes.
NOT_SETTINGS = {"training", "gradient_checkpointing", "max_seq_len_cached", "is_loaded_in_8bit", "is_loaded_in_4bit"}
# Modules of these stand between a model and its own.
WRAPPERS = {"transformer_lens", "nnsight", "peft", "accelerate"}
# What adapters call the module that they were put around.
WRAPPED = ("base_layer", "original_module")
# Rotary frequencies that a call may replace by those for its own length.
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another.

    ``weights`` and ``buffers`` are SHA-256 (hex). ``configuration`` is readable. ``adapters`` names the active and the
    merged ones with their scale, and is empty where none takes part. ``unseen`` names weights whose values are
    elsewhere, so that only their names, shapes and types could be hashed.
    """

    weights: str
    buffers: str
    configuration: dict[str, Any] = field(repr=False)
    adapters: tuple[str, ...]
    libraries: dict[str, str]
    unseen: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> "ModelIdentity":
        """Identify a model as it is now: of transformers, in a PEFT model, a TransformerBridge or an nnsight model.

        Reads every weight: about a second for a gigabyte and processor core.
        """
        inner = stock_model(model)
        idle, adapters = _adapters(model, inner)
        tensors = _named_tensors(model, inner, idle)
        weights, unseen = _digest(tensors, "weight")
        buffers, _ = _digest(tensors, "buffer")
        return cls(weights, buffers, configuration(model), adapters, libraries(), unseen)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all of it."""
        return _json_digest(list(self.entries().values()))

    def entries(self) -> dict[str, Any]:
        """Return what a manifest's ``identity`` keeps: values that must be equal, those that explain others first."""
        return {
            "libraries": self.libraries,
            "configuration": _json_digest(self.configuration),
            "adapters": list(self.adapters),
            "weight_hash": self.weights,
            "buffers": self.buffers,
        }

    @property
    def notes(self) -> list[str]:
        """What the identity cannot vouch for, for people."""
        if not self.unseen:
            return []
        return [
            f"the values of {len(self.unseen)} weights are not on this machine ({self.unseen[0]}, ...): "
            "a change of them alone would not be noticed on resuming"
        ]


def configuration(model: Any) -> dict[str, Any]:
    """Return what decides a model's numbers besides its tensors, as plain values: class, settings, numbers in modules.

    ``settings`` and ``generation`` are the configurations less what does not matter; ``modules`` is a digest of the
    class and the plain attributes of every module, since these, not the settings, are what a forward pass reads.
    """
    inner = stock_model(model)
    config, generation = inner.config, getattr(inner, "generation_config", None)
    return {
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "attention": getattr(config, "_attn_implementation", None),
        "type": str(getattr(inner, "dtype", None)).removeprefix("torch."),
        "settings": _plain(config.to_dict()),
        "generation": {} if generation is None else _plain(generation.to_diff_dict()),
        "modules": _json_digest(sorted(_module_settings(inner))),
    }


def configuration_digest(model: Any) -> str:
    """SHA-256 (hex) of a model without its weights: class, settings, attention implementation, type, libraries.

    Cheap. Two models with the same digest run the same operations.
    """
    inner = stock_model(model)
    _, adapters = _adapters(model, inner)
    kinds = sorted({(type(m).__module__, type(m).__qualname__) for m in inner.modules()})
    return _json_digest([configuration(model), list(adapters), libraries(), kinds])


def libraries() -> dict[str, str]:
    """Versions of the libraries that run a model."""
    return {name: version for name, version in versions().items() if name in LIBRARIES}


def inputs_digest(encoded: "Iterable[EncodedPrompt]") -> str:
    """SHA-256 (hex) of what a model reads: the tokens of each prompt and its reference, and where evidence is.

    Tokens decide, so another tokenizer, another chat template or a date in one makes another digest.
    """
    digest = hashlib.sha256()
    for prompt in encoded:
        digest.update(json.dumps([prompt.prompt_id, prompt.token_ids, prompt.reference_ids, prompt.evidence]).encode())
    return digest.hexdigest()


def tokens_digest(rows: Iterable[Any]) -> str:
    """SHA-256 (hex) of rows of token ids, or of anything else that JSON can hold."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 (hex) of how a tokenizer reads texts and conversations, as of now: a template may hold the date."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is not None:
        vocabulary = json.loads(fast.to_str())
        for call in ("truncation", "padding"):  # how it was last called
            vocabulary.pop(call, None)
    else:
        vocabulary = [type(tokenizer).__qualname__, sorted(tokenizer.get_vocab().items())]
    template = getattr(tokenizer, "chat_template", None)
    said = None
    if template:
        turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
        try:
            said = tokenizer.apply_chat_template([*turns, turns[0]], tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like; those that raise are told apart by their text
            said = type(error).__name__
    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items()}
    return _json_digest([vocabulary, template, said, special])


# --- Tensors ---


@dataclass(frozen=True)
class _Named:
    """A tensor that takes part: ``get`` fetches its values, None where they are not on this machine."""

    kind: str
    name: str
    tensor: Tensor
    get: Callable[[], Tensor] | None


def _named_tensors(model: Any, inner: nn.Module, idle: set[int]) -> list[_Named]:
    """Return the tensors of a model by their plain names, each once, without those of adapters that are off."""
    found: list[_Named] = []
    seen: set[int] = set()
    roots: list[tuple[str, nn.Module]] = [("", inner)]
    learnt = getattr(model, "prompt_encoder", None)
    if isinstance(learnt, nn.Module):
        roots.append(("prompt_encoder.", learnt))
    for prefix, root in roots:
        for path, module in root.named_modules():
            offloaded = _offloaded(module)
            kept_out: set[str] = getattr(module, "_non_persistent_buffers_set", set())
            own = [("weight", n, p) for n, p in module._parameters.items()]
            own += [("buffer" if n in kept_out else "weight", n, b) for n, b in module._buffers.items()]
            own += [("weight", n, t) for n, t in _packed(module)]
            for kind, name, tensor in own:
                if tensor is None or id(tensor) in seen or id(tensor) in idle:
                    continue
                if kind == "buffer" and _changes_with_length(module, name):
                    continue
                if name == "bias" and name in module._buffers and not tensor.is_meta and not tensor.any():
                    continue  # TransformerLens gives a head without a bias one of zeros
                seen.add(id(tensor))
                full = prefix + _plain_name(f"{path}.{name}" if path else name)
                found.append(_Named(kind, full, tensor, _getter(tensor, offloaded, name)))
    return sorted(found, key=lambda one: (one.kind, one.name))


def _plain_name(name: str) -> str:
    """Name a tensor as the plain model does: bridges and adapters put components of their own in between."""
    name = name.replace("_original_component.", "")
    for inner in WRAPPED:
        name = name.replace(f".{inner}.", ".")
    return name


def _getter(tensor: Tensor, offloaded: Any, name: str) -> Callable[[], Tensor] | None:
    if tensor.device.type != "meta":
        return lambda: tensor
    if offloaded is not None:
        try:
            offloaded[name]
        except Exception:  # a map of another module, or files that are gone
            return None
        return lambda: offloaded[name]
    return None


def _offloaded(module: nn.Module) -> Any:
    """Return accelerate's map from a module's tensors to their values on the CPU or disk; None where there is none."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return next((found for one in hooks if (found := getattr(one, "weights_map", None)) is not None), None)


def _packed(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors of PyTorch's and bitsandbytes' quantised layers that are neither parameters nor buffers."""
    weight = getattr(module, "weight", None)
    if callable(weight):  # torch.ao's dynamic int8 layers
        bias: Any = getattr(module, "bias", None)
        for name, tensor in (("weight", weight()), ("bias", bias() if callable(bias) else bias)):
            if isinstance(tensor, Tensor):
                yield name, tensor
    state = getattr(weight, "quant_state", None)
    if state is not None and hasattr(state, "as_dict"):
        yield from ((f"weight.{n}", t) for n, t in state.as_dict(packed=True).items() if isinstance(t, Tensor))
    for name in ("CB", "SCB"):
        tensor = getattr(weight, name, None)
        if isinstance(tensor, Tensor) and tensor is not weight:
            yield f"weight.{name}", tensor


def _changes_with_length(module: nn.Module, name: str) -> bool:
    """Whether a call may replace this buffer by another for its own length; the original stays beside it."""
    if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
        return False
    kinds = getattr(module, "rope_type", None)
    kind = kinds.get(name.removesuffix("_inv_freq")) if isinstance(kinds, dict) else kinds
    return isinstance(kind, str) and any(part in kind for part in LENGTH_DEPENDENT)


def _digest(tensors: Sequence[_Named], kind: str) -> tuple[str, tuple[str, ...]]:
    """SHA-256 over name, shape, type and all bytes of the tensors of a kind; names of those whose bytes are absent."""
    digest = hashlib.sha256()
    unseen = []
    # hashlib lets other threads run while it hashes.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for one in (one for one in tensors if one.kind == kind):
            digest.update(f"{one.name}{tuple(one.tensor.shape)}{one.tensor.dtype}".encode())
            if one.get is None:
                unseen.append(one.name)
                continue
            for leaf in pool.map(_piece_digest, _pieces(one.get())):
                digest.update(leaf)
    return digest.hexdigest(), tuple(unseen)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor's values into flat pieces of plain types, those of quantised tensors and subclasses included."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        if tensor.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
            yield from _pieces(tensor.q_per_channel_scales())
            yield from _pieces(tensor.q_per_channel_zero_points())
        else:
            yield torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)
        tensor = tensor.int_repr()
    elif hasattr(tensor, "__tensor_flatten__"):
        names, context = tensor.__tensor_flatten__()
        yield torch.frombuffer(bytearray(repr(context).encode()), dtype=torch.uint8)
        for name in names:
            yield from _pieces(getattr(tensor, name))
        return
    flat = tensor.reshape(-1)
    step = max(1, PIECE // flat.element_size())
    yield from (flat[start : start + step] for start in range(0, flat.numel(), step))


def _piece_digest(piece: Tensor) -> bytes:
    # Bytes, not values: numpy knows no bfloat16, and -0.0 is not 0.0.
    values: Any = piece.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(values).digest()


# --- Adapters ---


def _adapters(model: Any, inner: nn.Module) -> tuple[set[int], tuple[str, ...]]:
    """Find PEFT's layers: ids of parameters that take no part, and what does, readable.

    Layers are told by their attributes: peft need not be there, and transformers puts them into plain models, too.
    """
    idle: set[int] = set()
    said: dict[str, set[str]] = {}
    for path, module in inner.named_modules():
        if not _holds_adapters(module):
            continue
        merged = list(getattr(module, "merged_adapters", ()))
        on = [] if module.disable_adapters else list(module.active_adapters)
        holders = (*getattr(module, "adapter_layer_names", ()), "modules_to_save", "token_adapter")
        acting = False
        for holder in (getattr(module, name, None) for name in holders):
            for name, part in _items(holder):
                if name in on and name not in merged:
                    acting = True
                    continue
                idle |= {id(t) for t in _tensors_of(part)}
        scaling = getattr(module, "scaling", {})
        if acting:
            for name in on:
                scale = scaling.get(name) if isinstance(scaling, dict) else None
                said.setdefault(f"{name}, scale {scale:g}" if scale is not None else name, set()).add(path)
        for name in merged:
            said.setdefault(f"{name}, merged", set()).add(path)
    found = [f"{what} in {len(where)} layers ({_json_digest(sorted(where))[:8]})" for what, where in said.items()]
    if hasattr(model, "prompt_encoder"):
        state = "off" if "forward" in vars(model) else model.active_adapter
        found.append(f"prompt of {state}")
    return idle, tuple(sorted(found))


def _holds_adapters(module: nn.Module) -> bool:
    # Of transformers' own models it is a method.
    return isinstance(getattr(module, "disable_adapters", None), bool) and hasattr(module, "active_adapters")


def _items(holder: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(holder, nn.ModuleDict | nn.ParameterDict | dict):
        yield from holder.items()


def _tensors_of(part: Any) -> Iterator[Tensor]:
    if isinstance(part, nn.Module):
        yield from part.parameters()
        yield from part.buffers()
    elif isinstance(part, Tensor):
        yield part


# --- Settings ---


def _plain(value: Any) -> Any:
    """Make a configuration plain JSON without what does not decide numbers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])) if k not in NOT_NUMBERS}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(str(entry) for entry in value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _module_settings(inner: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Path, class and plain public attributes of every module of the model itself, not of what adapters add."""
    added: tuple[str, ...] = ()
    for path, module in inner.named_modules():
        kind = type(module)
        if _holds_adapters(module):
            added += tuple(f"{path}.{name}" for name, _ in module.named_children() if name not in WRAPPED)
        foreign = kind.__module__.partition(".")[0] in WRAPPERS
        if foreign or any(path == one or path.startswith(f"{one}.") for one in added):
            continue
        numbers = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name not in NOT_SETTINGS and isinstance(value, int | float | bool | None)
        }
        yield _plain_name(f"{path}."), kind.__qualname__, json.dumps(numbers, sort_keys=True)


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
