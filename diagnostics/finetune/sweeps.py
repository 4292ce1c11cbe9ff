"""Measures all cutoffs on the held-out prompts while a model is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.diagnosis.teacher import Teacher
from diagnostics.models.anatomy import dissect
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.segments import Layout
from diagnostics.prompts.encoding import EncodedPrompt


@torch.no_grad()
def sweep_cutoffs(
    lm: LoadedModel, encoded: Sequence[EncodedPrompt], teacher: Teacher, *, anchors: int = 1, own: bool = False
) -> pd.DataFrame:
    """Measure every cutoff 1..L on encoded prompts: frame with prompt_id, category, cutoff and the sweep's columns.

    The tokens that follow each prompt are the teacher's. Cutoffs are compared with the teacher's full depth, or with
    the model's ``own``. One pass per prompt serves all cutoffs; the probes of a diagnosis are left out.
    """
    was_training = lm.model.training
    lm.model.eval()
    # Adapters added since it was loaded replaced some of its modules.
    lm = replace(lm, anatomy=dissect(lm.model, lm.name))
    capture, readout, n_layers = HooksCapture(lm), Readout(lm.anatomy), lm.anatomy.n_layers
    frames = []
    for prompt in encoded:
        reference = teacher.references[prompt.prompt_id]
        layout = Layout.of(prompt.n_prompt, anchors)
        compared_with = None if own else teacher.logits[prompt.prompt_id]
        sweep = CutoffSweep(PromptContext(layout, n_layers, readout, lm.name, teacher=compared_with))
        outcome = capture.run(prompt.token_ids, reference, [sweep], n_decode=len(reference), n_anchors=layout.n_anchors)
        key = {"prompt_id": prompt.prompt_id, "category": prompt.category, "cutoff": range(1, n_layers + 1)}
        frames.append(pd.DataFrame(key | outcome.measured[0].cutoffs))
    lm.model.train(was_training)
    return pd.concat(frames, ignore_index=True)
