"""Distances over a large vocabulary, on processors that add float32 in whatever order."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from diagnostics.diagnosis.capture.attention_rows import RecomputedAttention
from diagnostics.diagnosis.probes.logit_lens import spaced
from diagnostics.diagnosis.readout import Readout
from diagnostics.evaluate.scoring import _scored
from diagnostics.support.divergence import kl_divergence, log_probabilities, reported
from diagnostics.support.sums import mean_row
from tests.support.rounding import SequentialSums
from tests.support.tiny import tiny_model

VOCABULARY, WIDTH = 49_152, 32
PROCESSORS = {"this processor": nullcontext, "sequential sums": SequentialSums}


@pytest.fixture(params=sorted(PROCESSORS))
def processor(request):
    return PROCESSORS[request.param]


@pytest.fixture(scope="module")
def readout():
    lm = tiny_model("llama")
    head = nn.Linear(WIDTH, VOCABULARY, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.5)
    lm.model.lm_head = head
    found = Readout(lm.anatomy)
    object.__setattr__(found.anatomy, "unembedding", head)
    return found


def exact(readout, residuals):
    """Float64 log-probabilities of residuals, from the weights."""
    norm = readout.norm(residuals).double()
    return (norm @ readout.anatomy.unembedding.weight.double().T).log_softmax(-1)


@pytest.mark.parametrize("n_candidates", [1, 4, 30])
def test_a_distribution_differs_from_itself_by_nothing(readout, processor, n_candidates):
    x = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), processor():
        compared = readout.compare(
            readout.logits(x), x[:, None].expand(-1, n_candidates, -1).contiguous(), consecutive=True
        )
    assert (compared.kl == 0).all()
    assert (compared.rank == 0).all()
    assert (compared.js[:, 1:] == 0).all()


def test_divergences_are_right_relative_to_their_size(readout, processor):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, WIDTH, generator=generator)
    steps = torch.tensor([1.0, 0.1, 0.01])[:, None] * torch.randn(4, 3, WIDTH, generator=generator)
    near, target = x[:, None] + steps, torch.tensor([5, 40_000, 49_151, 0])
    with torch.inference_mode(), processor():
        compared = readout.compare(readout.logits(x), near, target)
    p, q = exact(readout, x)[:, None], exact(readout, near)
    kl = (p.exp() * (p - q)).sum(-1)
    assert kl.min() < 1e-3 < 1 < kl.max()
    torch.testing.assert_close(compared.kl.double(), kl, rtol=1e-4, atol=1e-8)
    nll = -q.gather(-1, target[:, None, None].expand(4, 3, 1)).squeeze(-1)
    torch.testing.assert_close(compared.nll.double(), nll, rtol=1e-5, atol=0)


def test_the_streamed_divergence_is_the_plain_one(readout):
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        compared = readout.compare(readout.logits(x), x.flip(0)[:, None])
        p, q = (log_probabilities(readout.logits(rows)) for rows in (x, x.flip(0)))
        plain = kl_divergence(p, q)
    torch.testing.assert_close(compared.kl[:, 0], reported(plain))


def test_what_is_only_rounding_is_reported_as_nothing():
    values = torch.tensor([-1e-15, 3e-10, 2e-9, torch.nan], dtype=torch.float64)
    assert reported(values).tolist()[:3] == [0, 0, 2e-9]
    assert reported(values)[3].isnan()
    equal = torch.full((3,), -1.0986122886681098, dtype=torch.float64)
    assert kl_divergence(equal, equal) == 0
    excluded = torch.tensor([0.0, -torch.inf])
    assert kl_divergence(excluded, torch.tensor([-0.5, -1.0])) == 0.5


def test_means_over_many_positions_keep_their_digits(processor):
    rows = 1000 + torch.rand(100_000, 3, generator=torch.Generator().manual_seed(0))
    with processor():
        found = mean_row(rows)
    torch.testing.assert_close(found.double(), rows.double().mean(0), rtol=2e-7, atol=0)


def test_likelihoods_of_half_precision_logits_are_not_computed_in_it():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(300, 500, generator=generator)).bfloat16()
    ids = torch.randint(0, 500, (300,), generator=generator)
    wanted = logits.double().log_softmax(-1).gather(-1, ids[:, None]).sum()
    assert _scored(logits, ids).log_likelihood == pytest.approx(float(wanted), rel=1e-9)


def test_attention_rows_of_half_precision_are_not_computed_in_it():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, n, 16, generator=generator).bfloat16() for n in (3, 400))
    rows = RecomputedAttention(
        query=query,
        key=key,
        value=key,
        visible=torch.ones(3, 400, dtype=torch.bool),
        scaling=0.25,
        softcap=None,
        sinks=None,
        output=query,
        adds=lambda heads: heads,
    )
    wanted = (query[0].double() @ key[0].double().T * 0.25).softmax(-1)
    torch.testing.assert_close(rows.weights(0, slice(0, 3))[0].double(), wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("n", "most"), [(1, 4), (4, 4), (5, 4), (48, 4), (48, 1), (7, 2)])
def test_lens_positions_are_spread_from_the_first_to_the_last(n, most):
    picked = spaced(n, most).tolist()
    assert len(set(picked)) == min(n, most)
    assert picked[0] == 0
    assert most == 1 or picked[-1] == n - 1
