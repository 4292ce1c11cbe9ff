"""The identity of the model that produced a number. `diagnostics.prompts.digests` has the identity of its input.

A result may be continued, and a cache loaded, only where both are the same. A model is identified by

- its **weights**: SHA-256 over every byte of every tensor in use, on any device;
- its **buffers**: tensors computed when it was built, such as rotary frequencies;
- its **configuration**: its settings and the numbers in its modules (norm epsilons, scalings, windows);
- its **adapters**: which are active or merged, and at which scale;
- the **libraries** that run it.

Nothing is cached between calls: an edit through ``.data`` leaves no trace on a tensor, so no older hash could be
trusted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from diagnostics.models.active_adapters import active_adapters, holds_adapters
from diagnostics.models.libraries import WRAPPED, plain_name, stock_model
from diagnostics.models.tensor_digests import named_tensors, tensors_digest
from diagnostics.support.digests import json_digest
from diagnostics.support.versions import versions

LIBRARIES = ("torch", "transformers")
# Settings of a configuration that do not affect numbers: its origin, file formats, training, output formats.
NOT_NUMBERS = {
    *("_name_or_path", "_commit_hash", "transformers_version", "transformers.js_config", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "id2label", "label2id", "problem_type", "task_specific_params", "finetuning_task"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
    *("initializer_range", "router_aux_loss_coef", "gradient_checkpointing", "_from_model_config", "model_name"),
}
# Attributes of a module that training, calls and libraries change without changing its results.
NOT_SETTINGS = {"training", "gradient_checkpointing", "max_seq_len_cached", "is_loaded_in_8bit", "is_loaded_in_4bit"}
# Packages whose modules wrap those of a model.
WRAPPERS = {"transformer_lens", "nnsight", "peft", "accelerate"}


@dataclass(frozen=True)
class ModelIdentity:
    """What tells one model from another.

    ``weights`` and ``buffers`` are SHA-256 (hex). ``configuration`` is readable. ``adapters`` names the active and the
    merged ones with their scale; it is empty where there are none. ``unseen`` names weights whose values are not on
    this machine, so that only their names, shapes and types could be hashed.
    """

    weights: str
    buffers: str
    configuration: dict[str, Any] = field(repr=False)
    adapters: tuple[str, ...]
    libraries: dict[str, str]
    unseen: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: Any) -> "ModelIdentity":
        """Identify a transformers model in its present state, also inside a PEFT, TransformerBridge or nnsight model.

        Reads every weight: about one second per gigabyte on one processor core.
        """
        inner = stock_model(model)
        idle, adapters = active_adapters(model, inner)
        tensors = named_tensors(model, inner, idle)
        weights, unseen = tensors_digest(tensors, "weight")
        buffers, _ = tensors_digest(tensors, "buffer")
        return cls(weights, buffers, configuration(model), adapters, libraries(), unseen)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all `entries`."""
        return json_digest(list(self.entries().values()))

    def entries(self) -> dict[str, Any]:
        """Return a manifest's ``identity``: values that must all be equal; those that explain others come first."""
        return {
            "libraries": self.libraries,
            "configuration": json_digest(self.configuration),
            "adapters": list(self.adapters),
            "weight_hash": self.weights,
            "buffers": self.buffers,
        }

    @property
    def notes(self) -> list[str]:
        """What the identity does not cover, as readable sentences."""
        if not self.unseen:
            return []
        return [
            f"the values of {len(self.unseen)} weights are not on this machine ({self.unseen[0]}, ...): "
            "a change of them alone would not be noticed on resuming"
        ]


def configuration(model: Any) -> dict[str, Any]:
    """Return what determines a model's numbers besides its tensors, as plain values: class, settings and modules.

    ``settings`` and ``generation`` are the configurations without settings that do not affect numbers. ``modules`` is a
    digest of the class and the plain attributes of every module: a forward pass reads these, not the settings.
    """
    inner = stock_model(model)
    config, generation = inner.config, getattr(inner, "generation_config", None)
    return {
        "class": f"{type(inner).__module__}.{type(inner).__qualname__}",
        "attention": getattr(config, "_attn_implementation", None),
        "type": str(getattr(inner, "dtype", None)).removeprefix("torch."),
        "settings": _plain(config.to_dict()),
        "generation": {} if generation is None else _plain(generation.to_diff_dict()),
        "modules": json_digest(sorted(_module_settings(inner))),
    }


def configuration_digest(model: Any) -> str:
    """SHA-256 (hex) of a model without its weights: class, settings, attention implementation, type, libraries.

    Cheap, since it reads no weights. Two models with the same digest run the same operations.
    """
    inner = stock_model(model)
    _, adapters = active_adapters(model, inner)
    kinds = sorted({(type(m).__module__, type(m).__qualname__) for m in inner.modules()})
    return json_digest([configuration(model), list(adapters), libraries(), kinds])


def libraries() -> dict[str, str]:
    """Versions of the libraries that run a model."""
    return {name: version for name, version in versions().items() if name in LIBRARIES}


# --- Settings ---


def _plain(value: Any) -> Any:
    """Convert a configuration to plain JSON, without settings that do not affect numbers."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in sorted(value.items(), key=lambda kv: str(kv[0])) if k not in NOT_NUMBERS}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, set | frozenset):
        return sorted(str(entry) for entry in value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _module_settings(inner: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Path, class and plain public attributes of every module of the model itself, without modules of adapters."""
    added: tuple[str, ...] = ()
    for path, module in inner.named_modules():
        kind = type(module)
        if holds_adapters(module):
            added += tuple(f"{path}.{name}" for name, _ in module.named_children() if name not in WRAPPED)
        foreign = kind.__module__.partition(".")[0] in WRAPPERS
        if foreign or any(path == adapter or path.startswith(f"{adapter}.") for adapter in added):
            continue
        numbers = {
            name: value
            for name, value in vars(module).items()
            if not name.startswith("_") and name not in NOT_SETTINGS and isinstance(value, int | float | bool | None)
        }
        yield plain_name(f"{path}."), kind.__qualname__, json.dumps(numbers, sort_keys=True)
