"""The tables of a run: their columns and rows, and what is wrong with them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

TABLES = ("prompts", "layers", "heads", "cutoffs")
# Tables of the first prompts only, or of none.
DETAIL_TABLES = ("tokens", "lens", "head_tokens")
# Columns that readers of a run rely on; a run may have more. Earlier versions wrote no head_tokens, and no selectivity
# in tokens.
COLUMNS = {
    "prompts": "prompt_id category n_prompt n_decode",
    "layers": "prompt_id layer mass_anchor mass_prompt mass_decode prompt_contribution selectivity prompt_entropy "
    "drift_prompt drift_decode drift_prompt_centred update_decode lens_kl lens_top1 lens_rank lens_kl_translated "
    "saliency_overlap",
    "heads": "prompt_id layer head mass_anchor mass_prompt mass_decode selectivity",
    "cutoffs": "prompt_id cutoff kl top1_agreement nll nll_full",
    "tokens": "prompt_id position token_id text segment evidence attention",
    "lens": "prompt_id position layer lens_token lens_text lens_probability",
    "head_tokens": "prompt_id layer head position attention",
}
# Columns that identify a row of a table.
KEYS = {
    "prompts": ["prompt_id"],
    "layers": ["prompt_id", "layer"],
    "heads": ["prompt_id", "layer", "head"],
    "cutoffs": ["prompt_id", "cutoff"],
    "tokens": ["prompt_id", "position"],
    "lens": ["prompt_id", "position", "layer"],
    "head_tokens": ["prompt_id", "layer", "head", "position"],
}
TEXTS = {"prompt_id", "category", "text", "segment", "lens_text"}
# One number per layer in each row of tokens.
LISTS = ("attention", "selectivity")

Tables = dict[str, pd.DataFrame]


def tables_problem(manifest: Mapping[str, Any], tables: Tables) -> str | None:
    """Return what is wrong with a run's tables, such as columns or rows that are missing, double or not numbers."""
    n_layers, n_heads, prompts = manifest["n_layers"], manifest["n_heads"], tables["prompts"]
    expected = manifest["n_prompts"] if manifest["status"] == "complete" else len(prompts)
    rows = {"prompts": 1, "layers": n_layers, "heads": n_layers * n_heads, "cutoffs": n_layers}
    ranges = {"layer": (0, n_layers - 1), "head": (0, n_heads - 1), "cutoff": (1, n_layers)}
    for name, table in tables.items():
        for column in COLUMNS[name].split():
            if column not in table:
                return f"table {name} has no column {column}"
            is_list = name == "tokens" and column in LISTS
            if column not in TEXTS and not is_list and not pd.api.types.is_numeric_dtype(table[column]):
                return f"column {column} of table {name} is not numbers"
            if column in TEXTS and not all(isinstance(text, str) for text in table[column].unique()):
                return f"column {column} of table {name} is not text"
        if name in rows and len(table) != expected * rows[name]:
            return f"table {name} has {len(table)} rows instead of {expected * rows[name]}"
        if table.duplicated(KEYS[name]).any() or not set(table["prompt_id"].unique()) <= set(prompts["prompt_id"]):
            return f"table {name} has rows of other prompts, or rows twice"
        for column in set(KEYS[name]) & set(ranges):
            if not table[column].between(*ranges[column]).all():
                return f"column {column} of table {name} is out of its range"
    tokens = tables.get("tokens", pd.DataFrame())
    for column in LISTS:
        for numbers in tokens.get(column, ()):
            if numbers is not None and (np.asarray(numbers).dtype.kind != "f" or np.shape(numbers) != (n_layers,)):
                return f"column {column} of table tokens has not one number per layer"
    return None
