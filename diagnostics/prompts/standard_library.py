"""Long real text that comes with every Python: the language reference of ``pydoc``, and the library's source code."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from importlib import import_module
from pydoc_data.topics import topics
from random import Random

# Modules of the standard library with many functions of moderate length.
MODULES = (
    "copy",
    "difflib",
    "dis",
    "functools",
    "glob",
    "heapq",
    "inspect",
    "shutil",
    "statistics",
    "traceback",
)


def documentation(rng: Random, size: int, without: str | None = None) -> str:
    """Return ``size`` characters of the language reference in random order, without topics that contain ``without``."""
    return _fill(rng, [text for text in reference_topics().values() if without is None or without not in text], size)


def source_code(rng: Random, size: int) -> str:
    """Return ``size`` characters of functions of the standard library, in random order."""
    # A Python without source files still has the language reference.
    return _fill(rng, _library() or list(reference_topics().values()), size)


def _fill(rng: Random, texts: list[str], size: int) -> str:
    """Return ``size`` characters of the texts in random order, repeated as often as needed."""
    once = "\n\n".join(rng.sample(texts, len(texts))) + "\n\n"
    return (once * (size // len(once) + 1))[:size]


@cache
def reference_topics() -> dict[str, str]:
    """Return the topics of the language reference as running text, without tables and hard line breaks."""
    return {name: _running_text(topics[name]) for name in sorted(topics)}


def _running_text(text: str) -> str:
    text = re.sub(r"^(?:[*=\-~^]{3,}|\s*[|+].*)$", "", text, flags=re.MULTILINE)  # underlines of titles, tables
    text = re.sub(r"(?<=\w-)\n(?=\w)", "", text)  # a word broken at its hyphen
    # Lines of a paragraph or of a list item belong together; an indented line stays: it may be code.
    text = re.sub(r"(?<=\S)\n(?=[^\s*+-]|[*+-]\S)", " ", text)
    text = re.sub(r"(?<=[.!?])  (?=\S)", " ", text)
    return re.sub(r"\n\s*\n", "\n\n", text).strip()


@cache
def _library() -> list[str]:
    """Return the source of the functions of some standard library modules."""
    functions: list[str] = []
    for name in MODULES:
        try:
            source = inspect.getsource(import_module(name))
        except OSError:  # installed without source files
            continue
        lines = source.splitlines()
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        functions += ["\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes]
    return [function for function in functions if len(function) < 2500]
