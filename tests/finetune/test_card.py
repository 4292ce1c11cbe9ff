"""The model card: its header is YAML whatever the model is called."""

import yaml

from diagnostics.finetune.card import model_card
from tests.support.finetunings import make_finetuning


def header(text):
    _, about, _ = text.split("---\n", 2)
    return yaml.safe_load(about)


def test_the_header_holds_any_name():
    name = "a: 'b' #c"
    assert header(model_card(make_finetuning(anchors=1), name)) == {
        "base_model": name,
        "library_name": "peft",
        "tags": ["speed", "shallow-prefill"],
    }


def test_all_weights_have_no_library():
    assert "library_name" not in header(model_card(make_finetuning(anchors=1, method="full"), "base"))
