"""What a reader must know of the run and the regions behind a recommendation."""

import numpy as np

from diagnostics.cutoffs.regions import Regions
from diagnostics.cutoffs.savings import windows
from diagnostics.runs.run import Run


def run_notes(run: Run) -> list[str]:
    """Say what is particular about a run: its own notes, prompts that are missing or too short, windows."""
    notes, prompts, anchors = list(run.manifest["notes"]), run.prompts, int(run.manifest["identity"]["anchors"])
    if not run.complete:
        notes.append(f"the run is not complete: {len(prompts)} of {run.manifest['n_prompts']} prompts")
    # A cutoff changes nothing in a prompt that consists of the anchors and the first decode-phase token.
    if empty := int((prompts["n_prompt"] <= anchors + 1).sum()):
        notes.append(f"{empty} of {len(prompts)} prompts are too short to be cut: their loss says nothing")
    sliding = [window for window in windows(run.manifest["shape"]) if window]
    longest = int(prompts["n_prompt"].max())
    if sliding and longest < 2 * max(sliding):
        notes.append(
            f"measured at up to {longest:,} tokens, and {len(sliding)} of {run.n_layers} layers have a window of "
            f"{max(sliding):,}: beyond it the loss at a cutoff can grow (it doubled from 512 to 1,024 tokens on "
            "Gemma 3 270M); measure at the length that you will run, or take one layer more"
        )
    return notes


def region_notes(regions: Regions) -> list[str]:
    """Say why there is no selection region; nothing where there is one."""
    if regions.selection is not None:
        return []
    limit, total = regions.max_uptake_above, float(np.nansum(regions.uptake))
    if regions.cutoff is None:
        why = "some layers have no uptake that could be measured"
    elif total <= limit:
        why = f"the uptake of all layers together, {total:.3g}, is within what may be left above a cutoff, {limit:.3g}"
    else:
        why = "no layers stand out, though together they take from the prompt"
    return [f"there is no selection region: {why}"]
