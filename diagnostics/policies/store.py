"""Saves and loads a KV cache: one prefilled document answers many questions, in later sessions too.

The file is safetensors, without pickles: keys and values of every layer, columns where rows or heads differ, and a JSON
header with the policy and the identity of the model. A model with other weights, adapters or configuration cannot load
it.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diagnostics.models.anatomy import dissect
from diagnostics.models.identity import ModelIdentity
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.cache_layer import with_room
from diagnostics.policies.columns import Piece
from diagnostics.policies.registry import parse_policy
from diagnostics.support.errors import UserError
from diagnostics.support.files import BLANK, SEAL, flush_folder, require_sealed_file, seal_file
from diagnostics.support.sameness import difference

FORMAT = "speed-diagnostics KV cache 3"
HEADER = "cache"


def save_cache(cache: PolicyCache, path: str | Path, model: LoadedModel | nn.Module) -> None:
    """Write a cache atomically to a ``.safetensors`` file; ``model`` is the one that filled the cache.

    Raises
    ------
    UserError
        If the cache is empty or the file cannot be written.
    """
    if cache.n_columns == 0:
        raise UserError("this KV cache is empty: prefill first")
    if cache.writing:
        raise UserError("a call was interrupted while it wrote into this KV cache: prefill anew")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        slots = slice(layer.first, layer.first + layer.n_slots)
        tensors[f"keys.{index}"] = layer.keys[:, :, slots].contiguous()
        tensors[f"values.{index}"] = layer.values[:, :, slots].contiguous()
        pieces = []
        for number, piece in enumerate(layer.held):
            name = None
            if piece.columns is not None:
                name = f"columns.{index}.{number}"
                tensors[name] = piece.columns.clone()
            pieces.append([piece.start, piece.stop, piece.full, name])
        layers.append(pieces)
    if cache.padding is not None:
        tensors["padding"] = cache.padding.clone()
    header = {
        "format": FORMAT,
        "policy": cache.policy.spec,
        "model": _filled_by(model),
        "n_columns": cache.n_columns,
        "n_prompt": cache.n_prompt,
        "batch": cache.batch,
        "length": cache.length,
        "factors": cache.factors,
        "layers": layers,
        "decoded": [[piece.start, piece.stop] for piece in cache.decoded],
        "forgotten": [layer.hidden_stop for layer in cache.layers],
    }
    file = Path(path)
    try:
        part = file.parent / f".{file.name}.part"
        save_file(tensors, part, metadata={HEADER: json.dumps(header), SEAL: BLANK})
        seal_file(part)
        part.replace(file)
        flush_folder(file.parent)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(f"cannot write the KV cache to {str(path)!r}: {error}") from None


def load_cache(path: str | Path, model: LoadedModel | nn.Module) -> PolicyCache:
    """Load a cache onto the devices of the model's layers.

    Raises
    ------
    UserError
        If the file is missing or damaged, or if another model, adapter or configuration filled the cache.
    """
    module = _module(model)
    try:
        require_sealed_file(Path(path))
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                raise UserError(f"{str(path)!r} is not a KV cache of this version")
            if not isinstance(header["model"], dict):
                raise TypeError("it does not say which model filled it")
            if differs := difference(header["model"], _filled_by(model)):
                raise UserError(f"the KV cache {str(path)!r} was filled by another model: {differs}")
            return _rebuild(header, {name: file.get_tensor(name) for name in file.keys()}, module)  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read the KV cache {str(path)!r}: {error}") from None
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{str(path)!r} is not a KV cache, or a damaged one: {error}") from None


def _rebuild(header: dict[str, Any], tensors: dict[str, Tensor], model: Any) -> PolicyCache:
    anatomy = dissect(model, type(model).__name__)
    cache = PolicyCache(parse_policy(header["policy"]), anatomy)
    cache.n_columns, cache.n_prompt = header["n_columns"], header["n_prompt"]
    cache.batch = header["batch"]
    cache.length, cache.factors = header["length"], header["factors"]
    cache.decoded = tuple(Piece(*columns) for columns in header["decoded"])
    cache.padding = tensors.get("padding")
    for index, (layer, pieces) in enumerate(zip(cache.layers, header["layers"], strict=True)):
        device = next(anatomy.layers[index].parameters()).device
        if device.type == "meta":  # an offloaded layer: the first call moves its keys to the computing device
            device = torch.device("cpu")
        keys, values = tensors[f"keys.{index}"].to(device), tensors[f"values.{index}"].to(device)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = with_room(keys, layer.room), with_room(values, layer.room)
        layer.pieces = tuple(
            Piece(start, stop, tensors[name].to(device) if name else None, full) for start, stop, full, name in pieces
        )
        if layer.window is not None and layer.pieces:
            layer.forgotten = header["forgotten"][index]
    return cache


def _filled_by(model: Any) -> dict[str, Any]:
    """Return what identifies the model that filled a cache, without its generation settings."""
    identity = ModelIdentity.of(model.model if isinstance(model, LoadedModel) else model)
    configuration = {name: value for name, value in identity.configuration.items() if name != "generation"}
    parts = {"adapters": list(identity.adapters), "weight_hash": identity.weights, "buffers": identity.buffers}
    return {"configuration": configuration, "identity": {"configuration": configuration, **parts}}


def _module(model: Any) -> Any:
    model = model.model if isinstance(model, LoadedModel) else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model
