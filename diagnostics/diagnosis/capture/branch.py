"""Upper layers of SPEED by calling a layer as the model called it, for backends that do not own its attention.

The anchors' keys and values of the full model come back by running the anchors' own rows along: they see only each
other, so their rows of the full model give them again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from diagnostics.diagnosis.capture.attention_rows import visible_keys
from diagnostics.diagnosis.capture.passes import Pass
from diagnostics.diagnosis.observers import Branch
from diagnostics.models.anatomy import PER_POSITION
from diagnostics.policies.arguments import residual_of, take_rows
from diagnostics.support.errors import UserError


class AnchorRows:
    """Keeps what the layers of one prompt got for its anchors, from the pass that ran them."""

    def __init__(self, n_anchors: int) -> None:
        self.n_anchors = n_anchors
        self.kept: dict[int, dict[str, Any]] = {}

    def branch(
        self, call: Callable[..., Any], layer: int, over: Pass, arguments: dict[str, Any], window: int | None
    ) -> Branch:
        """Return `DecodeRows.branch` of a layer that the pass called with these arguments, on [1, rows, ...].

        ``call`` runs the layer with named arguments; ``window`` is the width of its sliding window, if it has one.
        """
        rows = {name: value for name, value in arguments.items() if name in PER_POSITION | {"hidden_states"}}
        if over.first_row == 0:
            self.kept[layer] = {name: take_rows(value, slice(0, self.n_anchors)) for name, value in rows.items()}
        anchors = self.kept.get(layer, {})

        def run(hidden: Tensor, sees_prompt: bool = False) -> Tensor:
            if sees_prompt:
                raise UserError("only the hooks backend runs decode rows that see the prompt in some layers")
            own = {name: take_rows(value, over.decode) for name, value in rows.items()}
            mask, n_anchors = self._mask(arguments.get("attention_mask"), over, window, hidden), self.n_anchors
            changed = {name: _joined(anchors.get(name), value) for name, value in own.items()}
            before = anchors["hidden_states"].expand(len(hidden), -1, -1) if n_anchors else hidden[:, :0]
            changed |= {"hidden_states": torch.cat([before, hidden], dim=1), "attention_mask": mask}
            # Neither the cache nor a promise to fill one: the branch is a pure function of its rows.
            without = {k: None if isinstance(v, Cache) else v for k, v in arguments.items()}
            if "use_cache" in without:
                changed["use_cache"] = False
            return residual_of(call(**without | changed))[:, n_anchors:]

        return run

    def _mask(self, mask: Any, over: Pass, window: int | None, hidden: Tensor) -> Tensor:
        """Additive mask [1, 1, rows, rows] of anchors and decode rows."""
        first, total, n = over.first_row + over.n_context, over.first_row + over.n_rows, self.n_anchors
        decode = visible_keys(mask, over.first_row, over.n_rows, total, window, over.decode)
        anchors = visible_keys(None, 0, n, n, window, slice(0, n))
        visible = torch.zeros(n + len(decode), n + len(decode), dtype=torch.bool, device=hidden.device)
        visible[:n, :n] = anchors
        visible[n:, :n], visible[n:, n:] = decode[:, :n], decode[:, first:]
        lowest = torch.finfo(hidden.dtype).min
        return torch.where(visible, 0.0, lowest).to(hidden.dtype)[None, None]


def _joined(anchors: Any, rows: Any) -> Any:
    """Put the anchors' part before the decode rows' part, along positions."""
    if anchors is None or rows is None:
        return rows
    if isinstance(rows, tuple):
        return tuple(_joined(a, b) for a, b in zip(anchors, rows, strict=True))
    return torch.cat([anchors, rows], dim=1)
