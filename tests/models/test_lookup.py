"""Models that are not there, and what is known of a model before its weights are read."""

import json
import time
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from diagnostics import FastKVPolicy, SpeedPolicy, UserError, load_model
from diagnostics.models import embedded
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.models.loading import check_model
from diagnostics.models.lookup import hub_problem
from tests.support.runs import save_tiny

OFFLINE = r"offline \(HF_HUB_OFFLINE=1\) and not in the cache"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working folder with runs, a model and an evaluation; the hub is off."""
    for name in ("runs/first", "runs/second", "runs/quality"):
        (tmp_path / name).mkdir(parents=True)
        file = "evaluation.json" if name.endswith("quality") else "manifest.json"
        (tmp_path / name / file).write_text("{}")
    save_tiny(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/frist", rf"^there is no folder 'runs/frist'; did you mean 'runs/first'\? \(.*: {OFFLINE}\)$"),
        ("runs/other", r"^there is no folder 'runs/other'; models and runs there: first, second \("),
        ("models/tiny/x", r"^there is no model folder 'models/tiny/x'"),
        ("path/to/model", r"^there is no model folder 'path/to/model'; 'path/to' is not there either$"),
        ("./models/tinny", r"^there is no model folder './models/tinny'; did you mean 'models/tiny'\?$"),
        ("secnd", rf"{OFFLINE}; did you mean 'runs/second'\?$"),
        ("smollm2-135m-instuct", rf"; did you mean '{EMBEDDED_MODEL}'\? \({OFFLINE}\)$"),
        ("some/model", rf"^model 'some/model' cannot be loaded: {OFFLINE}$"),
        ("no name!", r"it is no folder here, and no name that the hub can have$"),
        ("runs/first", r"^folder 'runs/first' holds no model: it is the folder of a run$"),
        ("runs/quality", r"it is the folder of an evaluation$"),
        ("tiny.gguf", r"^there is no GGUF file 'tiny.gguf'$"),
    ],
)
@pytest.mark.parametrize("call", [check_model, load_model])
def test_the_local_cause_is_said(here, call, name, said):
    with pytest.raises(UserError, match=said) as caught:
        call(name)
    assert "\n" not in str(caught.value)
    assert "huggingface.co" not in str(caught.value)


def test_an_adapter_names_what_its_base_lacks(here):
    pytest.importorskip("peft")
    folder = here / "models" / "adapter"
    folder.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "models/tinny"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for call in (check_model, load_model):
        with pytest.raises(UserError, match=r"base_model_name_or_path: there is no folder .* 'models/tiny'"):
            call("models/adapter")
    settings["base_model_name_or_path"] = "models/tiny"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    outline = check_model("models/adapter", dtype="bfloat16")
    assert (outline.name, outline.n_layers, outline.dtype) == ("models/adapter", 5, torch.bfloat16)


def test_a_hub_out_of_reach_is_known_at_once(here, monkeypatch):
    """transformers would try five times, for half a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    with pytest.raises(UserError, match="loaded: not in the cache, and the hub cannot be reached"):
        check_model("some/model")
    assert time.perf_counter() - started < 10


def raised(error):
    """As transformers passes it on."""
    try:
        try:
            raise error
        except Exception as cause:
            raise OSError("see https://huggingface.co/docs") from cause
    except OSError as passed:
        return passed


RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "it is gated; .*hf auth login"),
        (
            errors.RepositoryNotFoundError("no", response=RESPONSE),
            "the hub has no model of this name, or a private",
        ),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "no `revision` 'v7'"),
        (errors.LocalEntryNotFoundError("no"), "revision 'v7' is not in the cache"),
    ],
)
def test_answers_of_the_hub(here, error, said):
    problem = hub_problem(raised(error), "some/model", "v7")
    assert str(problem).startswith("model 'some/model' cannot be loaded: ")
    with pytest.raises(UserError, match=said):
        raise problem


def test_other_errors_are_none_of_the_hub():
    assert hub_problem(raised(ValueError("no")), "some/model", None) is None


# --- Before the weights ---


def test_a_model_is_checked_without_its_weights(here, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("weights"))
    (here / "models" / "tiny" / "model.safetensors").write_bytes(b"")
    outline = check_model(here / "models" / "tiny", device="cpu")
    assert (outline.n_layers, outline.n_heads, outline.max_positions) == (5, 4, 512)
    assert (outline.device, outline.dtype) == (torch.device("cpu"), torch.float32)
    outline.require([SpeedPolicy(5), FastKVPolicy()])
    with pytest.raises(UserError, match="speed:6 does not fit: the model has 5 layers"):
        outline.require([SpeedPolicy(5), SpeedPolicy(6)])
    save_tiny(here / "models" / "sliding", "gemma2")
    with pytest.raises(UserError, match="not defined for sliding-window layers"):
        check_model("models/sliding").require([FastKVPolicy()])
    for options, said in (({"device": "gpu"}, "device 'gpu'"), ({"dtype": "half"}, "dtype 'half'")):
        for call in (check_model, load_model):
            with pytest.raises(UserError, match=said):
                call("models/tiny", **options)


def test_a_folder_without_a_tokenizer_is_refused_before_its_weights(here):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (here / "models" / "tiny" / file).unlink()
    with pytest.raises(UserError, match="holds no tokenizer: it has no tokenizer"):
        check_model("models/tiny")


def test_policies_of_others_are_left_to_loading(here):
    class Curious:
        def check(self, anatomy):
            assert anatomy.layers

    check_model("models/tiny").require([Curious()])


def test_what_only_loading_tells_is_open(here, monkeypatch):
    """The built-in model before its first use, which converts it."""
    monkeypatch.setenv("SPEED_DIAGNOSTICS_CACHE", str(here / "cache"))
    found = SimpleNamespace(submodule_search_locations=[str(here)])
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: found)
    outline = check_model()
    assert (outline.name, outline.n_layers) == (EMBEDDED_MODEL, None)
    outline.require([SpeedPolicy(999)])
    assert not (here / "cache").exists()
