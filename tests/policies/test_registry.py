"""Policies are found by their names, those of other distributions too, and found without loading torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diagnostics import (
    FastKVPolicy,
    FullPolicy,
    ProjectedPolicy,
    SpeedPolicy,
    UserError,
    generate,
    load_model,
    parse_policy,
)
from diagnostics.policies.registry import all_policies, find_policy, menu, policies_at
from tests.support.runs import save_tiny

ROOT = Path(__file__).parents[2]
MINE = '''
from dataclasses import dataclass
from typing import ClassVar

from diagnostics import Policy
from diagnostics.policies import Workload


@dataclass(frozen=True)
class MinePolicy(Policy):
    """SPEED, written anew."""

    cutoff: int
    anchors: int = 1
    name: ClassVar[str] = "mine"
    title: ClassVar[str] = "Mine"

    def depth(self, n_layers):
        return self.cutoff

    def workload(self, n_prompt, n_layers):
        tokens = [n_prompt] * self.cutoff + [self.anchors + 1] * (n_layers - self.cutoff)
        return Workload(tokens, tokens, [0] * n_layers)


class OtherPolicy(MinePolicy):
    name = "other"


class FullPolicy(MinePolicy):
    name = "full"
'''


def plugin(folder, **entries):
    """A folder for the path with an installed distribution: a module ``mine`` and these entry points."""
    information = folder / "mine-1.2.dist-info"
    information.mkdir(parents=True)
    (folder / "mine.py").write_text(MINE)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.2\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (information / "entry_points.txt").write_text("\n".join(["[speed_diagnostics.policies]", *lines]))
    return folder


def in_a_new_process(folder, code, *arguments):
    """What Python does with the plugins of a folder installed: status, stdout, stderr."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    environment["SPEED_DIAGNOSTICS_CACHE"] = str(folder / "cache")
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_naming_and_pricing_a_policy_loads_no_torch(tmp_path):
    code = """
import sys
from diagnostics import FastKVPolicy, ProjectedPolicy, SpeedPolicy, parse_policy
from diagnostics.policies.registry import menu
assert parse_policy("speed:24:anchors=0") == SpeedPolicy(24, anchors=0)
assert [policy.name for policy in menu()][:4] == ["full", "speed", "projected", "fastkv"]
assert SpeedPolicy(2).workload(9, 3).run == [9, 9, 2]
print(*(name for name in ("torch", "transformers") if name in sys.modules))
"""
    status, out, err = in_a_new_process(tmp_path, code)
    assert (status, out.strip(), err) == (0, "", "")


@pytest.mark.parametrize("text", ["speed=24", "speed 24", "speed-24", "SPEED24", " speed@24 "])
def test_other_spellings_are_told_the_right_one(text):
    with pytest.raises(UserError, match=r"did you mean 'speed:24'\?$"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fastkv=3", "'fastkv:3'"),
        ("projected 24:anchors=0", "'projected:24'"),
        ("sped:24", "'speed'"),
        ("speed:24:anchor=0", "'anchors'"),
    ],
)
def test_names_like_it_are_told(text, said):
    with pytest.raises(UserError, match=rf"did you mean ({said})\?$"):
        parse_policy(text)


def test_what_each_says_of_itself():
    assert [(policy.name, policy.title) for policy in menu()] == [
        ("full", "full depth"),
        ("speed", "SPEED"),
        ("projected", "Projected"),
        ("fastkv", "FastKV"),
    ]
    assert [policy.takes_cutoff() for policy in menu()] == [False, True, True, False]
    assert [policy.follows_recommendation() for policy in menu()] == [False, True, True, True]
    assert policies_at(3) == [FullPolicy(), SpeedPolicy(3), ProjectedPolicy(3), FastKVPolicy()]
    assert find_policy("speed") is all_policies()["speed"] is SpeedPolicy
    assert list(all_policies()) == sorted(all_policies())


def test_a_policy_of_another_distribution_works_everywhere(tmp_path):
    folder = plugin(tmp_path / "plugin", mine="mine:MinePolicy", other="mine:OtherPolicy")
    model = save_tiny(tmp_path / "model")
    code = """
import json, sys
from diagnostics import parse_policy
from diagnostics.figures.quality import policy_label
from diagnostics.policies.registry import menu, policies_at
print(json.dumps({
    "specs": [parse_policy(text).spec for text in ("mine:3", "other:2:anchors=0", "speed:4")],
    "menu": [policy.title for policy in menu()],
    "at": [policy.spec for policy in policies_at(3)],
    "label": policy_label("mine:3:anchors=0"),
}))
"""
    status, out, err = in_a_new_process(folder, code)
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "specs": ["mine:3", "other:2:anchors=0", "speed:4"],
        "menu": ["full depth", "SPEED", "Projected", "FastKV", "Mine", "other"],
        "at": ["full", "speed:3", "projected:3", "fastkv", "mine:3", "other:3"],
        "label": "Mine 3, no anchor",
    }
    prompt = ("generate", model, "--quiet", "--prompt", "w5 w6 w7 w8 w9 w10", "--max-new-tokens", 4, "--text", "--json")
    command = "from diagnostics.cli import main; main()"
    status, out, err = in_a_new_process(folder, command, *prompt, "--policy", "mine", "--cutoff", 3)
    assert (status, err) == (0, "")
    lm = load_model(model)
    ids = torch.tensor([lm.tokenizer("w5 w6 w7 w8 w9 w10")["input_ids"]])
    expected = generate(lm, ids, policy=SpeedPolicy(3), max_new_tokens=4)
    assert json.loads(out)["policy"] == "mine:3"
    assert json.loads(out)["token_ids"] == expected.token_ids[0].tolist()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("mine", "mine:Nothing", "cannot be loaded (AttributeError: module 'mine' has no attribute 'Nothing')"),
        ("mine", "nothing:MinePolicy", "cannot be loaded (ModuleNotFoundError: No module named 'nothing')"),
        ("mine", "mine:dataclass", "cannot be used: mine:dataclass is no dataclass derived from diagnostics.Policy"),
        ("yours", "mine:MinePolicy", "cannot be used: mine:MinePolicy has another name, 'mine'"),
    ],
)
def test_a_broken_plugin_is_named_in_one_line(tmp_path, name, value, reason):
    folder = plugin(tmp_path / "plugin", **{name: value})
    command = "from diagnostics.cli import main; main()"
    arguments = ("generate", tmp_path, "--prompt", "w5", "--policy")
    status, out, err = in_a_new_process(folder, command, *arguments, f"{name}:3")
    line = f"the policy plugin '{name}' of mine 1.2 {reason}"
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert line in err
    # The others go on, and lists say what they leave out.
    code = """
import warnings
from diagnostics import parse_policy
assert parse_policy("speed:3").spec == "speed:3"
with warnings.catch_warnings(record=True) as caught:
    from diagnostics.policies.registry import all_policies
    print(*all_policies())
print(*(one.message for one in caught))
"""
    status, out, err = in_a_new_process(folder, code)
    names, said = out.splitlines()
    assert (status, err) == (0, "")
    assert set(names.split()) >= {"fastkv", "full", "projected", "speed"}
    assert name not in names.split()
    assert line in said


def test_a_plugin_takes_no_name_of_this_package(tmp_path):
    folder = plugin(tmp_path / "plugin", full="mine:FullPolicy")
    code = "from diagnostics import FullPolicy, parse_policy; assert parse_policy('full') == FullPolicy()"
    assert in_a_new_process(folder, code) == (0, "", "")
