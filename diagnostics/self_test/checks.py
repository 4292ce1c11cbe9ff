"""What the self-test tries on a model: each check ends in nothing, or in one line that says what differs.

A few dozen random tokens, some rows padded, run through the stock model under masks (`diagnostics.self_test.masked`)
and through what this package makes of it. In float32 every logit must agree; in half precision, where routing and
rounding move single positions, the median position must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diagnostics.diagnosis.capture.residual_path import watched_layers
from diagnostics.diagnosis.observers import DecodeRows, Layout
from diagnostics.diagnosis.probes.attention_mass import AttentionMass
from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep
from diagnostics.diagnosis.probes.probe import Probe, PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.models.anatomy import Anatomy
from diagnostics.policies.base import Policy
from diagnostics.policies.full import FullPolicy
from diagnostics.policies.speed import SpeedPolicy
from diagnostics.self_test.masked import Batch, Unprovable, masked_logits, masks, stock_logits
from diagnostics.self_test.residual import Gains, split_problem
from diagnostics.support.errors import UserError

N_PROMPT, N_DECODE, N_GREEDY, N_PADDING = 20, 4, 2, 5
# Share of the logits' spread by which they may differ, and share of its size by which an addition may.
LOGITS = {torch.float32: 1e-3, torch.float64: 1e-3}
LOGITS_IN_HALF = 0.1
ADDITIONS = {torch.float32: 1e-3, torch.float64: 1e-3}
ADDITIONS_IN_HALF = 0.05


@dataclass(frozen=True)
class Subject:
    """A model under test, with the sequences to test it on.

    Three rows: some tokens, a shorter row padded on the left, and the first again with another token at its end. What
    is compared in every check is the first two.
    """

    model: Any
    anatomy: Anatomy
    device: torch.device
    dtype: torch.dtype
    rows: Batch = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        length = N_PROMPT + N_DECODE - 1
        # Away from both ends of the vocabulary, where control tokens and those of other media are.
        size = self.model.get_input_embeddings().weight.shape[0]
        low, high = size // 8, max(size // 2, size // 8 + 1)
        ids = torch.randint(low, high, (3, length), generator=generator)
        ids[2] = ids[0]
        ids[2, -1] = low + (ids[0, -1] - low + 1) % (high - low)
        mask = torch.ones_like(ids)
        mask[1, :N_PADDING] = 0
        object.__setattr__(self, "rows", Batch(ids.to(self.device), mask.to(self.device), N_PROMPT))

    @property
    def batch(self) -> Batch:
        """The first two rows."""
        return Batch(self.rows.ids[:2], self.rows.mask[:2], N_PROMPT)

    @property
    def cutoffs(self) -> tuple[int, ...]:
        """Two cutoffs below full depth, as far as there are two: the lowest, and one in the middle."""
        n = self.anatomy.n_layers
        return tuple(sorted({1, max(1, n // 2)} - {n}))

    @cached_property
    def _stock(self) -> tuple[Tensor, Gains]:
        gains = Gains(self.anatomy, self.tolerance)
        with watched_layers(self.anatomy, gains.note):
            return stock_logits(self.model, self.rows), gains

    @property
    def stock(self) -> Tensor:
        """Logits of the stock model, [rows, columns, vocabulary]."""
        return self._stock[0]

    @property
    def gains(self) -> Gains:
        """What the residual gained from each attention in that pass."""
        return self._stock[1]

    @cached_property
    def masked(self) -> dict[int, Tensor]:
        """Logits under masks, by cutoff."""
        with masks(self.model):
            return {k: masked_logits(self.model, self.anatomy, self.batch, k) for k in self.cutoffs}

    def apart(self, ours: Tensor, expected: Tensor) -> float | None:
        """Share of the logits' spread by which two [..., positions, vocabulary] differ, if it is too much."""
        error = (ours.float() - expected.float()).abs().amax(-1).flatten()
        spread = float(expected.float().std(-1).mean())
        if self.dtype in LOGITS:
            found, tolerance = float(error.max()), LOGITS[self.dtype]
        else:
            found, tolerance = float(error.median()), LOGITS_IN_HALF
        return None if found <= tolerance * spread else found / max(spread, 1e-30)

    @property
    def tolerance(self) -> float:
        """Share of its size by which an addition to the residual may differ."""
        return ADDITIONS.get(self.dtype, ADDITIONS_IN_HALF)


def unsteady(subject: Subject) -> str | None:
    """Say that the stock model's own logits depend on what runs beside a row, so that nothing can be compared.

    As where activations are quantized with a scale for the whole batch.
    """
    alone = Batch(subject.batch.ids[:1], subject.batch.mask[:1], N_PROMPT)
    try:
        share = subject.apart(stock_logits(subject.model, alone)[0], subject.stock[0])
    except Exception:  # a model that does not run has failed for that
        return None
    return None if share is None else f"its own logits change by {share:.2g} of their spread with what runs beside them"


def causality(subject: Subject) -> str | None:
    """Earlier logits do not change when the last token does."""
    share = subject.apart(subject.stock[2, :-1], subject.stock[0, :-1])
    return None if share is None else f"a changed last token changes earlier logits by {share:.2g} of their spread"


def policies(subject: Subject) -> str | None:
    """Full depth and SPEED at full depth equal the stock model, SPEED at two cutoffs its masked passes.

    With padding and without, where models and policies make masks of their own kind or none.
    """
    n_layers, both, first = subject.anatomy.n_layers, slice(0, 2), slice(0, 1)
    wanted: list[tuple[Policy, Tensor, slice]] = [(FullPolicy(), subject.stock, both)]
    wanted += [(SpeedPolicy(k), subject.masked[k], both) for k in subject.cutoffs]
    wanted += [(SpeedPolicy(k), subject.masked[k], first) for k in subject.cutoffs[-1:]]
    wanted += [(SpeedPolicy(n_layers), subject.stock, first)]
    for policy, expected, rows in wanted:
        ours = torch.cat(list(_decoded(subject, policy, rows)), dim=1)
        if share := subject.apart(ours, expected[rows, subject.batch.decode]):
            what = "the stock model" if expected is subject.stock else "a masked pass of the stock model"
            return f"under {policy} its logits differ from those of {what} by {share:.2g} of their spread"
    return None


def _decoded(subject: Subject, policy: Policy, rows: slice) -> Iterator[Tensor]:
    """Logits of the decode phase: of the prompt's last token, of a further one, and of the rest in one call."""
    batch, cache, start = subject.batch, None, 0
    padded = not bool(batch.mask[rows].all())
    # Every call reads all weights, which is most of what the test costs: without padding all further tokens are one.
    stops = [(batch.n_prompt, 1), (batch.n_prompt + 1, 1), (batch.ids.shape[1], 0)]
    with policy(subject.model):
        for stop, keep in stops if padded else (stops[0], stops[2]):
            output = subject.model(
                input_ids=batch.ids[rows, start:stop],
                attention_mask=batch.mask[rows, :stop] if padded else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            cache, start = output.past_key_values, stop
            yield output.logits[:, -keep:]


def training(subject: Subject) -> str | None:
    """The forward pass of training under SPEED equals the masked pass, padded rows and all."""
    from diagnostics.finetune.visibility import train_under

    batch = subject.batch
    decode = torch.zeros_like(batch.mask, dtype=torch.bool)
    decode[:, batch.decode] = True
    for cutoff, expected in subject.masked.items():
        with train_under(SpeedPolicy(cutoff), subject.model):
            ours = subject.model(input_ids=batch.ids, attention_mask=batch.mask, decode_mask=decode).logits
        if share := subject.apart(ours[:, batch.decode], expected[:, batch.decode]):
            return (
                f"in training at cutoff {cutoff} its logits differ from those of a masked pass of the stock model by "
                f"{share:.2g} of their spread"
            )
    return None


class _Seen(Probe):
    """Keeps of every layer what its attention adds by the capture: all of it, [n_decode, width]."""

    def __init__(self, context: PromptContext) -> None:
        super().__init__(context)
        self.added: list[Tensor] = []

    def on_decode(self, rows: DecodeRows) -> None:
        heads, adds = rows.attention.output.flatten(1), rows.attention.adds
        self.added.append(adds(heads.float()) + adds.constant(heads))


@dataclass(frozen=True)
class Captured:
    """What a capture showed of the first row.

    ``branches``: logits of the sweep by cutoff, [n_decode, vocabulary]; ``added``: what each attention adds to the
    residual, biases included, [layers][n_decode, width].
    """

    branches: dict[int, Tensor]
    added: list[Tensor]


def captured(subject: Subject, capture: Any, n_decode: int, reference: Sequence[int] | None) -> Captured:
    """Run the first row's prompt through a capture, with this reference or a greedy one."""
    prompt, readout = subject.batch.ids[0, :N_PROMPT].tolist(), Readout(capture.lm.anatomy)
    context = PromptContext(
        layout=Layout(1, N_PROMPT), n_layers=subject.anatomy.n_layers, readout=readout, model_name=capture.lm.name
    )
    branches, seen = CutoffSweep(context), _Seen(context)
    # The probe of the attention refuses what it does not understand, here rather than after the first prompt.
    observers = [AttentionMass(context), branches, seen]
    capture.run(prompt, reference, observers, n_decode=n_decode, n_anchors=1)
    assert branches.branches is not None
    return Captured({k: readout.logits(branches.branches[k - 1]) for k in subject.cutoffs}, seen.added)


def sweep(subject: Subject, given: Captured, greedy: Captured) -> str | None:
    """Each branch of the cutoff sweep equals the masked pass, with a given reference and with a greedy one."""
    for how, found, rows in (("", given, slice(None)), ("with a greedy reference ", greedy, slice(1))):
        # With another reference only the first decode row has the same tokens before it.
        for cutoff, logits in subject.masked.items():
            if share := subject.apart(found.branches[cutoff][rows], logits[0, subject.batch.decode][rows]):
                return (
                    f"{how}the sweep's logits at cutoff {cutoff} differ from those of a masked pass of the stock model "
                    f"by {share:.2g} of their spread"
                )
    return None


def contribution(subject: Subject, given: Captured) -> str | None:
    """What the attention adds to the residual, by this capture, is what the stock model adds, and can be split."""
    first = Batch(subject.batch.ids[:1], subject.batch.mask[:1], N_PROMPT)
    found = subject.gains
    problem = found.problem or split_problem(subject.model, subject.anatomy, found.paths, first, subject.tolerance)
    if problem is not None:
        return problem
    for layer, ours in enumerate(given.added):
        expected = found.added[layer][0, first.decode]
        error = float((ours.to(expected.device) - expected).norm()) / max(float(expected.norm()), 1e-30)
        if not error <= subject.tolerance:
            return f"what the attention of layer {layer} adds to the residual is missed by {error:.2g} of its size"
    return None


def findings(subject: Subject, use: str, capture: Any = None) -> dict[str, str]:
    """Run all checks that a use of the model needs; return the failed ones with what differs.

    ``policies`` and ``training`` need the check of that name, ``diagnosis``, with a ``capture``, ``sweep`` and
    ``contribution``; each needs ``causality``.
    """
    checks: dict[str, Callable[[], str | None]] = {"causality": lambda: causality(subject)}
    if use == "policies":
        checks["policies"] = lambda: policies(subject)
    elif use == "training":
        checks["training"] = lambda: training(subject)
    else:
        runs: dict[str, Captured] = {}

        def run_sweep() -> str | None:
            runs["given"] = captured(subject, capture, N_DECODE, [*subject.batch.ids[0, N_PROMPT:].tolist(), 0])
            return sweep(subject, runs["given"], captured(subject, capture, N_GREEDY, None))

        checks["sweep"] = run_sweep
        checks["contribution"] = lambda: contribution(subject, runs["given"]) if runs else "the capture did not run"
    return _failed(checks)


def _failed(checks: dict[str, Callable[[], str | None]]) -> dict[str, str]:
    return {name: line for name, check in checks.items() if (line := _line(name, check))}


def _line(name: str, check: Callable[[], str | None]) -> str | None:
    """Run a check; an error of the model's own code is a finding like any other."""
    try:
        return check()
    except torch.OutOfMemoryError:
        raise
    except (UserError, Unprovable) as error:
        return str(error)
    except Exception as error:  # the code of any model, and of any library that wraps it
        text = " ".join(str(error).split())[:200]
        return f"the check of {name} ended in {type(error).__name__}: {text}"
