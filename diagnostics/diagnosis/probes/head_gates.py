"""How far back each head looks, whatever it reads: DuoAttention's gate without training, as kvpress computes it.

The mean query and the mean key of a head, both before rotary embedding, are repeated at 500 positions and turned; the
softmax of the last query over all keys, cumulated from the first key on, has a mean of about 0 where the head looks at
itself and of 1 where it looks at the beginning. A retrieval head looks far back (DuoAttention, arXiv 2410.10819).

Keys are those of the prompt segment, queries those of the observation window and the decode phase, which are the rows
that a capture has. They are known after rotary embedding only, and turned back. That the layer turns as its family's
function does is proven on every prompt: the projected queries of the decode rows must turn into the attention's own.
"""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention
from diagnostics.diagnosis.capture.queries import unturned_queries
from diagnostics.diagnosis.observers import DecodeRows
from diagnostics.diagnosis.probes.probe import Measured, Probe, PromptContext
from diagnostics.models.anatomy import unwrapped
from diagnostics.models.rotation import NoRotation, Rotation, rotation
from diagnostics.support.sums import wide

N_POSITIONS = 500


class HeadGates(Probe):
    """How far back each head's mean query looks over its mean key."""

    name = "head_gates"
    optional = True
    describes: ClassVar[Mapping[str, str]] = {
        "head_gate": f"mean of the cumulated attention of a head's mean query over its mean key at {N_POSITIONS} "
        "positions, 0 (looks at itself) .. 1 (at the beginning), about 0.5 where it looks everywhere alike; in heads; "
        f"NaN in sliding windows below {N_POSITIONS}, without a prompt segment, through transformer-lens, and where "
        "the rotary embedding of the family is not known",
    }

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.gates: list[np.ndarray] = []
        # By type of layer and number of positions, which some kinds of rotary embedding depend on.
        self.rotations: dict[tuple[str, int], Rotation | None] = {}

    def on_decode(self, rows: DecodeRows) -> None:
        """Score the heads of one layer."""
        gates = self._gates(rows)
        missing = np.full(rows.attention.n_heads, np.nan)
        self.gates.append(missing if gates is None else gates.cpu().numpy())

    def _gates(self, rows: DecodeRows) -> Tensor | None:
        attention, layout = rows.attention, self.context.layout
        window = self.context.windows[rows.layer] if self.context.windows else None
        if not isinstance(attention, RecomputedAttention) or not layout.n_segment:
            return None
        if window is not None and window < N_POSITIONS:
            return None
        turning = self._turning(rows.layer, attention)
        if turning is None:
            return None
        first = layout.n_prompt - attention.n_window
        query = turning.unturned(attention.query.float(), slice(first, first + attention.n_rows)).mean(1)
        key = turning.unturned(attention.key[:, layout.prompt].float(), layout.prompt).mean(1)
        repeated = self._rotation(rows.layer, N_POSITIONS, key.device) if isinstance(turning, Rotation) else turning
        return None if repeated is None else looks_back(attention, repeated, query, key)

    def _rotation(self, layer: int, n_positions: int, device: torch.device) -> Rotation | None:
        """Return the rotary embedding of a layer in a text of so many tokens; None where none is known."""
        anatomy = self.context.readout.anatomy
        kind = anatomy.layer_types[layer], n_positions
        if kind not in self.rotations:
            self.rotations[kind] = rotation(anatomy, layer, n_positions, device)
        return self.rotations[kind]

    def _turning(self, layer: int, attention: RecomputedAttention) -> Rotation | NoRotation | None:
        """Return the rotation that makes the attention's queries of the projected ones; None where none does."""
        anatomy, n_keys = self.context.readout.anatomy, attention.value.shape[1]
        if attention.projected is None:
            return None
        try:
            projected = unturned_queries(unwrapped(anatomy.attentions[layer]), anatomy, attention.projected)[0].float()
        except RuntimeError:  # laid out in another way
            return None
        own, decode = attention.query[:, -attention.n_decode :], slice(n_keys - attention.n_decode, n_keys)
        tolerance = 1e-3 if own.dtype == torch.float32 else 0.05
        for turning in (NoRotation(), self._rotation(layer, n_keys, own.device)):
            if turning is not None:
                error = (turning.turned(projected, decode) - own).abs().max() / own.abs().max()
                if error <= tolerance:
                    return turning
        return None

    def measured(self) -> Measured:
        """Return the column of the heads table."""
        return Measured(heads={"head_gate": np.stack(self.gates)})


def looks_back(attention: RecomputedAttention, turning: Rotation | NoRotation, query: Tensor, key: Tensor) -> Tensor:
    """Return the gates of mean queries [heads, head_dim] and keys [kv_heads, head_dim] before rotary embedding."""
    last = turning.turned(query[:, None], slice(N_POSITIONS - 1, N_POSITIONS)).unflatten(0, (len(key), -1))
    keys = turning.turned(key[:, None].expand(-1, N_POSITIONS, -1), slice(0, N_POSITIONS))
    scores = (last[:, :, 0] @ keys.mT).flatten(0, 1) * attention.scaling
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    weights = scores.to(wide(scores.device)).softmax(-1)
    return weights.cumsum(-1).mean(-1).float()
