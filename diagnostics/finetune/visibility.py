"""Training under SPEED: in each layer a token sees what it will see in inference, and no layer runs more tokens.

Prompt and targets of all turns run in one forward pass without a KV cache. Below the cutoff the layers run as they are.
Before the layer at the cutoff the anchors and decode-phase tokens of each row, its *deep* tokens, are gathered; the
layers above run only these, and after the last one they are spread back to their columns. Among deep tokens visibility
is plain causal order, with sliding windows by original position.

Layers under gradient checkpointing may run again in the backward pass, with their hooks, after the model has begun
another forward pass. So a layer's hook reads nothing but its arguments: the plan of a pass travels among them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.finetune.examples import IGNORED
from diagnostics.finetune.plan import PACKED, Plan, decode_phase, make_plan
from diagnostics.finetune.self_test import require_trainable
from diagnostics.models.anatomy import PER_POSITION, Anatomy
from diagnostics.models.libraries import TRANSFORMERS, library_of, stock_model
from diagnostics.models.rope import rope_lengths
from diagnostics.policies.arguments import Edit, EditArguments, input_tokens, placeholder_mask, take_rows
from diagnostics.policies.entry import admit, positions
from diagnostics.policies.occupancy import holder_of, occupy
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.support.errors import UserError

# Arguments that collators add to batches of several texts in one row.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
_PLAN = "speed_plan"


@contextmanager
def train_under(policy: SpeedPolicy, model: Any) -> Iterator[Visibility]:
    """Train ``model``, a transformers causal language model or a PEFT wrapper, as ``policy`` will run it.

    Inside the block ``model(**batch)`` with ``labels`` is a forward pass under the policy; put the block around
    ``trainer.train()``. Which tokens are decode phase is read from the labels, see `decode_phase`; a batch without
    labels, because the loss is computed elsewhere, needs ``decode_mask``, bool [batch, tokens], taken as it is. Logits
    of prompt tokens are zeros. At a cutoff of L the model is the stock one.

    Raises
    ------
    UserError
        If the policy is not SPEED or does not fit, the model cannot be served, or another block holds it; inside the
        block, from the model, if a batch is packed or says nothing of its decode phase.
    """
    if not isinstance(policy, SpeedPolicy):
        raise UserError(f"training runs under SPEED, not {policy}: give a SpeedPolicy")
    if library_of(model) != TRANSFORMERS:
        raise UserError(f"training needs the transformers model itself, not a {type(model).__name__}")
    entrant = admit(model)
    policy.check(entrant.anatomy)
    require_trainable(entrant.model, entrant.anatomy, entrant.name, train_under)
    with ExitStack() as stack:
        visibility = Visibility(policy, entrant.model, entrant.anatomy)
        stack.enter_context(occupy(entrant.model, _Training(visibility)))
        visibility.attach(model, stack)
        yield visibility


@contextmanager
def full_depth(model: Any) -> Iterator[None]:
    """Run ``model`` as the stock model inside the block, within `train_under`: for the teacher of a distillation.

    Raises UserError if ``model`` is not in such a block.
    """
    holder = holder_of(stock_model(model))
    if not isinstance(holder, _Training):
        raise UserError("full_depth is for a model inside `with train_under(...)`")
    was_at_full_depth, holder.visibility.at_full_depth = holder.visibility.at_full_depth, True
    try:
        yield
    finally:
        holder.visibility.at_full_depth = was_at_full_depth


class _Training:
    """Holds a model that is being trained, and refuses to run it under a policy."""

    def __init__(self, visibility: Visibility) -> None:
        self.visibility = visibility

    @property
    def policy(self) -> SpeedPolicy:
        return self.visibility.policy

    def __getattr__(self, name: str) -> Any:
        raise UserError(
            f"this model is being trained under {self.visibility.policy}: leave the `with train_under(...)` block first"
        )


class Visibility:
    """The hooks of `train_under` on one model.

    Attributes
    ----------
    policy
        May change between steps, for example to lower the cutoff.
    n_positions, n_deep
        Positions computed below and above the cutoff so far, padding and unused slots included.
    at_full_depth
        Whether forward passes currently run the stock model.
    """

    def __init__(self, policy: SpeedPolicy, model: Any, anatomy: Anatomy) -> None:
        self.policy, self.model, self.anatomy = policy, model, anatomy
        self.at_full_depth = False
        self.rope = rope_lengths(anatomy.stack)
        self.n_positions = self.n_deep = 0
        self._labels: Tensor | None = None
        self._decode_mask: Tensor | None = None
        self._plan: Plan | None = None  # between the start of the stack and the final norm: never in a backward pass
        self._head: Plan | None = None
        self._warned = False

    def __getstate__(self) -> Any:
        raise UserError("this model is being trained under a policy: copy or pickle it outside of train_under")

    def attach(self, model: nn.Module, stack: ExitStack) -> None:
        """Add all hooks; ``model`` is what the user calls: the model itself, or a wrapper of it."""

        def before(module: nn.Module, edit: Edit) -> None:
            stack.callback(module.register_forward_pre_hook(EditArguments(module, edit), with_kwargs=True).remove)

        anatomy = self.anatomy
        self.rope.settle()
        for module in {model, self.model}:  # a wrapper may call the forward method of the model, past its hooks
            before(module, self._before_model)
            stack.callback(module.register_forward_hook(self._after_model, always_call=True).remove)
        before(anatomy.stack, self._before_stack)
        for index, layer in enumerate(anatomy.layers):
            before(layer, partial(_before_layer, index, anatomy.window(index)))
        stack.callback(anatomy.final_norm.register_forward_pre_hook(self._before_final_norm).remove)
        stack.callback(anatomy.unembedding.register_forward_pre_hook(self._before_head).remove)
        stack.callback(anatomy.unembedding.register_forward_hook(self._after_head).remove)

    @property
    def _stock(self) -> bool:
        return self.at_full_depth or self.policy.cutoff == self.anatomy.n_layers

    # --- Hooks, in the order in which they run ---

    def _before_model(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UserError("torch.nn.DataParallel cannot train under a policy: launch with accelerate or torchrun")
        self._decode_mask = arguments.pop("decode_mask", self._decode_mask)
        labels, mask = arguments.get("labels"), arguments.get("attention_mask")
        if labels is None or self._stock:
            return
        if isinstance(mask, Tensor) and mask.shape == labels.shape:
            # Padding on the left would predict the first token, which inference never asks.
            labels = labels.clone()
            labels[:, 1:].masked_fill_(mask[:, :-1] == 0, IGNORED)
            arguments["labels"] = labels
        self._labels = labels

    def _before_stack(self, _: nn.Module, arguments: dict[str, Any]) -> None:
        decode_mask = arguments.pop("decode_mask", self._decode_mask)
        if arguments.get("use_cache") is None:
            arguments["use_cache"] = False
        inputs = input_tokens(arguments)
        self._plan = self._head = None
        if self.rope and inputs is not None:
            self._require_frequencies(inputs, arguments.get("attention_mask"))
        if self._stock or inputs is None:
            return
        self._refuse(arguments)
        mask = arguments.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != inputs.shape[:2]):
            raise UserError(
                "training makes the attention masks itself: give attention_mask as [batch, tokens], or none"
            )
        real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device) if mask is None else mask != 0
        phase = decode_mask
        if phase is None:
            if self._labels is None:
                raise UserError(
                    "this batch does not say which tokens are decode phase: call the model that train_under was given "
                    "with labels, or with decode_mask, bool [batch, tokens]; to generate, use `with policy(model)`"
                )
            phase = decode_phase(self._labels, boundary=self.policy.boundary)
        if phase.shape != real.shape:
            raise UserError(f"labels or decode_mask are {list(phase.shape)}, the tokens {list(real.shape)}")
        position_ids = arguments.get("position_ids")
        plan, shallow = make_plan(
            real,
            phase.to(real.device) != 0,
            cutoff=self.policy.cutoff,
            anchors=self.policy.anchors,
            labels=None if self._labels is None else self._labels.to(real.device),
            position_ids=position_ids,
            implementation=self.model.config._attn_implementation,
        )
        if not shallow and not self._warned:
            self._warned = True
            warnings.warn(_NO_PROMPT, stacklevel=2)
        if position_ids is None:
            arguments["position_ids"] = positions(0, plan.n_columns, plan.padding, inputs.device).clamp_(min=0)
        arguments["attention_mask"] = placeholder_mask(inputs.device)
        arguments["use_cache"] = False
        arguments[_PLAN] = self._plan = plan
        self.n_positions += real.numel()
        self.n_deep += plan.columns.numel()

    def _require_frequencies(self, inputs: Tensor, mask: Any) -> None:
        """Refuse a batch whose rows would have other rotary frequencies if they ran alone."""
        lengths = {inputs.shape[1]}
        if isinstance(mask, Tensor) and mask.ndim == 2:
            lengths.update(mask.ne(0).sum(1).tolist())
        if self.rope.mixes(*lengths):
            raise UserError(
                f"{self.rope.reason}: rows of {min(lengths)} tokens do not fit into a batch of {max(lengths)}, padding "
                "included; put texts on one side of that into a batch, or one text into each"
            )

    def _refuse(self, arguments: dict[str, Any]) -> None:
        """Refuse arguments of a batch that training does not support."""
        if arguments.get("past_key_values") is not None:
            raise UserError(
                "training under a policy takes no KV cache: leave out past_key_values; "
                "to generate, use `with policy(model)` instead of train_under"
            )
        if any(arguments.get(name) is not None for name in PACKING):
            raise UserError(PACKED)
        if (positions := arguments.get("position_ids")) is not None and positions.ndim != 2:
            raise UserError("training under a policy takes position_ids as [batch, tokens]")
        if arguments.get("output_router_logits", getattr(self.model.config, "output_router_logits", False)):
            raise UserError(
                "the auxiliary loss of experts counts tokens that do not run under a policy: output_router_logits=False"
            )

    def _before_final_norm(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        plan, self._plan = self._plan, None
        if plan is None:
            return None
        if not plan.entered:
            raise UserError(
                f"the decoder layers of {type(self.model).__name__} do not get the keyword arguments of its forward "
                "pass: it cannot be trained under a policy"
            )
        self._head = plan
        return (plan.spread(args[0]), *args[1:])

    def _before_head(self, _: nn.Module, args: tuple[Any, ...]) -> Any:
        # Logits of shallow tokens mean nothing; the head is often a fifth of a small model.
        plan = self._head
        if plan is None or args[0].shape[:-1] != (len(plan.columns), plan.n_columns):
            self._head = None  # only some logits are asked for
            return None
        return (take_rows(args[0], plan.rows), *args[1:])

    def _after_head(self, _: nn.Module, __: Any, logits: Tensor) -> Tensor | None:
        plan, self._head = self._head, None
        return None if plan is None else plan.spread(logits)

    def _after_model(self, *_: Any) -> None:
        self._labels = self._decode_mask = self._plan = self._head = None


_NO_PROMPT = (
    "every token of this batch is decode phase, so it trains at full depth: give the tokens of prompts the label -100 "
    "(SFTTrainer: assistant_only_loss or completion_only_loss)"
)


def _before_layer(index: int, window: int | None, _: nn.Module, arguments: dict[str, Any]) -> None:
    """Give a layer its mask, and above the cutoff its positions; the first such layer also its deep tokens."""
    plan: Plan | None = arguments.pop(_PLAN, None)
    if plan is None:
        return
    if index == plan.cutoff:
        plan.entered = True
        arguments["hidden_states"] = take_rows(arguments["hidden_states"], plan.rows)
    if index >= plan.cutoff:
        for name in PER_POSITION & arguments.keys():
            arguments[name] = take_rows(arguments[name], plan.rows)
    arguments["attention_mask"] = plan.mask(index >= plan.cutoff, window, arguments["hidden_states"])
