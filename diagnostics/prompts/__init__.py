"""Prompts: read from files or generated, and encoded as tokens."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.prompts.builtin import builtin_prompts
    from diagnostics.prompts.encoding import EncodedPrompt
    from diagnostics.prompts.given import as_prompts
    from diagnostics.prompts.load import load_prompts
    from diagnostics.prompts.prompt import Prompt, PromptSet

_HOMES = {
    "builtin": ("builtin_prompts",),
    "encoding": ("EncodedPrompt",),
    "given": ("as_prompts",),
    "load": ("load_prompts",),
    "prompt": (
        "Prompt",
        "PromptSet",
    ),
}

__all__ = [
    "EncodedPrompt",
    "Prompt",
    "PromptSet",
    "as_prompts",
    "builtin_prompts",
    "load_prompts",
]

find_on_demand(__name__, _HOMES)
