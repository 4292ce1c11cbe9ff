"""Built-in prompts to train on: some categories of a diagnosis, and many small tasks over the same long texts.

The model learns to retrieve in fewer layers what the task needs. A few tasks would teach it only those tasks; the
small ones here are many, and a diagnosis has none of them.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest
from random import Random

from diagnostics.prompts.builtin import CHARACTERS_PER_TOKEN, ask, builtin_prompts
from diagnostics.prompts.prompt import Prompt
from diagnostics.prompts.standard_library import documentation, source_code

READING = (
    "Copy the first sentence of the text word for word.",
    "What is the text mainly about? Answer with one sentence.",
    "Write three questions that the text answers.",
    "Make a list of the rules that the text gives.",
    "Explain the text to a beginner, with an example of your own.",
    "Give the text a title and say why it fits.",
    "Which names of functions, types or keywords does the text mention? List them.",
    "Quote a sentence of the text that says what must not be done.",
    "Rewrite the second paragraph in simpler words.",
    "Write a short program that shows what the text describes.",
    "Find a definition in the text and quote it.",
    "Write two true statements and a false one about the text, and say which is false.",
    "Go on with one more paragraph in the same style.",
    "Copy the last complete sentence of the text word for word.",
    "Write an e-mail to a colleague that says what the text says.",
    "Which part of the text is hardest to understand, and why?",
    "Does the text mention errors or exceptions? Quote where.",
    "Answer as a teacher: what should a student remember of the text?",
    "Name five important words of the text and explain each in a few words.",
    "Say in one sentence what the text says first, and in another what it says last.",
)
SOURCE = (
    "List the names of the functions in this code.",
    "Copy the first line of the last function.",
    "Write a docstring for the first function.",
    "What is this code for? Answer with two sentences.",
    "Suggest a test for one of the functions.",
    "Which of the functions raise errors? Quote the lines.",
    "Rewrite the first function with comments.",
    "Which names of variables occur most often? List them.",
    "Point out something that could go wrong in this code.",
    "Explain the second function line by line.",
)


SMALL_TASKS = 20  # per set, beside the prompts of a diagnosis


def training_prompts(context_length: int, seed: int) -> tuple[Prompt, ...]:
    """Make one set: the built-in prompts of a diagnosis, and small tasks, ``reading`` and ``source``, in turn.

    The same length and seed give the same prompts. Raises UserError as `builtin_prompts` does.
    """
    rng = Random(f"{seed}/small tasks")
    size = context_length * CHARACTERS_PER_TOKEN
    tasks = rng.sample([*(("reading", task) for task in READING), *(("source", task) for task in SOURCE)], SMALL_TASKS)
    small = [_small_task(rng, kind, task, size, f"{kind}-{n}") for n, (kind, task) in enumerate(tasks, 1)]
    turns = zip_longest(small, builtin_prompts(context_length, seed=seed))
    return tuple(prompt for turn in turns for prompt in turn if prompt is not None)


def _small_task(rng: Random, kind: str, task: str, size: int, name: str) -> Prompt:
    if kind == "reading":
        prompt = ask("Read this text.", task, document=documentation(rng, size))
    else:
        prompt = ask("Read this code.", task, document=source_code(rng, size), cut="line")
    return replace(prompt, id=name, category=kind)
