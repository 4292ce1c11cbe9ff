"""What observers are shown of the context rows equals what the residual gains, in all families and backends."""

import pytest

from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.capture.nnsight import NNsightCapture
from diagnostics.diagnosis.capture.transformer_lens import TransformerLensCapture
from diagnostics.diagnosis.observers import Measured
from tests.support.reference import Reference
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model

CAPTURES = {"hooks": HooksCapture, "transformer-lens": TransformerLensCapture, "nnsight": NNsightCapture}
N_PROMPT, N_DECODE = 40, 5

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


class Keep:
    """Keeps copies of the context rows of every layer."""

    def __init__(self):
        self.rows = []

    def on_context(self, rows):
        assert rows.layer == len(self.rows)
        self.rows.append([rows.residual_in.clone(), rows.residual_out.clone(), rows.attention.clone()])

    def on_decode(self, rows):
        pass

    def on_outcome(self, outcome):
        pass

    def measured(self):
        return Measured()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    lm, ids = tiny_model(request.param), random_ids(N_PROMPT + N_DECODE, seed=6)
    reference = Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids[:-1], N_PROMPT, 1)
    assert len(reference.attention_added) == N_LAYERS
    return lm, ids, reference


@pytest.mark.parametrize("generated", [False, True], ids=["given", "generated"])
@pytest.mark.parametrize("backend", CAPTURES)
def test_context_rows(case, backend, generated):
    lm, ids, reference = case
    kept = Keep()
    given = None if generated else ids[N_PROMPT:]
    CAPTURES[backend](lm).run(ids[:N_PROMPT], given, [kept], n_decode=N_DECODE, n_anchors=1)
    assert len(kept.rows) == N_LAYERS
    for layer, shown in enumerate(kept.rows):
        expected = reference.residual[layer], reference.residual[layer + 1], reference.attention_added[layer]
        for ours, theirs in zip(shown, expected, strict=True):
            theirs = theirs[: N_PROMPT - 1]
            assert ours.shape == theirs.shape
            assert float((ours.double() - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("backend", CAPTURES)
def test_a_prompt_of_one_token_has_no_context(backend):
    lm, kept = tiny_model("llama"), Keep()
    CAPTURES[backend](lm).run([1], [5, 6], [kept], n_decode=2, n_anchors=0)
    assert not kept.rows
