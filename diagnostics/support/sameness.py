"""Whether two results are of the same thing, and in what they differ. Imports no torch: runs are read without it."""

from collections.abc import Mapping
from typing import Any

# By the last name of what differs; what holds it is put in front.
EXPLAINED = {
    "buffers": "buffers of the model differ, such as rotary frequencies",
    "token_ids": "token_ids differ: another tokenizer or chat template, or a date in the template",
    "tokenizer": "the tokenizer or its chat template differs, or a date in the template",
    "items": "items differ: their texts, choices or answers",
}


def difference(kept: Mapping[str, Any], asked: Mapping[str, Any]) -> str | None:
    """Say in a few words how a result that is there differs from the one that is asked for; None if it does not.

    Both are manifests: all that ``identity`` asks for must be equal, and ``configuration`` says which settings are not.
    """
    there, mine = kept.get("identity"), asked["identity"]
    if not isinstance(there, dict) or ("configuration" in mine and "configuration" not in there):
        return "it was begun by an earlier version, which did not keep what tells models and inputs apart"
    for key, value in mine.items():
        if key == "configuration" and there.get(key) != value:
            return f"configuration differs: {_settings_that_differ(kept.get(key), asked.get(key))}"
        if said := _first_difference(key, there.get(key), value):
            return said
    return None


def _first_difference(path: str, there: Any, mine: Any) -> str | None:
    if there == mine:
        return None
    if isinstance(there, dict) and isinstance(mine, dict):
        names = [*mine, *(name for name in there if name not in mine)]
        each = (_first_difference(f"{path} {name}", there.get(name), mine.get(name)) for name in names)
        return next((said for said in each if said), None)
    before, _, leaf = path.rpartition(" ")
    said = EXPLAINED.get(leaf) or f"{leaf} is {_short(there)}, not {_short(mine)}"
    return f"{before} {said}" if before else said


def _settings_that_differ(kept: Any, asked: Any) -> str:
    """Name the settings that differ, with both values, of two configurations of `diagnostics.models.identity`."""
    there, mine = _flat(kept), _flat(asked)
    names = [name for name in sorted(there.keys() | mine.keys()) if there.get(name) != mine.get(name)]
    said = [f"{name} is {_short(there.get(name))}, not {_short(mine.get(name))}" for name in names if name != "modules"]
    if not said:
        return "numbers or classes in its modules"
    return "; ".join(said[:3]) + ("; ..." if len(said) > 3 else "")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found |= _flat(entry, name if prefix in ("", "settings") else f"{prefix}.{name}")
    return found


def _short(value: Any) -> str:
    text = ("; ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)
    return text if len(text) <= 40 else f"{text[:20]}..."
