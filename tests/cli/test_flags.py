"""Messages of the library name arguments; the command, and nothing else, names flags."""

import ast
import re
from inspect import Parameter, signature

import pytest

from diagnostics import UserError, diagnose, load_prompts
from diagnostics.cli.benchmark import bench
from diagnostics.cli.diagnosis import diagnose as diagnosis_command
from diagnostics.cli.evaluation import evaluate as evaluate_command
from diagnostics.cli.finetuning import finetune as finetune_command
from diagnostics.cli.flags import _options, with_flags
from diagnostics.cli.recommendation import recommend as recommend_command
from tests.support.paths import ROOT
from tests.support.runs import run_command, save_tiny, write_prompts
from tests.support.tiny import tiny_model


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("give `resume=True` to continue it, or another `out`", "give --resume to continue it, or another --out"),
        ('try `dtype="bfloat16"` or `device="map"`', "try --dtype bfloat16 or --device map"),
        ("no chat template: use `chat=False`", "no chat template: use --text"),
        ("`self_test=False` skips it", "--skip-self-test skips it"),
        ("`self_test=True` does not", "`self_test=True` does not"),
        ("which a run with `sweep=False` does not have", "which a run with --without-sweep does not have"),
        ("see `detail_prompts`", "see --detail-prompts"),
        ("`goals` and `recommend`, which are no options", "`goals` and `recommend`, which are no options"),
        ("a plain out stays", "a plain out stays"),
    ],
)
def test_arguments_become_flags(message, said):
    assert with_flags(message) == said


def test_an_error_carries_the_arguments_it_is_about():
    assert UserError("give `resume=True`, or another `out`").arguments == ("resume", "out")
    assert UserError("nothing to give").arguments == ()


def test_one_message_for_both(tmp_path, monkeypatch, capfd):
    prompts, tiny = write_prompts(tmp_path / "p.jsonl", n_prompts=1), save_tiny(tmp_path / "tiny")
    out = tmp_path / "run"
    diagnose(tiny_model("llama"), load_prompts(prompts), decode_tokens=2, out=out)
    with pytest.raises(UserError, match="give `resume=True` to continue it, or another `out`") as caught:
        diagnose(tiny_model("llama"), load_prompts(prompts), decode_tokens=2, out=out)
    assert caught.value.arguments == ("resume", "out")
    status, _, err = run_command(monkeypatch, capfd, "diagnose", tiny, "--prompts", prompts, "--out", out)
    assert status == 2
    assert "give --resume to continue it, or another --out" in err


def test_only_the_command_names_flags():
    flags = "|".join(re.escape(flag) for one in _options().values() for flag in (*one.opts, *one.secondary_opts))
    names_flag = re.compile(rf"(?<![\w-])({flags})(?![\w-])")
    found = []
    for path in sorted((ROOT / "diagnostics").rglob("*.py")):
        if "cli" in path.relative_to(ROOT / "diagnostics").parts:
            continue
        tree = ast.parse(path.read_text())
        holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, holders) and _has_docstring(node)}
        found += [
            f"{path.name}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
            if names_flag.search(node.value)
        ]
    assert found == []
    assert names_flag.search("give another --out")  # the pattern finds what it looks for


def _has_docstring(node):
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def test_commands_and_library_have_the_same_defaults():
    from diagnostics.cutoffs import recommend
    from diagnostics.evaluate import evaluate
    from diagnostics.finetune import Settings, Source
    from diagnostics.generation import benchmark

    pairs = [
        (diagnosis_command, diagnose),
        (recommend_command, recommend),
        (evaluate_command, evaluate),
        (bench, benchmark),
        (finetune_command, Settings),
        (finetune_command, Source),
    ]
    compared = 0
    # recommend(rules=...) are thresholds of regions; the command's --rules are those of diagnose(rules=...).
    others = {recommend: {"rules"}}
    for command, function in pairs:
        ours, theirs = (
            {name: one.default for name, one in signature(called).parameters.items()} for called in (command, function)
        )
        for name in (ours.keys() & theirs.keys()) - {"backend", "own_answers", "seed"} - others.get(function, set()):
            if theirs[name] is not Parameter.empty:
                assert ours[name] == theirs[name], (function, name)
                compared += 1
    assert compared > 40
