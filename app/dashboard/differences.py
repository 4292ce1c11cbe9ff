"""What differs in the settings of runs: the question before any difference between their curves is read."""

import re
from collections.abc import Mapping
from typing import Any

import pandas as pd

from diagnostics.runs.run import Run

# Parts of a manifest, and what of each says nothing: where the results went, and what follows from something else.
PARTS = {"identity": ("libraries",), "arguments": ("out", "resume", "json", "prompts"), "versions": ()}
# Digests, by what they are of.
DIGESTS = {"weight_hash": "weights", "prompts": "texts of prompts", "token_ids": "tokens of prompts"}
SINGLE = ("model", "n_layers", "n_heads", "hardware", "prompt_set", "n_prompts", "seed", "revision", "architecture")
LONGEST = 80


def differing_settings(runs: Mapping[str, Run]) -> pd.DataFrame:
    """Return the settings in which runs differ, a row each: column ``setting``, then a column per run."""
    said = {name: _settings(run.manifest) for name, run in runs.items()}
    settings = list(dict.fromkeys(setting for values in said.values() for setting in values))
    rows = [
        {"setting": setting} | {name: values.get(setting, "") for name, values in said.items()} for setting in settings
    ]
    differing = [row for row in rows if len({row[name] for name in said}) > 1]
    return pd.DataFrame(differing, columns=["setting", *said])


def _settings(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return every setting as text, each once: what was asked for gives way to what came of it."""
    settings = {name: _text(manifest.get(name)) for name in SINGLE}
    for part, left_out in PARTS.items():
        values = manifest.get(part)
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name not in left_out:
                settings.setdefault(DIGESTS.get(str(name), str(name)), _text(value))
    return {name.replace("_", " "): text for name, text in settings.items()}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return _text(", ".join(f"{name} {_text(part)}" for name, part in value.items()))
    if isinstance(value, list):
        return _text(", ".join(map(_text, value)))
    text = str(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]} ..."
