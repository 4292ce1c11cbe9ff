"""Builds the rows of a run's tables from the probes' measurements of one prompt."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.diagnosis.observers import Columns, Measured
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.models.anatomy import Anatomy
from diagnostics.prompts.encoding import EncodedPrompt
from diagnostics.prompts.token_text import token_texts
from diagnostics.runs.schema import Tables
from diagnostics.support.errors import UserError


def prompt_tables(row: Mapping[str, Any], measured: Mapping[str, Measured], anatomy: Anatomy) -> Tables:
    """Return a prompt's rows of ``prompts``, ``layers``, ``heads`` and ``cutoffs``.

    ``row`` has the columns of the prompts table that are not measured, including ``prompt_id``; ``measured`` is by
    probe. Raises UserError for a probe whose columns have another shape, or the name of an existing column.
    """
    n_layers, n_heads = anatomy.n_layers, anatomy.n_heads
    key = {"prompt_id": row["prompt_id"]}
    layers = key | {"layer": np.arange(n_layers)}
    heads = key | {"layer": np.repeat(np.arange(n_layers), n_heads), "head": np.tile(np.arange(n_heads), n_layers)}
    cutoffs = key | {"cutoff": np.arange(1, n_layers + 1)}
    prompts = dict(row)
    for probe, columns in measured.items():
        _add(layers, probe, columns.layers, (n_layers,))
        _add(heads, probe, columns.heads, (n_layers, n_heads))
        _add(cutoffs, probe, columns.cutoffs, (n_layers,))
        _add(prompts, probe, columns.prompt, ())
    return {
        "prompts": pd.DataFrame([prompts]),
        "layers": pd.DataFrame(layers),
        "heads": pd.DataFrame(heads),
        "cutoffs": pd.DataFrame(cutoffs),
    }


def _add(table: dict[str, Any], probe: str, columns: Columns | Mapping[str, float], shape: tuple[int, ...]) -> None:
    for name, values in columns.items():
        if name in table:
            raise UserError(f"probe {probe!r} writes the column {name!r}, which another probe has written")
        if np.shape(values) != shape:
            raise UserError(f"probe {probe!r}: column {name!r} has shape {np.shape(values)}, not {shape}")
        table[name] = np.ravel(values) if shape else values


def detail_tables(
    tokenizer: Any,
    prompt: EncodedPrompt,
    reference_ids: list[int],
    context: PromptContext,
    measured: Iterable[Measured],
) -> Tables:
    """Return the tables of a prompt that is kept in detail.

    ``tokens`` has one row per token of prompt and reference; ``lens`` has one row per layer and decode position, from
    the first position on; ``head_tokens`` has the prompt tokens that a head attends to most, the first one first.
    """
    measured = list(measured)
    token_ids, prompt_part = [*prompt.token_ids, *reference_ids], context.layout.prompt
    segment = np.full(len(token_ids), "decode", dtype=object)
    segment[: prompt_part.start], segment[prompt_part] = "anchor", "prompt"
    evidence = np.zeros(len(token_ids), dtype=bool)
    for start, stop in context.evidence:
        evidence[start:stop] = True
    tokens = pd.DataFrame(
        {
            "prompt_id": prompt.prompt_id,
            "position": np.arange(len(token_ids)),
            "token_id": token_ids,
            "text": token_texts(tokenizer, token_ids),
            "segment": segment,
            "evidence": evidence,
        }
    )
    for columns in measured:
        for name, values in columns.tokens.items():
            start = prompt_part.start
            tokens[name] = [None] * start + list(values) + [None] * (len(token_ids) - start - len(values))
    lens = {name: column for columns in measured for name, column in columns.lens.items()}
    n_positions, n_layers = next(iter(lens.values())).shape
    lens_rows = pd.DataFrame(
        {
            "prompt_id": prompt.prompt_id,
            "position": context.layout.n_prompt - 1 + np.repeat(np.arange(n_positions), n_layers),
            "layer": np.tile(np.arange(n_layers), n_positions),
        }
        | {name: column.reshape(-1) for name, column in lens.items()}
    )
    lens_rows["lens_text"] = [tokenizer.decode([token]) for token in lens_rows["lens_token"]]
    return {"tokens": tokens, "lens": lens_rows, "head_tokens": _head_tokens(prompt.prompt_id, measured)}


def _head_tokens(prompt_id: str, measured: Iterable[Measured]) -> pd.DataFrame:
    columns = {name: column for probe in measured for name, column in probe.head_tokens.items()}
    layer, head, _ = np.indices(columns["position"].shape, dtype=np.int32)
    table = pd.DataFrame({name: column.ravel() for name, column in ({"layer": layer, "head": head} | columns).items()})
    table.insert(0, "prompt_id", prompt_id)
    # What a sliding window hides from every query gets nothing.
    return table[table["attention"] > 0].reset_index(drop=True)
