"""The settings of a fine-tuning, with defaults that follow from the size of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from diagnostics.finetune.objectives import require_share
from diagnostics.finetune.schedule import CutoffSchedule
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.support import defaults
from diagnostics.support.errors import UserError

if TYPE_CHECKING:
    from diagnostics.models.loading import LoadedModel

METHODS = ("lora", "full")
REFERENCES = ("base", "itself")
# Largest number of parameters -> learning rate of LoRA; training all weights takes a twentieth of it.
LEARNING_RATES = {5e8: 1e-3, 2e9: 5e-4, 1.5e10: 2e-4, math.inf: 1e-4}
FULL_SHARE = 0.05
CHECKPOINTING_FROM = 1e9  # parameters from which activations cost more than computing them again


@dataclass(frozen=True)
class Settings:
    """How to fine-tune; what is None follows from the model, see `settled`.

    Attributes
    ----------
    cutoff, start_cutoff
        Layers that prompts run through, 1..L, at the end and at the start of training; the same unless given.
    hold
        Share of the steps, 0..0.5, that run at full depth and keep the model there as it was. A quarter halves what
        full depth loses, and costs a little of what the cutoff gains.
    anchors
        Leading tokens that run through all layers.
    supervised
        Share of the cross-entropy of given answers in the loss, 0..1. The rest is self-distillation: KL from the model
        at full depth before training.
    against
        What the cutoffs are compared with: ``base``, the model at full depth before training, or ``itself``, the
        trained one at full depth. By default ``itself`` if nothing is distilled: then answers should change the model.
    method, rank
        ``lora`` adds matrices of this rank, 16 unless given, to all linear layers but the head; ``full`` trains all
        weights.
    learning_rate
        Peak learning rate of AdamW; it rises over a tenth of the steps and falls as a cosine.
    steps, batch_size, accumulate
        Optimizer steps, rows in a forward pass, and forward passes in a step, of each process.
    gradient_checkpointing
        Whether activations are computed again in the backward pass.
    decode_tokens
        Reference tokens per held-out prompt at most.
    sweep_every, checkpoint_every
        Steps between measurements of all cutoffs on the held-out prompts, and between checkpoints; a sweep is also
        made before the first step and after the last.
    seed
        Seed of the adapter's weights and the order of the rows.
    """

    cutoff: int
    start_cutoff: int | None = None
    hold: float = defaults.HOLD
    anchors: int = defaults.ANCHORS
    supervised: float = 0.0
    against: Literal["base", "itself"] | None = None
    method: Literal["lora", "full"] = "lora"
    rank: int | None = None
    learning_rate: float | None = None
    steps: int = defaults.STEPS
    batch_size: int = defaults.BATCH_SIZE
    accumulate: int = defaults.ACCUMULATE
    gradient_checkpointing: bool | None = None
    decode_tokens: int = defaults.HELD_OUT_DECODE_TOKENS
    sweep_every: int = defaults.SWEEP_EVERY
    checkpoint_every: int = defaults.CHECKPOINT_EVERY
    seed: int = 0

    def schedule(self, n_layers: int) -> CutoffSchedule:
        """The cutoff of every step."""
        start = self.cutoff if self.start_cutoff is None else self.start_cutoff
        return CutoffSchedule(start, self.cutoff, hold=self.hold, full_depth=n_layers)

    def settled(self, lm: LoadedModel) -> Settings:
        """Return these settings with every None replaced to fit a model; raise UserError for invalid ones."""
        for name in ("rank", "steps", "batch_size", "accumulate", "decode_tokens", "sweep_every", "checkpoint_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}: give 1 or more")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}: give 0 or more")
        for name, allowed in (("method", METHODS), ("against", (*REFERENCES, None))):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name} is {getattr(self, name)!r}: give {' or '.join(filter(None, allowed))}")
        if self.method == "full" and self.rank is not None:
            raise UserError("a rank is of an adapter: leave it out, or train one (lora)")
        if self.method == "full" and lm.dtype.itemsize < 4:
            raise UserError(
                f"steps of training are smaller than what {str(lm.dtype).removeprefix('torch.')} rounds to: "
                'load it with `dtype="float32"`, or train an adapter (lora), whose own weights are float32'
            )
        require_share(self.supervised)
        start = self.cutoff if self.start_cutoff is None else self.start_cutoff
        if self.method == "lora" and lm.base is not None:
            raise UserError(f"{lm.name!r} is an adapter, and adapters of adapters do not load: give its base, or full")
        for cutoff in (self.cutoff, start):
            SpeedPolicy(cutoff, anchors=self.anchors).check(lm.anatomy)
        if self.cutoff == lm.anatomy.n_layers and not self.supervised:
            raise UserError(
                f"cutoff {self.cutoff} is full depth, where the model is its own teacher: there is nothing to learn; "
                "give a smaller cutoff, or given answers (supervised)"
            )
        assert self.schedule(lm.anatomy.n_layers)  # refuses one that rises
        size = sum(parameter.numel() for parameter in lm.model.parameters())
        rate = next(rate for limit, rate in LEARNING_RATES.items() if size <= limit)
        rate *= FULL_SHARE if self.method == "full" else 1
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise UserError(f"learning rate is {self.learning_rate}: give a number between 0 and 1")
        return replace(
            self,
            start_cutoff=start,
            rank=defaults.RANK if self.method == "lora" and self.rank is None else self.rank,
            against=self.against or ("base" if self.supervised < 1 else "itself"),
            learning_rate=self.learning_rate or rate,
            gradient_checkpointing=(
                size >= CHECKPOINTING_FROM if self.gradient_checkpointing is None else self.gradient_checkpointing
            ),
        )
