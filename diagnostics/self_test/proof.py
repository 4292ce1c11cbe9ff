"""Findings of the self-test about a model, kept in the cache folder: a model is tested once.

A finding holds for one architecture, configuration, set of library versions, backend, attention implementation, type
and kind of device; the weights' values do not decide it, and one file of a few lines keeps it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

import diagnostics
from diagnostics.models.converted import cache_folder
from diagnostics.models.identity import configuration_digest
from diagnostics.support.digests import json_digest
from diagnostics.support.files import read_json, write_sealed
from diagnostics.support.versions import versions

# Whose versions decide every finding.
DECIDING = ("python", "speed-diagnostics", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Proof:
    """Findings of one self-test.

    ``failed`` has a line for each part that failed: ``causality``, ``policies``, ``training``,
    ``sweep``, ``contribution``.
    ``unproved`` says why nothing was tested, None after a test.
    """

    failed: Mapping[str, str] = field(default_factory=dict)
    unproved: str | None = None


def key_of(model: Any, *, use: str, backend: str | None, device: str) -> dict[str, Any]:
    """Return what a finding holds for; ``structure`` is that of modules and weights, without the weights' values."""
    # Not of all that is loaded: what another part of the process imports changes no finding.
    took_part = {*DECIDING, backend, *(type(module).__module__.partition(".")[0] for module in model.modules())}
    return {
        "class": type(model).__qualname__,
        "configuration": configuration_digest(model),
        "structure": _structure(model),
        "use": use,
        "backend": backend,
        "device": device,
        "versions": {k: v for k, v in versions().items() if k in took_part},
        "source": _source(),
    }


def proofs_folder() -> Path:
    """Folder of the findings, inside the cache folder."""
    return cache_folder() / "self-tests"


def digest_of(key: Mapping[str, Any]) -> str:
    """Return a short digest of a key."""
    return json_digest(key)[:32]


def read_proof(digest: str) -> Proof | None:
    """Return a kept finding; None if none can be read."""
    try:
        kept = read_json(proofs_folder() / f"{digest}.json")
        return Proof({str(k): str(v) for k, v in kept["failed"].items()}, kept["unproved"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def keep_proof(digest: str, key: Mapping[str, Any], proof: Proof) -> None:
    """Keep a finding for later processes; where the cache folder cannot be written each process tests for itself."""
    target = proofs_folder() / f"{digest}.json"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(target, json.loads(json.dumps({"key": key, **asdict(proof)}, default=str)))
    except OSError:
        return


def _structure(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        digest.update(f"{name} {type(module).__module__}.{type(module).__qualname__} {module.extra_repr()}\n".encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.device.type}\n".encode())
    return digest.hexdigest()


@cache
def _source() -> str:
    """Digest of this package's own code: a finding of an older one is none."""
    digest = hashlib.sha256()
    for file in sorted(Path(diagnostics.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
