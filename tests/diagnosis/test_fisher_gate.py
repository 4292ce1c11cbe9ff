"""The Fisher gate against finite differences of the loss, under gates that are really there."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from diagnostics import UserError, diagnose
from diagnostics.diagnosis.capture.nnsight import traced_over
from diagnostics.diagnosis.capture.transformer_lens import bridge_over
from diagnostics.diagnosis.gate_gradients import gate_gradients
from diagnostics.diagnosis.probes.fisher_gate import FisherGate
from diagnostics.diagnosis.probes.probe import PromptContext
from diagnostics.diagnosis.readout import Readout
from diagnostics.models.loading import LoadedModel
from diagnostics.policies.segments import Layout
from tests.support.fingerprints import fingerprint
from tests.support.runs import save_tiny, write_prompts
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model, tiny_tokenizer

N_PROMPT = 40
STEP = 1e-3
# The modules whose outputs a layer adds to the residual, by family.
BRANCHES = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
]


def measure(lm, ids):
    context = PromptContext(Layout.of(len(ids), 1), lm.anatomy.n_layers, Readout(lm.anatomy), lm.name)
    probe = FisherGate(context)
    probe.on_model(lm, ids)
    return probe.measured().layers["fisher_gate"]


class Gated:
    """A float64 copy of a model, with a factor on both branches of one layer."""

    def __init__(self, lm, family):
        self.model = copy.deepcopy(lm.model).double()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation("eager")
        names = {id(module): name for name, module in lm.model.named_modules()}
        modules = dict(self.model.named_modules())
        self.layers = [modules[names[id(layer)]] for layer in lm.anatomy.layers]
        self.branches = BRANCHES.get(family, ("self_attn", "mlp"))

    @torch.no_grad()
    def log_p(self, ids, layer=0, gate=1.0):
        def scale(_module, _args, output):
            return (output[0] * gate, *output[1:]) if isinstance(output, tuple) else output * gate

        modules = [getattr(self.layers[layer], name) for name in self.branches]
        handles = [module.register_forward_hook(scale) for module in modules]
        try:
            return self.model(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        finally:
            for handle in handles:
                handle.remove()

    def fisher(self, ids):
        log_p = self.log_p(ids)
        draws = np.random.default_rng(ids).random(len(ids))
        targets = [int(np.searchsorted(np.exp(row).cumsum(), u)) for row, u in zip(log_p, draws, strict=True)]
        rows = np.arange(len(ids))

        def loss(layer, gate):
            return -self.log_p(ids, layer, gate)[rows, targets].mean()

        def slope(layer):
            """Of fourth order: norms are in float32 also in a float64 model, so small steps would drown in rounding."""
            one, two = (loss(layer, 1 + n * STEP) - loss(layer, 1 - n * STEP) for n in (1, 2))
            return (8 * one - two) / (12 * STEP)

        return np.square([slope(layer) for layer in range(len(self.layers))])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_finite_differences(family):
    lm, ids = tiny_model(family), random_ids(N_PROMPT, seed=12)  # one at which experts do not change within a step
    expected = Gated(lm, family).fisher(ids)
    np.testing.assert_allclose(np.sqrt(measure(lm, ids)), np.sqrt(expected), rtol=2e-3, atol=2e-4)
    assert expected.min() > 1e-6, "no layer matters, so this test could not fail"


@pytest.mark.parametrize("n_prompt", [1, 2])
def test_short_prompts(n_prompt):
    lm, ids = tiny_model("llama"), random_ids(n_prompt, seed=1)
    np.testing.assert_allclose(measure(lm, ids), Gated(lm, "llama").fisher(ids), rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_equals_the_gradient_of_gates_that_are_there(family, dtype, tolerance):
    """By one backward pass through all of the model, in its own type, with the same targets."""
    lm, ids, targets = (
        tiny_model(family, dtype),
        random_ids(N_PROMPT, seed=8),
        torch.tensor(random_ids(N_PROMPT, seed=9)),
    )
    gates = [torch.ones((), requires_grad=True) for _ in range(N_LAYERS)]

    def scaled(gate):
        def hook(_module, _args, output):
            branch, *others = output if isinstance(output, tuple) else (output,)
            branch = (branch.float() * gate).to(branch.dtype)
            return (branch, *others) if others else branch

        return hook

    handles = [
        getattr(layer, name).register_forward_hook(scaled(gate))
        for layer, gate in zip(lm.anatomy.layers, gates, strict=True)
        for name in BRANCHES.get(family, ("self_attn", "mlp"))
    ]
    loss = nn.functional.cross_entropy(lm.model(torch.tensor([ids])).logits[0].float(), targets)
    expected = np.array([float(slope) for slope in torch.autograd.grad(loss, gates)])
    for handle in handles:
        handle.remove()

    def loss_gradient(final):
        residual = final.detach().float().requires_grad_()
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(Readout(lm.anatomy).logits(residual), targets)
            return torch.autograd.grad(loss, residual)[0]

    np.testing.assert_allclose(
        gate_gradients(lm, ids, loss_gradient), expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_model_is_left_as_it_was(family):
    lm = tiny_model(family)
    frozen = next(lm.model.parameters())
    frozen.requires_grad_(False)
    before, weights = fingerprint(lm.model), copy.deepcopy(lm.model.state_dict())
    wanted = {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()}
    first = measure(lm, random_ids(20))
    assert fingerprint(lm.model) == before
    assert {name: parameter.requires_grad for name, parameter in lm.model.named_parameters()} == wanted
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert all(torch.equal(weights[name], value) for name, value in lm.model.state_dict().items())
    with torch.inference_mode():
        np.testing.assert_array_equal(measure(lm, random_ids(20)), first)


class AddsInPlace(nn.Module):
    """A layer of the family's that writes into the residual it was called with."""

    def __init__(self, layer):
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        hidden_states += self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        hidden_states += self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


def test_layers_that_add_in_place_are_refused():
    """Their own norms need what they have overwritten: such a model cannot be trained, either."""
    lm = tiny_model("llama")
    for index, layer in enumerate(lm.model.model.layers):
        lm.model.model.layers[index] = AddsInPlace(layer)
    lm = LoadedModel.wrap(lm.model, tiny_tokenizer(), "in-place")
    with pytest.raises(
        UserError, match=r"gradients of 'in-place' cannot be computed: in layer 4, .* inplace"
    ) as caught:
        measure(lm, random_ids(25))
    assert "\n" not in str(caught.value)


# --- Through diagnose ---


@pytest.fixture
def prompts(tmp_path):
    write_prompts(tmp_path / "prompts.jsonl", n_prompts=3, n_tokens=24)
    return str(tmp_path / "prompts.jsonl")


def diagnosed(model, prompts, **options):
    """A diagnosis with the rule that reads the gate."""
    return diagnose(model, prompts, rules="fisher-gate", decode_tokens=3, progress=False, **options)


def test_it_is_a_column_of_the_layers(prompts):
    lm = tiny_model("llama")
    assert "fisher_gate" not in diagnose(lm, prompts, decode_tokens=3, progress=False).layers
    run = diagnosed(lm, prompts)
    assert run.array("fisher_gate").shape == (3, N_LAYERS)
    assert (run.array("fisher_gate") > 0).all()
    again = diagnosed(lm, prompts)  # as a run that is continued: the same tokens are sampled
    np.testing.assert_array_equal(run.array("fisher_gate"), again.array("fisher_gate"))


@pytest.mark.parametrize("backend", ["transformer-lens", "nnsight"])
def test_other_backends_and_their_own_objects(prompts, backend):
    expected = diagnosed(tiny_model("llama"), prompts).array("fisher_gate")
    found = diagnosed(tiny_model("llama"), prompts, backend=backend).array("fisher_gate")
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    lm, ids = tiny_model("llama"), random_ids(24)
    theirs = traced_over(lm) if backend == "nnsight" else bridge_over(lm)
    inside = LoadedModel.wrap(theirs, lm.tokenizer, lm.name)
    np.testing.assert_allclose(measure(inside, ids), measure(lm, ids), rtol=1e-4)


# --- What is refused ---


def test_quantised_modules_that_pass_on_no_gradient_are_refused():
    model = tiny_model("llama").model
    with pytest.warns((UserWarning, DeprecationWarning)):
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    lm = LoadedModel.wrap(model, tiny_tokenizer(), "quantised")
    with pytest.raises(UserError, match="gradients of 'quantised' cannot be computed: some of its operations"):
        measure(lm, random_ids(12))


def test_one_module_that_passes_on_no_gradient_is_enough():
    """The residual goes around an MLP, so that nothing else would show it."""
    lm = tiny_model("llama")
    projection = lm.model.model.layers[2].mlp.down_proj
    projection.register_forward_hook(lambda _module, _args, output: output.detach())
    with pytest.raises(UserError, match="in layer 2, Linear passes on none"):
        measure(lm, random_ids(12))
    assert len(projection._forward_hooks) == 1


def test_a_layer_that_gives_something_else_when_it_runs_again_is_refused():
    lm, calls = tiny_model("llama"), []

    def changing(_module, _args, output):
        calls.append(1)
        return output * len(calls)

    lm.model.model.layers[3].mlp.register_forward_hook(changing)
    with pytest.raises(UserError, match="in layer 3, run again it differs"):
        measure(lm, random_ids(12))


class Scaled(nn.Module):
    """Scales the residual before a layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, **kwargs):
        return self.layer(hidden_states * 1.5, **kwargs)


def test_what_changes_the_residual_between_layers_is_refused():
    """The gradient by a layer's output would not be that by the next one's input."""
    lm = tiny_model("llama")
    layers = lm.model.model.layers
    layers[2] = Scaled(layers[2])
    with pytest.raises(UserError, match="in layer 1, run again it differs"):
        measure(lm, random_ids(12))


def test_models_that_run_elsewhere_are_refused(tmp_path):
    from nnsight import TransformersModel

    elsewhere = TransformersModel(str(save_tiny(tmp_path)), task="text-generation", tokenizer=tiny_tokenizer())
    lm = LoadedModel.wrap(elsewhere, tiny_tokenizer(), "far", weights=False)
    with pytest.raises(UserError, match="gradients of 'far' cannot be computed: the model runs elsewhere"):
        gate_gradients(lm, random_ids(5), lambda final: final)
