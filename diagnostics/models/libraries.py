"""Objects of other libraries that hold a transformers model: PEFT wrappers, TransformerLens bridges, nnsight models.

They are recognised by the packages of their classes, so that the check imports no library.
"""

import copy
from typing import Any

# Attribute names for the module that an adapter wraps.
WRAPPED = ("base_layer", "original_module")
TRANSFORMERS, TRANSFORMER_LENS, NNSIGHT = "transformers", "transformer-lens", "nnsight"


def library_of(model: Any) -> str:
    """Return which library an object belongs to: ``transformer-lens``, ``nnsight`` or else ``transformers``."""
    packages = {base.__module__.split(".")[0] for base in type(model).__mro__}
    if "transformer_lens" in packages and hasattr(model, "original_model"):
        return TRANSFORMER_LENS
    if "nnsight" in packages and hasattr(model, "_module"):
        return NNSIGHT
    return TRANSFORMERS


def stock_model(model: Any) -> Any:
    """Return the transformers model inside an object, or the object itself if it is one."""
    library = library_of(model)
    if library == TRANSFORMER_LENS:
        model = model.original_model
    elif library == NNSIGHT:
        model = model._module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_compiled(model: Any) -> bool:
    """Whether torch.compile wraps a model's own code: compiled code ignores hooks that are added later."""
    for module in (model, *model.modules()):
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            return True
        if hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable"):
            return True
    return False


def twin(model: Any) -> Any:
    """Copy a model's modules and share its weights, for libraries that change modules in place."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def plain_name(name: str) -> str:
    """Return a tensor's name in the plain model, without the components that bridges and adapters insert."""
    name = name.replace("_original_component.", "")
    for inner in WRAPPED:
        name = name.replace(f".{inner}.", ".")
    return name
