"""Evaluations: what is scored, what is compared, and what is left after a kill or a failure."""

import io
import json
import re
import resource
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from diagnostics import FullPolicy, SpeedPolicy, UserError, generate, load_run
from diagnostics.evaluate import item_answers
from diagnostics.evaluate.evaluation import draw, evaluate
from diagnostics.evaluate.evaluation_folder import load_evaluation
from diagnostics.evaluate.item_texts import item_texts
from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
from diagnostics.evaluate.retrieval import retrieval_names, retrieval_task
from diagnostics.evaluate.score_table import AVERAGE, markdown, summarize
from diagnostics.evaluate.scoring import encode_pair, score
from diagnostics.evaluate.statistics import difference, estimate, holm
from diagnostics.evaluate.tasks import load_task
from diagnostics.report import asked_margin
from diagnostics.terminal.evaluation import show_evaluation
from tests.support.runs import contents, run_command, save_tiny
from tests.support.tiny import random_ids, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def words(n, seed):
    return " ".join(f"w{i}" for i in random_ids(n, seed) if i > 3)


@pytest.fixture(scope="module")
def lm():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def choice():
    items = [
        ChoiceItem(f"c{i}", (Context(words(12, i), words(9, i + 50)),) * 3, (" w5 w6", " w7", " w8 w9 w10"), i % 3)
        for i in range(12)
    ]
    return Task("choice", tuple(items), "acc_per_char")


@pytest.fixture(scope="module")
def writing():
    items = [GenerationItem(f"g{i}", Context(words(10, i)), (f"w{i}", "w12")) for i in range(8)]
    return Task("writing", tuple(items), "contains", max_new_tokens=6)


POLICIES = [SpeedPolicy(2), SpeedPolicy(4)]
FILES = {"evaluation.json", "items.parquet", "summary.parquet", "summary.md"}


@pytest.fixture(scope="module")
def made(lm, choice, writing):
    return evaluate(lm, [choice, writing], POLICIES)


def rows_of(made, task, policy):
    return made.items[(made.items["task"] == task) & (made.items["policy"] == policy)].reset_index(drop=True)


def test_every_item_has_a_row_under_every_policy(made, choice, writing):
    assert len(made.items) == 20 * 3
    for task in (choice, writing):
        for policy in ("full", "speed:2", "speed:4"):
            assert list(rows_of(made, task.name, policy)["item_id"]) == [item.id for item in task.items]
    assert made.manifest["errors"] == []


def test_the_table_corrects_over_the_tasks_of_a_policy():
    """Two tasks of 12 and of 8 items, all lost: p-values of 2^-11 and 2^-7, of which the smaller is doubled."""
    rows = [
        {"task": task, "item_id": str(i), "policy": policy, "score": float(policy == "full")}
        for task, n in (("a", 8), ("b", 12))
        for i in range(n)
        for policy in ("full", "speed:2")
    ]
    table = summarize(SimpleNamespace(items=pd.DataFrame(rows)))
    table = table[table["policy"] == "speed:2"].set_index("task")
    assert table["p_value"][["a", "b"]].tolist() == pytest.approx([2**-7, 2**-11])
    assert table["p_holm"][["a", "b"]].tolist() == pytest.approx([2**-7, 2**-10])


@pytest.mark.parametrize("policy", [FullPolicy(), SpeedPolicy(2)], ids=str)
def test_choices_are_the_most_likely_by_their_metric(made, lm, choice, policy):
    found = rows_of(made, "choice", policy.spec)
    for row, item in zip(found.itertuples(), choice.items, strict=True):
        pairs = [encode_pair(lm.tokenizer, item.contexts[0], text, special=True) for text in item.continuations]
        scored = score(lm, policy, pairs[0][0], [ids for _, ids in pairs])
        values = [one.log_likelihood / len(text) for one, text in zip(scored, item.continuations, strict=True)]
        assert row.chosen == int(np.argmax(values))
        assert row.score == float(row.chosen == item.gold)
        assert row.n_prompt == len(pairs[0][0].ids)


@pytest.mark.parametrize("policy", [FullPolicy(), SpeedPolicy(2)], ids=str)
def test_answers_are_those_of_generate(made, lm, writing, policy):
    found = rows_of(made, "writing", policy.spec)
    for row, item in zip(found.itertuples(), writing.items, strict=True):
        ids = lm.tokenizer(item.context.text, return_tensors="pt")["input_ids"]
        tokens = generate(lm, ids, policy=policy, max_new_tokens=6).token_ids[0].tolist()
        tokens = tokens[: tokens.index(2)] if 2 in tokens else tokens
        # As it follows the context: this tokenizer puts a space between words.
        assert row.answer == " " + lm.tokenizer.decode(tokens, skip_special_tokens=True)
        assert row.n_tokens == len(tokens)
        assert row.score == float(any(answer in row.answer for answer in item.answers))


def test_stop_strings_end_an_answer(lm, writing):
    whole = rows_of(evaluate(lm, [writing], []), "writing", "full")
    word = whole["answer"][0].split()[2]
    stopped = rows_of(evaluate(lm, [replace(writing, stop=(word,))], []), "writing", "full")
    assert stopped["answer"][0] == whole["answer"][0].partition(word)[0]
    assert not stopped["unfinished"][0]
    assert stopped["unfinished"][1:].any()  # the others have no such word, and a stop string was to come


def test_the_table_is_estimates_and_paired_differences(made):
    table = summarize(made)
    for task in ("choice", "writing"):
        full = rows_of(made, task, "full")["score"].to_numpy()
        for policy in ("speed:2", "speed:4"):
            scores = rows_of(made, task, policy)["score"].to_numpy()
            (row,) = table[(table["task"] == task) & (table["policy"] == policy)].to_dict("records")
            wanted, paired = estimate(scores), difference(scores, full)
            assert (row["n"], row["score"], row["low"], row["high"]) == (
                len(scores),
                wanted.mean,
                wanted.low,
                wanted.high,
            )
            assert (row["difference"], row["p_value"]) == (paired.mean, paired.p_value)
            assert row["non_inferior"] == paired.non_inferior(0.02)
    of_tasks = table[(table["task"] != AVERAGE) & (table["policy"] != "full")]
    for _, rows in of_tasks.groupby("policy"):
        assert rows["p_holm"].tolist() == holm(rows["p_value"].tolist())
    averages = table[table["task"] == AVERAGE].set_index("policy")
    for policy in averages.index:
        means = [rows_of(made, task, policy)["score"].mean() for task in ("choice", "writing")]
        assert averages["score"][policy] == pytest.approx(np.mean(means))
    text = markdown(table)
    assert text.splitlines()[0].startswith("| policy | choice | writing | average |")
    assert text.count("\n") == 5


def test_a_limit_draws_the_same_items_for_all(lm, choice):
    drawn = draw(choice, 5, seed=3)
    assert len(drawn.items) == 5
    assert [item.id for item in drawn.items] == sorted((item.id for item in drawn.items), key=lambda i: int(i[1:]))
    assert drawn == draw(choice, 5, seed=3)
    assert drawn != draw(choice, 5, seed=4)
    assert draw(choice, 50, seed=3) is choice
    made = evaluate(lm, [choice], [SpeedPolicy(2)], limit=5, seed=3)
    assert list(rows_of(made, "choice", "full")["item_id"]) == [item.id for item in drawn.items]


def test_a_task_that_fails_leaves_the_others_alone(lm, choice, writing, tmp_path):
    long = Task("long", (GenerationItem("x", Context(words(700, 1)), ("w1",)),), "contains")
    made = evaluate(lm, [long, choice], [SpeedPolicy(2)], out=tmp_path / "out")
    assert [error.partition(":")[0] for error in made.manifest["errors"]] == ["long, full", "long, speed"]
    assert "positions" in made.manifest["errors"][0]
    assert set(made.items["task"]) == {"choice"}
    assert AVERAGE in set(summarize(made)["task"])
    with pytest.raises(UserError, match="nothing could be evaluated: long, full: UserError"):
        evaluate(lm, [long], [])


def test_the_average_takes_in_the_same_tasks_for_all(made):
    lost = made.items[~((made.items["task"] == "choice") & (made.items["policy"] == "full"))]
    lost = lost[~((lost["task"] == "writing") & (lost["policy"] == "speed:2"))]
    table = summarize(replace(made, items=lost))
    # speed:2 finished as many tasks as full depth, but not the same.
    assert list(table[table["task"] == AVERAGE]["policy"]) == ["full"]


def test_names_of_tasks_cannot_be_taken_for_something_else(writing, made):
    with pytest.raises(UserError, match="cannot be called 'average'"):
        replace(writing, name=AVERAGE)
    odd = replace(made, items=made.items.replace({"task": {"choice": "a|b"}}))
    assert markdown(summarize(odd)).splitlines()[0].startswith(r"| policy | a\|b | writing |")


@pytest.mark.parametrize("legacy", [False, True])
def test_an_answer_is_written_as_it_follows_its_context(legacy):
    """Some tokenizers leave out the first space of a text, which the code that follows a signature needs."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁", "▁x", "▁▁▁▁return", "▁(", ":", "<0xC3>", "<0xA9>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * legacy
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert fast.decode([3, 2]) == ("   return x" if legacy else "    return x")
    assert item_answers.Continuation(fast, [4, 2, 5]).text([3, 2]) == "    return x"
    # Half of a character before: what is whole is said.
    assert item_answers.Continuation(fast, [2, 6]).text([7, 5]) in ("é:", "\ufffd:")


def test_code_runs_only_if_that_is_asked_for(lm, tmp_path, monkeypatch):
    tests = "def check(f):\n    assert f(2) == 4\ncheck(double)\n"
    items = tuple(GenerationItem(str(i), Context("def double(x):\n"), (tests,)) for i in range(3))
    task = Task("code", items, "passes", max_new_tokens=4)
    with pytest.raises(UserError, match="allow it with `run_code=True`"):
        evaluate(lm, [task], [], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    written = iter(["    return 2 * x", "    return x", "    import os; os._exit(0)"] * 2)
    monkeypatch.setattr(item_answers.Continuation, "text", lambda self, ids: next(written) if len(ids) == 4 else "")
    monkeypatch.setattr(item_answers, "end_tokens", lambda _: np.array([]))
    made = evaluate(lm, [task], [], run_code=True, out=tmp_path / "out")
    assert list(made.items["score"]) == [1, 0, 0]
    assert "accepted" not in made.items
    assert set(map(type, made.manifest["sandbox"].values())) == {bool}


def test_what_was_asked_is_kept(made, choice, writing):
    for policy in ("full", "speed:2"):
        for row, item in zip(rows_of(made, "choice", policy).itertuples(), choice.items, strict=True):
            assert row.question == item.contexts[0].text
            assert row.choices == list(item.continuations)
        for row, item in zip(rows_of(made, "writing", policy).itertuples(), writing.items, strict=True):
            assert (row.question, row.choices) == (item.context.text, None)


def test_contexts_that_differ_go_to_the_choices():
    """As in winogrande, where each choice is in the middle of its sentence; and no word is cut in two."""
    contexts = (Context("The cup fell. It was Sam"), Context("The cup fell. It was Samantha"))
    assert item_texts(ChoiceItem("w", contexts, (" who ran.", " who ran."), 0)) == {
        "question": "The cup fell. It was ",
        "choices": ["Sam who ran.", "Samantha who ran."],
    }
    apart = ChoiceItem("x", (Context("Yes"), Context("No")), (".", "!"), 1)
    assert item_texts(apart) == {"question": "", "choices": ["Yes.", "No!"]}


def test_of_long_texts_the_middle_is_left_out():
    document = "".join(f"line {i}\n" for i in range(3000))
    texts = item_texts(GenerationItem("g", Context("Where is it?", document), ("here",)))
    assert texts["question"].startswith("line 0\nline 1\n")
    assert texts["question"].endswith("line 2999\nWhere is it?")
    left_out = int(re.search(r"\[\.\.\. ([0-9,]+) characters \.\.\.\]", texts["question"])[1].replace(",", ""))
    assert left_out == len(document + "Where is it?") - 2000
    assert len(texts["question"]) < 2050
    long = ChoiceItem("c", (Context("Q"),) * 2, ("a" * 9000, "b"), 1)
    assert [len(choice) < 2050 for choice in item_texts(long)["choices"]] == [True, True]


def test_an_evaluation_without_questions_is_read_and_a_damaged_one_refused(lm, choice, tmp_path):
    evaluate(lm, [choice], [], out=tmp_path / "out")
    file = tmp_path / "out" / "items.parquet"
    table = pd.read_parquet(file)
    table.drop(columns=["question", "choices"]).to_parquet(file)
    assert len(load_evaluation(tmp_path / "out").items) == len(choice.items)
    for name, value, said in (("question", 3, "a question is"), ("choices", [[1, 2]] * len(table), "a choice is")):
        table.assign(**{name: value}).to_parquet(file)
        with pytest.raises(UserError, match=said):
            load_evaluation(tmp_path / "out")


def test_stopped_and_resumed_it_ends_the_same(lm, choice, writing, made, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    original = item_answers._write

    def deadly(lm, task, item, policy, *more):
        if policy == SpeedPolicy(2) and item.id == "g3":
            raise Killed
        return original(lm, task, item, policy, *more)

    monkeypatch.setattr(item_answers, "_write", deadly)
    with pytest.raises(Killed):
        evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out")
    with pytest.raises(UserError, match="is not finished: continue it with `resume=True`"):
        load_evaluation(tmp_path / "out")
    with pytest.raises(UserError, match="give `resume=True` to continue"):
        evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out")
    with pytest.raises(UserError, match="another evaluation"):
        evaluate(lm, [choice, writing], POLICIES[:1], out=tmp_path / "out", resume=True)
    written = []

    def counting(lm, task, item, policy, *more):
        written.append((item.id, policy.spec))
        return original(lm, task, item, policy, *more)

    monkeypatch.setattr(item_answers, "_write", counting)
    monkeypatch.setattr(item_answers, "_choose", lambda *_: pytest.fail("done before"))
    resumed = evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out", resume=True)
    assert written[:2] == [("g3", "speed:2"), ("g3", "speed:4")]
    assert len(written) == 2 + 4 * 3
    pd.testing.assert_frame_equal(resumed.items, made.items)
    pd.testing.assert_frame_equal(load_evaluation(tmp_path / "out").items, made.items)
    assert set(contents(tmp_path / "out")) == FILES
    again = evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out", resume=True)
    pd.testing.assert_frame_equal(again.items, made.items)


@pytest.mark.parametrize("name", retrieval_names())
@pytest.mark.parametrize("length", [256, 1024])
def test_what_is_to_be_found_is_there(smollm, name, length):
    task = retrieval_task(name, length, smollm.tokenizer, n_items=6)
    assert task == retrieval_task(name, length, smollm.tokenizer, n_items=6)
    assert task != retrieval_task(name, length, smollm.tokenizer, n_items=6, seed=1)
    for item in task.items:
        n = len(smollm.tokenizer(item.context.text)["input_ids"])
        assert 0.97 * length <= n <= length
        for answer in item.answers:
            assert answer in item.context.document
            assert answer not in item.context.query
    if name == "needle" and length > 256:  # with room for depths
        places = [item.context.document.index(item.answers[0]) / len(item.context.document) for item in task.items]
        assert places == sorted(places)
        assert places[0] < 0.2 < 0.4 < places[-1]
    if name == "common_words":
        counts = pd.Series(task.items[0].context.document.split()).value_counts()
        common = set(task.items[0].answers)
        assert set(counts.index[: len(common)]) == common
        assert counts.iloc[len(common) - 1] > 3 * counts.iloc[len(common)]


@pytest.mark.slow
def test_the_embedded_model_finds_needles_at_full_depth(smollm):
    task = retrieval_task("needle", 512, smollm.tokenizer, n_items=6)
    table = summarize(evaluate(smollm, [task], [SpeedPolicy(3)]))
    scores = table[table["task"] == task.name].set_index("policy")["score"]
    assert scores["full"] >= 0.5
    assert scores["speed:3"] < scores["full"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("needle", "needs a length, such as needle@4096"),
        ("needle@many", "length 'many' is not a number of tokens"),
        ("needle@0", "length '0' is not a number of tokens"),
        ("hay@4K", "task 'hay' is not one of: needle"),
        ("arc", "task 'arc' is not one of: arc_easy"),
        ("missing.jsonl", "cannot read tasks 'missing.jsonl'"),
    ],
)
def test_names_of_tasks(lm, name, said):
    with pytest.raises(UserError, match=said):
        load_task(name, lm.tokenizer)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    lines = [{"query": words(8, i), "continuations": [" w5", " w6"], "gold": i % 2, "id": f"i{i}"} for i in range(6)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_command(world, monkeypatch, capfd):
    arguments = ("evaluate", "model", "--tasks", "mine.jsonl", "--policies", "speed:2,full", "--out", "out")
    status, out, err = run_command(monkeypatch, capfd, *arguments)
    assert (status, err) == (0, "")
    assert "speed:2" in out
    assert "Evaluation folder: out" in out
    assert set(contents(world / "out")) == FILES
    assert "| full |" in (world / "out" / "summary.md").read_text()
    status, out, err = run_command(monkeypatch, capfd, *arguments, "--resume", "--json")
    assert (status, err) == (0, "")
    assert {row["policy"] for row in json.loads(out)} == {"full", "speed:2"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--tasks", "mine.jsonl,mine.jsonl", "--policies", "speed:2"), "each once"),
        (("--tasks", "mine.jsonl", "--policies", "speed:9"), "the model has 5 layers"),
        (("--tasks", "mine.jsonl", "--policies", "slow"), "policy 'slow' is not one of"),
        (("--tasks", "nothing", "--policies", "full"), "task 'nothing' is not one of"),
        (("--tasks", "mine.jsonl", "--policies", "full", "--query", "x"), "query is 'x'"),
        (("--tasks", "mine.jsonl", "--policies", "full", "--limit", "0"), "limit is 0"),
        (("--tasks", "mine.jsonl", "--policies", "full", "--margin", "2"), "margin is 2"),
        (("--tasks", "mine.jsonl", "--policies", "full", "--resume"), "--resume needs --out"),
        (("--tasks", "mine.jsonl", "--policies", "full", "--out", "model"), "exists and is not an evaluation folder"),
        (("--policies", "full"), "--tasks"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(world, monkeypatch, capfd, arguments, said):
    before = contents(world)
    status, out, err = run_command(monkeypatch, capfd, "evaluate", "model", *arguments)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert contents(world) == before


@pytest.mark.parametrize("name", ["evaluation.json", "items.parquet"])
def test_a_single_bit_is_found(lm, choice, tmp_path, name):
    evaluate(lm, [choice], [], out=tmp_path / "out")
    data = bytearray((tmp_path / "out" / name).read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "out" / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        load_evaluation(tmp_path / "out")
    with pytest.raises(UserError, match=name):
        evaluate(lm, [choice], [], out=tmp_path / "out", resume=True)


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_the_summary_is_in_the_folder_at_the_margin_asked_for(lm, choice, tmp_path, margin):
    out = tmp_path / "out"
    found = evaluate(lm, [choice], POLICIES, margin=margin, seed=3, out=out)
    summary = summarize(found, margin=margin, seed=3)
    kept = pd.read_parquet(out / "summary.parquet")
    pd.testing.assert_frame_equal(kept.fillna(-9), summary.fillna(-9), check_dtype=False)
    assert (out / "summary.md").read_text() == markdown(summary)
    assert asked_margin(load_evaluation(out).manifest) == margin
    assert set(summary["non_inferior"].dropna()) == {margin == 1}


@pytest.mark.parametrize("size", [500, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_full_disk_names_the_folder_and_how_to_go_on(lm, choice, writing, tmp_path, size):
    wanted = evaluate(lm, [choice, writing], POLICIES).items
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        with pytest.raises(UserError, match=rf"cannot write .*{tmp_path}/out.*`resume=True`") as caught:
            evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    found = evaluate(lm, [choice, writing], POLICIES, out=tmp_path / "out", resume=True)
    pd.testing.assert_frame_equal(found.items, wanted)
    assert set(contents(tmp_path / "out")) == FILES


def test_damaged_evaluations_are_refused(world, lm, choice, tmp_path):
    evaluate(lm, [choice], [], out=tmp_path / "out")
    (tmp_path / "out" / "evaluation.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        load_evaluation(tmp_path / "out")
    with pytest.raises(UserError, match="is not a run"):
        load_run(tmp_path / "out")


@pytest.mark.parametrize("width", [48, 100, 400])
def test_the_terminal_says_averages_whatever_its_width(made, width):
    table, out = summarize(made), io.StringIO()
    show_evaluation(table, Console(file=out, width=width))
    said = " ".join(out.getvalue().split())
    for _, row in table[table["task"] == AVERAGE].iterrows():
        assert f"{100 * row['score']:.1f}" in said
        assert f"{100 * row['retention']:.0f}" in said
    assert max(map(len, out.getvalue().splitlines())) <= width
    assert ("±" in said) == (width > 48)


@pytest.mark.parametrize("n", [49, 50])
def test_few_items_are_named(made, n):
    out, table = io.StringIO(), summarize(made)
    tasks = [task for task in dict.fromkeys(table["task"]) if task != AVERAGE]
    table.loc[table["task"] == tasks[0], "n"] = n
    table.loc[table["task"] != tasks[0], "n"] = 200
    show_evaluation(table, Console(file=out, width=400))
    few = f"Few items: {tasks[0]} (49). Their intervals are wide" in out.getvalue()
    assert few == (n < 50)


def test_what_is_kept_is_the_share_of_full_depth(made):
    table = summarize(made).set_index(["policy", "task"])
    for policy, task in table.index:
        full = table.loc[("full", task), "score"]
        assert table.loc[(policy, task), "retention"] == pytest.approx(table.loc[(policy, task), "score"] / full)
    none = made.items.assign(score=0.0)
    assert summarize(replace(made, items=none))["retention"].isna().all()
