"""Predicts what SPEED saves at a cutoff, by counting operations and bytes; nothing is measured.

The model: time to first token is proportional to the prefill's floating-point operations, time per output token to the
bytes of weights and cache that one step reads. Both hold for a busy device: long prompts, and memory-bound decoding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diagnostics.policies.full import FullPolicy
from diagnostics.policies.speed import SpeedPolicy

LENGTHS = (1024, 8192, 32768, 131072)


@dataclass(frozen=True)
class Savings:
    """Prediction at one prompt length; ratios are SPEED / full depth, so below 1 is better.

    ``speedup_ttft`` is the inverse of ``ttft_ratio``: a quarter less work is 1.33 times as fast. ``kv_bytes`` is the
    cache of one prompt under SPEED; ``within_positions`` says whether the model has enough positions for that length.
    """

    n_prompt: int
    ttft_ratio: float
    speedup_ttft: float
    tpot_ratio: float
    kv_ratio: float
    kv_bytes: int
    kv_bytes_full: int
    within_positions: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def predict_savings(
    shape: Mapping[str, Any],
    cutoff: int,
    *,
    anchors: int = 1,
    lengths: Sequence[int] = LENGTHS,
    max_positions: int | None = None,
) -> list[Savings]:
    """Predict the savings of a cutoff at each prompt length, from a run's ``manifest["shape"]``."""
    n_layers = len(shape["layer_parameters"])
    predictions = []
    for n in lengths:
        full, speed = (policy.workload(n, n_layers) for policy in (FullPolicy(), SpeedPolicy(int(cutoff), anchors)))
        ttft = prefill_flops(shape, speed.run) / prefill_flops(shape, full.run)
        held, held_full = (Held.after(n, 0, work.held, anchors) for work in (speed, full))
        predictions.append(
            Savings(
                n_prompt=n,
                ttft_ratio=ttft,
                speedup_ttft=1 / ttft,
                tpot_ratio=decode_bytes(shape, held) / decode_bytes(shape, held_full),
                kv_ratio=kv_bytes(shape, held) / kv_bytes(shape, held_full),
                kv_bytes=kv_bytes(shape, held),
                kv_bytes_full=kv_bytes(shape, held_full),
                within_positions=max_positions is None or n <= max_positions,
            )
        )
    return predictions


@dataclass(frozen=True)
class Held:
    """Positions that each layer's cache holds for one row after ``total`` tokens, not counting sliding windows.

    A layer that dropped some tokens holds the first ``anchors`` ones and the last ones.
    """

    total: int
    layers: Sequence[int]
    anchors: int = 0

    @classmethod
    def after(cls, n_prompt: int, n_new: int, prompt_held: Sequence[int], anchors: int) -> "Held":
        """Return the positions held after ``n_new`` tokens, which all layers hold, from those held after the prompt."""
        return cls(n_prompt + n_new, [n + n_new for n in prompt_held], anchors)

    def within(self, layer: int, window: int) -> int:
        """Number of held positions of a layer that the next token sees: it sees itself and ``window`` - 1 others."""
        held, reach = self.layers[layer], window - 1
        first = min(self.anchors, held) if held < self.total else 0
        return max(0, first - max(0, self.total - reach)) + min(held - first, reach)


def kv_bytes(shape: Mapping[str, Any], held: Held) -> int:
    """Bytes of keys and values of one row; a sliding layer holds the positions in the next token's window."""
    per_position = 2 * shape["n_kv_heads"] * shape["head_dim"] * shape["bytes_per_value"]
    return per_position * sum(
        held.within(layer, window) if window else held.layers[layer] for layer, window in enumerate(windows(shape))
    )


def decode_bytes(shape: Mapping[str, Any], held: Held, batch: int = 1) -> int:
    """Bytes that one decode step of ``batch`` rows reads: all weights once, and every row's keys and values."""
    weights = (sum(shape["layer_parameters"]) + shape["head_parameters"]) * shape["bytes_per_value"]
    return weights + batch * kv_bytes(shape, held)


def prefill_flops(shape: Mapping[str, Any], run: Sequence[int], projected: Sequence[int] | None = None) -> float:
    """Operations of one row's prefill in which layer l runs ``run[l]`` positions, including the head on one position.

    ``projected[l]`` positions go only through the layer's key and value projections.
    """
    total = 2.0 * shape["head_parameters"]
    for parameters, n, window in zip(shape["layer_parameters"], run, windows(shape), strict=True):
        reach = min(n, window or n)
        pairs = reach * (reach + 1) / 2 + (n - reach) * reach  # query-key pairs under the causal mask
        total += 2.0 * parameters * n + 4.0 * shape["n_heads"] * shape["head_dim"] * pairs
    per_token = 2.0 * shape["width"] * 2 * shape["n_kv_heads"] * shape["head_dim"]
    return total + per_token * sum(projected or ())


def windows(shape: Mapping[str, Any]) -> list[int | None]:
    """Sliding window of each layer in positions, None for full attention."""
    return [shape["sliding_window"] if kind == "sliding_attention" else None for kind in shape["layer_types"]]
