"""Every model on every prompt set: what is finished is used again, what fails is a row like any other."""

import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from cutoff_selection.config import MEASURING, RATIOS, RUNS, Plan
from cutoff_selection.tables import Row, in_order, write_tables
from diagnostics import LoadedModel, Run, UserError, diagnose, load_model, load_run, recommend
from diagnostics.cutoffs.savings import LENGTHS
from diagnostics.models.embedded import EMBEDDED_MODEL, embedded_model_folder
from diagnostics.prompts.digests import tokenizer_digest
from diagnostics.runs.manifest import RUN_FOLDER
from diagnostics.runs.places import MANIFEST, RECOMMENDATION
from diagnostics.support.files import write_sealed
from diagnostics.support.signs_of_life import progress


@dataclass(frozen=True)
class Pair:
    """A model and a prompt set; ``asked`` is all that decides what is measured, and goes to the run's manifest."""

    number: int
    model: dict[str, Any]
    prompts: dict[str, Any]
    asked: dict[str, Any]


def select(plan: Plan) -> list[Row]:
    """Recommend a cutoff for every pair, the finished ones first; write the tables after each, and return the rows."""
    pairs = _pairs(plan)
    rows: dict[int, Row] = {}
    finished = _finished_runs(plan.out / RUNS)
    for pair in pairs:
        folder = finished.get(_canonical(pair.asked))
        if folder is not None:
            rows[pair.number] = _row(plan, pair, lambda there=folder: load_run(there))
    if rows:
        write_tables(plan, rows)
    waiting = [pair for pair in pairs if pair.number not in rows]
    for _, group in groupby(waiting, key=lambda pair: pair.model["label"]):
        for number, row in _measure(plan, list(group)):
            rows[number] = row
            write_tables(plan, rows)
        _free_memory()
    return in_order(rows)


def _pairs(plan: Plan) -> list[Pair]:
    pairs = []
    for model in plan.models:
        settings = {name: value for name, value in model.items() if name != "label"}
        settings["files"] = _files(model["name"], model["revision"])
        for prompts in plan.prompts:
            asked = settings | {"prompts": prompts["set"].fingerprint}
            pairs.append(Pair(len(pairs), model, prompts, asked))
    return pairs


def _files(name: str, revision: str | None) -> str | None:
    """Identify a model's files without reading them: names, sizes and times, or a hub commit; None if unknown."""
    try:
        place = embedded_model_folder() if name.lower() == EMBEDDED_MODEL else Path(os.path.expanduser(name))
        if not place.exists():
            # Asks the hub for the present commit; without network, the cache for the one that would be loaded.
            return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
        files = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else [place]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr(stats).encode()).hexdigest()
    except Exception:  # loading the model will say what is wrong
        return None


def _finished_runs(folder: Path) -> dict[str, Path]:
    """Folder of every complete run by what was asked for."""
    found = {}
    for path in sorted(folder.glob(f"*/{MANIFEST}")):
        try:
            manifest = RUN_FOLDER.read(path.parent)
        except UserError:
            continue
        asked = manifest.get("arguments")
        if manifest["status"] == "complete" and isinstance(asked, dict) and asked.get("files"):
            found[_canonical(asked)] = path.parent
    return found


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True)


def _measure(plan: Plan, pairs: Sequence[Pair]) -> Iterator[tuple[int, Row]]:
    """Load the one model of some pairs, and yield the row of each; the model is let go of at the end."""
    model = pairs[0].model
    lm, problem = None, ""
    try:
        names = ("device", "dtype", "revision", "trust_remote_code")
        lm = load_model(model["name"], **{name: model[name] for name in names})
    except Exception as error:
        problem = _one_line(error)
    for pair in pairs:
        if lm is None:
            yield pair.number, _failed(pair, problem)
            continue
        folder = plan.out / RUNS / _folder_name(pair, lm)
        title = f"pair {pair.number + 1} of {len(plan.models) * len(plan.prompts)}"
        row = _row(plan, pair, lambda pair=pair, folder=folder, title=title: _diagnose(lm, pair, folder, title))
        if row["status"] == "failed" and (folder / MANIFEST).exists():
            row["run_folder"] = f"{RUNS}/{folder.name}"
        yield pair.number, row
        _free_memory()


def _folder_name(pair: Pair, lm: LoadedModel) -> str:
    """Name a run folder by all that decides its numbers; a change of any makes another folder."""
    decides = {name: value for name, value in pair.asked.items() if name != "files"}
    decides |= {"model": lm.identity().digest, "tokenizer": tokenizer_digest(lm.tokenizer), "on": lm.device.type}
    names = [Path(pair.model["name"]).name, Path(pair.prompts["set"].name).stem]
    slugs = [re.sub(r"[^A-Za-z0-9.-]+", "-", name)[:60].strip("-.") or "x" for name in names]
    return "_".join([*slugs, hashlib.sha256(_canonical(decides).encode()).hexdigest()[:10]])


def _diagnose(lm: LoadedModel, pair: Pair, folder: Path, title: str) -> Run:
    """Measure what is left to measure in a run folder."""
    with progress(title) as advance:
        run = diagnose(
            lm,
            pair.prompts["set"],
            **{name: pair.model[name] for name in MEASURING},
            out=folder,
            resume=True,
            progress=advance,
            arguments=pair.asked,
        )
    if run.manifest["arguments"] != pair.asked:
        # The same weights in files that were copied or touched: next time they need not be loaded.
        write_sealed(folder / MANIFEST, run.manifest | {"arguments": pair.asked})
    return run


def _row(plan: Plan, pair: Pair, get_run: Callable[[], Run]) -> Row:
    """Get the run, judge it by the goal, keep that beside it; whatever goes wrong is the row's error."""
    try:
        run = get_run()
        further = [length for length in plan.lengths if length not in LENGTHS]
        found = recommend(run, **plan.goal, lengths=[*LENGTHS, *further], seed=pair.prompts["seed"])
        assert run.path is not None
        found.save(run.path / RECOMMENDATION)
    except Exception as error:  # one pair's trouble is not the others'
        return _failed(pair, _one_line(error))
    data, at_cutoff, manifest = found.data, found.evidence[found.cutoff - 1], run.manifest
    row = {"model": pair.model["label"], "prompts": pair.prompts["label"], "status": "ok"}
    row |= {name: data[name] for name in ("cutoff", "n_layers", "depth_fraction", "n_prompts")}
    row |= {name: at_cutoff[name] for name in ("kl", "kl_bound", "top1_agreement", "nll_increase")}
    for name, region in (("selection", found.selection_region), ("stabilization", found.stabilization_region)):
        row[f"{name}_region"] = f"{region.first}..{region.last}" if region else None
    for savings in data["predicted"]:
        row |= {f"{name}_ratio_{savings['n_prompt']}": savings[f"{name}_ratio"] for name in RATIOS}
    row |= {name: manifest["identity"][name] for name in ("device", "dtype")}
    row |= {"max_positions": manifest["max_positions"], "run_folder": f"{RUNS}/{run.path.name}"}
    row |= {"seconds": manifest["timings"]["seconds_last_session"], "notes": "; ".join(data["notes"]) or None}
    return {name: row.get(name) for name in plan.columns}


def _failed(pair: Pair, error: str) -> Row:
    return {"model": pair.model["label"], "prompts": pair.prompts["label"], "status": "failed", "error": error}


def _one_line(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return 'out of device memory: try a smaller context_length, dtype "bfloat16" or device "map"'
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}".rstrip(": ")


def _free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()
