"""What --help shows: options in their groups, then examples and the page of the documentation."""

from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

SITE = "https://speed-diagnostics.github.io/speed-diagnostics/"
ARGUMENTS, OPTIONS = "Arguments", "Options"  # headings of what has no group
NAME_WIDTH = 30  # columns; longer names have a line of their own


def epilog(page: str, *examples: str) -> str:
    """Return the end of a command's help: lines to try, and a page of the documentation."""
    lines = ["Examples:", *(f"  {line}" for line in examples), "", f"Documentation: {SITE}{page}"]
    return "\n".join(lines)


class Command(TyperCommand):
    """A command whose help has a heading for each group of options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and the options, with the texts of all groups in one column."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                alone = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or alone, []).append(record)
        width = min(NAME_WIDTH, max(len(name) for records in groups.values() for name, _ in records))
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), text) for name, text in records])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog as it is: lines to copy must not be wrapped."""
        _write_epilog(self.epilog, formatter)


class Group(TyperGroup):
    """The commands: their help has whole sentences, on as many lines as these take."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each command with the first sentence of its help."""
        names: Sequence[str] = self.list_commands(ctx)
        with formatter.section("Commands"):
            formatter.write_dl([(name, _first_sentence(self.commands[name].help or "")) for name in names])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the epilog as it is."""
        _write_epilog(self.epilog, formatter)


def _first_sentence(text: str) -> str:
    sentence, stop, _ = " ".join(text.split()).partition(". ")
    return sentence + stop.strip()


def _write_epilog(text: str | None, formatter: Any) -> None:
    if text:
        formatter.write(f"\n{text}\n")
