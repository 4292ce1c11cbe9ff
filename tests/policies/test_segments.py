import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diagnostics.segments import ANCHOR, DECODE, PADDING, PROMPT, Segments
from diagnostics.support.errors import UserError

counts = st.integers(0, 6)


@st.composite
def rows(draw):
    """Rows as (prompt tokens, tokens), with anchors and boundary."""
    lengths = draw(st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=5))
    return [(p, p + new) for p, new in lengths], draw(st.integers(0, 5)), draw(st.integers(1, 5))


def padded(tokens: list[int], side: str, width: int) -> torch.Tensor:
    mask = torch.zeros(len(tokens), width, dtype=torch.long)
    for row, n in enumerate(tokens):
        mask[row, width - n :] = 1 if side == "left" else 0
        if side == "right":
            mask[row, :n] = 1
    return mask


def test_one_row_in_full():
    segments = Segments.of(torch.ones(1, 7), 5)
    assert segments.label.tolist() == [[ANCHOR, PROMPT, PROMPT, PROMPT, DECODE, DECODE, DECODE]]
    assert segments.label.dtype == torch.int8
    assert segments.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6]]


def test_left_padding_moves_everything_and_changes_nothing():
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    segments = Segments.of(mask, torch.tensor([3, 6]), anchors=1, boundary=2)
    assert segments.label[0].tolist() == [PADDING] * 3 + [ANCHOR, DECODE, DECODE, DECODE]
    assert segments.label[1].tolist() == [ANCHOR, PROMPT, PROMPT, PROMPT, DECODE, DECODE, DECODE]
    assert segments.position_ids.tolist() == [[0, 0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]


def test_one_token_prompt_has_only_a_decode_token():
    segments = Segments.of(torch.tensor([[0, 1], [1, 1]]), torch.tensor([1, 2]))
    assert segments.label.tolist() == [[PADDING, DECODE], [ANCHOR, DECODE]]
    assert segments.n_anchor.tolist() == [0, 1]
    assert segments.n_prompt.tolist() == [0, 0]
    assert segments.n_decode.tolist() == [1, 1]


@given(rows(), st.sampled_from(["left", "right"]), st.integers(0, 4))
def test_padding_side_does_not_matter(case, side, extra):
    lengths, anchors, boundary = case
    tokens = [n for _, n in lengths]
    mask = padded(tokens, side, max(tokens) + extra)
    segments = Segments.of(mask, torch.tensor([p for p, _ in lengths]), anchors, boundary)
    for row, (prompt, n) in enumerate(lengths):
        alone = Segments.of(torch.ones(1, n), prompt, anchors, boundary)
        assert segments.label[row][mask[row].bool()].tolist() == alone.label[0].tolist()
        assert segments.position_ids[row][mask[row].bool()].tolist() == list(range(n))
        assert (segments.label[row][~mask[row].bool()] == PADDING).all()


@given(rows())
def test_counts_follow_from_the_definition(case):
    lengths, anchors, boundary = case
    tokens = [n for _, n in lengths]
    prompts = torch.tensor([p for p, _ in lengths])
    segments = Segments.of(padded(tokens, "left", max(tokens)), prompts, anchors, boundary)
    for row, (prompt, n) in enumerate(lengths):
        shallow = max(prompt - boundary, 0)
        assert segments.n_anchor[row] == min(anchors, shallow)
        assert segments.n_prompt[row] == max(shallow - anchors, 0)
        assert segments.n_decode[row] == n - shallow
    together = segments.anchor.int() + segments.prompt.int() + segments.decode.int()
    assert (together == segments.real.int()).all()


def test_a_bool_mask_and_one_length_for_all_rows():
    mask = torch.tensor([[True, True, True, False], [False, True, True, True]])
    expected = Segments.of(mask.long(), torch.tensor([2, 2]))
    assert Segments.of(mask, 2).label.equal(expected.label)


@pytest.mark.parametrize(
    ("mask", "n_prompt", "options", "message"),
    [
        ([[1, 1]], 1, {"anchors": -1}, "anchors is -1"),
        ([[1, 1]], 1, {"boundary": 0}, "boundary is 0"),
        ([[1, 0, 1]], 1, {}, "padding between"),
        ([[0, 1, 0, 1]], 1, {}, "padding between"),
        ([1, 1], 1, {}, r"\[batch, position\], not \[2\]"),
        ([[1, 1]], 0, {}, "at least 1"),
        ([[1, 1], [0, 1]], 2, {}, "at most the real tokens"),
        ([[0, 0]], 1, {}, "at most the real tokens"),
        ([[1, 1], [1, 1]], [1, 1, 1], {}, r"one per row, not \[3\]"),
    ],
)
def test_what_is_refused(mask, n_prompt, options, message):
    with pytest.raises(UserError, match=message):
        Segments.of(torch.tensor(mask), torch.tensor(n_prompt), **options)
