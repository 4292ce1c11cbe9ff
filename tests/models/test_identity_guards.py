"""What was begun with one model and one input does not go on with others: runs, saved caches, evaluations."""

import copy
import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch

from diagnostics import LoadedModel, SpeedPolicy, UserError, diagnose, load_cache, load_model, prefill, save_cache
from diagnostics.evaluate import evaluate
from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
from diagnostics.models.identity import ModelIdentity
from diagnostics.prompts.digests import tokenizer_digest
from diagnostics.prompts.prompt import Prompt, PromptSet
from tests.support.tiny import random_ids, tiny_model
from tests.support.tokenizers import CHAT_TEMPLATE, byte_tokenizer

DATED = "{{ strftime_now('%f %S %M %H %d') }} " + CHAT_TEMPLATE
PROMPTS = PromptSet(
    tuple(
        Prompt(id=f"p{i}", messages=({"role": "user", "content": f"say {i}"},), text=None, reference="ok")
        for i in range(3)
    ),
    "set",
)
SETTINGS = {"decode_tokens": 3, "detail_prompts": 0}


class Stop(Exception):
    """Ends a diagnosis after its first prompt."""


def stop(done, total, prompt_id):
    if done == 1:
        raise Stop


def save(folder, template=CHAT_TEMPLATE):
    lm = tiny_model("llama")
    model = lm.model
    model.resize_token_embeddings(300)
    model.save_pretrained(folder)
    byte_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A model folder, and a run on it that was stopped."""
    folder = tmp_path_factory.mktemp("begun")
    save(folder / "model")
    with pytest.raises(Stop):
        diagnose(load_model(folder / "model"), PROMPTS, out=folder / "run", progress=stop, **SETTINGS)
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: save(f, "{{ '<s>' }}Be good. " + CHAT_TEMPLATE), "token_ids differ: another tokenizer or chat"),
        (lambda f: edit(f, rms_norm_eps=0.1), "configuration differs: rms_norm_eps is 1e-06, not 0.1"),
        (
            lambda f: edit(f, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
            r"configuration differs: rope_parameters.rope_theta is 10000.0, not 500000.0",
        ),
        (lambda f: edit(f, hidden_act="gelu"), "configuration differs: hidden_act is silu, not gelu"),
    ],
)
def test_a_run_does_not_go_on_after_a_change(begun, tmp_path, change, said):
    shutil.copytree(begun, tmp_path / "b")
    change(tmp_path / "b" / "model")
    lm = load_model(tmp_path / "b" / "model")
    with pytest.raises(UserError, match=f"another run .{said}"):
        diagnose(lm, PROMPTS, out=tmp_path / "b" / "run", resume=True, **SETTINGS)


def test_a_run_goes_on_where_nothing_changed(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "b")
    lm = load_model(tmp_path / "b" / "model")
    run = diagnose(lm, PROMPTS, out=tmp_path / "b" / "run", resume=True, **SETTINGS)
    assert run.complete
    assert run.manifest["configuration"]["settings"]["rms_norm_eps"] == 1e-6


def test_a_date_in_the_template_is_noticed(tmp_path):
    lm = load_model(save(tmp_path / "model", DATED))
    assert tokenizer_digest(lm.tokenizer) != tokenizer_digest(lm.tokenizer)
    with pytest.raises(Stop):
        diagnose(lm, PROMPTS, out=tmp_path / "run", progress=stop, **SETTINGS)
    with pytest.raises(UserError, match="or a date in the template"):
        diagnose(lm, PROMPTS, out=tmp_path / "run", resume=True, **SETTINGS)


def test_a_model_edited_after_it_was_loaded_is_another(begun, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    lm = load_model(begun / "model")
    lm.model.model.layers[2].self_attn.o_proj.weight.data[:, 8:] = 0
    with pytest.raises(UserError, match="weight_hash is "):
        diagnose(lm, PROMPTS, out=tmp_path / "run", resume=True, **SETTINGS)


def test_a_run_of_an_earlier_version_is_read_but_not_continued(begun, tmp_path):
    shutil.copytree(begun / "run", tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for name in ("libraries", "configuration", "adapters", "buffers", "token_ids"):
        del manifest["identity"][name]
    del manifest["seal"]  # earlier versions wrote none
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="begun by an earlier version"):
        diagnose(load_model(begun / "model"), PROMPTS, out=tmp_path / "run", resume=True, **SETTINGS)


# --- Saved caches ---


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama").model, settings, adapter_name="one")
    model.add_adapter("two", settings)
    model.set_adapter("one")
    return model.eval()


def saved(model, path):
    _, cache = prefill(model, torch.tensor([random_ids(12)]), policy=SpeedPolicy(3), more=True)
    save_cache(cache, path, model)
    return path


def test_a_cache_belongs_to_the_adapters_that_were_active(adapted, tmp_path):
    path = saved(adapted, tmp_path / "c.safetensors")
    load_cache(path, adapted)
    adapted.set_adapter("two")
    with pytest.raises(UserError, match="another model: adapters is one, scale"):
        load_cache(path, adapted)
    adapted.set_adapter("one")
    with adapted.disable_adapter(), pytest.raises(UserError, match="not none"):
        load_cache(path, adapted)
    for layer in adapted.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.scaling["one"] *= 2
    with pytest.raises(UserError, match="adapters is one, scale"):
        load_cache(path, adapted)


def test_what_a_manifest_keeps_names_the_active_adapters(adapted):
    names = ModelIdentity.of(adapted).entries()["adapters"]
    assert [name.partition(",")[0] for name in names] == ["one"]
    with adapted.disable_adapter():
        assert ModelIdentity.of(adapted).entries()["adapters"] == []


def test_adapters_that_take_no_part_are_not_asked_for(adapted, tmp_path):
    with adapted.disable_adapter():
        path = saved(adapted, tmp_path / "c.safetensors")
        load_cache(path, adapted)
    load_cache(path, tiny_model("llama"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.model.layers[0].self_attn.o_proj.weight.data[:, 8:].zero_(), "weight_hash"),
        (lambda m: m.model.rotary_emb.inv_freq.mul_(0.5), "buffers of the model differ"),
        (lambda m: setattr(m.model.layers[1].self_attn, "scaling", 1.0), "numbers or classes in its modules"),
        (lambda m: m.set_attn_implementation("eager"), "attention is sdpa, not eager"),
        (lambda m: m.bfloat16(), "type is float32, not bfloat16"),
    ],
)
def test_a_cache_belongs_to_one_configuration(tmp_path, change, said):
    model = tiny_model("llama").model
    path = saved(model, tmp_path / "c.safetensors")
    other = copy.deepcopy(model)
    change(other)
    load_cache(path, model)
    with pytest.raises(UserError, match=said):
        load_cache(path, other)


# --- Evaluations ---


TEXT = "w5 w6 w7 w8"
CHOICE = ChoiceItem("i", (Context(TEXT), Context(TEXT)), (" w9", " w10 w11"), 0)
WRITING = GenerationItem("i", Context(TEXT), ("w9",))


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        (Task("t", (CHOICE,), "acc"), {"items": (replace(CHOICE, gold=1),)}, "tasks t items differ"),
        (
            Task("t", (CHOICE,), "acc"),
            {"items": (replace(CHOICE, contexts=(Context("w4 w5"), Context("w4 w5"))),)},
            "tasks t items differ",
        ),
        (Task("t", (CHOICE,), "acc"), {"metric": "acc_per_char"}, "tasks t metric is acc, not acc_per_char"),
        (Task("t", (WRITING,), "f1"), {"items": (replace(WRITING, answers=("w8",)),)}, "tasks t items differ"),
        (Task("t", (WRITING,), "f1"), {"stop": ("w3",)}, "tasks t stop is none, not w3"),
        (Task("t", (WRITING,), "f1"), {"max_new_tokens": 3}, "tasks t max_new_tokens is 32, not 3"),
    ],
)
def test_an_evaluation_does_not_go_on_with_another_task(tmp_path, task, changes, said):
    lm = tiny_model("llama")
    evaluate(lm, [task], [SpeedPolicy(3)], out=tmp_path / "e")
    evaluate(lm, [task], [SpeedPolicy(3)], out=tmp_path / "e", resume=True)
    with pytest.raises(UserError, match=f"another evaluation .{said}"):
        evaluate(lm, [replace(task, **changes)], [SpeedPolicy(3)], out=tmp_path / "e", resume=True)


def test_an_evaluation_belongs_to_its_query_type_and_tokenizer(tmp_path):
    lm, task = tiny_model("llama"), Task("t", (CHOICE,), "acc")
    evaluate(lm, [task], [SpeedPolicy(3)], out=tmp_path / "e")
    with pytest.raises(UserError, match="query is prompt, not decode"):
        evaluate(lm, [task], [SpeedPolicy(3)], query="decode", out=tmp_path / "e", resume=True)
    other = tiny_model("llama", torch.bfloat16)
    with pytest.raises(UserError, match="type is float32, not bfloat16"):
        evaluate(other, [task], [SpeedPolicy(3)], out=tmp_path / "e", resume=True)
    words = LoadedModel.wrap(lm.model, byte_tokenizer(bos=False), lm.name)
    with pytest.raises(UserError, match="tasks t token_ids differ"):
        evaluate(words, [task], [SpeedPolicy(3)], out=tmp_path / "e", resume=True)


# --- Weights that are elsewhere ---


def test_offloaded_weights_are_read_where_they_are_and_absent_ones_named():
    from accelerate import cpu_offload

    whole = tiny_model("llama")
    offloaded = cpu_offload(tiny_model("llama").model)
    assert next(offloaded.parameters()).is_meta
    assert LoadedModel.wrap(offloaded, whole.tokenizer, "o").weight_hash == whole.weight_hash
    absent = copy.deepcopy(whole.model).to("meta")
    identity = ModelIdentity.of(absent)
    assert len(identity.unseen) == len(list(absent.parameters()))
    assert "are not on this machine" in identity.notes[0]


# --- Conversations without a template ---


def test_conversations_without_a_template_are_measured_with_a_note(capsys):
    from rich.console import Console

    from diagnostics.terminal.diagnosis import show_run

    lm = tiny_model("llama")
    run = diagnose(lm, PROMPTS, **SETTINGS)
    said = "the model has no chat template: 3 of 3 prompts are conversations, and they were measured as plain text"
    assert said in run.manifest["notes"]
    show_run(run, Console(width=200))
    assert said in capsys.readouterr().out
    texts = PromptSet((Prompt(id="t", text="w5 w6 w7 w8", reference="w9"),), "set")
    assert not any("template" in note for note in diagnose(lm, texts, **SETTINGS).manifest["notes"])
