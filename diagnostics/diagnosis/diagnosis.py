"""Runs prompts through a capture and its probes, and collects their measurements in a run."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from diagnostics.diagnosis.capture import make_capture
from diagnostics.diagnosis.observers import Capture
from diagnostics.diagnosis.probes import added_probes, all_probes, chosen_probes, require_backend
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.probe import LENS_POSITIONS, Probe, PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.diagnosis.self_test import require_measurable
from diagnostics.diagnosis.tables import detail_tables, prompt_tables
from diagnostics.diagnosis.teacher import Teacher
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.segments import Layout
from diagnostics.prompts.digests import inputs_digest
from diagnostics.prompts.encoding import EncodedPrompt, encode_for_diagnosis
from diagnostics.prompts.given import as_prompts
from diagnostics.prompts.prompt import PromptSet
from diagnostics.runs.manifest import SCHEMA_VERSION, RunManifest
from diagnostics.runs.parts import merge
from diagnostics.runs.run import Run
from diagnostics.runs.schema import DETAIL_TABLES, TABLES, Tables
from diagnostics.runs.writer import RunWriter
from diagnostics.self_test import Proof, skipped
from diagnostics.self_test import self_test as testing
from diagnostics.support.defaults import ANCHORS, DECODE_TOKENS, DETAIL_PROMPTS
from diagnostics.support.errors import UserError
from diagnostics.support.folders import manifest_head
from diagnostics.support.locks import one_writer
from diagnostics.support.progress import Progress, reporter


@one_writer
def diagnose(
    model: Any,
    prompts: PromptSet | Sequence[Any] | str,
    *,
    decode_tokens: int = DECODE_TOKENS,
    anchors: int = ANCHORS,
    lens_positions: int = LENS_POSITIONS,
    detail_prompts: int = DETAIL_PROMPTS,
    backend: str | None = None,
    remote: bool | str = False,
    rules: str | Sequence[str] = "all",
    sweep: bool = True,
    self_test: bool = True,
    out: str | Path | None = None,
    resume: bool = False,
    teacher: Teacher | None = None,
    progress: Progress | bool = True,
    arguments: dict[str, Any] | None = None,
) -> Run:
    """Measure every layer and every cutoff on every prompt.

    Parameters
    ----------
    model
        The model: from `load_model` or `LoadedModel.wrap`, or a TransformerBridge or an nnsight model.
    prompts
        From `load_prompts`; or a text, or a list of texts, conversations and `Prompt` objects: see
        `diagnostics.prompts.as_prompts`. A prompt without a reference is continued greedily at full depth.
    decode_tokens
        Maximum number of reference tokens per prompt, 1 or more.
    anchors
        Leading tokens that SPEED keeps in all layers, 0 or more.
    lens_positions
        Maximum number of decode positions per prompt, evenly spaced, that the logit lens reads, 1 or more.
    detail_prompts
        How many of the first prompts also keep their tokens, with the attention that each receives and its part of
        the selectivity, in each layer: 8 bytes per token and layer; the tokens that each head attends to most; and the
        logit lens token by token. 0 for none.
    backend
        How activations are read: ``hooks``, ``transformer-lens`` or ``nnsight``; by default the library of the model.
    remote
        Run an nnsight model on NDIF; ``"local"`` simulates this locally. The weights are then never loaded.
    rules
        The cutoff rules whose readings are measured along: ``"all"`` that cost a few percent, ``"none"``, or names, as
        in ``"all,leave-one-out"``; see `diagnostics.cutoffs.rules`.
    sweep
        Measure the loss of every cutoff. Without it the run has only what rules read, and its table ``cutoffs`` has no
        numbers.
    self_test
        First prove, once per model, that measurements equal masked passes of the model; see `diagnostics.self_test`. A
        model that fails is refused; a model that fails only for the contribution is measured without it.
    out
        Run folder to write; without it the run stays in memory.
    resume
        Continue an interrupted run in ``out``; the numbers equal those of an uninterrupted run.
    teacher
        From `diagnostics.diagnosis.teacher.observe_teacher` on the same prompts: every cutoff, full depth too, is
        compared with that model's full depth, on its references. For a fine-tuned model this measures what was lost
        relative to the original.
    progress
        A bar on stderr by default, False for none, or a function that is called as ``progress(done, total, prompt_id)``
        before each prompt and once at the end.
    arguments
        The user's arguments, stored unchanged in the manifest.

    Raises
    ------
    UserError
        For a prompt that does not fit, a folder that cannot be written, or a model that cannot be measured.
    """
    if decode_tokens < 1:
        raise UserError(f"decode tokens is {decode_tokens}: give 1 or more")
    if anchors < 0:
        raise UserError(f"anchors is {anchors}: give 0 or more")
    if lens_positions < 1:
        raise UserError(f"lens positions is {lens_positions}: give 1 or more")
    if detail_prompts < 0:
        raise UserError(f"detail prompts is {detail_prompts}: give 0 or more")
    prompts, report = as_prompts(prompts), reporter(progress, "diagnosing")
    lm = model if isinstance(model, LoadedModel) else LoadedModel.wrap(model, weights=not remote)
    probes = chosen_probes(rules, sweep=sweep)
    capture = make_capture(backend, lm, remote)
    require_backend(probes, capture.name)
    with testing(self_test and not skipped()):
        proof = require_measurable(lm, capture)
    encoded = encode_for_diagnosis(prompts, lm.tokenizer, lm.anatomy.max_positions, decode_tokens)
    if teacher is not None:
        teacher.require_prompts(encoded, decode_tokens)
        encoded = [replace(prompt, reference_ids=teacher.references[prompt.prompt_id]) for prompt in encoded]
    settings = {
        "anchors": anchors,
        "decode_tokens": decode_tokens,
        "lens_positions": lens_positions,
        "detail_prompts": detail_prompts,
    }
    manifest = _manifest(lm, prompts, encoded, capture, probes, settings, teacher, proof, arguments)
    writer = RunWriter.open(Path(out), manifest, resume=resume) if out is not None else None
    readout = Readout(lm.anatomy)
    finished: list[Tables] = []
    started = time.perf_counter()
    for index, prompt in enumerate(encoded):
        if writer and writer.is_done(index):
            continue
        report(index, len(encoded), prompt.prompt_id)
        tables = _diagnose_prompt(
            lm,
            prompt,
            capture,
            probes,
            readout,
            decode_tokens,
            anchors,
            lens_positions,
            detail=index < detail_prompts,
            teacher=None if teacher is None else teacher.logits[prompt.prompt_id],
        )
        if "contribution" in proof.failed:
            tables["layers"][[column for probe in probes.values() for column in probe.of_additions]] = np.nan
        if writer:
            writer.write(index, tables)
        else:
            finished.append(tables)
    report(len(encoded), len(encoded), "")
    timings = {"timings": {"seconds_last_session": round(time.perf_counter() - started, 3)}}
    if writer:
        return writer.finish(**timings)
    return Run(cast(RunManifest, {**manifest, **timings, "status": "complete"}), merge(finished))


def _diagnose_prompt(
    lm: LoadedModel,
    prompt: EncodedPrompt,
    capture: Capture,
    probes: Mapping[str, type[Probe]],
    readout: Readout,
    decode_tokens: int,
    anchors: int,
    lens_positions: int,
    detail: bool,
    teacher: torch.Tensor | None,
) -> Tables:
    n_prompt = prompt.n_prompt
    layout = Layout.of(n_prompt, anchors)
    segment = layout.prompt
    evidence = tuple((max(a, segment.start), min(b, segment.stop)) for a, b in prompt.evidence)
    evidence = tuple((a, b) for a, b in evidence if a < b)
    notes = list(prompt.notes)
    if sum(b - a for a, b in evidence) < sum(b - a for a, b in prompt.evidence):
        some = "some" if evidence else "all"
        notes.append(f"{some} of the evidence is anchor or the last prompt token, where no evidence mass is measured")
    context = PromptContext(
        layout=layout,
        n_layers=lm.anatomy.n_layers,
        readout=readout,
        model_name=lm.name,
        evidence=evidence,
        lens_positions=lens_positions,
        detail=detail,
        teacher=teacher,
        windows=tuple(map(lm.anatomy.window, range(lm.anatomy.n_layers))),
    )
    observers = [probe(context) for probe in probes.values()]
    for observer in observers:
        observer.on_model(lm, prompt.token_ids)
    outcome = capture.run(
        prompt.token_ids, prompt.reference_ids, observers, n_decode=decode_tokens, n_anchors=layout.n_anchors
    )
    row = {
        "prompt_id": prompt.prompt_id,
        "category": prompt.category,
        "n_prompt": n_prompt,
        "n_decode": len(outcome.reference_ids),
        "n_anchors": layout.n_anchors,
        "has_bos": prompt.has_bos,
        "reference": "given" if prompt.reference_ids is not None else "greedy",
        "reference_text": lm.tokenizer.decode(outcome.reference_ids),
        "notes": "; ".join(notes),
    }
    measured = dict(zip(probes, outcome.measured, strict=True))
    tables = prompt_tables(row, measured, lm.anatomy)
    if CutoffSweep.name not in probes:
        tables["cutoffs"][[*CutoffSweep.describes]] = np.nan
    if detail:
        reference = outcome.reference_ids.tolist()
        tables |= detail_tables(lm.tokenizer, prompt, reference, context, measured.values())
    return tables


def _manifest(
    lm: LoadedModel,
    prompts: PromptSet,
    encoded: Sequence[EncodedPrompt],
    capture: Capture,
    probes: Mapping[str, type[Probe]],
    settings: dict[str, int],
    teacher: Teacher | None,
    proof: Proof,
    arguments: dict[str, Any] | None,
) -> RunManifest:
    """Return the manifest of a run; ``identity`` holds what a resumed run must share to give the same numbers."""
    without_bos = [prompt.prompt_id for prompt in encoded if not prompt.has_bos]
    notes = []
    if settings["anchors"] and without_bos:
        notes.append(
            f"{len(without_bos)} of {len(encoded)} prompts do not begin with a BoS token: "
            "their first anchor is the first real token"
        )
    if cut := sum("model's limit" in note for prompt in encoded for note in prompt.notes):
        notes.append(f"{cut} prompts were cut, at the document, to fit the model's positions")
    if proof.unproved is not None:
        notes.append(f"not proven to be measured right: {proof.unproved}")
    if line := proof.failed.get("contribution"):
        notes.append(
            "prompt_contribution is left out, and with it uptake, the selection region and all that rules read of what "
            f"the attention adds to the residual: {line}"
        )
    chats = sum(prompt.messages is not None for prompt in prompts)
    if chats and not lm.tokenizer.chat_template:
        notes.append(
            f"the model has no chat template: {chats} of {len(encoded)} prompts are conversations, "
            "and they were measured as plain text"
        )
    if teacher is not None:
        notes.append(f"every cutoff, full depth too, is compared with {teacher.name} at full depth")
    head = manifest_head(
        lm,
        arguments,
        dtype=str(lm.dtype).removeprefix("torch."),
        device=lm.device.type,
        backend=capture.name,
        context_length=prompts.context_length,
        prompts=prompts.fingerprint,
        teacher=None if teacher is None else teacher.weight_hash,
        **settings,
        left_out=sorted(all_probes().keys() - probes.keys()) or None,
        added_probes=added_probes(probes) or None,
        tables=[*TABLES, *DETAIL_TABLES],
        token_ids=inputs_digest(encoded),
    )
    details = {
        "schema_version": SCHEMA_VERSION,
        "status": "running",
        "revision": lm.revision,
        "architecture": lm.model.config.model_type,
        "n_heads": lm.anatomy.n_heads,
        "max_positions": lm.anatomy.max_positions,
        "shape": lm.anatomy.shape,
        "seed": prompts.seed,
        "prompt_set": prompts.name,
        "sweep": CutoffSweep.name in probes,
        "n_prompts": len(prompts),
        "columns": {column: text for probe in probes.values() for column, text in probe.describes.items()},
        "notes": notes + head["notes"],
    }
    return cast(RunManifest, head | details)
