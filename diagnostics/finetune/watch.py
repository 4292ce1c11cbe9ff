"""Records a fine-tuning while it runs: the loss of every step, and all cutoffs at intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState

from diagnostics.diagnosis.teacher import Teacher
from diagnostics.finetune.finetuning_folder import STEPS, SWEEPS, FineTuningWriter
from diagnostics.finetune.settings import Settings
from diagnostics.finetune.sweeps import sweep_cutoffs
from diagnostics.finetune.visibility import full_depth
from diagnostics.models.loading import LoadedModel
from diagnostics.prompts.encoding import EncodedPrompt
from diagnostics.support.errors import UserError
from diagnostics.support.files import read_table, write_sums
from diagnostics.support.progress import Progress


class Watch(TrainerCallback):
    """Measures the cutoffs on the way, keeps the curve of the loss, and stops at a loss that is not finite."""

    def __init__(
        self,
        lm: LoadedModel,
        held_out: Sequence[EncodedPrompt],
        teacher: Teacher,
        settings: Settings,
        folder: FineTuningWriter,
        report: Progress,
    ) -> None:
        self.lm, self.teacher, self.settings, self.folder, self.report = lm, teacher, settings, folder, report
        self.held_out = held_out
        self.sweeps: list[pd.DataFrame] = []

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the measurements up to the checkpoint, or measure the model before its first step."""
        if state.global_step:
            try:
                sweeps = read_table(self.folder.path / SWEEPS)
            except (OSError, ValueError) as error:
                raise UserError(f"{str(self.folder.path / SWEEPS)!r} is damaged: {error}") from None
            self.sweeps = [sweeps[sweeps["step"] <= state.global_step]]
        else:
            self.write_steps(state)
            self._sweep(0)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Measure the cutoffs, before the checkpoint of this step is written."""
        self.report(state.global_step, state.max_steps, "training")
        if state.global_step % self.settings.sweep_every == 0 or state.global_step == state.max_steps:
            self._sweep(state.global_step)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop at a loss that is not finite."""
        self._require_number(state.log_history[-1].get("loss", 0.0), state.global_step)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the curve of the loss and the checkpoint's sums; a checkpoint needs no pickle of its arguments."""
        self.write_steps(state)
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (checkpoint / "training_args.bin").unlink(missing_ok=True)
        write_sums(checkpoint)

    def write_steps(self, state: TrainerState) -> None:
        """Write the curve of the loss so far."""
        rows = [row for row in state.log_history if "loss" in row]
        table = pd.DataFrame(rows, columns=["step", "loss", "learning_rate", "grad_norm"])
        table = table.astype({name: int if name == "step" else float for name in table})
        schedule = self.settings.schedule(self.lm.anatomy.n_layers)
        table["cutoff"] = pd.Series([schedule.at(n - 1, state.max_steps) for n in table["step"]], dtype=int)
        self.folder.write(STEPS, table)

    def _sweep(self, step: int) -> None:
        own = self.settings.against == "itself"
        anchors = self.settings.anchors
        with full_depth(self.lm.model):
            table = sweep_cutoffs(self.lm, self.held_out, self.teacher, anchors=anchors, own=own)
        self._require_number(table["kl"].sum(skipna=False), step)
        self.sweeps.append(table.assign(step=step))
        self.folder.write(SWEEPS, pd.concat(self.sweeps, ignore_index=True))

    def _require_number(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: lower the learning rate")
