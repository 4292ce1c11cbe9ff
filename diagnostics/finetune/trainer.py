"""The transformers Trainer, with every step under SPEED, and the model's own full depth as a teacher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from diagnostics.finetune.examples import IGNORED
from diagnostics.finetune.objectives import distillation_loss, mixed_loss, predicting, require_share, supervised_loss
from diagnostics.finetune.plan import decode_phase
from diagnostics.finetune.schedule import CutoffSchedule
from diagnostics.finetune.visibility import Visibility, full_depth, train_under
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.support.errors import UserError


class SpeedTrainer(Trainer):
    """`transformers.Trainer` whose steps run under SPEED and learn from targets, from a teacher, or from both.

    Parameters
    ----------
    schedule
        The cutoff of every step; a number for a fixed one.
    anchors
        Leading tokens of each row that run through all layers.
    supervised
        Share of the targets' cross-entropy in the loss, 0..1; the rest is KL(teacher || model) at their positions.
    teacher
        The model at full depth to learn from. Without one, a PEFT model's own base teaches, with the adapter off.
    **trainer
        As for the Trainer. Batches come with ``labels``, -100 for prompts, as `collate` makes them.

    Raises
    ------
    UserError
        If a number is out of range, there is no teacher where one is needed, or for what `train_under` refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        schedule: CutoffSchedule | int,
        anchors: int = 1,
        supervised: float = 0.0,
        teacher: nn.Module | None = None,
        **trainer: Any,
    ) -> None:
        require_share(supervised)
        if supervised < 1 and teacher is None and not hasattr(model, "disable_adapter"):
            raise UserError("distillation needs a teacher: give one, or a PEFT model, whose base is taken")
        if teacher is not None and teacher is model:
            raise UserError("the teacher is the model itself and would be frozen: give a copy, or a PEFT model alone")
        super().__init__(model, **trainer)
        self._refuse_arguments(supervised)
        self.schedule = CutoffSchedule(schedule, schedule) if isinstance(schedule, int) else schedule
        self.anchors, self.supervised = anchors, supervised
        self._visibility: Visibility | None = None
        self.teacher = None if teacher is None else teacher.to(self.args.device).eval().requires_grad_(False)
        # `compute_loss` below divides by the targets of all batches of a step.
        self.model_accepts_loss_kwargs = True

    def _refuse_arguments(self, supervised: float) -> None:
        """Refuse arguments of the Trainer that would change the loss or the model, and that this class ignores."""
        args = self.args
        sizes = (getattr(getattr(args, "parallelism_config", None), name, 1) for name in ("cp_size", "sp_size"))
        for refused, reason in (
            (self.compute_loss_func is not None, "compute_loss_func: it has a loss of its own, see supervised"),
            (
                args.label_smoothing_factor != 0 and supervised == 0,
                "label_smoothing_factor: it smooths targets, which supervised=0 leaves out of the loss",
            ),
            (args.use_liger_kernel, "use_liger_kernel: its kernels are untried on the tokens of a policy"),
            (args.torch_compile, "torch_compile: compiled code may leave out the hooks that a policy is made of"),
            (any(size > 1 for size in sizes), "context or sequence parallelism: a row has to be in one place"),
        ):
            if refused:
                raise UserError(f"SpeedTrainer does not serve {reason}")

    @property
    def cutoff(self) -> int:
        """Cutoff of the step that comes next."""
        return self.schedule.at(self.state.global_step, self.state.max_steps)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does."""
        # Around all steps: DDP and FSDP wrap the model later and hide its layers.
        with train_under(self._policy(self.schedule.start), self.model) as self._visibility:
            try:
                return super().train(*args, **kwargs)
            finally:
                self._visibility = None

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run one forward and backward pass at the cutoff of this step."""
        assert self._visibility is not None
        self._visibility.policy = self._policy(self.cutoff)
        return super().training_step(model, inputs, *args, **kwargs)

    def _policy(self, cutoff: int) -> SpeedPolicy:
        return SpeedPolicy(cutoff, anchors=self.anchors)

    def prediction_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch at the current cutoff of training."""
        if self._visibility is not None:  # between steps of training
            self._visibility.policy = self._policy(self.cutoff)
            return super().prediction_step(model, *args, **kwargs)
        with train_under(self._policy(self.cutoff), model):
            return super().prediction_step(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, in nats per target."""
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        if mask is not None:
            # Inference never asks what padding on the left predicts; `train_under` ignores such targets, too.
            labels = labels.clone()
            labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        # The head is the largest layer of many models: it runs from the first prediction of any row on.
        first = int((labels != IGNORED).any(0).int().argmax()) - 1
        if return_outputs and self.compute_metrics is not None:  # it gets logits and labels of all positions
            first = 0
        model_inputs["logits_to_keep"] = kept = labels.shape[1] - max(0, first)
        teacher_logits = self._teacher_logits(model, model_inputs) if self.supervised < 1 else None
        outputs = model(**model_inputs, decode_mask=decode_phase(labels, mask))
        labels, smoothing = labels[:, -kept:], self.args.label_smoothing_factor
        if teacher_logits is None:
            loss = supervised_loss(outputs.logits, labels, n_items=num_items_in_batch, smoothing=smoothing)
        elif self.supervised:
            loss = mixed_loss(
                outputs.logits,
                teacher_logits,
                labels,
                supervised=self.supervised,
                n_items=num_items_in_batch,
                smoothing=smoothing,
            )
        else:
            loss = distillation_loss(outputs.logits, teacher_logits, predicting(labels), n_items=num_items_in_batch)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes, items are summed
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _teacher_logits(self, model: nn.Module, model_inputs: dict[str, Any]) -> Tensor:
        """Return the logits of the teacher at full depth."""
        if self.teacher is not None:
            return self.teacher(**model_inputs).logits
        with full_depth(self.model), self.accelerator.unwrap_model(model).disable_adapter():
            was_training = model.training
            model.eval()  # dropout of the base model, if it has any
            try:
                return model(**model_inputs).logits
            finally:
                model.train(was_training)
