"""Whether two results are of the same computation, and how they differ. Imports no torch: runs are read without it."""

from collections.abc import Mapping
from typing import Any

# Explanations by the last part of the name that differs; the other parts are put in front.
EXPLAINED = {
    "buffers": "buffers of the model differ, such as rotary frequencies",
    "token_ids": "token_ids differ: another tokenizer or chat template, or a date in the template",
    "tokenizer": "the tokenizer or its chat template differs, or a date in the template",
    "items": "items differ: their texts, choices or answers",
    "tables": "an earlier version began it, which kept other tables",
}


def difference(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Return in a few words how a kept result differs from the one asked for; None if it does not.

    Both are manifests: each entry of the new ``identity`` must be equal; ``configuration`` tells which settings differ.
    """
    kept_identity, identity = kept.get("identity"), asked["identity"]
    if not isinstance(kept_identity, dict) or ("configuration" in identity and "configuration" not in kept_identity):
        return "it was begun by an earlier version, which did not keep what tells models and inputs apart"
    for key, value in identity.items():
        if key == "configuration" and kept_identity.get(key) != value:
            return f"configuration differs: {_settings_that_differ(kept.get(key), asked.get(key))}"
        if reason := _first_difference(key, kept_identity.get(key), value):
            return reason
    return None


def _first_difference(path: str, kept: Any, asked: Any) -> str | None:
    if kept == asked:
        return None
    if isinstance(kept, dict) and isinstance(asked, dict):
        names = [*asked, *(name for name in kept if name not in asked)]
        each = (_first_difference(f"{path} {name}", kept.get(name), asked.get(name)) for name in names)
        return next((reason for reason in each if reason), None)
    before, _, leaf = path.rpartition(" ")
    reason = EXPLAINED.get(leaf) or f"{leaf} is {_short(kept)}, not {_short(asked)}"
    return f"{before} {reason}" if before else reason


def _settings_that_differ(kept: Any, asked: Any) -> str:
    """Name the settings that differ, with both values, of two configurations of `diagnostics.models.identity`."""
    old, new = _flat(kept), _flat(asked)
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    texts = [f"{name} is {_short(old.get(name))}, not {_short(new.get(name))}" for name in names if name != "modules"]
    if not texts:
        return "numbers or classes in its modules"
    return "; ".join(texts[:3]) + ("; ..." if len(texts) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for name, entry in value.items():
        flat |= _flat(entry, name if prefix in ("", "settings") else f"{prefix}.{name}")
    return flat


def _short(value: Any) -> str:
    text = ("; ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:20]}..."
