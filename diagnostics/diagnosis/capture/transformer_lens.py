"""Capture through TransformerLens: four hook points per layer of a `TransformerBridge`, reduced inside the hooks.

TransformerLens makes every model compute attention eagerly, so that a pattern can be hooked. Each layer therefore
holds heads x rows x keys weights while it runs, where the ``hooks`` backend holds none: memory grows with the square of
the prompt. A prompt that would not fit is refused beforehand.
"""

import copy
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from diagnostics.diagnosis.capture.attention_rows import PatternAttention
from diagnostics.diagnosis.capture.branch import AnchorRows
from diagnostics.diagnosis.capture.passes import Pass, PassCapture, Watch
from diagnostics.diagnosis.capture.residual_path import Addition, ResidualPath, Shown
from diagnostics.models.anatomy import unwrapped
from diagnostics.models.libraries import TRANSFORMER_LENS, twin
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.arguments import named_arguments, residual_of
from diagnostics.support.errors import UserError
from diagnostics.support.memory import free_memory

# Copies of the pattern, in float32, that a layer holds at once: scores, masked scores, weights and their sum.
EAGER_COPIES = 4


class TransformerLensCapture(PassCapture):
    """Capture with TransformerLens's own hooks."""

    name = "transformer-lens"
    reads_cache = True

    def __init__(self, lm: LoadedModel) -> None:
        self.bridge = lm.wrapper if lm.library == TRANSFORMER_LENS else bridge_over(lm)
        super().__init__(lm if lm.wrapper is self.bridge else LoadedModel.wrap(self.bridge, lm.tokenizer, lm.name))
        if self.bridge.compatibility_mode:
            raise UserError(
                "the bridge is in compatibility mode, which folds weights and shifts what probes measure: "
                "boot it anew without enable_compatibility_mode()"
            )
        self.anchors = AnchorRows(0)
        # Pattern rows of each layer's observation window, from a pass that ended before the decode rows.
        self.windows: dict[int, Tensor] = {}

    def forward(self, watch: Watch, ids: Tensor, first_row: int, cache: Cache | None, n_logits: int) -> Tensor | None:
        """Run a pass with hooks on every block; see `PassCapture.forward`."""
        over = watch.over(first_row, ids.shape[1])
        self._require_room(over)
        if first_row == 0:
            self.anchors, self.windows = AnchorRows(watch.n_anchors), {}
        taps = _Taps(watch, over, cache, self.anchors, self.windows, self.paths)
        points = {
            "hook_resid_pre": taps.on_residual_in,
            "attn.hook_pattern": taps.on_pattern,
            "attn.hook_z": taps.on_heads,
            "hook_resid_post": taps.on_residual_out,
        }
        hooks = [
            (f"blocks.{layer}.{point}", partial(act, layer))
            for layer in range(watch.anatomy.n_layers)
            for point, act in points.items()
        ]
        with ExitStack() as stack:
            for layer, block in enumerate(watch.anatomy.layers):
                note = partial(taps.on_call, layer)
                stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
                projection, adder = watch.anatomy.output_projections[layer], self.paths[layer].adder
                stack.callback(projection.register_forward_hook(taps.on_projection).remove)
                stack.callback(adder.register_forward_hook(taps.on_added).remove)
            stack.enter_context(self.bridge.hooks(fwd_hooks=hooks))
            output = self.lm.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=n_logits or 1)
        return output.logits[0] if n_logits else None

    def _require_room(self, over: Pass) -> None:
        keys = over.first_row + over.n_rows
        needed = EAGER_COPIES * 4 * self.lm.anatomy.n_heads * over.n_rows * keys
        free = free_memory(self.lm.device)
        if free is not None and needed > free:
            raise UserError(
                f"TransformerLens computes attention eagerly: {keys} tokens need about {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free; use the hooks backend, or shorter prompts"
            )


def bridge_over(lm: LoadedModel) -> Any:
    """Boot a `TransformerBridge` over a model without changing it: the bridge gets modules of its own, same weights.

    Raises
    ------
    UserError
        If TransformerLens is not installed, or does not know the architecture.
    """
    try:
        from transformer_lens.model_bridge import TransformerBridge
    except ImportError:
        raise UserError(
            "the transformer-lens backend needs TransformerLens 4.3: pip install 'speed-diagnostics[transformer-lens]'"
        ) from None
    model = twin(lm.model)
    model.config.architectures = [type(model).__name__]
    # The bridge would load its tokenizer again to add BoS; it is not used here.
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": lm.name, "add_bos_token": True}
    try:
        return TransformerBridge.boot_transformers(lm.name, hf_model=model, tokenizer=tokenizer, device=str(lm.device))
    except Exception as error:  # adapters raise what they like where a model is not theirs
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"TransformerLens cannot take model {lm.name!r}: {reason}; use the hooks backend") from error


class _Taps:
    """The hooks of one forward pass; each gets the layer first, and changes nothing."""

    def __init__(
        self,
        watch: Watch,
        over: Pass,
        cache: Cache | None,
        anchors: AnchorRows,
        windows: dict[int, Tensor],
        paths: tuple[ResidualPath, ...],
    ) -> None:
        self.watch, self.over, self.cache, self.anchors, self.windows = watch, over, cache, anchors, windows
        self.paths = paths
        self.branching = False
        # What the layer that is running has shown so far.
        self.arguments: dict[str, Any] = {}
        self.before: Tensor
        self.pattern: Tensor
        self.heads: Tensor
        self.shown: dict[str, Tensor] = {}
        self.added: Tensor | None = None

    def on_call(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note how the model calls the block."""
        if not self.branching:
            self.arguments = named_arguments(block, args, kwargs)

    def on_residual_in(self, layer: int, residual: Tensor, hook: Any) -> None:
        """Note the residual before the block, [1, rows, width]."""
        if not self.branching:
            self.before = residual

    def on_pattern(self, layer: int, pattern: Tensor, hook: Any) -> None:
        """Reduce the pattern, [1, heads, rows, keys], to the rows that are looked at."""
        if self.branching:
            return
        # clone: a view would keep all of the pattern alive.
        if self.over.n_context:
            self.windows[layer] = pattern[0, :, self.over.window].clone()
        if self.over.has_decode:
            self.pattern = pattern[0, :, self.over.decode].clone()

    def on_heads(self, layer: int, heads: Tensor, hook: Any) -> None:
        """Note what the heads give, [1, rows, heads, head_dim]."""
        if not self.branching:
            self.heads = heads[0, self.over.decode]

    def on_projection(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Note what entered and left the output projection."""
        if not self.branching:
            self.shown |= {"entered": args[0][0, self.over.decode], "left": output[0, self.over.decode]}

    def on_added(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Note what is added to the residual; of a module that runs twice, as shared ones do, the first time."""
        if not self.branching:
            self.added = residual_of(output)[0] if self.added is None else self.added

    def on_residual_out(self, layer: int, residual: Tensor, hook: Any) -> None:
        """Show the block that has run."""
        if self.branching:
            return
        block, anatomy = self.watch.anatomy.layers[layer], self.watch.anatomy
        window = anatomy.window(layer)

        def call(**arguments: Any) -> Any:
            self.branching = True
            try:
                return block(**arguments)
            finally:
                self.branching = False

        branch = self.anchors.branch(call, layer, self.over, self.arguments, window)
        attention = self._attention(layer) if self.over.has_decode else None
        assert self.added is not None
        self.watch.layer(layer, self.over, self.before[0], residual[0], self.added, attention, branch)
        self.shown, self.added = {}, None

    def _attention(self, layer: int) -> PatternAttention:
        anatomy, pattern = self.watch.anatomy, self.pattern
        if layer in self.windows:
            early = self.windows.pop(layer)
            # Context rows cannot see the keys of a later pass.
            early = nn.functional.pad(early, (0, pattern.shape[-1] - early.shape[-1]))
            pattern = torch.cat([early, pattern], dim=1)
        assert self.cache is not None
        assert self.added is not None
        heads, projection = self.heads, anatomy.output_projections[layer]
        shown = Shown(**self.shown, added=self.added[self.over.decode])
        return PatternAttention(
            pattern=pattern,
            value=self.cache.layers[layer].values[0],
            output=heads.unflatten(-1, (-1, anatomy.head_dim)) if heads.ndim == 2 else heads,
            adds=Addition.of(projection, self.paths[layer].multiplier, heads.flatten(1), shown),
            has_sinks=getattr(unwrapped(anatomy.attentions[layer]), "sinks", None) is not None,
        )
