"""Training sees what inference sees: logits, loss and gradients against a slow masked pass, for every family."""

import copy
import random
import warnings

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from diagnostics import FullPolicy, ProjectedPolicy, SpeedPolicy, UserError, decode, generate, prefill
from diagnostics.finetune import decode_phase, full_depth, train_under
from diagnostics.policies import occupancy
from tests.support.fingerprints import Snapshot, fingerprint
from tests.support.policy_cases import assert_close, letters_of, load, masked_pass
from tests.support.policy_reference import ANCHOR, DECODE, PROMPT, SlowModel, speed
from tests.support.tiny import FAMILIES, N_LAYERS, random_ids, tiny_model
from tests.support.training import assert_same_gradients, double, gradients, labels_of, without_dropout

pytestmark = pytest.mark.usefixtures("one_thread")
families = pytest.mark.parametrize("family", sorted(FAMILIES))
TURNS = [(17, 6), (9, 4)]  # tokens of the user's turns and of their answers
CONVERSATION, OTHER = random_ids(36, seed=5), random_ids(27, seed=6)


def batch_of(rows, side=None):
    """Batch of pairs of token ids and labels; ``side`` is that of the padding."""
    width = max(len(ids) for ids, _ in rows)

    def fill(values, value):
        missing = [value] * (width - len(values))
        return missing + values if side == "left" else values + missing

    made = {
        "input_ids": torch.tensor([fill(ids, 0) for ids, _ in rows]),
        "labels": torch.tensor([fill(labels, -100) for _, labels in rows]),
    }
    if side:
        made["attention_mask"] = torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows])
    return made


ROWS = [(CONVERSATION, labels_of(CONVERSATION, *TURNS)), (OTHER, labels_of(OTHER, (21, 6)))]
BATCH = batch_of(ROWS[:1])


def decoded(letters):
    return [i for i, letter in enumerate(letters) if letter == DECODE]


def forward(policy, model, batch):
    with train_under(policy, model):
        return model(**batch)


def step(policy, model, batch):
    """Loss and gradients of one step; without a policy those of the stock model."""
    model.zero_grad()
    loss = (model(**batch) if policy is None else forward(policy, model, batch)).loss
    loss.backward()
    return loss.detach(), gradients(model)


# --- Against the slow masked pass and against inference ---


@families
@pytest.mark.parametrize(("anchors", "boundary"), [(0, 1), (1, 1), (3, 4)])
def test_logits_are_those_of_the_masked_pass(family, anchors, boundary):
    for cutoff in range(1, N_LAYERS + 1):
        policy = SpeedPolicy(cutoff, anchors, boundary)
        letters = letters_of(policy, *TURNS)
        with torch.no_grad():
            found = forward(policy, load(family).model, BATCH).logits[0]
        wanted = masked_pass(family, policy, CONVERSATION, letters)
        assert_close(found[decoded(letters)], wanted[decoded(letters)])
        assert found.isfinite().all()


@pytest.mark.usefixtures("all_double")
@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_the_masked_pass(family, side):
    policy = SpeedPolicy(2, anchors=2, boundary=3)
    model, slow = double(family)
    loss, found = step(policy, model, batch_of(ROWS, side))
    slow_loss, wanted = slow.step(policy, [(CONVERSATION, TURNS), (OTHER, [(21, 6)])])
    torch.testing.assert_close(loss, slow_loss, rtol=1e-12, atol=0)
    assert_same_gradients(found, wanted, 1e-9)
    assert len(found) == len(list(model.parameters()))


@pytest.mark.parametrize("seed", range(6))
def test_any_pattern_of_targets(seed):
    """Answers of one token, adjacent answers, targets from the first token on: letters by plain loops."""
    chance = random.Random(seed)
    ids = random_ids(30, seed)
    target = [chance.random() < chance.choice([0.1, 0.7]) for _ in ids]
    anchors, boundary, cutoff = chance.randrange(4), chance.randrange(1, 5), chance.randrange(1, N_LAYERS)
    letters = [ANCHOR if i < anchors else PROMPT for i in range(len(ids))]
    for i in range(len(ids)):
        if any(target[i : i + boundary + 1]):
            letters[i] = DECODE
    labels = [token if wanted else -100 for token, wanted in zip(ids, target, strict=True)]
    for family in ("llama", "gemma3"):
        found = forward(SpeedPolicy(cutoff, anchors, boundary), load(family).model, batch_of([(ids, labels)])).logits[0]
        wanted = speed(SlowModel(load(family)), ids, letters, cutoff)
        assert_close(found[decoded(letters)], wanted[decoded(letters)])


def in_turns(model, policy, ids):
    """Logits of inference on a conversation, by their position: prompt, answer, prompt, answer."""
    row, (first, answer), (second, _) = torch.tensor([ids]), *TURNS
    end = first + answer
    logits, cache = prefill(model, row[:, :first], policy=policy)
    found = {first - 1: logits[0]}
    found |= dict(enumerate(decode(model, row[:, first : end - 1], cache)[0], first))
    logits, cache = prefill(model, row[:, end - 1 : end + second], cache=cache)  # the answer's last token comes along
    found[end + second - 1] = logits[0]
    return found | dict(enumerate(decode(model, row[:, end + second :], cache)[0], end + second))


@families
@pytest.mark.parametrize("policy", [SpeedPolicy(3), SpeedPolicy(2, 3, 4), SpeedPolicy(N_LAYERS)], ids=str)
def test_training_sees_what_inference_sees(family, policy):
    model = load(family).model
    wanted = in_turns(model, policy, CONVERSATION)
    with torch.no_grad():
        found = forward(policy, model, BATCH).logits[0]
    assert sorted(wanted) == [*range(16, 22), *range(31, 36)]
    for position, logits in wanted.items():
        assert_close(found[position], logits)


def test_the_embedded_model_trains_as_it_runs(smollm):
    policy = SpeedPolicy(24)
    ids = smollm.tokenizer("The sea is wide. The sea is deep. " * 8)["input_ids"][:36]
    wanted = in_turns(smollm.model, policy, ids)
    with torch.no_grad():
        found = forward(policy, smollm.model, batch_of([(ids, labels_of(ids, *TURNS))])).logits[0]
    for position, logits in wanted.items():
        assert_close(found[position], logits)


@families
def test_logits_of_shallow_tokens_are_zeros(family):
    batch = batch_of(ROWS[::-1], "right")  # the first row has fewer deep tokens
    made = forward(SpeedPolicy(2, anchors=0), load(family).model, batch | {"use_cache": True})
    deep = decode_phase(batch["labels"])
    assert made.logits[deep].any(dim=-1).all()
    assert not made.logits[~deep].any()
    assert made.past_key_values is None


@families
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_as_alone(family, side):
    policy, model = SpeedPolicy(2, anchors=2), load(family).model
    with torch.no_grad():
        found = forward(policy, model, batch_of(ROWS, side)).logits
        for i, (ids, labels) in enumerate(ROWS):
            alone = forward(policy, model, batch_of([(ids, labels)])).logits[0]
            shift = found.shape[1] - len(ids) if side == "left" else 0
            assert_close(found[i, shift : shift + len(ids)], alone)


def test_a_first_token_as_target_is_predicted_by_no_padding():
    rows = [(ids, [*ids[:3], *labels[3:]]) for ids, labels in ROWS]
    policy, model = SpeedPolicy(2), load("llama").model
    left, right = (forward(policy, model, batch_of(rows, side)).loss for side in ("left", "right"))
    torch.testing.assert_close(left, right)


@families
def test_at_full_depth_nothing_changes(family):
    model = tiny_model(family).model
    batch = batch_of(ROWS, "right")
    loss, found = step(SpeedPolicy(N_LAYERS), model, batch)
    stock_loss, wanted = step(None, model, batch)
    assert torch.equal(loss, stock_loss)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# --- What the batch says ---


def test_a_row_without_targets_adds_nothing():
    policy, model = SpeedPolicy(2), load("llama").model
    silent = (OTHER, [-100] * len(OTHER))
    with torch.no_grad():
        both, alone = (forward(policy, model, batch_of(rows, "left")).loss for rows in ([ROWS[0], silent], ROWS[:1]))
    torch.testing.assert_close(both, alone)
    nothing = batch_of([silent])
    assert forward(policy, model, nothing).loss.isnan()  # as that of the stock model
    assert model(**nothing).loss.isnan()
    total = forward(SpeedPolicy(2, anchors=0), model, nothing | {"num_items_in_batch": 5})
    assert total.loss == 0
    assert total.logits.isfinite().all()


def test_a_decode_mask_stands_in_for_labels():
    policy, model = SpeedPolicy(2, anchors=2), load("qwen3").model
    batch = batch_of(ROWS, "left")
    wanted = forward(policy, model, batch).logits
    mask = decode_phase(batch.pop("labels"), batch["attention_mask"])
    assert torch.equal(forward(policy, model, batch | {"decode_mask": mask}).logits, wanted)
    with train_under(policy, model):
        states = model.model(**batch, decode_mask=mask).last_hidden_state  # as losses fused with the head do
    assert torch.equal(model.lm_head(states)[mask], wanted[mask])


def test_all_targets_is_full_depth_and_says_so():
    model = load("llama").model
    batch = {"input_ids": BATCH["input_ids"], "labels": BATCH["input_ids"]}
    with pytest.warns(UserWarning, match="every token of this batch is decode phase"):
        found = forward(SpeedPolicy(2), model, batch)
    torch.testing.assert_close(found.loss, model(**batch).loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(SpeedPolicy(2), model, BATCH)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, "which tokens are decode phase"),
        ({"position_ids": torch.cat([torch.arange(20), torch.arange(16)])[None]}, "several texts in one row"),
        ({"cu_seq_lens_q": torch.tensor([0, 20, 36])}, "several texts in one row"),
        ({"position_ids": torch.arange(36).expand(3, 1, -1)}, "position_ids as"),
        ({"attention_mask": torch.ones(1, 1, 36, 36, dtype=torch.bool)}, "attention_mask as"),
        ({"attention_mask": torch.tensor([[1] * 10 + [0] * 3 + [1] * 23])}, "padding between tokens"),
        ({"decode_mask": torch.zeros(1, 36)}, "labels ask for logits"),
        ({"decode_mask": torch.zeros(1, 35)}, "the tokens"),
        ({"output_router_logits": True}, "output_router_logits=False"),
    ],
)
def test_batches_that_cannot_be_served_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        forward(SpeedPolicy(2), load("llama").model, BATCH | change)


def test_positions_of_ones_own_are_taken():
    model = load("llama").model
    batch = batch_of(ROWS, "left")
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = forward(SpeedPolicy(2), model, batch | {"position_ids": positions}).logits
    torch.testing.assert_close(found, forward(SpeedPolicy(2), model, batch).logits)


# --- The block ---


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_block_undoes_everything(family):
    model = tiny_model(family).model
    before = Snapshot(model)
    for cutoff in (2, N_LAYERS):
        with train_under(SpeedPolicy(cutoff), model):
            assert fingerprint(model) != before.print
            model(**BATCH)
            with full_depth(model):
                model(**BATCH)
        before.assert_same()
    with pytest.raises(RuntimeError, match="mine"), train_under(SpeedPolicy(2), model):
        raise RuntimeError("mine")
    before.assert_same()
    with pytest.raises(UserError, match="labels"), train_under(SpeedPolicy(2), model):
        model(BATCH["input_ids"])
    before.assert_same()


def test_an_interrupted_pass_leaves_no_labels_behind():
    model = tiny_model("llama").model
    with train_under(SpeedPolicy(2), model):
        with pytest.raises(UserError, match="several texts"):
            model(**BATCH, cu_seq_lens_q=torch.tensor([0, 36]))
        with pytest.raises(UserError, match="which tokens are decode phase"):
            model(BATCH["input_ids"])


def test_one_block_at_a_time():
    model, policy = tiny_model("llama").model, SpeedPolicy(2)
    with train_under(policy, model):
        for other in (lambda: train_under(policy, model).__enter__(), lambda: policy(model).__enter__()):
            with pytest.raises(UserError, match=r"runs under speed:2 already: leave"):
                other()
        for call in (
            lambda: generate(model, tokens_of(12), max_new_tokens=2),
            lambda: generate(model, tokens_of(12), policy=policy, max_new_tokens=2),
            lambda: prefill(model, tokens_of(12)),
        ):
            with pytest.raises(UserError, match="being trained"):
                call()
        with pytest.raises(UserError, match=r"to generate, use `with policy\(model\)`"):
            model.generate(tokens_of(12), max_new_tokens=2)
    with policy(model), pytest.raises(UserError, match="runs under speed:2 already"):
        train_under(policy, model).__enter__()
    with pytest.raises(UserError, match="inside `with train_under"):
        full_depth(model).__enter__()
    assert not occupancy._HELD


def tokens_of(n):
    return torch.tensor([random_ids(n)])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (FullPolicy(), "give a SpeedPolicy"),
        (ProjectedPolicy(2), "give a SpeedPolicy"),
        (SpeedPolicy(N_LAYERS + 1), "5 layers"),
    ],
)
def test_policies_that_do_not_fit_are_refused(policy, message):
    with pytest.raises(UserError, match=message):
        train_under(policy, load("llama").model).__enter__()


def test_models_that_cannot_be_served_are_refused():
    model = tiny_model("llama").model
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="flex_attention"):
        train_under(SpeedPolicy(2), model).__enter__()
    with pytest.raises(UserError, match="not Linear"):
        train_under(SpeedPolicy(2), torch.nn.Linear(2, 2)).__enter__()
    model = tiny_model("llama").model
    model._is_replica = True  # as the copies of torch.nn.DataParallel are
    with pytest.raises(UserError, match="DataParallel"):
        forward(SpeedPolicy(2), model, BATCH)


def test_layers_that_get_no_keyword_arguments_are_refused(monkeypatch):
    model = tiny_model("llama").model
    layer = model.model.layers[0]
    stock = type(layer).__call__
    monkeypatch.setattr(type(layer), "__call__", lambda self, *a, **k: stock(self, *a, **{**k, "speed_plan": None}))
    with pytest.raises(UserError, match="do not get the keyword arguments"):
        forward(SpeedPolicy(2), model, BATCH)


# --- Cost ---


def test_upper_layers_and_the_head_run_deep_tokens_only():
    model, rows = tiny_model("llama").model, []
    for module in [*model.model.layers, model.lm_head]:
        part = module.mlp if hasattr(module, "mlp") else module
        part.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[1]))
    with train_under(SpeedPolicy(2), model) as visibility:
        model(**batch_of(ROWS, "right"))
        with full_depth(model):
            model(**BATCH)
        model(**BATCH)
    deep = 1 + (6 + 1) + (4 + 1)
    shallow_pass = [36] * 2 + [deep] * (N_LAYERS - 2 + 1)
    assert rows == shallow_pass + [36] * (N_LAYERS + 1) + shallow_pass
    assert (visibility.n_positions, visibility.n_deep) == (3 * 36, 3 * deep)


@pytest.mark.parametrize("side", [None, "right"])
def test_fused_causal_attention_stays_in_use(side, monkeypatch):
    seen, stock = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        seen.append(attn_mask)
        return stock(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    forward(SpeedPolicy(2), load("llama").model, batch_of(ROWS if side else ROWS[:1], side))
    assert seen == [None] * N_LAYERS


# --- With the tools that train ---


def checkpointed(model, kind):
    """Turn on gradient checkpointing: transformers' own, or FSDP's, which runs a layer's hooks again."""
    model.train()
    if kind == "fsdp":
        stack = model.get_decoder()
        layers = stack.h if hasattr(stack, "h") else stack.layers
        for i, layer in enumerate(layers):
            layers[i] = checkpoint_wrapper(layer)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": kind == "reentrant"})
        assert model.is_gradient_checkpointing


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_oss"])
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant", "fsdp"])
def test_gradient_checkpointing_changes_nothing(family, kind):
    policy, batch = SpeedPolicy(2, anchors=2), batch_of(ROWS, "left")
    model = without_dropout(double(family)[0])
    model.config.attn_pdrop = model.config.resid_pdrop = 0.0
    model.train()
    loss, wanted = step(policy, model, batch)
    model.zero_grad()
    with train_under(policy, model):
        checkpointed(model, kind)
        first = model(**batch).loss
        with full_depth(model), torch.no_grad():
            teacher = model(**batch).logits
        second = model(**BATCH).loss  # other rows, while the first pass has still to be computed again
        first.backward()
    assert teacher.isfinite().all()
    assert second.isfinite()
    torch.testing.assert_close(first.detach(), loss)
    found = {name.replace("_checkpoint_wrapped_module.", ""): g for name, g in gradients(model).items()}
    assert_same_gradients(found, wanted, 1e-9)


def test_autocast_to_bfloat16():
    model, policy = tiny_model("llama").model, SpeedPolicy(2)
    batch = batch_of(ROWS, "left")
    wanted, _ = step(policy, model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss, found = step(policy, model, batch)
    torch.testing.assert_close(loss, wanted, rtol=0.03, atol=0)
    assert all(gradient.isfinite().all() for gradient in found.values())


@pytest.fixture
def adapted():
    peft = pytest.importorskip("peft")
    model = tiny_model("llama").model
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("inside", [False, True])
def test_lora(adapted, inside):
    policy = SpeedPolicy(2)
    base = {name: p.clone() for name, p in adapted.named_parameters() if "lora_" not in name}
    merged = copy.deepcopy(adapted).merge_and_unload()
    given = adapted if not inside else adapted.get_base_model()
    with train_under(policy, given):
        loss = given(**BATCH).loss
        loss.backward()
        torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1).step()
        with full_depth(adapted), adapted.disable_adapter(), torch.no_grad():
            teacher = given(**BATCH).logits
    torch.testing.assert_close(loss, forward(policy, merged, BATCH).loss)
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert all(torch.equal(p, base[name]) for name, p in adapted.named_parameters() if name in base)
    assert_close(teacher, tiny_model("llama").model(**BATCH).logits, 5e-6)


def test_a_call_past_the_hooks_is_refused():
    model = load("llama").model
    with (
        train_under(SpeedPolicy(2), model),
        pytest.raises(UserError, match="call the model that train_under was given"),
    ):
        model.forward(**BATCH)


def test_the_trainer_is_a_plain_loop(tmp_path):
    from transformers import Trainer, TrainingArguments

    policy = SpeedPolicy(2)
    batches = [batch_of(ROWS, "right"), batch_of(ROWS[::-1], "right"), batch_of([ROWS[1]] * 2, "right")]
    rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(2)]
    plain, trained = tiny_model("llama").model.train(), tiny_model("llama").model
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    losses = []
    for batch in batches:
        with train_under(policy, plain):
            loss = plain(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, max_steps=3, learning_rate=0.05, optim="sgd", report_to=[],
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = Trainer(trained, arguments, train_dataset=rows, data_collator=lambda features: {
        name: torch.stack([feature[name] for feature in features])[:, : max(len(f[name]) for f in features)]
        for name in features[0]
    })  # fmt: skip
    with train_under(policy, trained):
        trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    for (name, found), wanted in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, msg=name)
