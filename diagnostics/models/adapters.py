"""Reads LoRA adapter folders as peft writes them, and merges the adapter into the weights of its base model.

peft never sees the folder: from ``adapter_config.json`` it gets only settings known to be plain LoRA, and tensors come
from safetensors. So no file can name code to import or a pickle to read. From an adapter on the hub these two files
are fetched, and ``config.json``, which shows that the repository also holds a model.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.errors import UserError, one_line
from diagnostics.support.fields import parse_object
from diagnostics.support.files import require_sums

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MERGED = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("target_modules", "exclude_modules", "target_parameters", "layers_to_transform", "layers_pattern"),
    *("rank_pattern", "alpha_pattern"),
)
# Origin of the file, model class, and settings that matter only in training.
IGNORED = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
    *("inference_mode", "lora_dropout", "init_lora_weights", "eva_config"),
}
# All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights at the start of training.
INITIALISATIONS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder: its base as ``load_model`` takes it, and the ``peft.LoraConfig`` to build it with."""

    folder: Path
    base: str
    revision: str | None
    config: Any


@contextmanager
def merge_errors(name: str) -> Iterator[None]:
    """Turn any error inside the block into a UserError that names the adapter; one that is raised as such passes."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a damaged file raises different errors in different libraries
        raise UserError(f"adapter {name!r} cannot be merged: {one_line(error)}") from error


@contextmanager
def base_errors(name: str) -> Iterator[None]:
    """Say of a UserError inside the block that it is about the base of the adapter."""
    try:
        yield
    except UserError as error:
        raise UserError(f"adapter {name!r}, its base_model_name_or_path: {error}") from None


def is_adapter(name: str) -> bool:
    """Whether a name is a folder with an adapter and no model."""
    folder = os.path.expanduser(name)
    alone = os.path.isfile(os.path.join(folder, CONFIG)) and not os.path.isfile(os.path.join(folder, "config.json"))
    return alone and name.lower() != EMBEDDED_MODEL


def holds_adapter(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a hub repository has an adapter, with or without a model; raises the hub's errors."""
    from transformers.utils import find_adapter_config_file

    return find_adapter_config_file(source, revision=revision) is not None


def beside_a_model(name: str) -> UserError:
    """Return the error for a folder, or a repository, that holds both."""
    return UserError(f"{name!r} holds an adapter beside a model: copy one of them to a folder of its own")


def fetch_adapter(name: str, revision: str | None = None) -> Path | None:
    """Fetch the missing files of an adapter on the hub; return its folder, None if it also holds a model."""
    from huggingface_hub import snapshot_download

    folder = snapshot_download(name, revision=revision, allow_patterns=[CONFIG, WEIGHTS, "config.json"])
    return Path(folder) if is_adapter(folder) else None


def read_adapter(name: str, folder: Path) -> Adapter:
    """Read the settings of an adapter folder; errors name the adapter.

    A relative path to the base is resolved from the working folder, then from the adapter's. Raises UserError if peft
    is missing, and for damaged files, pickled weights, a base that is itself an adapter, and anything but plain LoRA
    for causal models; other errors are peft's.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("adapters need peft 0.17: pip install 'speed-diagnostics[finetune]'") from None
    require_sums(folder)
    try:
        settings = parse_object((folder / CONFIG).read_text(encoding="utf-8"))
    except (UserError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"adapter {name!r} cannot be loaded: its {CONFIG} is damaged: {error}") from None
    base, revision = settings.get("base_model_name_or_path"), settings.get("revision")
    method, task = settings.get("peft_type"), settings.get("task_type")
    if not base or not isinstance(base, str) or not isinstance(revision, str | None):
        raise UserError(f"adapter {name!r} cannot be loaded: its {CONFIG} names no base model")
    if method != "LORA":
        raise UserError(f"adapter {name!r} cannot be merged: its method is {method!r}, and only 'LORA' is served")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"adapter {name!r} is for another task: {task!r}, not 'CAUSAL_LM'")
    if (initialisation := settings.get("init_lora_weights")) not in INITIALISATIONS:
        raise UserError(
            f"adapter {name!r} changes the weights of its base (init_lora_weights={initialisation!r}): convert it first"
        )
    for key, value in settings.items():
        default = getattr(LoraConfig.__dataclass_fields__.get(key), "default", None)
        if value and value != default and key not in IGNORED.union(MERGED):
            raise UserError(f"adapter {name!r} cannot be merged: its {CONFIG} sets {key!r}, which is not plain LoRA")
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / PICKLE).exists()
        problem = "has pickled weights only; convert them to safetensors first" if pickled else f"has no {WEIGHTS}"
        raise UserError(f"adapter {name!r} {problem}")
    path = os.path.expanduser(base)
    # A folder of that name in the working folder need not be a model.
    is_base = os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json")) or is_adapter(path)
    from_adapter = os.path.join(folder, path)
    if base.lower() != EMBEDDED_MODEL and not is_base and os.path.exists(from_adapter):
        base = from_adapter
    if is_adapter(base):
        raise UserError(f"adapter {name!r} cannot be merged: its base {base!r} is itself an adapter")
    config = LoraConfig(init_lora_weights=False, **{key: settings[key] for key in MERGED if key in settings})
    return Adapter(folder, base, revision, config)


def merge(adapter: Adapter, model: Any) -> Any:
    """Merge an adapter into its base model, in place, and return the plain transformers model.

    The update is computed in float32, and a weight in half precision is rounded once, after the addition. Logits differ
    from those of the unmerged adapter by 4e-5 in float32 (tiny models; 1e-4 for the embedded one). In bfloat16
    (embedded model, root mean squares) they differ by 0.2; merged and unmerged are 0.18 and 0.19 from float32, and a
    merge in float32 that is rounded afterwards is no closer. Raises UserError for tensors that the adapter lacks or
    that do not fit the base, and for a base that is quantised or offloaded; other errors are the libraries'.
    """
    from peft import get_peft_model, set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    label = f"adapter {str(adapter.folder)!r}"
    if getattr(model, "is_quantized", False):
        raise UserError(f"{label} cannot be merged: the weights of its base are quantised")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{label} cannot be merged: its base does not fit the device and is offloaded")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft warns of problems that are checked or corrected here
        wrapped: Any = get_peft_model(model, adapter.config)
        try:
            report: Any = set_peft_model_state_dict(wrapped, load_file(adapter.folder / WEIGHTS))
        except KeyError as error:
            raise UserError(f"{label} lacks weights: {error.args[0]}") from None
        # The file does not contain the rest of the model, but it must contain every trained weight.
        missing = {name for name, p in wrapped.named_parameters() if p.requires_grad}.intersection(report.missing_keys)
        if missing:
            raise UserError(f"{label} lacks {len(missing)} of its weights ({min(missing)}, ...)")
        if report.unexpected_keys:
            excess = report.unexpected_keys
            raise UserError(
                f"{label} does not fit its base: {len(excess)} of its weights have no place ({min(excess)}, ...)"
            )
        # Merging adds in place: if embedding and head share a tensor, both would get the update meant for one of them.
        for part in (model.get_input_embeddings(), model.get_output_embeddings()):
            if isinstance(part, BaseTunerLayer):
                layer: Any = part.get_base_layer()
                layer.weight = nn.Parameter(layer.weight.detach().clone())
        merged = wrapped.merge_and_unload()
    return merged.requires_grad_(True)  # like every other loaded model: peft had frozen it
