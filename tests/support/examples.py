"""How many cases are tried: some in `make test`, all in `make test-slow`."""

import pytest
from hypothesis import settings

AT_LENGTH = "at-length"


def examples(number: int, **more) -> settings:
    """Draw ``number`` examples under ``--hypothesis-profile=at-length``, and else a quarter of them, at least ten."""
    at_length = settings.get_current_profile_name() == AT_LENGTH
    return settings(deadline=None, max_examples=number if at_length else max(10, number // 4), **more)


def mostly_slow(cases, *quick):
    """Return parameters of which all but the ``quick`` are marked slow: they go through the same code again."""
    assert all(case in cases for case in quick)
    return [
        case if case in quick else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
