"""Runs to test with: tables made by hand, and tiny model folders with prompts to diagnose."""

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from diagnostics.runs.run import Run
from tests.support.tiny import VOCAB, tiny_model

DECODE_TOKENS = 4


def llama_8b_shape():
    """Llama-3.1-8B in bfloat16."""
    width, inner, n_layers = 4096, 14336, 32
    layer = 2 * width * width + 2 * width * 1024 + 3 * width * inner
    return {
        "n_heads": 32,
        "n_kv_heads": 8,
        "head_dim": 128,
        "width": width,
        "layer_parameters": [layer] * n_layers,
        "head_parameters": 128256 * width,
        "bytes_per_value": 2,
        "layer_types": ["full_attention"] * n_layers,
        "sliding_window": None,
    }


def make_run(
    kl, *, agreement=None, nll_increase=None, layers=None, n_prompt=100, anchors=1, n_prompts=None, model="made"
):
    """A run in memory from losses [prompts, cutoffs] and, for layers, curves [L] or [prompts, L].

    Curves that are not given are flat: nothing selects and nothing is stable.
    """
    kl = np.asarray(kl, dtype=float)
    n, n_layers = kl.shape
    # Not in alphabetical order, so that rows that got sorted on the way show.
    ids = [f"p{i}" for i in reversed(range(n))]
    curves = {
        "mass_anchor": 0.5,
        "mass_prompt": 0.4,
        "mass_decode": 0.1,
        "prompt_contribution": 0.1,
        "selectivity": 0.0,
        "prompt_entropy": 0.5,
        "update_decode": 0.5,
        "drift_prompt": 0.3,
        "drift_decode": 0.3,
        "drift_prompt_centred": 0.3,
        "lens_kl": 1.0,
        "lens_top1": 0.5,
        "lens_rank": 3.0,
        "lens_kl_translated": 1.0,
        "saliency_overlap": 0.2,
    } | (layers or {})
    full = np.full(kl.shape, 2.0)
    losses = {
        "kl": kl,
        "top1_agreement": 1 - kl / 10 if agreement is None else agreement,
        "nll": full + (kl if nll_increase is None else nll_increase),
        "nll_full": full,
    }

    def table(index, size, columns):
        spread = {
            name: np.broadcast_to(np.asarray(c, dtype=float), (n, size)).reshape(-1) for name, c in columns.items()
        }
        return pd.DataFrame({"prompt_id": np.repeat(ids, size), index: np.tile(np.arange(size), n)} | spread)

    tables = {
        "prompts": pd.DataFrame(
            {
                "prompt_id": ids,
                "category": [f"category {i % 2}" for i in range(n)],
                "n_prompt": n_prompt,
                "n_decode": 12,
            }
        ),
        "layers": table("layer", n_layers, curves),
        "heads": table("layer", n_layers, {}).assign(head=0, mass_anchor=0.5, mass_prompt=0.4, mass_decode=0.1),
        "cutoffs": table("cutoff", n_layers, losses).assign(cutoff=lambda t: t["cutoff"] + 1),
    }
    shape = llama_8b_shape()
    shape |= {name: shape[name][:1] * n_layers for name in ("layer_parameters", "layer_types")}
    manifest = {
        "schema_version": 1,
        "status": "complete" if n_prompts in (None, n) else "running",
        "model": model,
        "n_layers": n_layers,
        "n_heads": 1,
        "n_prompts": n_prompts or n,
        "max_positions": 8192,
        "shape": shape,
        "notes": [],
        "identity": {"weight_hash": "0" * 64, "anchors": anchors},
    }
    return Run(manifest, tables)


def without_sweep(run):
    """The same run as if the loss of no cutoff had been measured."""
    cutoffs = run.cutoffs.assign(**dict.fromkeys(("kl", "top1_agreement", "nll", "nll_full"), np.nan))
    return replace(run, manifest=run.manifest | {"sweep": False}, tables=run.tables | {"cutoffs": cutoffs})


def save_tiny(folder, family="llama", seed=0):
    """Save a tiny random model with its tokenizer as a model folder."""
    lm = tiny_model(family, seed=seed)
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


def write_prompts(path, n_prompts=6, n_tokens=40, seed=0):
    """Write a JSONL set of random words, of differing lengths and two categories, with evidence."""
    rng = random.Random(seed)
    lines = []
    for i in range(n_prompts):
        words = ["<s>", *(f"w{rng.randrange(4, VOCAB)}" for _ in range(n_tokens - 1 - i % 3))]
        evidence = [" ".join(words[10:13])]
        lines.append(
            json.dumps({"id": f"p{i}", "text": " ".join(words), "evidence": evidence, "category": "ab"[i % 2]})
        )
    path.write_text("\n".join(lines) + "\n")
    return path


LONG_COMMANDS = ("diagnose", "recommend", "generate", "bench", "evaluate", "finetune")


def run_command(monkeypatch, capfd, *arguments, signs=False):
    """Run the command in this process: (exit status, stdout, stderr); without signs of life unless asked for."""
    from diagnostics import cli

    if arguments and arguments[0] in LONG_COMMANDS and not signs:
        arguments = (arguments[0], "--quiet", *arguments[1:])
    monkeypatch.setattr(sys, "argv", ["speed-diagnostics", *map(str, arguments)])
    capfd.readouterr()
    try:
        cli.main()
    except SystemExit as end:
        status = end.code
    out, err = capfd.readouterr()
    return status, out, err


def contents(folder):
    """Every file below a folder with its bytes, and every folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


def write_run(folder, *, n_prompts=3, finished=None, **changes):
    """Write a run made by hand: complete, or with the first prompts finished."""
    run = make_run(np.full((n_prompts, 4), 0.01))
    run.tables["heads"]["selectivity"] = 0.0
    folder.mkdir(parents=True)
    status = "complete" if finished is None else "running"
    (folder / "manifest.json").write_text(json.dumps(run.manifest | {"status": status} | changes))
    if finished is None:
        for name, table in run.tables.items():
            table.to_parquet(folder / f"{name}.parquet")
    for i in range(finished or 0):
        part = folder / "parts" / f"{i:06d}"
        part.mkdir(parents=True)
        for name, table in run.select([run.prompts["prompt_id"][i]]).tables.items():
            table.to_parquet(part / f"{name}.parquet")
    return folder


FALLING = [2.0, 1.0, 0.5, 0.3, 0.15, 0.08, 0.04, 0.0]


def spread(mean, n_prompts=20, relative=0.1, seed=0):
    """Losses [prompts, L] around a mean curve, differing between prompts."""
    noise = np.random.default_rng(seed).uniform(-relative, relative, (n_prompts, 1))
    return np.asarray(mean) * (1 + noise)


def region_layers(first, last, stable_from, n_layers=8):
    """Curves whose uptake, 0.24 in every selecting layer, is above the limit of 0.2 until the last of them."""
    layer = np.arange(n_layers)
    return {
        "prompt_contribution": 0.15,
        "selectivity": np.where((layer >= first) & (layer <= last), 0.8, 0.0),
        "drift_prompt_centred": np.where(layer < stable_from, 0.3, 0.01),
        "saliency_overlap": 0.9,
    }
