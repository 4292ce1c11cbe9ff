"""Converts models in GGUF files to safetensors in float32 (de-quantised), with every setting in the file.

A conversion is identified by the content of its file: a replaced file is converted again, a copy is not.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch

from diagnostics.models.converted import cache_folder, convert_once
from diagnostics.models.gguf_settings import FREQUENCIES, LONG, SHORT, rebuild, require_frequencies, require_used
from diagnostics.support.errors import UserError, one_line
from diagnostics.support.versions import versions

# Increased when the result of a conversion changes.
FORMAT = 1
SOURCE = "source.txt"


def converted_gguf(file: Path, name: str) -> Path:
    """Folder of a GGUF file's model in safetensors, converted on the first call.

    Raises UserError if a package to read the file is missing, and for keys and tensors that would be lost, by name.
    """
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256")
    digest.update(f"{FORMAT} {versions()['transformers']}".encode())
    target = cache_folder() / "gguf" / digest.hexdigest()[:32]
    size = file.stat().st_size
    return convert_once(target, lambda folder: write_converted(file, folder, name), f"model {name!r}", _room(size))


def write_converted(file: Path, folder: Path, name: str) -> None:
    """Write the model and the tokenizer of a GGUF file to ``folder``, with every setting in the file.

    Raises UserError for a damaged file, for keys and tensors that transformers would drop and that cannot be rebuilt,
    and for models that cannot be served; where nothing can be written, the libraries' own errors.
    """
    try:
        model, tokenizer = _read(file, name)
    except UserError:
        raise
    except Exception as error:  # a damaged file raises different errors in different libraries
        raise UserError(f"model {name!r} cannot be loaded: {one_line(error)}") from error
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / SOURCE).write_text(f"{file.name}\n", encoding="utf-8")


def _read(file: Path, name: str) -> tuple[Any, Any]:
    """Return the model and the tokenizer of a GGUF file."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from diagnostics.models.anatomy import refuse_config

    source: dict[str, Any] = {"gguf_file": file.name}
    config = AutoConfig.from_pretrained(file.parent, **source)
    refuse_config(config, name)
    architecture, keys, tensors, rotary = read_gguf(file)
    config = rebuild(config, keys, rotary, architecture, name)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    require_used(tensors, _used(model), name)
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            require_frequencies(type(module)(config), rotary, name)
    quantised: Any
    quantised, report = AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **source
    )
    if wrong := sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]):
        raise UserError(
            f"model {name!r} cannot be loaded: {len(wrong)} of its weights are missing or of another size "
            f"({wrong[0]}, ...)"
        )
    # save_pretrained refuses a model loaded from GGUF, so its weights move to one built from a clean configuration.
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    return model, AutoTokenizer.from_pretrained(file.parent, **source)


def read_gguf(file: Path) -> tuple[str, dict[str, Any], set[str], dict[str, torch.Tensor]]:
    """Read a GGUF file's architecture, its keys without that prefix, its tensors' names, and its rotary tensors."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    architecture = str(reader.fields["general.architecture"].contents())
    prefix = f"{architecture}."
    fields = reader.fields.items()
    keys = {key.removeprefix(prefix): field.contents() for key, field in fields if key.startswith(prefix)}
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise UserError(f"{str(file)!r} is one part of several: join them with llama-gguf-split --merge")
    rotary = {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().reshape(-1)
        for tensor in reader.tensors
        if tensor.name in (FREQUENCIES, LONG, SHORT)
    }
    return architecture, keys, {tensor.name for tensor in reader.tensors}, rotary


def _used(model: Any) -> set[str]:
    """Names of the GGUF tensors that transformers loads into a model."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind = model.config.model_type
    names = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
    processor = TENSOR_PROCESSORS.get(names.get(kind, kind), TensorProcessor)(config=model.config.to_dict())
    used = set(get_gguf_hf_weights_map(model, processor))
    # The map lists experts without a suffix; it lacks GPT-2's head.
    return used | {f"{name}.weight" for name in used} | ({"output.weight"} if kind == "gpt2" else set())


def _room(size: int) -> str:
    """Disk space that a conversion may take: 4 bytes per weight, from about 4 bits per weight in the file."""
    return f"about {max(1, round(size * 8 / 1e9))} GB"
