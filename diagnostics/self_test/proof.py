"""Findings of the self-test about a model, stored in the cache folder: a model is tested once.

A finding holds for one architecture, configuration, set of library versions, backend, attention implementation, type
and kind of device; it does not depend on the weights' values. Each finding is one small file.
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

# Packages whose versions affect every finding.
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
    """Return the conditions of a finding; ``structure`` is that of modules and weights, without the weights' values."""
    # Not every loaded library: what another part of the process imports changes no finding.
    involved = {*DECIDING, backend, *(type(module).__module__.partition(".")[0] for module in model.modules())}
    return {
        "class": type(model).__qualname__,
        "configuration": configuration_digest(model),
        "structure": _structure(model),
        "use": use,
        "backend": backend,
        "device": device,
        "versions": {k: v for k, v in versions().items() if k in involved},
        "source": _source(),
    }


def proofs_folder() -> Path:
    """Folder of the findings, inside the cache folder."""
    return cache_folder() / "self-tests"


def digest_of(key: Mapping[str, Any]) -> str:
    """Return a short digest of a key."""
    return json_digest(key)[:32]


def read_proof(digest: str) -> Proof | None:
    """Return a stored finding; None if none can be read."""
    try:
        stored = read_json(proofs_folder() / f"{digest}.json")
        return Proof({str(k): str(v) for k, v in stored["failed"].items()}, stored["unproved"])
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def keep_proof(digest: str, key: Mapping[str, Any], proof: Proof) -> None:
    """Store a finding for later processes; if the cache folder is not writable, each process runs its own test."""
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
    """Digest of this package's own code: findings of other versions do not count."""
    digest = hashlib.sha256()
    for file in sorted(Path(diagnostics.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
