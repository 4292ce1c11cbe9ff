"""Prompts: reading them, making the built-in ones, and turning them into tokens."""

from typing import TYPE_CHECKING

from diagnostics.support.lazy import find_on_demand

if TYPE_CHECKING:
    from diagnostics.prompts.builtin import builtin_prompts
    from diagnostics.prompts.encoding import EncodedPrompt, encode_input
    from diagnostics.prompts.prompt import Prompt, PromptSet, load_prompts

_HOMES = {
    "builtin": ("builtin_prompts",),
    "encoding": (
        "EncodedPrompt",
        "encode_input",
    ),
    "prompt": (
        "Prompt",
        "PromptSet",
        "load_prompts",
    ),
}

__all__ = [
    "EncodedPrompt",
    "Prompt",
    "PromptSet",
    "builtin_prompts",
    "encode_input",
    "load_prompts",
]

find_on_demand(__name__, _HOMES)
