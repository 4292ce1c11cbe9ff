"""Over random shapes: batches in any parts equal the reference, masks their definition, pieces their columns."""

from itertools import pairwise

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

from diagnostics import ProjectedPolicy, SpeedPolicy, decode, prefill
from diagnostics.policies.arguments import spread_rows, take_rows
from diagnostics.policies.columns import EMPTY, Piece, as_tensor, count, gaps, join, rows_in, span
from diagnostics.policies.masks import attention_mask
from tests.support.examples import examples
from tests.support.policy_cases import assert_close, left_padded, letters_of, load, masked_pass
from tests.support.tiny import N_LAYERS, random_ids

FAMILIES = ("llama", "gemma3")
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")
some_examples = examples(40, derandomize=True)
many_examples = examples(200, derandomize=True)


# --- Batches ---


@st.composite
def policies(draw):
    cutoff, boundary = draw(st.integers(1, N_LAYERS)), draw(st.integers(1, 4))
    if draw(st.booleans()):
        return ProjectedPolicy(cutoff, boundary)
    return SpeedPolicy(cutoff, draw(st.integers(0, 4)), boundary)


@st.composite
def batches(draw):
    """A policy, prompts of at least its anchors, columns of padding before the longest of them, and pieces to run."""
    policy = draw(policies())
    lengths = draw(st.lists(st.integers(max(1, policy.anchors), 24), min_size=1, max_size=4))
    prompts = [random_ids(n, seed=i) for i, n in enumerate(lengths)]
    chunks = st.none() | st.integers(1, 30)
    steps = st.lists(st.integers(2, 5), min_size=1, max_size=3)
    return policy, prompts, draw(st.integers(0, 5)), draw(chunks), draw(chunks), draw(steps)


@pytest.mark.parametrize("family", FAMILIES)
@some_examples
@given(batches(), st.integers(2, 9))
def test_batches_in_any_parts_equal_the_reference_of_each_row(family, batch, n_second):
    policy, prompts, margin, chunk, second_chunk, steps = batch
    lm, rows, n_decode = load(family), len(prompts), sum(steps)
    ids, mask = (torch.nn.functional.pad(part, (margin, 0)) for part in left_padded(prompts))
    answer, second, last = (
        torch.tensor([random_ids(n, seed=s + row) for row in range(rows)])
        for n, s in ((n_decode, 50), (n_second, 60), (n_decode, 70))
    )
    first, cache = prefill(lm, ids, mask if mask.min() == 0 else None, policy=policy, chunk_size=chunk)
    # The last token of the answer comes with the next turn.
    parts = answer[:, :-1].split([*steps[:-1], steps[-1] - 1], dim=1)
    logits = [first[:, None], *(decode(lm, part, cache) for part in parts)]
    again, _ = prefill(lm, torch.cat([answer[:, -1:], second], dim=1), cache=cache, chunk_size=second_chunk)
    logits += [again[:, None], *(decode(lm, part, cache) for part in last.split(steps, dim=1))]
    logits = torch.cat(logits, dim=1)
    for row, prompt in enumerate(prompts):
        turns = ((len(prompt), n_decode), (n_second, n_decode))
        whole = prompt + answer[row].tolist() + second[row].tolist() + last[row].tolist()
        wanted = masked_pass(family, policy, whole, letters_of(policy, *turns))
        start, later = len(prompt) - 1, len(prompt) + n_decode + n_second - 1
        assert_close(logits[row], torch.cat([wanted[start : start + n_decode], wanted[later:]]))


@pytest.mark.parametrize("family", FAMILIES)
@some_examples
@given(policies(), st.lists(st.integers(1, 12), min_size=2, max_size=4), st.integers(1, 12), st.booleans())
def test_a_document_in_parts_is_one_prompt(family, policy, parts, n_question, later):
    """Also where a conversation goes before; the first part then begins with the last token of the answer."""
    lm, cache, ids, turns, n_answer = load(family), None, [], [], 3
    lengths = [*parts, max(n_question, policy.boundary)]
    if later:
        ids, turns = random_ids(9, 1), [(9, n_answer)]
        _, cache = prefill(lm, torch.tensor([ids]), policy=policy)
        answer = random_ids(n_answer, 2)
        decode(lm, torch.tensor([answer[:-1]]), cache)
        ids, lengths[0] = ids + answer, lengths[0] + 1
        document = answer[-1:] + random_ids(sum(lengths) - 1)
    else:
        lengths[0] += policy.anchors
        document = random_ids(sum(lengths))
    *parts, question = torch.tensor([document]).split(lengths, dim=1)
    for part in parts:
        _, cache = prefill(lm, part, policy=policy, cache=cache, more=True)
    logits, _ = prefill(lm, question, cache=cache)
    ids += document[later:]
    letters = letters_of(policy, *turns, (sum(lengths) - later, 0))
    assert_close(logits[0], masked_pass(family, policy, ids, letters)[-1])


# --- Pieces ---


@st.composite
def pieces_of(draw, batch, shuffled=False, full=False):
    """Disjoint pieces of columns 0 to 24, some with columns of their own for each row; in order, or not quite."""
    cuts = sorted(draw(st.sets(st.integers(0, 24), min_size=2, max_size=8)))
    spans = [(a, b) for a, b in pairwise(cuts) if draw(st.booleans())] or [(cuts[0], cuts[1])]
    made = []
    for start, stop in spans:
        if full or draw(st.booleans()):
            made.append(Piece(start, stop))
            continue
        slots = draw(st.integers(1, stop - start))
        rows = [sorted(draw(st.sets(st.integers(start, stop - 1), max_size=slots))) for _ in range(batch)]
        columns = torch.tensor([[EMPTY] * (slots - len(row)) + row for row in rows])
        made.append(Piece(start, stop, columns, full=bool((columns != EMPTY).all())))
    return tuple(draw(st.permutations(made)) if shuffled else made)


def listed(pieces, batch):
    """Columns of each row, one by one."""
    rows = [[] for _ in range(batch)]
    for piece in pieces:
        for row, columns in enumerate(rows):
            own = piece.columns
            columns += range(piece.start, piece.stop) if own is None else own[row % len(own)].tolist()
    return rows


batched_pieces = st.integers(1, 3).flatmap(lambda batch: st.tuples(st.just(batch), pieces_of(batch)))


@many_examples
@given(batched_pieces, st.integers(0, 8))
def test_join_appends_and_makes_longer(case, at):
    batch, pieces = case
    joined = join(pieces[:at], pieces[at:])
    assert listed(joined, batch) == listed(pieces, batch)
    assert count(joined) == count(pieces) == len(listed(pieces, batch)[0])
    assert as_tensor(joined, CPU).expand(batch, -1).tolist() == listed(pieces, batch)
    assert listed(join(joined, span(30, 33)), batch) == [[*row, 30, 31, 32] for row in listed(pieces, batch)]
    token_by_token = join((), [piece for column in range(9) for piece in span(column, column + 1)])
    assert [(p.start, p.stop) for p in token_by_token] == [(0, 9)]


@many_examples
@given(pieces_of(1, full=True), st.integers(0, 3), st.integers(0, 3))
def test_gaps_are_what_is_left_out(pieces, before, after):
    start, stop = pieces[0].start - before, pieces[-1].stop + after
    left = listed(gaps(pieces, start, stop), 1)[0]
    assert sorted(left + listed(pieces, 1)[0]) == list(range(start, stop))
    assert gaps((), start, stop) == () if start == stop else len(gaps((), start, stop)) == 1
    assert span(stop, stop) == span(stop, start) == ()


@many_examples
@given(batched_pieces, st.integers(0, 25))
def test_until_leaves_out_later_columns(case, stop):
    batch, pieces = case
    for piece in pieces:
        before, kept = listed([piece], batch), piece.until(stop)
        left = listed([kept], batch) if kept else [[] for _ in range(batch)]
        assert [[c for c in row if c != EMPTY] for row in left] == [
            [c for c in row if c != EMPTY and c < stop] for row in before
        ]
        if kept is None:
            continue
        assert kept.stop == min(stop, piece.stop)
        assert kept.full <= piece.full
        if piece.columns is not None:  # slots stay where they are
            assert left == [[c if c < stop else EMPTY for c in row] for row in before]


@many_examples
@given(batched_pieces, st.lists(st.integers(0, 2), min_size=1, max_size=4), st.booleans())
def test_take_rows_picks_columns_and_select_rows_picks_rows(case, rows, shared):
    batch, pieces = case
    first = pieces[0].start
    values = torch.arange((1 if shared else batch) * 25 * 2).view(-1, 25, 2)[:, first:]
    taken, beside, nothing = take_rows((values, values[..., 0], None), rows_in(pieces, first, CPU))
    assert torch.equal(beside, taken[..., 0])
    assert nothing is None
    for row, columns in enumerate(listed(pieces, batch)):
        picked = taken[min(row, len(taken) - 1)]
        assert picked.tolist() == [values[0 if shared else row, max(c - first, 0)].tolist() for c in columns]
    assert taken.untyped_storage().data_ptr() != values.untyped_storage().data_ptr()
    rows = [row for row in rows if row < batch] or [0]
    chosen = [piece.select_rows(torch.tensor(rows)) for piece in pieces]
    assert listed(chosen, len(rows)) == [listed(pieces, batch)[row] for row in rows]


@many_examples
@given(batched_pieces)
def test_spread_rows_undoes_take_rows(case):
    """Unused slots, and positions beyond the end, leave nothing behind."""
    batch, pieces = case
    values = torch.rand(batch, 25, 2)
    taken = take_rows(values, rows_in(pieces, 0, CPU))
    spread = spread_rows(taken.expand(batch, -1, -1), as_tensor(pieces, CPU), 20, -1.0)
    for row, columns in enumerate(listed(pieces, batch)):
        for column in range(20):
            wanted = values[row, column].tolist() if column in columns else [-1.0, -1.0]
            assert spread[row, column].tolist() == wanted


# --- Masks ---


@st.composite
def attention(draw):
    """Keys held, keys of the rows that run, padding, window and implementation."""
    batch = draw(st.integers(1, 3))
    padding = draw(st.none() | st.lists(st.integers(0, 12), min_size=batch, max_size=batch))
    full = padding is None and draw(st.booleans())
    pieces = draw(pieces_of(batch, full=full))
    held = draw(st.lists(st.sampled_from(pieces), unique=True, max_size=len(pieces) - 1))
    queries = tuple(piece for piece in pieces if piece not in held)
    if draw(st.booleans()):  # one token, as when decoding
        queries = span(queries[-1].stop - 1, queries[-1].stop)
        held = [piece for piece in held if piece.stop < queries[0].start or piece.start >= queries[0].stop]
    window = draw(st.none() | st.integers(1, 12))
    return batch, tuple(held), queries, padding, window, draw(st.sampled_from(["sdpa", "eager"]))


@many_examples
@given(attention())
def test_masks_equal_their_definition(case):
    batch, held, queries, padding, window, implementation = case
    keys = join(held, queries)
    mask = attention_mask(
        queries,
        keys,
        padding=None if padding is None else torch.tensor(padding),
        window=window,
        implementation=implementation,
        dtype=torch.float16,
        device=CPU,
    )
    n_queries, n_keys = count(queries), count(keys)
    event("no mask" if mask is None else "mask")
    if mask is None:  # then the kernel shows all keys to a single query, and otherwise does causal order by itself
        assert n_queries == 1 or (implementation == "sdpa" and n_queries == n_keys)
        shown = torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)[None]
    elif implementation == "sdpa":
        shown = mask[:, 0]
        assert shown.dtype == torch.bool
    else:
        shown = mask[:, 0] == 0
        assert mask.dtype == torch.float16
        assert (mask[:, 0][~shown] == torch.finfo(torch.float16).min).all()
    assert shown.any(-1).all(), "a query that sees nothing is NaN"
    shown = shown.expand(batch, -1, -1).tolist()
    for row, (asking, asked) in enumerate(zip(listed(queries, batch), listed(keys, batch), strict=True)):
        first = padding[row] if padding else 0
        for i, query in enumerate(asking):
            if query >= first:  # neither padding nor an unused slot
                wanted = [first <= key <= query and (window is None or key > query - window) for key in asked]
                assert shown[row][i] == wanted
