"""The command: parses, calls, prints. One file per group of commands."""

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from diagnostics import __version__
from diagnostics.cli.benchmark import bench
from diagnostics.cli.common import HELD, INTERRUPTED, TERMINATED, fail
from diagnostics.cli.dashboard import dashboard
from diagnostics.cli.diagnosis import diagnose
from diagnostics.cli.environment import library_settings
from diagnostics.cli.evaluation import evaluate
from diagnostics.cli.examples import EPILOGS, PROGRAM_EPILOG
from diagnostics.cli.finetuning import finetune
from diagnostics.cli.flags import use_flags_of, with_flags
from diagnostics.cli.generation import generate
from diagnostics.cli.help import Command, Group
from diagnostics.cli.recommendation import recommend
from diagnostics.cli.report import report
from diagnostics.support.errors import UserError

ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    help="How deep must a prompt go? Layer diagnostics and the SPEED cutoff for decoder-only language models.",
    cls=Group,
    epilog=PROGRAM_EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (recommend, diagnose, generate, bench, evaluate, finetune, report, dashboard):
    app.command(cls=Command, epilog=EPILOGS[command.__name__])(command)
use_flags_of(app)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"speed-diagnostics {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version and end")
    ] = False,
) -> None:
    pass


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM end the command as an interrupt does, so that scratch folders and locks are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry point: bad input gives one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets "?" for the bars
    try:
        _require_utf8(sys.argv[1:])
        with _ending_in_order(), library_settings(), HELD:
            status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk below it can still be reported
    except UserError as error:
        fail(with_flags(str(error)))
    except ClickException as error:
        fail(error.format_message())
    except OSError as error:  # such as a full disk below stdout
        # Its buffer cannot be written; Python would try again at exit, and complain.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        fail("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _require_utf8(arguments: list[str]) -> None:
    """Refuse names that JSON and tables, which are UTF-8, cannot hold: before any work, not after it."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"argument {argument!a} is not UTF-8: give text, or rename the file or folder") from None
