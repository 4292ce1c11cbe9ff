"""The three forms of one rule, masks of a batch, columns of a call and positions of a row, agree with counting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics import FastKVPolicy, SpeedPolicy, UserError
from diagnostics.finetune.plan import decode_phase
from diagnostics.models.anatomy import dissect
from diagnostics.policies.cache import PolicyCache
from diagnostics.policies.columns import EMPTY, as_tensor
from diagnostics.policies.segments import Layout, Phases, Segments, deep_columns, phases_of, require_anchors
from tests.support.tiny import tiny_model

CPU = torch.device("cpu")


def plain(n_prompt, n_tokens, anchors, boundary):
    """One letter for each token of a row: a(nchor), p(rompt), d(ecode phase)."""
    shallow = max(n_prompt - boundary, 0)
    return ["a" if i < min(anchors, shallow) else "p" if i < shallow else "d" for i in range(n_tokens)]


@st.composite
def rows(draw):
    """Rows as (prompt tokens, tokens), with anchors and boundary."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=5))
    return [(p, p + new) for p, new in lengths], draw(st.integers(0, 5)), draw(st.integers(1, 5))


def padded(tokens: list[int], side: str, width: int) -> torch.Tensor:
    mask = torch.zeros(len(tokens), width, dtype=torch.bool)
    for row, n in enumerate(tokens):
        start = width - n if side == "left" else 0
        mask[row, start : start + n] = True
    return mask


@given(rows(), st.sampled_from(["left", "right"]), st.integers(0, 4))
def test_masks_of_a_batch_follow_from_the_definition(case, side, extra):
    lengths, anchors, boundary = case
    real = padded([n for _, n in lengths], side, max(n for _, n in lengths) + extra)
    index = real.long().cumsum(1) - 1
    prompts = torch.tensor([p for p, _ in lengths])
    segments = Segments(real, index >= prompts[:, None] - boundary, anchors)
    for row, (prompt, n) in enumerate(lengths):
        letters = plain(prompt, n, anchors, boundary)
        for letter, mask in (("a", segments.anchor), ("p", segments.prompt), ("d", segments.decode)):
            assert mask[row][real[row]].tolist() == [one == letter for one in letters]
            assert not mask[row][~real[row]].any()
        assert segments.deep[row][real[row]].tolist() == [one != "p" for one in letters]
        assert segments.padding[row] == (real.shape[1] - n if side == "left" else 0)
    assert not segments.has_gap


@given(rows(), st.integers(0, 4))
def test_columns_of_a_call_are_the_deep_tokens_of_the_batch(case, extra):
    """Of a batch padded on the left, whose rows have one decode-phase tail."""
    lengths, anchors, boundary = case
    lengths = [p + boundary for p, _ in lengths]
    width = max(lengths) + extra
    real = padded(lengths, "left", width)
    decode = torch.zeros_like(real)
    decode[:, width - boundary :] = True
    padding = (~real).sum(1)
    pieces = deep_columns(0, width, Phases(0, boundary), padding if bool(padding.any()) else None, anchors)
    columns = as_tensor(pieces, CPU).expand(len(lengths), -1)
    deep = Segments(real, decode, anchors).deep
    for row in range(len(lengths)):
        assert [c for c in columns[row].tolist() if c != EMPTY] == deep[row].nonzero()[:, 0].tolist()


@given(st.integers(1, 12), st.integers(0, 5), st.integers(0, 6))
def test_the_layout_of_a_row_is_the_same(n_prompt, anchors, n_new):
    layout, letters = Layout.of(n_prompt, anchors), plain(n_prompt, n_prompt + n_new, anchors, 1)
    assert letters[: layout.n_anchors] == ["a"] * letters.count("a")
    assert letters[layout.prompt] == ["p"] * letters.count("p") == ["p"] * layout.n_segment
    assert letters[layout.n_context :] == ["d"] * letters.count("d")


def test_labels_say_the_same_as_lengths():
    labels = torch.tensor([[-100, -100, -100, -100, 5, 6], [-100, -100, -100, 7, 8, 9]])
    segments = Segments(torch.ones(2, 6, dtype=torch.bool), decode_phase(labels, boundary=2), anchors=1)
    assert [plain(4, 6, 1, 2), plain(3, 6, 1, 2)] == [
        ["a" if a else "d" if d else "p" for a, d in zip(*masks, strict=True)]
        for masks in zip(segments.anchor.tolist(), segments.decode.tolist(), strict=True)
    ]


@pytest.mark.parametrize(("mask", "has_gap"), [([[1, 0, 1]], True), ([[0, 1, 0, 1]], True), ([[0, 1, 1, 0]], False)])
def test_padding_between_tokens(mask, has_gap):
    real = torch.tensor(mask, dtype=torch.bool)
    assert bool(Segments(real, torch.zeros_like(real), 1).has_gap) == has_gap


@given(st.integers(0, 1), st.integers(0, 5), st.integers(1, 12), st.integers(1, 13))
def test_parts_of_a_call_divide_it(head, tail, chunk, n_tokens):
    phases = Phases(min(head, n_tokens), min(tail, n_tokens - min(head, n_tokens)))
    letters = ["d"] * phases.head + ["p"] * (n_tokens - sum(phases)) + ["d"] * phases.tail
    for start in range(0, n_tokens, chunk):
        stop = min(start + chunk, n_tokens)
        part = phases.within(start, stop, n_tokens)
        assert part.head + part.tail >= 0
        divided = ["d" if i < part.head or i >= stop - start - part.tail else "p" for i in range(stop - start)]
        assert divided == letters[start:stop]


@pytest.fixture(scope="module")
def anatomy():
    return dissect(tiny_model("llama").model, "tiny")


def cache_of(anatomy, policy, n_columns=0, decoded=0):
    cache = PolicyCache(policy, anatomy)
    cache.n_columns = n_columns
    cache.decoded = Phases(0, decoded).columns(0, n_columns)[1]
    return cache


@pytest.mark.parametrize(
    ("policy", "held", "n_new", "n_logits", "phases"),
    [
        (SpeedPolicy(2), (0, 0), 9, 1, (0, 1)),
        (SpeedPolicy(2), (0, 0), 9, 0, (0, 0)),  # more of the prompt follows
        (SpeedPolicy(2), (0, 0), 9, 3, (0, 3)),
        (SpeedPolicy(2, boundary=4), (0, 0), 9, 1, (0, 4)),
        (SpeedPolicy(2, boundary=4), (0, 0), 3, 1, (0, 3)),
        (SpeedPolicy(2), (9, 0), 5, 1, (0, 1)),  # a question after its document
        (SpeedPolicy(2), (9, 2), 5, 1, (1, 1)),  # a next turn: the first token is the last of the answer
        (SpeedPolicy(2), (9, 2), 1, 1, (0, 1)),
        (FastKVPolicy(), (9, 2), 5, 1, (0, 5)),  # later turns run at full depth
    ],
)
def test_phases_of_new_tokens(anatomy, policy, held, n_new, n_logits, phases):
    assert phases_of(cache_of(anatomy, policy, *held), n_new, n_logits) == phases


def test_what_is_refused(anatomy):
    with pytest.raises(UserError, match="the last 4 prompt tokens are decode phase, and of these only 2 are new"):
        phases_of(cache_of(anatomy, SpeedPolicy(2, boundary=4), 9), 2, 1)
    cache = cache_of(anatomy, SpeedPolicy(2, anchors=3))
    require_anchors(cache, 3)
    cache.padding = torch.tensor([1, 0])
    with pytest.raises(UserError, match="speed:2:anchors=3: the prompt has 2 tokens, fewer than the anchors"):
        require_anchors(cache, 3)
