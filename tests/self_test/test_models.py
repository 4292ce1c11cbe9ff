"""Models are proven before they are measured or run: what is right passes, and every kind of fault is named."""

import json

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    LlamaForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from diagnostics import FullPolicy, LoadedModel, SpeedPolicy, UserError, diagnose, recommend
from diagnostics.diagnosis.capture import make_capture, residual_path
from diagnostics.diagnosis.capture.hooks import HooksCapture
from diagnostics.diagnosis.self_test import prove_measurable
from diagnostics.finetune import plan, train_under
from diagnostics.finetune.self_test import prove_trainable
from diagnostics.models.anatomy import dissect
from diagnostics.policies import call, masks
from diagnostics.policies.self_test import prove_runnable
from diagnostics.prompts.prompt import Prompt, PromptSet
from diagnostics.self_test import proof as proofs
from diagnostics.self_test import proving, self_test, switch
from tests.support.fingerprints import fingerprint
from tests.support.observe import observe
from tests.support.reference import Reference
from tests.support.runs import run_command, save_tiny, write_prompts
from tests.support.tiny import COMMON, FAMILIES, random_ids, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
USES = ("policies", "training")


@pytest.fixture(autouse=True)
def _anew(tmp_path, monkeypatch):
    """Nothing is remembered from test to test."""
    monkeypatch.setattr(proving, "_proofs", {})
    monkeypatch.setattr(proofs, "proofs_folder", lambda: tmp_path / "proofs")


def found(lm, use="diagnosis", backend="hooks"):
    if use == "policies":
        return prove_runnable(lm.model, lm.anatomy).failed
    if use == "training":
        return prove_trainable(lm.model, lm.anatomy, train_under).failed
    return prove_measurable(lm, make_capture(backend, lm, False)).failed


def made(kind, attention="sdpa", **settings):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(COMMON | {"num_hidden_layers": 4} | settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return LoadedModel.wrap(model, tiny_tokenizer(), kind)


def prompts(n=5):
    words = " ".join(f"w{i}" for i in range(10, 40))
    return PromptSet(tuple(Prompt(id=f"p{i}", text=f"w{50 + i} {words}", reference="w5 w6 w7") for i in range(n)), "x")


# --- What is right passes ---


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_proven_and_left_as_it_was(family):
    lm = tiny_model(family)
    lm.model.train()
    before = fingerprint(lm.model)
    for use in ("diagnosis", *USES):
        assert found(lm, use) == {}
    assert fingerprint(lm.model) == before


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_half_precision_is_not_mistaken_for_a_fault(family):
    lm = tiny_model(family, dtype=torch.bfloat16)
    for use in ("diagnosis", *USES):
        assert found(lm, use) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_other_backends_are_proven(family, backend):
    assert found(tiny_model(family), backend=backend) == {}


def test_a_model_of_one_layer():
    lm = made("llama", num_hidden_layers=1)
    for use in ("diagnosis", *USES):
        assert found(lm, use) == {}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("afmoe", {"layer_types": ["full_attention"] * 4, "num_dense_layers": 4}),
        ("bitnet", {}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("granite", {"residual_multiplier": 0.22}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
        ("cohere", {"logit_scale": 0.25}),
        ("exaone4", {"sliding_window": 9}),
    ],
)
def test_gates_norms_multipliers_and_parallel_layers_are_followed(kind, settings):
    """What the capture says that attention adds is what the residual gains."""
    assert found(made(kind, **settings)) == {}


# --- Models that do something else ---


def test_a_second_attention_call_per_layer_is_refused():
    lm = made("diffllama")
    assert "more than once" in found(lm)["sweep"]
    assert found(lm, "policies") == {}  # SPEED masks whole layers, and is right there
    with pytest.raises(UserError, match=r"'diffllama' cannot be measured: in its self-test .* more than once"):
        diagnose(lm, prompts())


def test_a_layer_that_needs_its_mask_spelt_out_is_refused():
    """Doge sees later tokens under sdpa where it gets no mask, as it does from a policy and from training."""
    lm = made("doge")
    for use in USES:
        assert "differ from those of" in found(lm, use)[use]
    with pytest.raises(UserError, match="cannot be run under a policy: in its self-test"), FullPolicy()(lm.model):
        pass
    with pytest.raises(UserError, match="cannot be trained"), train_under(SpeedPolicy(2), lm.model):
        pass
    with pytest.raises(UserError, match="cannot be measured"):
        diagnose(lm, prompts())


PER_LAYER_INPUTS = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 211, "num_kv_shared_layers": 0}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gemma3n_text", PER_LAYER_INPUTS | {"laurel_rank": 4, "altup_num_inputs": 2, "sliding_window": 9}),
        ("gemma4_text", PER_LAYER_INPUTS | {"global_head_dim": 8, "sliding_window": 9}),
    ],
)
def test_layers_with_inputs_of_their_own_are_refused_by_name(kind, settings):
    lm = made(kind, **settings)
    for policy in (FullPolicy(), SpeedPolicy(2)):
        with pytest.raises(UserError, match=r"cannot be run under a policy: in its self-test"), policy(lm.model):
            pass
    with pytest.raises(UserError, match="cannot be measured: in its self-test"):
        diagnose(lm, prompts())


def test_attention_of_another_shape_in_some_layers_is_refused_by_name():
    with pytest.raises(UserError, match="changes from layer to layer"):
        made("gemma4_text", **(PER_LAYER_INPUTS | {"hidden_size_per_layer_input": 0, "global_head_dim": 16}))


def test_a_class_for_text_and_pictures_is_refused_by_policies_with_advice_that_helps():
    """Its masks come as a dictionary; the text model alone, with the same weights, runs."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=COMMON | {"sliding_window": 9}, vision_config=vision, mm_tokens_per_image=4)
    both = Gemma3ForConditionalGeneration(config).eval()
    with pytest.raises(UserError, match="use the class of its text model alone"), SpeedPolicy(3)(both):
        pass
    text = Gemma3ForCausalLM(config.text_config).eval()
    text.model.load_state_dict(both.model.language_model.state_dict())
    with SpeedPolicy(3)(text):
        text.generate(torch.tensor([random_ids(12)]), max_new_tokens=2)


def test_chunked_attention_is_refused_by_name():
    """It shows only beyond the first chunk, which no test of a few dozen tokens reaches."""
    with pytest.raises(UserError, match="chunked attention"):
        made("llama4_text", attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48)


class SeesLater(LlamaDecoderLayer):
    """Adds a little of the last token to all others."""

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states + 0.1 * hidden_states[:, -1:]


def test_a_model_that_sees_later_tokens_is_refused():
    lm = made("llama")
    lm.model.model.layers[1].__class__ = SeesLater
    for use in ("diagnosis", *USES):
        assert "a changed last token changes earlier logits" in found(lm, use)["causality"]


def test_what_cannot_be_followed_to_the_residual_is_left_out_and_said():
    lm = made("llama")
    # A step between heads and output projection that does not multiply each number by itself.
    projection = lm.model.model.layers[2].self_attn.o_proj
    projection.register_forward_pre_hook(lambda _, args: (args[0].flip(-1),))
    line = found(lm)["contribution"]
    assert "what layer 2 does to its heads before the output projection does not multiply" in line
    assert set(found(lm)) == {"contribution"}  # the sweep does not need it
    run = diagnose(lm, prompts(), decode_tokens=3)
    for column in ("prompt_contribution", "attention_cosine", "attention_update_prompt"):
        assert run.layers[column].isna().all()
    assert run.layers["selectivity"].notna().all()
    assert any("prompt_contribution is left out" in note and line in note for note in run.manifest["notes"])
    recommendation = recommend(run)
    assert recommendation.selection_region is None
    assert any("prompt_contribution is left out" in note for note in recommendation.data["notes"])


# --- Faults of this package's own ---


def test_a_wrong_multiplier_is_noticed(monkeypatch):
    monkeypatch.setattr(residual_path, "multiplier_of", lambda layer: 1.0)
    monkeypatch.setattr("diagnostics.diagnosis.residual_check.multiplier_of", lambda layer: 1.0)
    assert "adds to the residual differs from its parts" in found(tiny_model("granite"))["contribution"]


def test_a_norm_that_is_overlooked_is_noticed(monkeypatch):
    """The capture takes the attention's output for what is added, the residual gains what the norm made of it."""
    monkeypatch.setattr(
        "diagnostics.diagnosis.capture.passes.residual_paths",
        lambda anatomy, device: tuple(residual_path.ResidualPath(a, 1.0) for a in anatomy.attentions),
    )
    assert "is missed by" in found(tiny_model("gemma2"))["contribution"]


def test_a_policy_that_shows_a_prompt_token_is_noticed(monkeypatch):
    kept = call.Call.deep_columns
    monkeypatch.setattr(call.Call, "deep_columns", lambda self, anchors: kept(self, anchors + 1))
    assert "masked pass of the stock model" in found(tiny_model("llama"), "policies")["policies"]


def test_a_mask_without_its_window_is_noticed(monkeypatch):
    original = masks.attention_mask
    monkeypatch.setattr(call, "attention_mask", lambda *args, **kwargs: original(*args, **(kwargs | {"window": None})))
    assert "differ from those of" in found(tiny_model("mistral"), "policies")["policies"]


def test_a_sweep_that_branches_off_too_late_is_noticed(monkeypatch):
    from diagnostics.diagnosis.probes.cutoff_sweep import CutoffSweep

    def late(self, rows):
        if self.branches is None:
            self.branches = rows.residual_out.new_zeros((self.context.n_layers - 1, *rows.residual_out.shape))
        if rows.layer > 0:
            self.branches[: rows.layer - 1] = rows.branch(self.branches[: rows.layer])[: rows.layer - 1]
            self.branches[rows.layer - 1] = rows.residual_out
        self.final = rows.residual_out

    monkeypatch.setattr(CutoffSweep, "on_decode", late)
    assert "the sweep's logits at cutoff" in found(tiny_model("llama"))["sweep"]


def kept_wrongly(monkeypatch, when):
    """Let policies keep one prompt token above the cutoff as well, in the calls that ``when`` is true of."""
    kept = call.Call.deep_columns
    monkeypatch.setattr(call.Call, "deep_columns", lambda self, anchors: kept(self, anchors + when(self)))


@pytest.mark.parametrize(
    ("when", "dtype"),
    [
        (lambda call: call.depth == 1, torch.float32),
        (lambda call: call.depth > 1, torch.float32),
        (lambda call: call.padding is None, torch.float32),
        (lambda call: call.padding is not None, torch.float32),
        (lambda call: True, torch.bfloat16),
    ],
    ids=["lowest cutoff", "further cutoff", "no padding", "padding", "half precision"],
)
def test_a_policy_that_is_wrong_in_some_calls_is_noticed(when, dtype, monkeypatch):
    kept_wrongly(monkeypatch, when)
    assert "differ from those of a masked pass" in found(tiny_model("llama", dtype=dtype), "policies")["policies"]


def test_training_that_shows_padding_is_noticed(monkeypatch):
    original = plan.attention_mask
    monkeypatch.setattr(plan, "attention_mask", lambda *args, **kwargs: original(*args, **(kwargs | {"padding": None})))
    assert "in training at cutoff" in found(tiny_model("llama"), "training")["training"]


def test_a_sweep_that_is_wrong_after_a_generated_reference_is_noticed(monkeypatch):
    """There the decode rows are a pass of their own."""
    forward = HooksCapture.forward

    def without_anchors(self, watch, ids, first_row, *rest):
        watch.n_anchors = 0 if first_row else 1
        return forward(self, watch, ids, first_row, *rest)

    monkeypatch.setattr(HooksCapture, "forward", without_anchors)
    assert found(tiny_model("llama"))["sweep"].startswith("with a greedy reference the sweep's logits")


class BendsALittle(LlamaDecoderLayer):
    """Adds 3 parts in a thousand of the last token to all others: it moves logits by 3 in a hundred of their spread."""

    def forward(self, hidden_states, *args, **kwargs):
        hidden_states = super().forward(hidden_states, *args, **kwargs)
        return hidden_states + 0.003 * hidden_states[:, -1:]


def test_small_faults_are_told_from_rounding(monkeypatch):
    lm = made("llama")
    lm.model.model.layers[1].__class__ = BendsALittle
    assert "changes earlier logits" in found(lm, "policies")["causality"]
    original = residual_path.multiplier_of
    for place in ("diagnostics.diagnosis.capture.residual_path", "diagnostics.diagnosis.residual_check"):
        monkeypatch.setattr(f"{place}.multiplier_of", lambda layer: 1.02 * original(layer))
    assert "adds to the residual differs from its parts" in found(tiny_model("granite"))["contribution"]


@pytest.mark.parametrize("use", ["diagnosis", *USES])
def test_causality_alone_is_enough_to_refuse(use, monkeypatch):
    lm = made("llama")
    monkeypatch.setattr("diagnostics.self_test.proving.findings", lambda *_: {"causality": "later tokens are seen"})
    act = {
        "diagnosis": lambda: diagnose(lm, prompts(2), decode_tokens=3),
        "policies": lambda: FullPolicy()(lm.model).__enter__(),
        "training": lambda: train_under(SpeedPolicy(2), lm.model).__enter__(),
    }[use]
    with pytest.raises(UserError, match="in its self-test later tokens are seen"):
        act()


# --- What was found is kept ---


class Counted:
    """Counts how often a self-test really runs."""

    def __init__(self, monkeypatch):
        self.runs, self.monkeypatch, tested = 0, monkeypatch, proving._tested

        def counted(*args):
            self.runs += 1
            return tested(*args)

        monkeypatch.setattr(proving, "_tested", counted)

    def forget(self):
        """As a new process would."""
        self.monkeypatch.setattr(proving, "_proofs", {})


def test_a_model_is_tested_once(monkeypatch, tmp_path):
    counted, lm = Counted(monkeypatch), made("llama")
    for _ in range(2):
        found(lm)
        counted.forget()
    assert counted.runs == 1
    (kept,) = (tmp_path / "proofs").iterdir()
    assert json.loads(kept.read_text())["failed"] == {}
    kept.write_text("{")
    found(lm)
    assert counted.runs == 2, "what cannot be read is tested again"


def test_what_a_finding_holds_for(monkeypatch):
    counted, lm = Counted(monkeypatch), made("llama")
    found(lm)
    others = [
        lambda: found(made("llama", rms_norm_eps=1e-3)),
        lambda: found(made("llama", rope_parameters={"rope_type": "default", "rope_theta": 500.0})),  # in no module
        lambda: found(made("llama", attention="eager")),
        lambda: found(made("llama", num_hidden_layers=3)),
        lambda: found(LoadedModel.wrap(made("llama").model.bfloat16(), tiny_tokenizer(), "b")),
        lambda: found(lm, backend="nnsight"),
        lambda: found(lm, "policies"),
        lambda: found(lm, "training"),
    ]
    for runs, other in enumerate(others, start=2):
        other()
        assert counted.runs == runs
    found(made("llama"))  # the same but for the weights' place in memory
    assert counted.runs == len(others) + 1
    for what, other in (("versions", lambda: {"torch": "another one"}), ("_source", lambda: "changed")):
        monkeypatch.setattr(proofs, what, other)
        counted.forget()
        found(lm)
    assert counted.runs == len(others) + 3


def test_what_a_finding_holds_for_names_the_backend():
    """By itself: two backends may come from one library, or from none."""
    model = tiny_model("llama").model
    keys = [proofs.key_of(model, use="diagnosis", backend=backend, device="cpu") for backend in ("hooks", "others")]
    assert proofs.digest_of(keys[0]) != proofs.digest_of(keys[1])


def test_a_failure_is_kept_too(monkeypatch):
    counted, lm = Counted(monkeypatch), made("diffllama")
    first = found(lm)
    counted.forget()
    assert found(lm) == first
    assert counted.runs == 1


def test_a_cache_folder_that_cannot_be_written_is_no_fault(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(proofs, "proofs_folder", lambda: tmp_path / "file" / "proofs")
    assert found(made("llama")) == {}


# --- Without it ---


def test_it_can_be_skipped():
    doge = made("doge")
    with self_test(False), FullPolicy()(doge.model):
        pass
    with pytest.raises(UserError), FullPolicy()(doge.model):
        pass


def test_a_skipped_test_is_said(monkeypatch):
    run = diagnose(made("llama"), prompts(2), decode_tokens=3, self_test=False)
    assert any("the self-test was skipped" in note for note in run.manifest["notes"])
    monkeypatch.setenv("SPEED_DIAGNOSTICS_SELF_TEST", "off")
    run = diagnose(made("llama"), prompts(2), decode_tokens=3)
    assert any("the self-test was skipped" in note for note in run.manifest["notes"])
    monkeypatch.delenv("SPEED_DIAGNOSTICS_SELF_TEST")
    run = diagnose(made("llama"), prompts(2), decode_tokens=3)
    assert not any("self-test" in note for note in run.manifest["notes"])


def test_a_model_whose_numbers_depend_on_the_batch_is_not_refused_but_unproven():
    """Dynamic quantization scales activations by all rows of a call: nothing equals anything, stock or not."""
    model = tiny_model("llama").model
    with pytest.warns((UserWarning, DeprecationWarning)):
        model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    proof = prove_runnable(model, dissect(model, "int8"))
    assert proof.failed == {}
    assert "with what runs beside them" in proof.unproved
    assert prove_runnable(model, dissect(model, "int8")) == proof


def test_weights_that_are_elsewhere_are_not_tested_and_it_is_said():
    lm = made("llama")
    with torch.device("meta"):
        model = LlamaForCausalLM(lm.model.config)
    assert "not all weights" in prove_runnable(model, lm.anatomy).unproved


def test_the_command_has_it(tmp_path, monkeypatch, capfd):
    model, file = save_tiny(tmp_path / "model"), tmp_path / "prompts.jsonl"
    write_prompts(file, n_prompts=2, n_tokens=30)
    arguments = ("diagnose", model, "--prompts", file, "--decode-tokens", 3, "--json")
    status, out, err = run_command(monkeypatch, capfd, *arguments, "--out", tmp_path / "a")
    assert (status, err) == (0, "")
    assert not any("self-test" in note for note in json.loads(out)["notes"])
    assert len(list((tmp_path / "proofs").iterdir())) == 1
    status, out, err = run_command(monkeypatch, capfd, *arguments, "--out", tmp_path / "b", "--skip-self-test")
    assert (status, err) == (0, "")
    assert any("the self-test was skipped" in note for note in json.loads(out)["notes"])
    switch(True)


def test_a_norm_between_heads_and_projection_counts_with_the_scale_of_the_whole():
    """BitNet, by its formula in float64."""
    lm = made("bitnet")
    ids = random_ids(30)
    _, layers, _, _ = observe(lm, ids[:24], ids[24:])
    slow = Reference(lm.model, lm.anatomy.layers, lm.anatomy.attentions, ids[:-1], 24, 1)
    for layer in range(4):
        norm = slow.attentions[layer].attn_sub_norm
        weights = slow.weights[layer]
        values = slow.values[layer].repeat_interleave(2, dim=0)
        whole = torch.einsum("hij,hjd->ihd", weights[:, 23:], values).flatten(1)
        part = torch.einsum("hij,hjd->ihd", weights[:, 23:, 1:23], values[:, 1:23]).flatten(1)
        scale = (whole.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        written = slow.attentions[layer].o_proj(part / scale * norm.weight)
        expected = written.norm(dim=-1) / slow.residual[layer][23:].norm(dim=-1)
        np.testing.assert_allclose(layers["prompt_contribution"][layer], expected.mean().item(), rtol=1e-4)
