"""TransformerLens and nnsight see what the hooks see: on every family, on the embedded model, in their own objects."""

import gc
import sys

import numpy as np
import pytest
import torch

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    LoadedModel,
    ProjectedPolicy,
    SpeedPolicy,
    UserError,
    diagnose,
    generate,
    load_prompts,
    load_run,
)
from diagnostics.diagnosis.capture import make_capture, transformer_lens
from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.capture.nnsight import NNsightCapture, traced_over
from diagnostics.diagnosis.capture.transformer_lens import TransformerLensCapture, bridge_over
from diagnostics.models.identity import ModelIdentity
from diagnostics.models.loading import load_model
from tests.support.fingerprints import fingerprint
from tests.support.observe import observe
from tests.support.prompts import real_prompt
from tests.support.runs import run_command, save_tiny, write_prompts
from tests.support.tiny import FAMILIES, random_ids, tiny_model

TOLERANCE = 1e-4
OTHERS = {"transformer-lens": TransformerLensCapture, "nnsight": NNsightCapture}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


# Columns that a backend cannot measure, and leaves without numbers.
UNSEEN = {"transformer-lens": {"head_gate"}, "nnsight": set()}


def assert_same(backend, found, expected):
    """All columns of layers, heads and cutoffs that the backend measures, and the reference tokens."""
    assert torch.equal(found[0].reference_ids, expected[0].reference_ids)
    for table, wanted in zip(found[1:], expected[1:], strict=True):
        assert table.keys() == wanted.keys()
        for name, column in wanted.items():
            column = column * np.nan if name in UNSEEN[backend] else column
            np.testing.assert_allclose(table[name], column, atol=TOLERANCE, rtol=TOLERANCE, err_msg=name)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request):
    """A model, a prompt and its evidence, and what the hooks see of it with and without a given reference."""
    lm, prompt, given = tiny_model(request.param), random_ids(60), random_ids(9, seed=3)
    cases = [(None, {"n_anchors": 1, "evidence": ((8, 11),)}), (given, {"n_anchors": 3}), (given, {"n_anchors": 0})]
    return lm, [(prompt, reference, options, observe(lm, prompt, reference, **options)) for reference, options in cases]


@pytest.mark.parametrize("backend", OTHERS)
def test_all_columns_agree_with_the_hooks(case, backend):
    lm, cases = case
    before = fingerprint(lm.model)
    for prompt, reference, options, expected in cases:
        assert_same(backend, observe(lm, prompt, reference, capture=OTHERS[backend], **options), expected)
    # The last entry also lists what transformers remembers on the class of every model of this family.
    assert fingerprint(lm.model)[:-1] == before[:-1]


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize("n_prompt", [1, 2, 3, 9])
def test_short_prompts(backend, n_prompt):
    lm, prompt = tiny_model("llama"), random_ids(n_prompt)
    assert_same(backend, observe(lm, prompt, capture=OTHERS[backend]), observe(lm, prompt))


@pytest.mark.parametrize("backend", OTHERS)
def test_the_embedded_model(smollm, backend):
    prompt = real_prompt(smollm, 300)
    expected = observe(smollm, prompt, n_decode=16)
    assert_same(backend, observe(smollm, prompt, n_decode=16, capture=OTHERS[backend]), expected)


# --- Their own objects ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def objects(folder):
    """A bridge and an nnsight model as their users make them, and the model that both should be."""
    from nnsight import TransformersModel
    from transformer_lens.model_bridge import TransformerBridge

    lm = load_model(folder, device="cpu")
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=load_model(folder, device="cpu").model)
    traced = TransformersModel(str(folder), task="text-generation", dispatch=True)
    return lm, {"transformer-lens": bridge, "nnsight": traced}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(path, n_prompts=2, n_tokens=30)
    return load_prompts(str(path))


@pytest.mark.parametrize("backend", OTHERS)
def test_diagnose_takes_their_objects(objects, prompts, backend):
    lm, theirs = objects
    expected = diagnose(lm, prompts, decode_tokens=6)
    run = diagnose(theirs[backend], prompts, decode_tokens=6)
    assert run.manifest["identity"]["backend"] == backend
    assert run.manifest["identity"]["weight_hash"] == expected.manifest["identity"]["weight_hash"]
    for name, table in expected.tables.items():
        numbers = table.select_dtypes("number").drop(columns=UNSEEN[backend], errors="ignore")
        np.testing.assert_allclose(run.tables[name][numbers.columns], numbers, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("backend", OTHERS)
@pytest.mark.parametrize(
    "policy", [FullPolicy(), SpeedPolicy(2), SpeedPolicy(2, anchors=0), ProjectedPolicy(3)], ids=str
)
def test_policies_run_the_model_inside(objects, backend, policy):
    lm, theirs = objects
    ids = torch.tensor([random_ids(40)])
    expected = generate(lm, ids, policy=policy, max_new_tokens=6).token_ids
    inside = LoadedModel.wrap(theirs[backend])
    assert torch.equal(generate(inside, ids, policy=policy, max_new_tokens=6).token_ids, expected)
    with policy(theirs[backend]):
        found = inside.model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(found[:, 40:], expected)


def test_fastkv_needs_the_attention_interface(objects):
    _, theirs = objects
    with pytest.raises(UserError, match="computes attention itself"), FastKVPolicy(2)(theirs["transformer-lens"]):
        pass


# --- The command ---


@pytest.mark.parametrize("backend", OTHERS)
def test_the_command_takes_a_backend(folder, tmp_path, monkeypatch, capfd, backend):
    write_prompts(tmp_path / "prompts.jsonl", n_prompts=1, n_tokens=30)
    arguments = ("diagnose", folder, "--prompts", tmp_path / "prompts.jsonl", "--device", "cpu", "--decode-tokens", "5")
    runs = {}
    for name in ("hooks", backend):
        status, *_ = run_command(monkeypatch, capfd, *arguments, "--backend", name, "--out", tmp_path / name)
        assert status == 0
        runs[name] = load_run(tmp_path / name)
    assert runs[backend].manifest["identity"]["backend"] == backend
    for column in ("selectivity", "lens_kl", "kl", "mass_prompt"):
        np.testing.assert_allclose(runs[backend].array(column), runs["hooks"].array(column), atol=TOLERANCE)
    status, out, err = run_command(monkeypatch, capfd, *arguments, "--backend", backend, "--out", tmp_path / "hooks")
    assert (status, out) == (2, "")
    assert "holds a run already" in err


# --- Elsewhere ---


@pytest.fixture
def elsewhere(folder):
    """An nnsight model whose weights are not here."""
    from nnsight import TransformersModel

    return TransformersModel(str(folder), task="text-generation", tokenizer=load_model(folder, device="cpu").tokenizer)


def test_a_rehearsed_remote_run_is_the_same(objects, prompts):
    """nnsight ships the trace without this package, takes it up where the package cannot be imported, and runs it."""
    lm, theirs = objects
    expected = diagnose(lm, prompts, decode_tokens=6)
    run = diagnose(theirs["nnsight"], prompts, decode_tokens=6, remote="local")
    for name, table in expected.tables.items():
        numbers = table.select_dtypes("number")
        np.testing.assert_allclose(run.tables[name][numbers.columns], numbers, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_remote_run_needs_a_key(elsewhere, prompts, monkeypatch):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    with pytest.raises(UserError, match="needs a key of NDIF"):
        diagnose(elsewhere, prompts, remote=True)
    assert not elsewhere.dispatched


def test_a_service_that_does_not_answer_is_one_line(elsewhere, prompts, monkeypatch, tmp_path):
    from nnsight import CONFIG

    monkeypatch.setattr(CONFIG.API, "APIKEY", "key")
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(type(elsewhere), "_remoteable_model_key", lambda self: "model")
    with pytest.raises(UserError, match=r"remote run failed: .*refused") as caught:
        diagnose(elsewhere, prompts, remote=True, out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not elsewhere.dispatched
    assert not (tmp_path / "run").exists()


def test_only_nnsight_models_run_elsewhere(objects, prompts):
    for model in (objects[0], objects[1]["transformer-lens"]):
        with pytest.raises(UserError, match="remote runs need an nnsight model"):
            diagnose(model, prompts, remote=True)


# --- What cannot be served ---


def test_a_bridge_that_folded_its_weights_is_refused():
    bridge = bridge_over(tiny_model("llama", seed=4))
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    lm = tiny_model("llama")
    with pytest.raises(UserError, match="compatibility mode"):
        TransformerLensCapture(LoadedModel.wrap(bridge, lm.tokenizer))


def test_backends_that_do_not_fit_are_refused(objects):
    lm, theirs = objects
    bridge = LoadedModel.wrap(theirs["transformer-lens"])
    for backend in ("hooks", "nnsight"):
        with pytest.raises(UserError, match="a TransformerBridge computes attention itself"):
            make_capture(backend, bridge)
    with pytest.raises(UserError, match="'magic' is not one of: hooks, transformer-lens, nnsight"):
        make_capture("magic", lm)
    with pytest.raises(UserError, match="not a transformers model"):
        LoadedModel.wrap(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="without a tokenizer"):
        LoadedModel.wrap(lm.model)


def test_prompts_that_do_not_fit_eager_attention_are_refused(monkeypatch):
    monkeypatch.setattr(transformer_lens, "free_memory", lambda device: 1 << 16)
    with pytest.raises(UserError, match="use the hooks backend"):
        observe(tiny_model("llama"), random_ids(100), capture=TransformerLensCapture)
    observe(tiny_model("llama"), random_ids(20), capture=TransformerLensCapture)


@pytest.mark.parametrize(("backend", "package"), [("transformer-lens", "transformer_lens"), ("nnsight", "nnsight")])
def test_without_the_library_the_install_line_is_given(monkeypatch, backend, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    lm = tiny_model("llama")
    with pytest.raises(UserError, match=rf"pip install 'speed-diagnostics\[{backend}\]'"):
        make_capture(backend, lm)
    observe(lm, random_ids(9), capture=HooksCapture)


# --- Memory ---


@pytest.mark.parametrize("make", [bridge_over, traced_over])
def test_a_model_made_for_a_library_shares_the_weights(make):
    lm = tiny_model("llama")
    inside = LoadedModel.wrap(make(lm), lm.tokenizer).model
    own = {p.data_ptr() for p in lm.model.parameters()}
    assert {p.data_ptr() for p in inside.parameters()} <= own
    assert ModelIdentity.of(inside).weights == lm.weight_hash


@pytest.mark.parametrize("backend", ["hooks", *OTHERS])
def test_memory_does_not_grow(backend):
    """Two models of one process, twenty diagnoses: as many tensors are alive after the last as after the fourth."""
    captures = [make_capture(backend, tiny_model(family)) for family in ("llama", "gpt2")]

    def alive():
        gc.collect()
        return sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor)

    counts = []
    for repetition in range(20):
        capture = captures[repetition % 2]
        observe(capture.lm, random_ids(30, seed=repetition), n_decode=4, capture=lambda lm, own=capture: own)
        if repetition in (3, 11, 19):
            counts.append(alive())
    assert len(set(counts)) == 1, counts


def test_a_bridge_reads_the_tokens_that_its_model_reads(tmp_path):
    """TransformerLens makes tokenizers add BoS; this model's own does not."""
    from transformer_lens.model_bridge import TransformerBridge

    from diagnostics.prompts.prompt import Prompt, PromptSet

    folder = save_tiny(tmp_path / "model")
    prompts = PromptSet((Prompt("p", text="w5 w6 w7 w8 w9", reference="w7 w8"),), "set")
    stock = diagnose(load_model(folder, device="cpu"), prompts)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    bridged = diagnose(bridge, prompts)
    assert bridged.prompts["n_prompt"][0] == stock.prompts["n_prompt"][0] == 5
    np.testing.assert_allclose(bridged.array("kl"), stock.array("kl"), atol=TOLERANCE, rtol=TOLERANCE)
    bridge.tokenizer.init_kwargs["name_or_path"] = str(tmp_path / "gone")
    with pytest.raises(UserError, match=r"use LoadedModel\.wrap\(bridge, tokenizer\)"):
        diagnose(bridge, prompts)
