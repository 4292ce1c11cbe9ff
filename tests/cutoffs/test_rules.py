"""Every rule against a slow version in plain Python, written from its formula, and at its edges."""

import itertools
import math
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diagnostics.cutoffs.rules import all_rules
from diagnostics.cutoffs.rules.rule import Curves, first_from, first_tail_share, first_tail_within, largest
from diagnostics.cutoffs.rules.squeeze_attention import nearest_groups
from diagnostics.cutoffs.rules.uptake import uptake_limit

RULES = all_rules()
NAN = np.nan
HEADS = 3
LOOK_AT_NOTHING = {name for name in RULES if name.endswith("-depth")}


def made_curves(n_layers, *, max_kl=0.1, shortest=None, heads=None, **layers):
    layers = {name: np.asarray(values, dtype=float) for name, values in layers.items()}
    heads = {name: np.asarray(values, dtype=float) for name, values in (heads or {}).items()}
    return Curves(layers, heads, n_layers, max_kl, shortest)


def asked(name, values, **settings):
    """The cutoff of a rule that reads one column of layers."""
    rule = RULES[name]
    column = rule.reads[0]
    return rule.cutoff(made_curves(len(values), **{column: values}, **settings))


# --- Slow versions: lists, loops, and nothing of numpy ---


def depths_where(n_layers, holds):
    """The smallest depth 1..L at which something holds."""
    return next((k for k in range(1, n_layers + 1) if holds(k)), None)


def tail(values, limit):
    return depths_where(len(values), lambda k: sum(reversed(values[k:])) <= limit)


def tail_share(values, share):
    total = sum(values)
    return tail(values, share * total) if total > 0 else None


def from_depth(values, passes, last=None):
    """The smallest k >= 1 from which on all layers pass, up to ``last``; None if there is no such layer."""
    last = len(values) - 1 if last is None else last
    return next((k for k in range(1, last + 1) if all(map(passes, values[k : last + 1]))), None) or (
        1 if last == 0 and passes(values[0]) else None
    )


def median(values):
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def chosen(values, count):
    """The indices of the largest values, the lower index first of equal ones."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def up_to_last(indices):
    return max(indices) + 1 if indices else None


def slow_asl(c):
    (ratio,) = c
    return next((layer + 1 for layer, value in enumerate(ratio) if value < 0.3), None)


def slow_structkv(c):
    entropy, top, variance = c
    n = len(entropy)

    def scaled(values):
        change = [values[i] - values[i - 1] for i in range(1, n)]
        low, high = min(change, default=0), max(change, default=0)
        return [(x - low) / (high - low) if high > low else 0.0 for x in change]

    parts = scaled([-x for x in entropy]), scaled(top), scaled(variance)
    total = {i + 1: 0.2 * h + 0.3 * r + 0.5 * v for i, (h, r, v) in enumerate(zip(*parts, strict=True))}
    inner = [total[layer] for layer in range(1, n - 1)]
    if not inner or max(inner) == min(inner):
        return None
    return inner.index(max(inner)) + 1 + 1


def slow_squeeze(c):
    (cosine,) = c
    values = sorted(set(cosine))
    if len(values) < 3:
        return None

    def spread(group):
        mean = math.fsum(group) / len(group)
        return math.fsum((x - mean) ** 2 for x in group)

    ways = []
    for i, j in itertools.combinations(range(1, len(values)), 2):
        low, high = values[i], values[j]
        groups = (
            [x for x in cosine if x < low],
            [x for x in cosine if low <= x < high],
            [x for x in cosine if x >= high],
        )
        ways.append((sum(map(spread, groups)), high))
    best = min(cost for cost, _ in ways)
    found = nearest_groups(np.array(cosine), 3)[-1]
    # Which of ways that cost the same is taken may hang on rounding.
    assert any(high == found and cost == pytest.approx(best, abs=1e-12) for cost, high in ways)
    for last in range(len(cosine) - 1, max(len(cosine) - 4, -1), -1):
        if cosine[last] >= found:
            return from_depth(cosine, lambda x: x >= found, last) or 1
    return None


def slow_calm(c):
    (exited,) = c
    return next((layer + 1 for layer, share in enumerate(exited) if share >= 0.9), len(exited))


def slow_cka(c):
    (similarity,) = c
    return depths_where(len(similarity), lambda k: k == len(similarity) or similarity[k] > 0.9)


def slow_oracle(recall, first=0):
    best = max(recall[first:], default=0)
    if best <= 0:
        return None
    return next(layer + 1 for layer, value in enumerate(recall) if layer >= first and value >= 0.95 * best)


def slow_duo_heads(heads):
    scores = sorted(itertools.chain(*heads))
    at = 0.9 * (len(scores) - 1)
    low, high = scores[math.floor(at)], scores[math.ceil(at)]
    limit = low + (high - low) * (at - math.floor(at))
    return up_to_last([layer for layer, row in enumerate(heads) if max(row) > limit])


def positive(values):
    return [max(value, 0.0) for value in values]


SLOW = {
    "uptake": lambda c: tail(c[0], 0.2),
    "removal-effect": lambda c: tail([x * x for x in c[0]], 0.2**2),
    "speed-depth": lambda n: max(1, round(3 * n / 4)),
    "pop-depth": lambda n: max(1, round(2 * n / 3)),
    "fastkv-depth": lambda n: max(1, round(n / 2)),
    "swiftkv-depth": lambda n: max(1, round(n / 2)),
    "gemfilter-depth": lambda n: max(1, round(14 * n / 32)),
    "dash-depth": lambda n: max(1, round(2 * n / 5)),
    "asl": slow_asl,
    "structkv": slow_structkv,
    "simlayerkv": lambda c: from_depth(c[0], lambda x: x > 0.9),
    "lighttransfer": lambda c: from_depth(range(len(c[0])), lambda layer: layer in chosen(c[0], round(len(c[0]) / 2))),
    "squeeze-attention": slow_squeeze,
    "llm-drop": lambda c: from_depth(range(len(c[0])), lambda layer: layer in chosen(c[0], round(len(c[0]) / 4))),
    "dash-update": lambda c: from_depth(c[0], lambda x: x < median(c[0]) / 2),
    "block-influence": lambda c: (
        from_depth(c[0], lambda x: x < median(c[0]) / 2, len(c[0]) - 2) if len(c[0]) > 1 else None
    ),
    "angular-distance": lambda c: next((k for k in range(1, len(c[0])) if c[0][k] < 0.2), None),
    "cka": slow_cka,
    "calm": slow_calm,
    "layerskip": lambda c: next((layer + 1 for layer, share in enumerate(c[0]) if share > 0.8), None),
    "duo-heads": slow_duo_heads,
    "duo-mass": lambda heads: tail_share([sum(row) / len(row) for row in heads], 0.05),
    "claa": lambda c: slow_oracle(c[0], 3),
    "oracle": lambda c: slow_oracle(c[0]),
    "leave-one-in": lambda c: tail_share(positive(c[0]), 0.05),
    "recache": lambda c: up_to_last([i for i in chosen(c[0], round(20 / 36 * len(c[0]))) if c[0][i] > 0]),
    "leave-one-out": lambda c: up_to_last([i for i, x in enumerate(c[0]) if x > 0.1 / len(c[0])]) or 1,
    "leave-one-out-sum": lambda c: tail(c[0], 0.1),
    "leave-one-out-top": lambda c: up_to_last(chosen(c[0], max(1, round(len(c[0]) / 4)))),
    "fisher-gate": lambda c: tail_share(c[0], 0.05),
}
# Exact in binary, so that sums do not hang on their order; few values, so that many are equal.
exact = st.one_of(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), st.integers(0, 128).map(lambda i: i / 128))
small = st.one_of(st.sampled_from([0.0, 1 / 1024]), st.integers(0, 64).map(lambda i: i / 1024))
signed = small.map(lambda x: x - 1 / 64)


@pytest.mark.parametrize("name", RULES)
@given(data=st.data())
def test_every_rule_is_its_formula(name, data):
    rule, n_layers = RULES[name], data.draw(st.integers(1, 34))
    # Sums are near their limits where values are small; what a layer helps may be below 0.
    value = data.draw(st.sampled_from([exact, small, *([signed] if "leave_one_in_nll" in rule.reads else [])]))
    columns = [data.draw(st.lists(value, min_size=n_layers, max_size=n_layers)) for _ in rule.reads]
    row = st.lists(value, min_size=HEADS, max_size=HEADS)
    heads = [data.draw(st.lists(row, min_size=n_layers, max_size=n_layers)) for _ in rule.reads_heads]
    curves = made_curves(
        n_layers,
        **dict(zip(rule.reads, columns, strict=True)),
        heads=dict(zip(rule.reads_heads, heads, strict=True)),
    )
    found = rule.cutoff(curves)
    assert found == SLOW[name](columns if rule.reads else heads[0] if heads else n_layers)
    assert found is None or (type(found) is int and 1 <= found <= n_layers)


def readers():
    return [name for name in RULES if name not in LOOK_AT_NOTHING]


@pytest.mark.parametrize("name", readers())
def test_a_rule_without_its_columns_finds_none(name):
    rule = RULES[name]
    assert rule.cutoff(made_curves(8)) is None
    assert rule.curve(made_curves(8)) is None


@pytest.mark.parametrize("name", readers())
@given(
    values=arrays(np.float64, (12, HEADS), elements=st.sampled_from([0.0, 0.1, 0.5, 1.0])), missing=st.integers(0, 12)
)
def test_numbers_that_are_missing_are_never_guessed(name, values, missing):
    """With the last layer, or all up to one, missing: nothing is known of what is cut."""
    rule = RULES[name]

    def find(values):
        columns = {column: values[:, i % HEADS] for i, column in enumerate(rule.reads)}
        return rule.cutoff(made_curves(12, **columns, heads=dict.fromkeys(rule.reads_heads, values)))

    whole = find(values)
    values[missing:] = NAN
    found = find(values)
    # What was found below is found still, where the rule looks upwards and stops.
    assert found is None or (name == "asl" and found == whole <= missing) or missing == 12


def test_rules_say_what_they_are():
    assert set(SLOW) == set(RULES)
    assert len({rule.title for rule in RULES.values()}) == len(RULES)
    for name, rule in RULES.items():
        for text in (rule.title, rule.source, rule.thresholds, rule.mapping, rule.blind):
            assert text.strip(), name
        assert bool(rule.reads or rule.reads_heads) == (name not in LOOK_AT_NOTHING)
        for field in fields(rule):
            with pytest.raises(FrozenInstanceError):
                setattr(rule, field.name, None)


@pytest.mark.parametrize("name", readers())
def test_every_rule_that_looks_has_a_curve(name):
    rule = RULES[name]
    values = np.random.default_rng(0).uniform(size=(9, HEADS))
    columns = {column: values[:, i] for i, column in enumerate(rule.reads)}
    curve = rule.curve(made_curves(9, **columns, heads=dict.fromkeys(rule.reads_heads, values)))
    assert curve.shape == (9,)
    assert np.isfinite(curve[1:]).all()


# --- By hand ---


def test_uptake_is_left_above_up_to_the_limit():
    assert asked("uptake", [9, 0.5, 0.125, 0.125, 0.0625]) == 3
    assert asked("uptake", [9, 0.5, 0.125, 0.125, 0.25]) == 5
    assert asked("uptake", [9, 0.1, 0.05, 0.02, 0.01]) == 1
    assert asked("uptake", [NAN, 0.5, 0.5, 0.0]) == 3  # layer 0 is never cut
    assert asked("uptake", [0.1, NAN, 0.5, 0.0]) == 3  # nor is what is below the cutoff
    assert asked("uptake", [0.1, NAN, 0.05, 0.0]) is None


def test_limits_of_our_rules_follow_the_goal():
    assert uptake_limit(0.1) == 0.2
    assert uptake_limit(0.4) == pytest.approx(0.4)
    assert uptake_limit(0) == 0
    values = [1, 1, 0.3, 0.15, 0.05]
    assert [asked("uptake", values, max_kl=goal) for goal in (0.0, 0.025, 0.1, 0.2, 1.0)] == [5, 4, 3, 3, 2]
    effects = [1, 1, 0.2, 0.1, 0.05]
    assert [asked("removal-effect", effects, max_kl=goal) for goal in (0.0, 0.025, 0.1, 0.4)] == [5, 4, 3, 2]


def test_asl_takes_the_first_layer_below_the_ratio():
    assert asked("asl", [NAN, NAN, 1, 0.4, 0.29, 0.1]) == 5
    assert asked("asl", [NAN, NAN, 1, 0.4, 0.31, 0.3]) is None
    assert asked("asl", [NAN, NAN, 1, NAN, 0.1, 0.1]) is None  # a sliding layer might have been the first
    assert asked("asl", [NAN, NAN, 1, 0.1, NAN, NAN]) == 4


def test_recall_of_four_layers_begins_with_the_fourth():
    assert asked("claa", [NAN, NAN, NAN, 0.2, 0.5, 0.8, 0.85]) == 7
    assert asked("claa", [NAN, NAN, NAN, 0.2, 0.5, 0.8, NAN]) is None
    assert asked("claa", [NAN, NAN, NAN]) is None
    assert asked("oracle", [NAN, 0.2, 0.5, 0.8, 0.84]) is None
    assert asked("oracle", [0.9, 0.2, 0.5, 0.8, 0.85]) == 1


def test_why_there_is_none_is_said():
    def why(name, values):
        assert asked(name, values) is None
        return RULES[name].why_none(made_curves(len(values), **{RULES[name].reads[0]: np.array(values)}))

    assert why("asl", [NAN, NAN, 1, 0.5]) == "finds none: no ratio is below 0.3"
    assert why("asl", [NAN] * 4) == (
        "finds none: prompts are too short for it, or the first eligible layer has a sliding window"
    )
    assert why("asl", [NAN, 1, NAN, 0.2]) == "finds none: layers with sliding windows are not judged"
    assert why("claa", [NAN, NAN, NAN, NAN, 0.5]) == "finds none: 1 of 5 layers have no recall"
    assert why("claa", [NAN, NAN, NAN, 0, 0]) == "finds none: no layer recalls any of the tokens"
    assert why("claa", [NAN, NAN]) == "finds none: the model has fewer than 4 layers"
    assert why("cka", [0, NAN, 0]) == "finds none: cka_to_final has no value in 1 of 3 layers"
    assert why("layerskip", [0, 0.1, 0.2]) == "finds none"


def test_structkv_leaves_the_ends_out():
    flat = np.ones(6)
    rule = RULES["structkv"]

    def pivot(variance):
        return rule.cutoff(made_curves(6, window_entropy=flat, window_top20=flat, window_variance=variance))

    assert pivot([0, 0, 0, 1, 1, 1]) == 4
    assert pivot([0, 9, 9, 9, 9, 9]) == 2
    assert pivot([0, 0, 0, 1, 1, 9]) == 4  # the last layer changes most, and does not count
    assert pivot(flat) is None
    assert pivot([0, 0, 0, 0, 0, 9]) is None


def test_the_group_of_the_least_important_layers_may_end_before_the_last():
    low, middle, high = 0.1, 0.5, 0.9
    assert asked("squeeze-attention", [low, middle, high, low, middle, high, high, high]) == 5
    assert asked("squeeze-attention", [low, middle, low, middle, high, high, low, low]) == 4
    assert asked("squeeze-attention", [low, middle, middle, high, high, low, low, low]) is None
    assert asked("squeeze-attention", [low, low, high, high]) is None  # two values make no three groups
    assert nearest_groups(np.array([0.0, 0.1, 1.0, 1.1, 5.0, 5.2]), 3) == [0.0, 1.0, 5.0]


def test_no_exit_is_full_depth():
    assert asked("calm", [0, 0.5, 0.89]) == 3
    assert asked("calm", [0, 0.9, 1]) == 2
    assert asked("cka", [1, 0.5, 0.5]) == 3
    assert asked("cka", [1, 1, 1]) == 1


def test_what_was_scaled_is_said():
    short, long = (made_curves(30, shortest=n) for n in (1029, 1030))
    assert RULES["simlayerkv"].remark(short) == "scaled to short prompts"
    assert RULES["lighttransfer"].remark(long) == ""
    assert RULES["asl"].remark(made_curves(17)) == "scaled to the depth"
    assert RULES["asl"].remark(made_curves(18)) == ""


def test_helpers_at_their_edges():
    assert first_tail_within(np.array([5.0]), 0) == 1
    assert first_tail_within(np.zeros(4), 0) == 1
    assert first_tail_within(np.array([0, 0, 0, np.inf]), 1) is None
    assert first_tail_share(np.zeros(4), 0.05) is None
    assert first_tail_share(np.array([1, NAN]), 0.05) is None
    assert largest(np.array([1, 2, 2, 2]), 2).tolist() == [False, True, True, False]
    assert not largest(np.ones(3), 0).any()
    assert first_from(np.array([False, True, True, False])) is None
    assert first_from(np.array([False, True, True, False]), 3) == 1
    assert first_from(np.ones(3, dtype=bool)) == 0
    assert first_from(np.ones(0, dtype=bool)) is None
