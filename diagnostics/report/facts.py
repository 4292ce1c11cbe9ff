"""How something was measured, as facts for the end of a page: names in plain words, readable times, nothing empty."""

from collections.abc import Mapping
from typing import Any

from diagnostics.runs.run import Run
from diagnostics.terminal.units import readable_time

# Names of a manifest that do not read well with a capital and spaces.
NAMES = {
    "dtype": "Number type",
    "prompts": "Digest of the prompts",
    "configuration": "Digest of the configuration",
    "buffers": "Digest of the buffers",
    "token_ids": "Digest of the token ids",
    "weight_hash": "Digest of the weights",
    "lens_positions": "Positions of the logit lens",
    "detail_prompts": "Prompts kept in detail",
    "context_length": "Context length, tokens",
    "decode_tokens": "Most reference tokens",
    "added_probes": "Added probes",
}


def measured_facts(manifest: Mapping[str, Any], folder: object) -> dict[str, str]:
    """Return what every kind of result says of itself: its folder, time, machine, versions."""
    return {
        "Folder": str(folder or "in memory"),
        "Measured": readable_time(manifest.get("created")),
        "Hardware": worded(manifest.get("hardware")),
        "Versions": worded(manifest.get("versions")),
    }


def run_facts(run: Run) -> dict[str, str]:
    """Return how a diagnosis was measured."""
    manifest = run.manifest
    # The libraries are among the versions.
    identity = {name: value for name, value in manifest["identity"].items() if name != "libraries"}
    facts = measured_facts(manifest, run.path)
    facts["Prompt set"] = f"{len(run.prompts)} prompts of {manifest.get('prompt_set', '')}"
    return facts | named(identity)


def named(entries: Mapping[str, Any]) -> dict[str, str]:
    """Return a manifest's entries with names and values for readers; those without a value are left out."""
    readable = {NAMES.get(name, name.replace("_", " ").capitalize()): worded(value) for name, value in entries.items()}
    return {name: value for name, value in readable.items() if value}


def worded(value: Any) -> str:
    """Write a value of a manifest for readers; "" for none."""
    if value is None or value in ({}, [], ""):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {worded(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(worded, value))
    return str(value)
