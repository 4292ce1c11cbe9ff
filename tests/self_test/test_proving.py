"""How often a proof is looked up: at each entry, once per piece of work, and anew where a model changed."""

import pytest
import torch

from diagnostics import FullPolicy, SpeedPolicy, UserError, decode, prefill
from diagnostics.self_test import looked_up_once, proving
from tests.support.tiny import random_ids, tiny_model

IDS = torch.tensor([random_ids(9)])


@pytest.fixture
def model():
    return tiny_model("llama").model


@pytest.fixture
def lookups(monkeypatch):
    """The uses whose proofs were looked up, one after the other."""
    uses, key_of = [], proving.key_of

    def counted(model, **options):
        uses.append(options["use"])
        return key_of(model, **options)

    monkeypatch.setattr(proving, "key_of", counted)
    return uses


def work(model):
    _, cache = prefill(model, IDS, policy=SpeedPolicy(2))
    decode(model, IDS[:, :1], cache)


def test_each_entry_looks_the_proof_up(model, lookups):
    work(model)
    assert lookups == ["policies"] * 2


def test_a_piece_of_work_looks_it_up_once(model, lookups):
    with looked_up_once():
        work(model)
        with looked_up_once():
            work(model)
        work(model)
    assert lookups == ["policies"]
    work(model)
    assert len(lookups) == 3


def test_other_models_types_and_implementations_are_others(model, lookups):
    with looked_up_once():
        work(model)
        work(tiny_model("llama").model)
        assert len(lookups) == 2
        model.double()
        work(model)
        assert len(lookups) == 3
        model.float().set_attn_implementation("eager")
        work(model)
    assert len(lookups) == 4


def test_a_setting_that_changed_between_two_pieces_of_work_counts(model, lookups, monkeypatch):
    """The verdict of the one is not that of the other: the changed model is refused."""

    @looked_up_once()
    def piece():
        with FullPolicy()(model):
            pass

    piece()
    for layer in model.model.layers:
        # A token sees the one after it: what the policies' own masks hide, the stock model shows.
        forward = layer.self_attn.forward
        layer.self_attn.seen_ahead = 1  # a setting, as the lookup sees it
        monkeypatch.setattr(
            layer.self_attn, "forward", lambda hidden, *a, f=forward, **k: f(hidden + hidden.roll(-1, 1), *a, **k)
        )
    with pytest.raises(UserError, match="cannot be run under a policy"):
        piece()
    assert len(lookups) == 2
