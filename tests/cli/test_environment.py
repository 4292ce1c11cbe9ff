"""What the command sets for the libraries before they are loaded, and what it leaves as it was."""

import os
import subprocess
import sys

import pytest
import torch

from diagnostics.cli.environment import library_settings
from tests.support.gguf_files import write_gguf
from tests.support.paths import ROOT

NAMES = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "TQDM_DISABLE")


@pytest.fixture(autouse=True)
def bare(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def generate(model, cache, **environment):
    """The stderr of the real command, which loads its libraries anew."""
    arguments = ("generate", str(model), "--prompt", "th", "--text", "--max-new-tokens", "2", "--quiet")
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "SPEED_DIAGNOSTICS_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics.cli", *arguments],
        env=os.environ | settings | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf")


def test_no_bar_of_a_library_is_shown(model, tmp_path):
    """The conversion of a GGUF file has one, and loading weights has one."""
    (line,) = generate(model, tmp_path).splitlines()
    assert line.startswith("[full: ")


@pytest.mark.skipif("parallel backend: OpenMP" not in torch.__config__.parallel_info(), reason="torch without OpenMP")
@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(model, tmp_path, given, policy):
    said = generate(model, tmp_path, OMP_DISPLAY_ENV="TRUE", **given)
    assert f"OMP_WAIT_POLICY = '{policy}'" in said.replace("=\t", "= ")


def test_nothing_is_left_behind(bare):
    bare.setenv("TQDM_DISABLE", "0")
    before = dict(os.environ)
    with library_settings():
        assert (os.environ["OMP_WAIT_POLICY"], os.environ["KMP_BLOCKTIME"]) == ("PASSIVE", "0")
        assert os.environ["TQDM_DISABLE"] == "0"
    assert dict(os.environ) == before


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT"])
def test_a_user_who_sets_one_of_them_decides_how_threads_wait(bare, name):
    bare.setenv(name, "1")
    before = dict(os.environ)
    with library_settings():
        assert os.environ == before | {"TQDM_DISABLE": "1"}
