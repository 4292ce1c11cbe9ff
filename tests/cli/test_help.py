"""What --help shows, and what completes a command line in the shell."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest
import typer

from diagnostics import cli
from diagnostics.cli.examples import EPILOGS, PROGRAM_EPILOG
from diagnostics.cli.help import SITE
from diagnostics.cli.recommendation import REGION_RULES
from diagnostics.cutoffs.regions import RegionRules
from tests.support.paths import ROOT
from tests.support.runs import run_command

COMMANDS = typer.main.get_command(cli.app).commands


@pytest.fixture
def help_of(monkeypatch, capfd):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("shutil.get_terminal_size", lambda *_: os.terminal_size((80, 24)))

    def text(*command):
        status, out, err = run_command(monkeypatch, capfd, *command, "--help", signs=True)
        assert (status, err) == (0, "")
        return out

    return text


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_every_page_fits_80_columns_and_ends_with_examples_and_a_link(help_of, name):
    text = help_of(*([name] if name else []))
    epilog = EPILOGS[name] if name else PROGRAM_EPILOG
    assert text.endswith(f"\nExamples:\n{epilog.partition(chr(10))[2]}\n")
    page = text.removesuffix(f"{epilog}\n")
    assert [line for line in page.splitlines() if len(line) > 80] == []
    assert [line for line in epilog.splitlines() if line.startswith("  ") and len(line) > 80] == []
    assert "9223372036854775807" not in text


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("report", "dashboard")])
def test_options_are_in_groups_and_none_is_lost(help_of, name):
    text = help_of(name)
    assert re.findall(r"^(\w+):$", text, re.MULTILINE)[-4:] == ["Model", "Results", "Options", "Examples"]
    for parameter in COMMANDS[name].params:
        flag = re.escape(parameter.opts[0])
        assert len(re.findall(rf"^  (-\w, )?{flag}( .*)?$", text, re.MULTILINE)) == 1, parameter.name
    (column,) = {len(found[0]) for found in re.findall(r"^(  --\S+( \S+)?  +)\S", text, re.MULTILINE)}
    assert column < 40


def test_commands_are_described_by_whole_sentences(help_of):
    described = " ".join(help_of().split())
    for command in COMMANDS.values():
        sentence = " ".join(command.help.split()).partition(". ")[0]
        assert sentence in described


def test_every_region_rule_is_named(help_of):
    assert REGION_RULES.split(", ") == [field.name for field in fields(RegionRules)]
    assert REGION_RULES in " ".join(help_of("recommend").split())


@pytest.mark.parametrize("epilog", [*EPILOGS.values(), PROGRAM_EPILOG])
def test_examples_are_commands_and_links_are_pages(epilog):
    lines = [line.strip() for line in epilog.splitlines() if line.startswith("  ")]
    assert lines
    for line in lines:
        words = shlex.split(line)
        if "<" in words:
            words = words[: words.index("<")]
        program, name, *arguments = words
        assert program == "speed-diagnostics"
        COMMANDS[name].make_context(name, arguments)  # an unknown option or a missing one is an error
    page = epilog.rpartition(SITE)[2]
    assert (ROOT / "docs" / (f"{page.rstrip('/')}.md" if page else "index.md")).is_file()
    assert f'Documentation = "{SITE}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("seed", "status"), [(-1, 2), (2**63, 2), ("x", 2)])
def test_seeds_out_of_range(monkeypatch, capfd, tmp_path, seed, status):
    found, out, err = run_command(monkeypatch, capfd, "recommend", tmp_path, f"--seed={seed}")
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert "--seed" in err


# --- Completion ---


def complete(shell, **environment):
    code = "import sys; sys.argv[0] = 'speed-diagnostics'; from diagnostics.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT), "_SPEED_DIAGNOSTICS_COMPLETE": f"complete_{shell}"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("shell", "line"),
    [
        ("bash", {"COMP_WORDS": "speed-diagnostics rec", "COMP_CWORD": "1"}),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "speed-diagnostics rec"}),
    ],
)
def test_a_command_is_completed_without_loading_libraries(shell, line):
    done = complete(shell, **line)
    assert "recommend" in done.stdout
    assert "generate" not in done.stdout
    loaded = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "pandas", "numpy", "streamlit"} & loaded  # it answers as quickly as --help


def test_options_are_completed():
    done = complete("bash", COMP_WORDS="speed-diagnostics recommend --max", COMP_CWORD="2")
    assert done.stdout.split() == ["--max-prompts", "--max-kl", "--max-nll-increase"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_installed_for_a_shell(tmp_path, shell):
    code = "import sys; sys.argv[0] = 'speed-diagnostics'; from diagnostics.cli import main; main()"
    environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for option in ("--show-completion", "--install-completion"):
        done = subprocess.run(
            [sys.executable, "-c", code, option, shell],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "completion" in done.stdout
    assert "speed-diagnostics" in (tmp_path / f".{shell}rc").read_text() or shell == "zsh"
    installed = [path for path in tmp_path.rglob("*") if path.is_file() and "speed-diagnostics" in path.name]
    (script,) = installed
    assert "_SPEED_DIAGNOSTICS_COMPLETE" in script.read_text()
