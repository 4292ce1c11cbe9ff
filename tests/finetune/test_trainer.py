"""Steps of the trainer against slow masked passes in float64, and what decides its cutoffs."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import IntervalStrategy, TrainingArguments

from diagnostics import SpeedPolicy, UserError
from diagnostics.finetune import (
    CutoffSchedule,
    Settings,
    SpeedTrainer,
    collate,
    decode_phase,
    predicting,
    train_under,
)
from diagnostics.finetune import trainer as trainer_module
from diagnostics.finetune.lora import add_lora
from tests.support.examples import examples
from tests.support.policy_cases import letters_of
from tests.support.policy_reference import speed
from tests.support.tiny import N_LAYERS, random_ids, tiny_model
from tests.support.training import (
    Gradients,
    SlowTrainer,
    assert_same_gradients,
    double,
    gradients,
    labels_of,
    without_dropout,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Prompts and answers of conversations of different lengths; the second has two turns.
TURNS = [[(14, 3)], [(9, 2), (5, 4)], [(20, 1)], [(3, 6)]]
IDS = [random_ids(sum(map(sum, turns)), seed=n) for n, turns in enumerate(TURNS)]
ROWS = [
    {"id": str(n), "input_ids": ids, "labels": labels_of(ids, *turns)}
    for n, (ids, turns) in enumerate(zip(IDS, TURNS, strict=True))
]


def make(
    model,
    folder,
    rows=ROWS,
    *,
    callbacks=(),
    batch_size=1,
    accumulate=4,
    steps=1,
    checkpointing=False,
    learning_rate=1e-2,
    **speed,
):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        gradient_checkpointing=checkpointing,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        remove_unused_columns=False,
        report_to=[],
    )
    return SpeedTrainer(
        model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=lambda batch: collate(batch, 0),
        callbacks=list(callbacks),
        **speed,
    )


def train(model, folder, **how):
    """Losses and gradients of the steps."""
    kept = Gradients()
    trainer = make(model, folder, callbacks=[kept], **how)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row], kept.steps


def with_adapter(lm):
    """Add an adapter that does something."""
    model = add_lora(lm, rank=2)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.05)
    return model


def by_hand(slow, teacher, cutoff, supervised):
    """Loss and gradients of all rows in one step, from the formula and masked passes of single rows."""
    slow.model.zero_grad()
    total, count = 0, 0
    for ids, turns in zip(IDS, TURNS, strict=True):
        student = speed(slow, ids, letters_of(SpeedPolicy(cutoff), *turns), cutoff)
        with torch.no_grad():
            taught = teacher.run(ids, lambda _, hidden, mask: (hidden, mask))
        for position, target in enumerate(labels_of(ids, *turns)[1:]):
            if target != -100:
                q, p = student[position].log_softmax(0), taught[position].log_softmax(0)
                total = total + supervised * -q[target] + (1 - supervised) * (p.exp() * (p - q)).sum()
                count += 1
    loss = total / count
    loss.backward()
    return float(loss.detach()), gradients(slow.model)


def inner(found):
    """Gradients by the names that the model itself has for its parameters."""
    return {name.removeprefix("base_model.model."): gradient for name, gradient in found.items()}


# --- One step ---


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize(
    ("family", "supervised", "batch_size", "accumulate"),
    [("llama", 0.0, 1, 4), ("gemma2", 0.0, 2, 2), ("gpt2", 0.25, 2, 2), ("llama", 1.0, 4, 1), ("gemma2", 0.5, 4, 1)],
)
def test_a_step_of_an_adapter_is_the_formula(tmp_path, family, supervised, batch_size, accumulate):
    lm = tiny_model(family)
    without_dropout(lm.model.double())
    base = SlowTrainer(lm)
    model = with_adapter(lm)
    loss, found = train(
        model, tmp_path, batch_size=batch_size, accumulate=accumulate, schedule=2, supervised=supervised
    )
    torch.manual_seed(0)
    fresh = tiny_model(family)
    without_dropout(fresh.model.double())
    with_adapter(fresh)
    wanted_loss, wanted = by_hand(SlowTrainer(fresh), base, 2, supervised)
    assert loss == pytest.approx([wanted_loss], rel=1e-10)
    assert_same_gradients(inner(found[0]), wanted, 1e-8)


@pytest.mark.usefixtures("all_double")
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_step_of_all_weights_is_the_formula(tmp_path, batch_size):
    model, slow = double("llama")
    torch.manual_seed(3)
    other, teacher = double("llama")
    with torch.no_grad():
        for mine, theirs in zip(other.parameters(), teacher.model.parameters(), strict=True):
            mine.add_(torch.randn_like(mine) * 0.02)
            theirs.copy_(mine)
    loss, found = train(model, tmp_path, batch_size=batch_size, accumulate=4 // batch_size, schedule=3, teacher=other)
    wanted_loss, wanted = by_hand(slow, teacher, 3, 0.0)
    assert loss == pytest.approx([wanted_loss], rel=1e-10)
    assert_same_gradients(found[0], wanted, 1e-8)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    made = []
    for checkpointing in (False, True):
        model = with_adapter(tiny_model("llama"))
        made.append(train(model, tmp_path, steps=2, accumulate=2, checkpointing=checkpointing, schedule=2))
    (losses, found), (others, wanted) = made
    assert losses == others
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_at_full_depth_has_nothing_to_learn_at_first(tmp_path):
    losses, found = train(add_lora(tiny_model("qwen3"), 2), tmp_path, schedule=N_LAYERS)
    assert losses == [0.0]
    assert max(gradient.abs().max() for gradient in found[0].values()) < 1e-6


# --- The teacher ---


@pytest.fixture
def taught(monkeypatch):
    """Logits of students and of teachers, as the loss gets them."""
    seen = []
    plain = trainer_module.distillation_loss

    def spy(student, teacher, *args, **kwargs):
        seen.append((student.detach(), teacher.detach()))
        return plain(student, teacher, *args, **kwargs)

    monkeypatch.setattr(trainer_module, "distillation_loss", spy)
    return seen


def stock_logits(lm, batch):
    with torch.no_grad():
        return lm.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_teacher_is_at_full_depth_without_adapter_and_without_dropout(tmp_path, taught, method):
    lm, base = tiny_model("gpt2"), tiny_model("gpt2")
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in lm.model.modules())
    model, teacher = (with_adapter(lm), None) if method == "lora" else (lm.model, copy.deepcopy(lm.model).train())
    train(model, tmp_path, steps=3, batch_size=4, accumulate=1, schedule=1, teacher=teacher)
    assert len(taught) == 3
    for student, logits in taught:
        n_kept = logits.shape[1]
        wanted = stock_logits(base, collate(ROWS, 0))[:, -n_kept:]
        rows = [next(i for i, row in enumerate(logits) if close(row, one, ROWS[n])) for n, one in enumerate(wanted)]
        assert sorted(rows) == [0, 1, 2, 3]
        assert student.shape == logits.shape
    assert not torch.equal(taught[0][0], taught[1][0])


def close(found, wanted, row):
    """Whether logits agree at the tokens of a row; padding on the right is of no interest."""
    n = len(row["input_ids"]) - (max(map(len, IDS)) - len(found))
    return torch.allclose(found[:n], wanted[:n], atol=1e-5)


def test_nothing_reaches_an_explicit_teacher(tmp_path):
    lm = tiny_model("llama")
    teacher = copy.deepcopy(lm.model)
    before = copy.deepcopy(teacher.state_dict())
    train(lm.model, tmp_path, steps=2, accumulate=2, schedule=2, teacher=teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not torch.equal(lm.model.state_dict()["model.norm.weight"], before["model.norm.weight"])


def test_given_answers_alone_need_no_teacher(tmp_path, taught):
    losses, _ = train(tiny_model("llama").model, tmp_path, schedule=2, supervised=1.0)
    assert losses[0] > 0
    assert not taught
    with pytest.raises(UserError, match="needs a teacher"):
        make(tiny_model("llama").model, tmp_path, schedule=2, supervised=0.5)
    with pytest.raises(UserError, match="give 0 to 1"):
        make(tiny_model("llama").model, tmp_path, schedule=2, supervised=2)


def test_a_trainer_leaves_the_adapter_on_and_the_model_in_training(tmp_path):
    model = with_adapter(tiny_model("llama"))
    trainer = make(model, tmp_path, schedule=2)
    batch = collate(ROWS, 0)
    before = model(input_ids=batch["input_ids"]).logits.detach()
    model.train()
    with train_under(SpeedPolicy(2), model):
        trainer.compute_loss(model, batch)
    assert model.training
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, before)


def test_evaluation_is_under_the_policy_and_leaves_the_weights(tmp_path):
    model = with_adapter(tiny_model("llama"))
    trainer = make(model, tmp_path, schedule=2, supervised=0.5)
    trainer.args.per_device_eval_batch_size = 4
    found = trainer.evaluate(eval_dataset=list(ROWS))["eval_loss"]
    model.eval()
    with train_under(SpeedPolicy(2), model):
        wanted = float(trainer.compute_loss(model, collate(ROWS, 0)))
    assert found == pytest.approx(wanted, rel=1e-5)
    assert not model.training


def test_metrics_get_a_prediction_beside_every_label(tmp_path):
    model = with_adapter(tiny_model("llama"))
    trainer = make(model, tmp_path, schedule=2)
    trainer.args.per_device_eval_batch_size = 1
    seen = []
    trainer.compute_metrics = lambda found: seen.append(found) or {"accuracy": 0.5}
    row = ROWS[0]
    found = trainer.evaluate(eval_dataset=[row])
    assert found["eval_accuracy"] == 0.5
    (given,) = seen
    assert given.predictions.shape[:2] == given.label_ids.shape == (1, len(row["labels"]))
    batch = collate([row], 0)
    with torch.no_grad(), train_under(SpeedPolicy(2), model):
        wanted = model(input_ids=batch["input_ids"], decode_mask=decode_phase(batch["labels"], None)).logits
    targets = given.label_ids[0] != -100
    before = targets.nonzero()[0] - 1
    torch.testing.assert_close(torch.tensor(given.predictions[0, before]), wanted[0, before])
    trainer.compute_metrics = None
    assert trainer.evaluate(eval_dataset=[row])["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-6)


def test_evaluation_between_steps(tmp_path):
    trainer = make(with_adapter(tiny_model("llama")), tmp_path, schedule=2, steps=2, learning_rate=1e-12)
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
    trainer.args.per_device_eval_batch_size = 4
    trainer.eval_dataset = list(ROWS)
    trainer.train()
    rows = trainer.state.log_history
    losses, evaluated = ([row[name] for row in rows if name in row] for name in ("loss", "eval_loss"))
    assert evaluated == pytest.approx(losses, rel=1e-4)
    assert len(evaluated) == 2


# --- Which logits are computed ---


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    model = with_adapter(tiny_model("llama"))
    return make(model, tmp_path_factory.mktemp("small"), schedule=2, supervised=0.5)


patterns = st.lists(st.lists(st.booleans(), min_size=2, max_size=14), min_size=1, max_size=3)


@examples(40)
@given(patterns=patterns, cutoff=st.integers(1, N_LAYERS))
def test_no_target_is_cut_off(small, patterns, cutoff):
    """Any pattern of targets, rows without any among them, against logits of all positions."""
    rows = []
    for n, pattern in enumerate(patterns):
        ids = random_ids(len(pattern), seed=n)
        labels = [
            token if wanted and place else -100 for place, (token, wanted) in enumerate(zip(ids, pattern, strict=True))
        ]
        rows.append({"id": str(n), "input_ids": ids, "labels": labels})
    batch = collate(rows, 0)
    model, labels = small.model.train(), batch["labels"]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad(), train_under(SpeedPolicy(cutoff), model):
        found = float(small.compute_loss(model, dict(batch)))
        student = model(**inputs, decode_mask=decode_phase(labels, batch["attention_mask"])).logits.double()
    with torch.no_grad(), model.disable_adapter():
        teacher = model(**inputs).logits.double()
    mask = predicting(labels)
    q, p = student[mask].log_softmax(-1), teacher[mask].log_softmax(-1)
    targets = labels[:, 1:][mask[:, :-1]]
    wanted = 0.0
    if len(targets):
        wanted = (
            float(functional.nll_loss(q, targets) + functional.kl_div(q, p, log_target=True, reduction="sum") / len(q))
            / 2
        )
    assert len(targets) == sum(label != -100 for row in rows for label in row["labels"])
    assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_the_head_runs_from_the_first_prediction_on(small):
    seen = []
    head = small.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    row = {"id": "a", "input_ids": random_ids(30), "labels": [-100] * 25 + random_ids(30)[25:]}
    with train_under(SpeedPolicy(2), small.model):
        small.compute_loss(small.model, collate([row], 0))
    hook.remove()
    assert seen == [6, 6]


# --- The schedule ---


@pytest.mark.parametrize("anchors", [1, 3])
def test_every_step_runs_at_its_cutoff(tmp_path, anchors):
    """With next to no learning rate the losses are those of the cutoffs; full depth is among them."""
    how = {"batch_size": 4, "accumulate": 1, "supervised": 1.0, "anchors": anchors, "learning_rate": 1e-12}
    at = {k: train(tiny_model("llama").model, tmp_path, schedule=k, **how)[0][0] for k in range(2, N_LAYERS + 1)}
    assert len(set(at.values())) == 4
    schedule = CutoffSchedule(N_LAYERS, 2, share=0.8)
    losses, _ = train(tiny_model("llama").model, tmp_path, steps=10, schedule=schedule, **how)
    assert losses == pytest.approx([at[k] for k in (5, 5, 4, 4, 3, 3, 2, 2, 2, 2)], rel=1e-5)


schedules = st.tuples(st.integers(1, 60), st.integers(1, 60)).map(sorted)


@given(ends=schedules, share=st.floats(0, 1), n_steps=st.integers(1, 300))
def test_a_schedule_falls_evenly_and_ends_where_it_should(ends, share, n_steps):
    end, start = ends
    schedule = CutoffSchedule(start, end, share)
    cutoffs = [schedule.at(step, n_steps) for step in range(n_steps)]
    assert cutoffs == sorted(cutoffs, reverse=True)
    assert all(end <= cutoff <= start for cutoff in cutoffs)
    assert cutoffs[-1] == end
    lowering = min(round(share * n_steps), n_steps - 1)
    assert all(cutoff == end for cutoff in cutoffs[lowering:])
    if lowering:
        assert cutoffs[0] == start
    if lowering >= start - end + 1:
        counts = [cutoffs[:lowering].count(cutoff) for cutoff in range(end, start + 1)]
        assert max(counts) - min(counts) <= 1


@given(ends=schedules, hold=st.floats(0, 0.5), n_steps=st.integers(1, 300))
def test_a_schedule_holds_full_depth_evenly_and_leaves_the_other_steps_as_they_are(ends, hold, n_steps):
    end, start = ends
    plain, held = CutoffSchedule(start, end), CutoffSchedule(start, end, hold=hold, full_depth=61)
    cutoffs = [held.at(step, n_steps) for step in range(n_steps)]
    places = [step for step, cutoff in enumerate(cutoffs) if cutoff == 61]
    assert all(cutoff == plain.at(step, n_steps) for step, cutoff in enumerate(cutoffs) if cutoff != 61)
    assert cutoffs[0] == plain.at(0, n_steps)
    assert cutoffs[-1] == end
    assert abs(len(places) - hold * n_steps) < 2
    gaps = {later - earlier for earlier, later in pairwise(places)}
    assert len(gaps) <= 2
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


@pytest.mark.parametrize(
    "wrong", [(2, 3), (0, 0), (3, 0), (3, 2, 1.5), (3, 2, -0.1), (3, 2, 1, 0.6, 5), (3, 2, 1, -0.1, 5), (3, 2, 1, 0.2)]
)
def test_a_schedule_that_makes_no_sense(wrong):
    with pytest.raises(UserError):
        CutoffSchedule(*wrong)


# --- Settings ---


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


def test_choices_follow_the_model(lm):
    settled = Settings(3).settled(lm)
    assert (settled.start_cutoff, settled.against, settled.learning_rate) == (3, "base", 1e-3)
    assert (settled.gradient_checkpointing, settled.rank) == (False, 16)
    assert settled.settled(lm) == settled
    assert Settings(3, method="full").settled(lm).learning_rate == pytest.approx(5e-5)
    assert Settings(3, supervised=1.0).settled(lm).against == "itself"
    assert Settings(3, supervised=1.0, against="base").settled(lm).against == "base"
    assert Settings(N_LAYERS, supervised=0.5).settled(lm).cutoff == N_LAYERS
    given = Settings(3, start_cutoff=5, learning_rate=0.5, gradient_checkpointing=True).settled(lm)
    assert (given.start_cutoff, given.learning_rate, given.gradient_checkpointing) == (5, 0.5, True)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"cutoff": 0}, "cutoff"),
        ({"cutoff": 6}, "5"),
        ({"cutoff": N_LAYERS}, "nothing to learn"),
        ({"start_cutoff": 2}, "cannot go from 2 to 3"),
        ({"start_cutoff": 6}, "5"),
        ({"start_cutoff": 0}, "0"),
        ({"anchors": -1}, "anchors"),
        ({"supervised": 2.0}, "give 0 to 1"),
        ({"supervised": -0.1}, "give 0 to 1"),
        ({"supervised": float("nan")}, "give 0 to 1"),
        ({"against": "both"}, "give base or itself"),
        ({"method": "qlora"}, "give lora or full"),
        ({"method": "full", "rank": 8}, "rank"),
        ({"rank": 0}, "rank is 0"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": -1e-3}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 0}, "batch"),
        ({"accumulate": 0}, "accumulate"),
        ({"decode_tokens": 0}, "decode"),
        ({"sweep_every": 0}, "sweep"),
        ({"checkpoint_every": 0}, "checkpoint"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense(lm, wrong, said):
    with pytest.raises(UserError, match=said) as error:
        Settings(**{"cutoff": 3} | wrong).settled(lm)
    assert "\n" not in str(error.value)


# --- Arguments of the Trainer that change the loss ---


def trained_loss(folder, supervised, smoothing, **arguments):
    trainer = make(with_adapter(tiny_model("llama")), folder, schedule=2, supervised=supervised, learning_rate=0.0)
    trainer.args.label_smoothing_factor = smoothing
    for name, value in arguments.items():
        setattr(trainer.args, name, value)
    return trainer.train().training_loss


def test_label_smoothing_is_in_the_loss(tmp_path):
    plain, smooth = (trained_loss(tmp_path / str(s), 1.0, s) for s in (0.0, 0.5))
    lm, total, targets, spread = with_adapter(tiny_model("llama")), 0.0, 0, 0.0
    with train_under(SpeedPolicy(2), lm), torch.no_grad():
        for row in ROWS:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            log_p = lm(input_ids=ids, labels=labels).logits[0, :-1].double().log_softmax(-1)
            at = labels[0, 1:] != -100
            total -= float(log_p[at].gather(-1, labels[0, 1:][at][:, None]).sum())
            spread -= float(log_p[at].mean(-1).sum())
            targets += int(at.sum())
    assert plain == pytest.approx(total / targets, rel=1e-4)
    assert smooth == pytest.approx((0.5 * total + 0.5 * spread) / targets, rel=1e-4)


@pytest.mark.parametrize(
    ("supervised", "arguments", "trainer", "message"),
    [
        (0.0, {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor: it smooths targets"),
        (1.0, {}, {"compute_loss_func": lambda *_, **__: None}, "compute_loss_func"),
        (1.0, {"torch_compile": True}, {}, "torch_compile"),
        (1.0, {"use_liger_kernel": True}, {}, "use_liger_kernel"),
    ],
)
def test_arguments_that_would_be_left_out_of_the_loss_are_refused(tmp_path, supervised, arguments, trainer, message):
    settings = TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, remove_unused_columns=False, **(arguments | {"torch_compile": False})
    )
    for name, value in arguments.items():
        setattr(settings, name, value)
    model = with_adapter(tiny_model("llama"))
    with pytest.raises(UserError, match=f"SpeedTrainer does not serve {message}"):
        SpeedTrainer(model, schedule=2, supervised=supervised, args=settings, train_dataset=ROWS, **trainer)


def test_noise_on_embeddings_is_the_students_alone(tmp_path):
    loss = {}
    for alpha in (None, 40.0):
        trainer = make(
            with_adapter(tiny_model("llama")), tmp_path / str(alpha), schedule=2, supervised=1.0, learning_rate=0.0
        )
        trainer.neftune_noise_alpha = alpha
        loss[alpha] = trainer.train().training_loss
    assert loss[40.0] != pytest.approx(loss[None], rel=1e-3)
