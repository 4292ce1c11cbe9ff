"""How long a diagnosis will take, from what finished ones took on this machine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dashboard.catalog import Entry


@dataclass(frozen=True)
class Estimate:
    """Seconds that a diagnosis takes, and the run whose measured time says so."""

    seconds: float
    run: str


def estimate(listed: Iterable[Entry], model: str, n_prompts: int, n_tokens: int, device: str) -> Estimate | None:
    """Return the time of the newest finished run of this model and device, scaled to prompts and tokens per prompt.

    ``n_tokens`` is the context length with the reference. None where no run tells.
    """
    for entry in listed:
        manifest: Any = entry.manifest or {}
        identity = manifest.get("identity", {})
        if manifest.get("status") != "complete" or manifest.get("model") != model:
            continue
        if device not in ("auto", "map", str(identity.get("device"))):
            continue
        seconds, finished = manifest.get("timings", {}).get("seconds_last_session"), manifest.get("n_prompts")
        tokens = (identity.get("context_length") or 0) + (identity.get("decode_tokens") or 0)
        if seconds and finished and tokens:
            return Estimate(seconds / finished * n_prompts * n_tokens / tokens, entry.name)
    return None
