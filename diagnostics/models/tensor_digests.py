"""The tensors that determine a model's numbers, each by its plain name, and a digest over all of their bytes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.models.libraries import plain_name

PIECE = 2**25  # bytes per hashed piece; tensors are copied from a device in such pieces
# Kinds of rotary frequencies that a call may replace by those for its own length.
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class NamedTensor:
    """A tensor in use; ``get`` returns its values, and is None where they are not on this machine."""

    kind: str
    name: str
    tensor: Tensor
    get: Callable[[], Tensor] | None


def named_tensors(model: Any, inner: nn.Module, idle: set[int]) -> list[NamedTensor]:
    """Return the tensors of a model by their plain names, each once, without those of inactive adapters."""
    tensors: list[NamedTensor] = []
    seen: set[int] = set()
    roots: list[tuple[str, nn.Module]] = [("", inner)]
    prompt_encoder = getattr(model, "prompt_encoder", None)
    if isinstance(prompt_encoder, nn.Module):
        roots.append(("prompt_encoder.", prompt_encoder))
    for prefix, root in roots:
        for path, module in root.named_modules():
            offloaded = _offloaded(module)
            not_saved: set[str] = getattr(module, "_non_persistent_buffers_set", set())
            own = [("weight", n, p) for n, p in module._parameters.items()]
            own += [("buffer" if n in not_saved else "weight", n, b) for n, b in module._buffers.items()]
            own += [("weight", n, t) for n, t in _packed(module)]
            for kind, name, tensor in own:
                if tensor is None or id(tensor) in seen or id(tensor) in idle:
                    continue
                if kind == "buffer" and _changes_with_length(module, name):
                    continue
                if name == "bias" and name in module._buffers and not tensor.is_meta and not tensor.any():
                    continue  # TransformerLens adds a bias of zeros to a head without one
                seen.add(id(tensor))
                full = prefix + plain_name(f"{path}.{name}" if path else name)
                tensors.append(NamedTensor(kind, full, tensor, _getter(tensor, offloaded, name)))
    return sorted(tensors, key=lambda named: (named.kind, named.name))


def _getter(tensor: Tensor, offloaded: Any, name: str) -> Callable[[], Tensor] | None:
    if tensor.device.type != "meta":
        return lambda: tensor
    if offloaded is not None:
        try:
            offloaded[name]
        except Exception:  # another module's map, or deleted files
            return None
        return lambda: offloaded[name]
    return None


def _offloaded(module: nn.Module) -> Any:
    """Return accelerate's map from a module's tensors to their values on the CPU or disk; None without one."""
    outer = getattr(module, "_hf_hook", None)
    hooks = getattr(outer, "hooks", (outer,))
    return next((values for hook in hooks if (values := getattr(hook, "weights_map", None)) is not None), None)


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


def tensors_digest(tensors: Sequence[NamedTensor], kind: str) -> tuple[str, tuple[str, ...]]:
    """SHA-256 over name, shape, type and all bytes of the tensors of a kind; names of those whose bytes are absent."""
    digest = hashlib.sha256()
    unseen = []
    # hashlib lets other threads run while it hashes.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for named in (named for named in tensors if named.kind == kind):
            digest.update(f"{named.name}{tuple(named.tensor.shape)}{named.tensor.dtype}".encode())
            if named.get is None:
                unseen.append(named.name)
                continue
            for leaf in pool.map(_piece_digest, _pieces(named.get())):
                digest.update(leaf)
    return digest.hexdigest(), tuple(unseen)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor's values into flat pieces of plain types; also for quantised tensors and tensor subclasses."""
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
    # Bytes, not values: numpy has no bfloat16, and -0.0 must differ from 0.0.
    values: Any = piece.cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(values).digest()
