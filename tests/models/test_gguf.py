"""GGUF files: all that they say of the model is in it, or they are refused; they are converted once."""

import math
import threading

import numpy as np
import pytest
import torch

from diagnostics import UserError, load_model
from diagnostics.models import converted, gguf
from tests.support.gguf_files import BASE, HEAD_DIM, N_FREQUENCIES, WIDTH, write_gguf
from tests.support.runs import contents

pytest.importorskip("gguf")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEED_DIAGNOSTICS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PLAIN = BASE ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)


def llama3(factor):
    """Factors by the definition: wavelengths over 8192 are stretched, those below 2048 kept, between them mixed."""
    waves = 2 * math.pi / PLAIN
    share = np.clip((8192 / waves - 1) / 3, 0, 1)
    return PLAIN / (PLAIN * share + PLAIN / factor * (1 - share))


def frequencies(lm):
    rotary = lm.model.model.rotary_emb
    return rotary.inv_freq.double().numpy(), rotary.attention_scaling


def test_plain(tmp_path):
    lm = load_model(write_gguf(tmp_path / "m.gguf"))
    np.testing.assert_allclose(frequencies(lm)[0], PLAIN, rtol=1e-5)
    assert lm.name == str(tmp_path / "m.gguf")
    assert lm.tokenizer.decode(lm.tokenizer("the sea")["input_ids"], skip_special_tokens=True) == "the sea"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_factors_of_llama_3(tmp_path, factor):
    lm = load_model(write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": llama3(factor)}))
    assert lm.model.config.rope_parameters["rope_type"] == "llama3"
    found, scaling = frequencies(lm)
    np.testing.assert_allclose(found, PLAIN / llama3(factor), rtol=1e-5)
    assert scaling == 1


def test_any_other_factors(tmp_path):
    factors = np.array([1, 1, 1, 2, 4, 8, 8, 8.0])
    lm = load_model(write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors}))
    lm.model(torch.tensor([[5, 6, 7]]))
    found, scaling = frequencies(lm)
    np.testing.assert_allclose(found, PLAIN / factors, rtol=1e-5)
    assert scaling == 1


def test_factors_of_one_change_nothing(tmp_path):
    lm = load_model(write_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.ones(N_FREQUENCIES)}))
    assert lm.model.config.rope_parameters["rope_type"] == "default"


def test_linear_scaling(tmp_path):
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    found, scaling = frequencies(load_model(write_gguf(tmp_path / "m.gguf", keys=keys)))
    np.testing.assert_allclose(found, PLAIN / 4, rtol=1e-5)
    assert scaling == 1


def test_yarn(tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 2048}
    found, scaling = frequencies(load_model(write_gguf(tmp_path / "m.gguf", keys=keys)))
    # By the paper: dimensions that turn more than 32 times in 2048 positions are kept, those below once are divided.
    ends = [HEAD_DIM * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(BASE)) for turns in (32, 1)]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), HEAD_DIM - 1)
    divided = np.clip((np.arange(N_FREQUENCIES) - low) / (high - low), 0, 1)
    np.testing.assert_allclose(found, PLAIN / 4 * divided + PLAIN * (1 - divided), rtol=1e-5)
    assert scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize(
    ("keys", "tensors", "said"),
    [
        ({"rope.scaling.type": "longrope"}, {}, "its rotary scaling 'longrope' is not understood"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_beta_fast": 8.0}, {}, "yarn_beta_fast' is not understood"),
        ({"rope.scaling.attn_factor": 1.2}, {}, "attn_factor' is not understood"),
        ({}, {"rope_factors_long.weight": np.ones(8)}, "not both"),
        ({"rope.dimension_count": 8}, {}, "8 of its weights are missing or of another size"),
        ({"attention.sliding_window": 16}, {}, "leaves out its key 'attention.sliding_window'"),
        ({"attention.key_length": 32}, {}, "'attention.key_length' is 32, the model's is 16"),
        ({"logit_scale": 0.5}, {}, "leaves out its key 'logit_scale'"),
        ({"attn_logit_softcapping": 50.0}, {}, "leaves out its key 'attn_logit_softcapping'"),
        ({"something.new": 3}, {}, "leaves out its key 'something.new'"),
        ({}, {"blk.0.attn_q.bias": np.ones(WIDTH)}, "1 of its tensors have no place .*blk.0.attn_q.bias"),
        ({}, {"blk.2.attn_norm.weight": np.ones(WIDTH)}, "1 of its tensors have no place .*blk.2"),
        ({}, {"blk.0.attn_q_norm.weight": np.ones(HEAD_DIM)}, "have no place"),
    ],
)
def test_what_would_be_lost_is_refused_by_name(tmp_path, cache, keys, tensors, said):
    file = write_gguf(tmp_path / "m.gguf", keys=keys, tensors=tensors)
    with pytest.raises(UserError, match=said) as caught:
        load_model(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in contents(cache) if "/" in path] == []


def test_keys_that_ask_for_nothing(tmp_path):
    keys = {"logit_scale": 1.0, "attention.causal": True, "expert_count": 0, "attention.sliding_window": 8192}
    keys |= {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scaling.finetuned": False}
    load_model(write_gguf(tmp_path / "m.gguf", keys=keys))


def test_it_is_converted_once_and_anew_where_its_content_changed(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf")
    first = load_model(file)
    made = []
    write = gguf.write_converted
    monkeypatch.setattr(gguf, "write_converted", lambda *args: made.append(args) or write(*args))
    again = load_model(file)
    copy = load_model(file.rename(tmp_path / "copy.gguf"))
    assert made == []
    assert {first.identity().digest} == {again.identity().digest, copy.identity().digest}
    other = load_model(write_gguf(file, seed=1))
    assert len(made) == 1
    assert other.weight_hash != first.weight_hash


def test_a_conversion_that_was_killed_leaves_nothing_to_be_taken_for_one(tmp_path, cache, monkeypatch):
    file = write_gguf(tmp_path / "m.gguf")

    def killed(source, folder, name):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "write_converted", killed)
        with pytest.raises(KeyboardInterrupt):
            load_model(file)
    assert not list(cache.glob("gguf/*"))
    load_model(file)


def test_two_at_once(tmp_path, cache):
    file = write_gguf(tmp_path / "m.gguf")
    folders = []
    together = threading.Barrier(2)

    def convert(folder):
        together.wait(20)
        (folder / "config.json").write_text("{}")

    def start():
        folders.append(converted.convert_once(cache / "gguf" / "x", convert, "m", "1 GB"))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders == [cache / "gguf" / "x"] * 2
    assert [path.name for path in (cache / "gguf").iterdir()] == ["x"]
    assert file.exists()
