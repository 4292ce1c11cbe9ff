"""Finds what the name of a model means: the built-in one, a GGUF file, a folder, or a model on the hub.

Errors know the machine: they say which folders are there, which name is similar, and whether the hub can be asked.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from diagnostics.models.embedded import EMBEDDED_MODEL, embedded_model_folder, find_embedded_model
from diagnostics.models.gguf import converted_gguf
from diagnostics.support.errors import UserError, one_line
from diagnostics.support.suggest import did_you_mean, whats_there

# Files that show that a folder can be given in place of a model: a model, an adapter, or a run.
NAMED = ("config.json", "adapter_config.json", "manifest.json")
RESULTS = {"manifest.json": "run", "benchmark.json": "benchmark", "evaluation.json": "evaluation"}
SECONDS = 10.0  # to reach the hub


def locate(name: str, *, convert: bool = True) -> str | None:
    """Return the folder or hub id that transformers reads the model of this name from.

    The built-in model and GGUF files are converted to a folder on first use; without ``convert`` the answer is None
    where that has yet to be done. Raises UserError for what is not there, or is no model.
    """
    if name.lower() == EMBEDDED_MODEL:
        folder = embedded_model_folder() if convert else find_embedded_model()
        return None if folder is None else str(folder)
    # os.path, unlike pathlib, treats an impossible name as a missing one.
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() == ".gguf":
        if not os.path.isfile(path):
            hint = whats_there(name, lambda file: file.suffix.lower() == ".gguf", "GGUF files")
            raise UserError(f"there is no GGUF file {name!r}{hint}")
        return str(converted_gguf(path, name)) if convert else None
    if os.path.isdir(path):
        _require_model(path, name)
        return str(path)
    if os.path.exists(path):
        raise UserError(f"{name!r} is a file, but neither a model folder nor a .gguf file")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name!r}{_around(name)}")
    return name


def require_on_hub(name: str, revision: str | None) -> None:
    """Raise UserError, before libraries retry for half a minute, if a model is neither in the cache nor to be had."""
    from huggingface_hub import constants, get_session, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        files = (try_to_load_from_cache(name, file, revision=revision) for file in NAMED[:2])
        if any(isinstance(file, str) for file in files):
            return
    except HFValidationError:
        raise not_found(name, "it is no folder here, and no name that the hub can have") from None
    if is_offline_mode():
        raise not_found(name, "offline (HF_HUB_OFFLINE=1) and not in the cache")
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the network, of several libraries
        raise not_found(name, f"not in the cache, and the hub cannot be reached ({one_line(error)})") from None


def hub_problem(error: BaseException, name: str, revision: str | None) -> UserError | None:
    """Return what an error of the hub means for a model, None for any other error."""
    from huggingface_hub import errors

    for cause in _causes(error):
        if isinstance(cause, errors.GatedRepoError):
            return UserError(
                f"model {name!r} cannot be loaded: it is gated; accept its terms on its page at the hub, then log in "
                "with `hf auth login` or set HF_TOKEN"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return UserError(f"model {name!r} cannot be loaded: it has no `revision` {revision!r}")
        if isinstance(cause, errors.RepositoryNotFoundError):
            return not_found(
                name, "the hub has no model of this name, or a private one: log in with `hf auth login` or set HF_TOKEN"
            )
        if isinstance(cause, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
            return not_found(name, f"revision {revision!r} is not in the cache" if revision else "not in the cache")
    return None


def not_found(name: str, reason: str) -> UserError:
    """Return the error for a name that is nothing here and that the hub does not answer, with the local cause first."""
    if meant := did_you_mean(name, [EMBEDDED_MODEL]):
        return UserError(f"model {name!r} cannot be loaded{meant} ({reason})")
    if "/" in name and os.path.isdir(os.path.dirname(name)):
        return UserError(f"there is no folder {name!r}{_around(name)} (as a model of the hub: {reason})")
    return UserError(f"model {name!r} cannot be loaded: {reason}{'' if '/' in name else _around(name)}")


def _around(name: str) -> str:
    return whats_there(name, lambda folder: any((folder / file).is_file() for file in NAMED), "models and runs")


def _require_model(folder: Path, name: str) -> None:
    """Raise UserError for a folder that holds no model that can be read."""
    if not (folder / "config.json").is_file():
        kind = next((kind for file, kind in RESULTS.items() if (folder / file).is_file()), None)
        why = "it has no config.json" if kind is None else f"it is the folder of {_a(kind)}"
        raise UserError(f"folder {name!r} holds no model: {why}")
    if not any(folder.glob("*.safetensors")) and (any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))):
        raise UserError(f"folder {name!r} has pickled weights only; convert them to safetensors first")


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
