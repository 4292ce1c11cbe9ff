"""TRL's SFTTrainer under SPEED: its steps against slow masked passes, and what it can do that has no meaning there."""

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from diagnostics import SpeedPolicy, UserError
from diagnostics.finetune import train_under
from tests.support.tiny import N_LAYERS, random_ids, tiny_model, tiny_tokenizer
from tests.support.training import Gradients, SlowTrainer, assert_same_gradients, without_dropout

pytestmark = pytest.mark.usefixtures("one_thread")

POLICY = SpeedPolicy(2)
TURNS = [(14, 6), (23, 3), (9, 8)]
IDS = [random_ids(sum(turn), seed=n) for n, turn in enumerate(TURNS)]
TOKENIZED = [
    {"input_ids": ids, "completion_mask": [0] * prompt + [1] * answer}
    for ids, (prompt, answer) in zip(IDS, TURNS, strict=True)
]
WRITTEN = [
    {"prompt": "w7 w8 w9 w10 w11 w12", "completion": " w13 w14 w15"},
    {"prompt": "w20 w21 w22", "completion": " w23 w24 w25 w26"},
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}w5 {{ m.content }}{% endgeneration %} "
    "{% else %}w4 {{ m.content }} {% endif %}{% endfor %}"
)


def make(model, folder, rows=TOKENIZED, *, peft_config=None, callbacks=(), **options):
    arguments = {
        "max_steps": 1,
        "per_device_train_batch_size": len(rows),
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "completion_only_loss": True,
        "report_to": [],
        "disable_tqdm": True,
    }
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return SFTTrainer(
        model,
        SFTConfig(str(folder), **(arguments | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=list(callbacks),
    )


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def assert_masked_step(folder, family, conversations, rows, **options):
    """Loss and gradients of one step are those of slow masked passes."""
    model = without_dropout(tiny_model(family).model)
    model.config.attn_pdrop = model.config.resid_pdrop = 0.0
    wanted_loss, wanted = SlowTrainer(tiny_model(family)).step(POLICY, conversations)
    kept = Gradients()
    trainer = make(model, folder, rows, callbacks=[kept], **options)
    with train_under(POLICY, trainer.model):
        trainer.train()
    assert losses(trainer) == pytest.approx([float(wanted_loss)], rel=1e-4)
    assert_same_gradients(kept.steps[0], wanted, 1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_the_masked_pass(tmp_path, family, checkpointing):
    conversations = [(ids, [turn]) for ids, turn in zip(IDS, TURNS, strict=True)]
    assert_masked_step(tmp_path, family, conversations, TOKENIZED, gradient_checkpointing=checkpointing)


def test_every_turn_of_a_conversation_is_the_masked_pass(tmp_path):
    turns = [(11, 4), (5, 7)]
    ids, messages = [], []
    for role, n in zip(("user", "assistant") * 2, sum(turns, ()), strict=True):
        said = random_ids(n, seed=n)[1:]
        ids += [5 if role == "assistant" else 4, *said]
        messages.append({"role": role, "content": " ".join(f"w{token}" for token in said)})
    only = {"assistant_only_loss": True, "completion_only_loss": False}
    assert_masked_step(tmp_path, "llama", [(ids, turns)], [{"messages": messages}], **only)


def test_texts_and_an_adapter_that_trl_makes(tmp_path):
    """What TRL marks as completion is decode phase: fewer positions run through the upper layers than the lower."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make(tiny_model("llama").model, tmp_path, WRITTEN, peft_config=lora, max_steps=6)
    with train_under(POLICY, trainer.model) as visibility:
        trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    assert 0 < visibility.n_deep < visibility.n_positions
    stock = make(tiny_model("llama").model, tmp_path, WRITTEN, peft_config=lora)
    stock.train()
    assert losses(stock)[0] != pytest.approx(found[0], rel=1e-4)


def test_at_full_depth_it_is_stock(tmp_path):
    ends = []
    for policy in (SpeedPolicy(N_LAYERS), None):
        trainer = make(tiny_model("llama").model, tmp_path, max_steps=3)
        if policy is None:
            trainer.train()
        else:
            with train_under(policy, trainer.model):
                trainer.train()
        ends.append([*losses(trainer), *(float(p.detach().sum()) for p in trainer.model.parameters())])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6)


@pytest.mark.parametrize("options", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_rows_that_share_a_sequence_are_refused(tmp_path, options):
    trainer = make(tiny_model("llama").model, tmp_path, **options)
    with train_under(POLICY, trainer.model), pytest.raises(UserError, match="pack"):
        trainer.train()
