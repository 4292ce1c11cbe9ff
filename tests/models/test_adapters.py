"""LoRA adapter folders: merged they are the adapter beside its base; everything else is refused in one line."""

import json
import shutil
import sys
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from diagnostics import UserError, load_model
from diagnostics.finetune import Settings
from diagnostics.models import adapters
from diagnostics.models.embedded import EMBEDDED_MODEL
from tests.support.policy_cases import assert_close
from tests.support.runs import save_tiny
from tests.support.tiny import COMMON, random_ids, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
IDS = torch.tensor([random_ids(24)])


def save_adapter(folder, base, *, scale=0.05, wrote=None, **settings):
    """Save a random adapter of rank 2 for a base, both of its factors other than zero."""
    settings = {"target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False} | settings
    torch.manual_seed(7)
    wrapped = get_peft_model(load_model(base).model, LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn_like(parameter) * scale
                parameter.copy_(noise if "lora_" in name and "magnitude" not in name else parameter + noise)
    wrapped.peft_config["default"].base_model_name_or_path = str(wrote or base)
    wrapped.save_pretrained(folder)
    return folder


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def unmerged(folder, base, dtype="float32"):
    return PeftModel.from_pretrained(load_model(base, dtype=dtype).model, folder).eval()


def edit(folder, **changes):
    path = folder / adapters.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(change):
    def damage(folder):
        tensors = load_file(folder / adapters.WEIGHTS)
        change(tensors)
        save_file(tensors, folder / adapters.WEIGHTS)

    return damage


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Folders of tiny models by family, made when first asked for."""
    root, made = tmp_path_factory.mktemp("bases"), {}
    return lambda family: (
        made.setdefault(family, None) or made.update({family: save_base(root, family)}) or made[family]
    )


def save_base(root, family):
    if family != "tied":
        return save_tiny(root / family, family)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **COMMON, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / family)
    tiny_tokenizer().save_pretrained(root / family)
    return root / family


@pytest.fixture(scope="module")
def saved(bases, tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("adapter") / "plain", bases("llama"))


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


# --- What is merged ---

VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "layers_to_transform": [1, 3]},
    "all-linear": {"target_modules": "all-linear", "lora_dropout": 0.5, "task_type": "CAUSAL_LM"},
    "head": {"modules_to_save": ["lm_head"]},
    "norms": {"modules_to_save": ["input_layernorm"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
}


@pytest.mark.parametrize(
    ("family", "variant"),
    [
        *(("llama", variant) for variant in VARIANTS),
        *(("tied", variant) for variant in ("plain", "head", "embeddings")),
        *((family, v) for family in ("gpt2", "qwen3", "gemma2", "phi3", "gpt_oss") for v in ("all-linear", "dora")),
        ("qwen2", "bias"),
        ("gpt_oss", "parameters"),
    ],
)
def test_merged_model_equals_the_adapter_beside_its_base(bases, tmp_path, family, variant):
    settings = {
        "bias": {"bias": "all", "lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        "parameters": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    } | VARIANTS
    kwargs = settings[variant] | ({"target_modules": "all-linear"} if variant == "dora" else {})
    folder = save_adapter(tmp_path / "adapter", bases(family), **kwargs)
    lm = load_model(folder)
    expected = logits(unmerged(folder, bases(family)))
    assert_close(logits(lm.model), expected, 3e-5)
    assert (expected - logits(load_model(bases(family)).model)).abs().max() > 0.05


def test_what_is_loaded_is_a_plain_model(bases, saved):
    lm, base = load_model(saved), load_model(bases("llama"))
    assert (lm.name, lm.library) == (str(saved), "transformers")
    assert type(lm.model) is type(base.model)
    assert [(name, p.shape, p.dtype, p.requires_grad) for name, p in lm.model.named_parameters()] == [
        (name, p.shape, p.dtype, p.requires_grad) for name, p in base.model.named_parameters()
    ]
    assert [type(m) for m in lm.model.modules()] == [type(m) for m in base.model.modules()]
    assert not any(m.training for m in lm.model.modules())
    assert not hasattr(lm.model, "peft_config")
    assert lm.tokenizer.get_vocab() == base.tokenizer.get_vocab()
    assert lm.weight_hash != base.weight_hash
    assert lm.weight_hash == load_model(saved).weight_hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", ["all-linear", "head"])
def test_weights_in_half_precision_are_rounded_once(bases, tmp_path, dtype, variant):
    folder = save_adapter(tmp_path / "adapter", bases("llama"), **VARIANTS[variant])
    tensors = load_file(folder / adapters.WEIGHTS)
    exact = load_model(bases("llama"), dtype=dtype).model.double().state_dict()
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if ".lora_A." in name:
            # alpha 8 over rank 2
            delta = 4 * tensors[key.replace("lora_A", "lora_B")].double() @ tensor.double()
            exact[name.replace("lora_A.", "")] += delta
        elif ".lora_B." not in name:
            exact[name] = tensor.double()
    merged = load_model(folder, dtype=dtype).model.state_dict()
    for name, value in exact.items():
        assert merged[name].dtype == getattr(torch, dtype)
        # One in many thousand sums lies between two numbers as near as float32 can tell.
        assert (merged[name] != value.to(merged[name].dtype)).float().mean() < 1e-3, name


def test_embedded_model_is_named_as_a_base(smollm, tmp_path):
    folder = save_adapter(tmp_path / "adapter", EMBEDDED_MODEL, scale=0.02)
    assert json.loads((folder / adapters.CONFIG).read_text())["base_model_name_or_path"] == EMBEDDED_MODEL
    lm = load_model(folder)
    expected = logits(unmerged(folder, EMBEDDED_MODEL))
    assert_close(logits(lm.model), expected, 2e-5)
    assert (expected - logits(smollm.model)).abs().max() > 0.05
    assert lm.tokenizer.chat_template == smollm.tokenizer.chat_template


def test_base_beside_the_adapter_and_in_the_working_folder(bases, tmp_path, monkeypatch):
    shutil.copytree(bases("llama"), tmp_path / "out" / "base")
    folder = save_adapter(tmp_path / "out" / "adapter", bases("llama"), wrote="../base")
    # A folder of that name that holds no model is not in the way.
    for place in ("elsewhere/base", "elsewhere/here"):
        (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    found = load_model(folder).weight_hash
    monkeypatch.chdir(tmp_path / "out" / "adapter")
    assert load_model(".").weight_hash == found
    # Another model of that name in the working folder comes first.
    shutil.copytree(bases("qwen3"), tmp_path / "elsewhere" / "base", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    assert adapters.read_adapter("it", folder).base == "../base"
    assert load_model("../base").model.config.model_type == "qwen3"


def test_options_and_revision_are_for_the_base(folder, monkeypatch):
    import diagnostics.models.loading

    asked = []
    original = diagnostics.models.loading.load_model

    def load(model, **options):
        asked.append((model, options))
        return original(model, **options)

    monkeypatch.setattr(diagnostics.models.loading, "load_model", load)
    options = {"device": "cpu", "dtype": "bfloat16", "trust_remote_code": False}
    edit(folder, revision="v1")
    original(folder, **options)
    original(folder, **options, revision="v2")
    base = json.loads((folder / adapters.CONFIG).read_text())["base_model_name_or_path"]
    assert asked == [(base, options | {"revision": "v1"}), (base, options | {"revision": "v2"})]


def test_loading_warns_of_nothing_and_asks_no_hub(bases, tmp_path, monkeypatch):
    folder = save_adapter(tmp_path / "adapter", bases("tied"), **VARIANTS["embeddings"])
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm = load_model(folder)
    assert not lm.model.config.tie_word_embeddings


def test_settings_of_other_programs_change_nothing(folder):
    before = load_model(folder).weight_hash
    edit(
        folder,
        auto_mapping={"base_model_class": "Popen", "parent_library": "subprocess"},
        peft_version="9.9",
        of_a_later_peft=None,
        merge_weights=False,
    )
    assert load_model(folder).weight_hash == before


# --- What is refused ---


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / adapters.CONFIG).write_text("{"), "adapter_config.json is damaged: not valid JSON"),
        (lambda f: (f / adapters.CONFIG).write_text("[]"), "damaged: must be a JSON object, not a list"),
        (lambda f: (f / adapters.CONFIG).write_bytes(b"\xff\xfe"), "damaged: .*codec"),
        (lambda f: edit(f, base_model_name_or_path=None), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path=""), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path=3), "names no base model"),
        (lambda f: edit(f, revision=3), "names no base model"),
        (lambda f: edit(f, base_model_name_or_path="/nowhere/base"), "no model folder '/nowhere/base'"),
        (lambda f: edit(f, base_model_name_or_path="."), "its base '.*' is itself an adapter"),
        (lambda f: edit(f, base_model_name_or_path="../adapter"), "its base '.*/../adapter' is itself an adapter"),
        (lambda f: edit(f, base_model_name_or_path=str(f)), "is itself an adapter"),
        (lambda f: edit(f, base_model_name_or_path="org/name"), "base_model_name_or_path: model 'org/name' cannot be"),
        (lambda f: edit(f, peft_type="PROMPT_TUNING"), "its method is 'PROMPT_TUNING', and only 'LORA'"),
        (lambda f: edit(f, peft_type="os"), "its method is 'os'"),
        (lambda f: edit(f, peft_type=None), "its method is None"),
        (lambda f: edit(f, task_type="SEQ_CLS"), "another task: 'SEQ_CLS'"),
        (
            lambda f: edit(f, init_lora_weights="pissa"),
            r"changes the weights of its base \(init_lora_weights='pissa'\)",
        ),
        (lambda f: edit(f, init_lora_weights=["x"]), "changes the weights of its base"),
        (lambda f: edit(f, megatron_config={"a": 1}, megatron_core="antigravity"), "sets 'megatron_config'"),
        (lambda f: edit(f, trainable_token_indices=[5]), "sets 'trainable_token_indices'"),
        (lambda f: edit(f, layer_replication=[[0, 2], [1, 5]]), "sets 'layer_replication'"),
        (lambda f: edit(f, alora_invocation_tokens=[5]), "sets 'alora_invocation_tokens'"),
        (lambda f: edit(f, runtime_config={"ephemeral_gpu_offload": True}), "sets 'runtime_config'"),
        (lambda f: edit(f, of_a_later_peft=True), "sets 'of_a_later_peft', which is not plain LoRA"),
        (lambda f: edit(f, target_modules=["nonsense"]), "nonsense"),
        (lambda f: edit(f, target_modules="(("), "cannot be merged: "),
        (lambda f: edit(f, r="two"), "cannot be merged: "),
        (lambda f: edit(f, r=0), "positive integer"),
        (lambda f: edit(f, r=3), "size mismatch"),
        (lambda f: edit(f, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]), "lacks 10 of its weights"),
        (lambda f: edit(f, use_dora=True), "lacks 15 of its weights"),
        (lambda f: edit(f, modules_to_save=["lm_head"]), "lacks weights: base_model.model.lm_head.weight"),
        (lambda f: edit(f, target_modules=["q_proj"]), "20 of its weights have no place"),
        (edit_weights(lambda t: t.pop(min(t))), "lacks 1 of its weights"),
        (edit_weights(lambda t: t.update(other=torch.ones(2))), r"1 of its weights have no place \(other, ...\)"),
        (edit_weights(lambda t: t.update({min(t): torch.ones(2, 2)})), "size mismatch"),
        (lambda f: (f / adapters.WEIGHTS).write_bytes(b"garbage" * 99), "header"),
        (lambda f: (f / adapters.WEIGHTS).write_bytes(b""), "header"),
        (lambda f: (f / adapters.WEIGHTS).unlink(), "has no adapter_model.safetensors"),
        (lambda f: (f / adapters.WEIGHTS).rename(f / adapters.PICKLE), "has pickled weights only"),
        (lambda f: shutil.copy(f / adapters.CONFIG, f / "config.json"), "holds an adapter beside a model"),
    ],
)
def test_adapters_that_cannot_be_merged(folder, damage, said, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    damage(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 400 + 2 * len(str(folder))
    assert "antigravity" not in sys.modules


def test_adapter_of_another_model_is_refused(bases, folder):
    edit(folder, base_model_name_or_path=str(bases("gpt2")))
    with pytest.raises(UserError, match=f"adapter '{folder}' cannot be merged: .*q_proj"):
        load_model(folder)


def test_adapters_on_adapters_are_refused(saved, folder):
    edit(folder, base_model_name_or_path=str(saved))
    with pytest.raises(UserError, match=f"its base '{saved}' is itself an adapter"):
        load_model(folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Put folders on a hub, of which all was fetched before, and return the snapshot that is made of them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def publish(name, *folders, revision="main", commit="a" * 40):
        repository = tmp_path / f"models--{name.replace('/', '--')}"
        for folder in folders:
            shutil.copytree(folder, repository / "snapshots" / commit, dirs_exist_ok=True)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return repository / "snapshots" / commit

    return publish


def test_an_adapter_on_the_hub(bases, saved, hub, tmp_path):
    """A revision is the adapter's; that of the base is in its file."""
    hub("org/base", bases("llama"), revision="v1", commit="b" * 40)
    edit(hub("org/name", saved), base_model_name_or_path="org/base", revision="v1")
    other = save_adapter(tmp_path / "other", bases("llama"), target_modules=["q_proj"])
    edit(hub("org/name", other, revision="v2", commit="c" * 40), base_model_name_or_path="org/base", revision="v1")
    lm = load_model("org/name")
    assert (lm.name, lm.base) == ("org/name", "org/base")
    with pytest.raises(UserError, match="adapters of adapters"):
        Settings(cutoff=2).settled(lm)
    assert lm.weight_hash == load_model(saved).weight_hash
    assert load_model("org/name", revision="v2").weight_hash == load_model(other).weight_hash != lm.weight_hash


def test_an_adapter_on_the_hub_without_its_weights(saved, hub):
    (hub("org/name", saved) / adapters.WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"adapter 'org/name' has no adapter_model\.safetensors"):
        load_model("org/name")


def test_only_two_files_of_an_adapter_are_fetched(saved, hub, monkeypatch):
    asked = []
    place = hub("org/name", saved)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: asked.append((a, k)) or str(place))
    load_model("org/name", revision="main")
    (((name,), options),) = asked
    assert (name, options["revision"]) == ("org/name", "main")
    assert set(options["allow_patterns"]) == {adapters.CONFIG, adapters.WEIGHTS, "config.json"}


def test_adapters_on_the_hub_beside_a_model_are_refused_before_anything_is_read(bases, saved, hub, monkeypatch):
    hub("org/name", saved, bases("qwen3"))
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_: pytest.fail("weights were read")
    )
    with pytest.raises(UserError, match="'org/name' holds an adapter beside a model"):
        load_model("org/name")


def test_an_adapter_on_the_hub_is_no_base(saved, folder, hub):
    edit(hub("org/name", saved), base_model_name_or_path="org/name")
    for name in ("org/name", folder):
        edit(folder, base_model_name_or_path="org/name")
        with pytest.raises(UserError, match="its base_model_name_or_path: 'org/name' is itself an adapter"):
            load_model(name)


def test_biases_that_the_file_lacks_are_not_taken_from_the_base(bases, tmp_path):
    folder = save_adapter(tmp_path / "adapter", bases("qwen2"), bias="lora_only")
    edit_weights(lambda t: t.pop(next(key for key in t if key.endswith(".bias"))))(folder)
    with pytest.raises(UserError, match=r"lacks 1 of its weights .*bias"):
        load_model(folder)


def test_another_vocabulary_is_refused(bases, tmp_path):
    wrapped = get_peft_model(load_model(bases("llama")).model, LoraConfig(target_modules=["q_proj"]))
    wrapped.get_base_model().resize_token_embeddings(215)
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    edit(tmp_path / "adapter", base_model_name_or_path=str(bases("llama")))
    with pytest.raises(UserError, match="size mismatch"):
        load_model(tmp_path / "adapter")


def test_prompt_tuning_is_refused(bases, tmp_path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(load_model(bases("llama")).model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="its method is 'PROMPT_TUNING'"):
        load_model(tmp_path / "adapter")


@pytest.mark.parametrize(("change", "said"), [("is_quantized", "quantised"), ("meta", "offloaded")])
def test_bases_that_take_no_merging(bases, saved, change, said):
    model = load_model(bases("llama")).model
    if change == "meta":
        model.model.layers[4].to("meta")
    else:
        model.is_quantized = True
    with pytest.raises(UserError, match=said):
        adapters.merge(adapters.read_adapter("it", saved), model)


def test_settings_are_refused_before_the_base_is_loaded(folder, monkeypatch):
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained", lambda *_: pytest.fail("weights were read")
    )
    for changes, said in (
        ({"use_qalora": True}, "sets 'use_qalora'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
    ):
        edit(folder, **changes)
        with pytest.raises(UserError, match=said):
            load_model(folder)
        edit(folder, use_qalora=False)


def test_without_peft_the_install_line_is_given(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"pip install 'speed-diagnostics\[finetune\]'"):
        load_model(saved)


def test_a_model_folder_and_a_name_are_no_adapters(bases, tmp_path, monkeypatch):
    assert not adapters.is_adapter(str(bases("llama")))
    assert not adapters.is_adapter("org/name")
    monkeypatch.chdir(tmp_path)
    (tmp_path / EMBEDDED_MODEL).mkdir()
    (tmp_path / EMBEDDED_MODEL / adapters.CONFIG).write_text("{}")
    assert not adapters.is_adapter(EMBEDDED_MODEL)
    assert adapters.is_adapter(f"./{EMBEDDED_MODEL}")
