"""The Dockerfile, as far as it goes without Docker: what it copies is enough to install, and its command is one."""

import json
import re
import shutil
import subprocess
import sys

import typer

from diagnostics import cli
from tests.support.paths import ROOT

LINES = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
COPIED = [source for line in LINES if line.startswith("COPY ") for source in line.split()[1:-1]]


def test_what_is_copied_is_in_the_context_and_enough_for_the_wheel(tmp_path):
    context = (ROOT / ".dockerignore").read_text().split()
    assert sorted(COPIED) == sorted(line[1:] for line in context if line.startswith("!"))
    source = tmp_path / "source"
    source.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source],
        check=True,
    )
    (wheel,) = tmp_path.glob("speed_diagnostics-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    assert (tmp_path / "site" / "speed_diagnostics_app" / "server.py").is_file()


def test_the_extras_that_are_installed_are_ours():
    (extras,) = re.findall(r"'\.\[(.*)\]'", "\n".join(LINES))
    declared = (ROOT / "pyproject.toml").read_text()
    for extra in extras.split(","):
        assert re.search(rf"^{extra} = \[", declared, re.MULTILINE)


def test_its_command_serves_at_the_port_that_is_exposed():
    (command,) = [json.loads(line.removeprefix("CMD ")) for line in LINES if line.startswith("CMD ")]
    (port,) = [int(line.split()[1]) for line in LINES if line.startswith("EXPOSE ")]
    program, name, *arguments = command
    assert program == "speed-diagnostics"
    given = typer.main.get_command(cli.app).commands[name].make_context(name, arguments).params
    assert (given["host"], given["port"], given["browser"]) == ("0.0.0.0", port, False)
