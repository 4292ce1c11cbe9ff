"""The built-in prompts: seven kinds of task over long real text, generated for any context length.

The text comes with every Python installation (`diagnostics.prompts.standard_library`). Documents are longer than any
tokenizer needs, and are cut when they are encoded. Texts that a task depends on are *inserted* and survive the cut;
without a document every prompt is below 256 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random
from typing import Literal

from diagnostics.prompts.inserts import Insert
from diagnostics.prompts.prompt import PLACEHOLDER, Prompt
from diagnostics.prompts.standard_library import documentation, reference_topics, source_code
from diagnostics.support.errors import UserError

PROMPTS_PER_CATEGORY = 4
CHARACTERS_PER_TOKEN = 8  # most tokenizers need 4 to 5, so every document is long enough to be cut
MAX_CONTEXT_LENGTH = 2**20


def builtin_prompts(context_length: int, *, seed: int = 0, max_prompts: int | None = None) -> tuple[Prompt, ...]:
    """Return the built-in set, which cycles through its categories; ``max_prompts`` limits it to the first prompts.

    Raises
    ------
    UserError
        If ``context_length`` is above ``MAX_CONTEXT_LENGTH`` tokens (the documents would fill the memory).
    """
    if context_length > MAX_CONTEXT_LENGTH:
        raise UserError(
            f"context_length is {context_length}: the built-in prompts go up to {MAX_CONTEXT_LENGTH} tokens; "
            "for more, bring your own as a .jsonl file"
        )
    size = context_length * CHARACTERS_PER_TOKEN
    plan = [(category, number) for number in range(PROMPTS_PER_CATEGORY) for category in CATEGORIES]
    prompts = []
    for category, number in plan[:max_prompts]:
        rng = Random(f"{seed}/{category}/{number}")
        prompt = CATEGORIES[category](rng, number, size)
        prompts.append(replace(prompt, id=f"{category}-{number + 1}", category=category))
    return tuple(prompts)


# --- The tasks. Each takes a random generator, its number in the category and the size of its document ---


def question(rng: Random, number: int, size: int) -> Prompt:
    """A question that one paragraph of the language reference answers; the paragraph is at a known depth."""
    available = [topic for topic in QUESTIONS if topic in reference_topics()]  # topics differ between Python versions
    topic = rng.choice(available[number::PROMPTS_PER_CATEGORY])
    title, paragraph = reference_topics()[topic].split("\n\n")[:2]
    return ask(
        "Read this part of the Python reference.",
        f'Question: according to the section "{title}" above, {QUESTIONS[topic]} Answer in your own words.',
        document=documentation(rng, size, without=paragraph),
        inserts=(Insert(_depth(number), f"{title}\n\n{paragraph}"),),
        evidence=(paragraph,),
    )


def needle(rng: Random, number: int, size: int) -> Prompt:
    """One of several numbers hidden in unrelated text."""
    cities = rng.sample(CITIES, 4)
    needles = [f"The secret access code for {city} is {rng.randrange(100_000, 10**6)}." for city in cities]
    depths = [_depth(number), *(rng.random() for _ in cities[1:])]
    return ask(
        "Some secret access codes are hidden in the following text. Remember them.",
        f"Question: what is the secret access code for {cities[0]}? Answer with one sentence.",
        document=documentation(rng, size),
        inserts=tuple(map(Insert, depths, needles)),
        evidence=(needles[0],),
    )


def summary(rng: Random, number: int, size: int) -> Prompt:
    """A summary of the entire document."""
    return ask("Here is a text about Python.", SUMMARIES[number], document=documentation(rng, size))


def variables(rng: Random, number: int, size: int) -> Prompt:
    """A value passed from variable to variable through the document, beside a second, shorter chain."""
    names = rng.sample(VARIABLES, 6)
    chain = assignments(names[: 3 + number % 2], rng.randrange(10_000, 100_000))
    other = assignments(names[4:], rng.randrange(10_000, 100_000))
    inserts = [Insert((step + 0.5) / len(chain), line) for step, line in enumerate(chain)]
    inserts += [Insert(step / len(other) + 0.4, line) for step, line in enumerate(other)]
    return ask(
        "The following text has assignments of variables in it. Keep track of their values.",
        f"Question: what is the value of {names[len(chain) - 1]}? Follow the assignments one by one.",
        document=documentation(rng, size),
        inserts=tuple(inserts),
        evidence=tuple(chain),
    )


def code(rng: Random, number: int, size: int) -> Prompt:
    """The return value of a small function among many others."""
    name = f"{rng.choice(VERBS)}_{rng.choice(THINGS)}"
    function = FUNCTIONS[number].format(name=name, a=rng.randrange(2, 10), b=rng.randrange(2, 10)).strip()
    return ask(
        "Here is a Python module.",
        f"Question: what does {name}({rng.randrange(3, 7)}) return? Explain the function step by step.",
        document=source_code(rng, size),
        cut="line",
        inserts=(Insert(_depth(number), function),),
        evidence=(function,),
    )


def instructions(rng: Random, number: int, size: int) -> Prompt:
    """Strict rules for the form of the answer, after the text that the answer is about."""
    return ask("Here is a text about Python.", INSTRUCTIONS[number], document=documentation(rng, size))


def arithmetic(rng: Random, number: int, size: int) -> Prompt:
    """Word problems with worked answers, as many as fit, then one without an answer."""
    shots: list[str] = []
    while size > 0:
        shots.append("Problem: {}\nAnswer: {}".format(*_word_problem(rng)))
        size -= len(shots[-1])
    problem, _ = _word_problem(rng)
    return ask(
        "Here are word problems with their answers.",
        f"Now answer this one in the same way.\n\nProblem: {problem}",
        document="\n\n".join(shots),
        cut="paragraph",
    )


CATEGORIES: dict[str, Callable[[Random, int, int], Prompt]] = {
    task.__name__: task for task in (question, needle, summary, variables, code, instructions, arithmetic)
}

QUESTIONS = {  # topic of the reference: a question that the topic's first paragraph answers
    "bltin-code-objects": "what are code objects used for, and how do they differ from function objects?",
    "bltin-ellipsis-object": "what is the ellipsis object called, and what is it commonly used for?",
    "bltin-null-object": "what is the null object called, and which functions return it?",
    "bltin-type-objects": "how can the type of an object be found, and where are the standard types named?",
    "context-managers": "what is a context manager, and what does it handle?",
    "exceptions": "what are exceptions for, and where may an exception be handled?",
    "numbers": "which types of numeric literals are there, and how is a complex number formed?",
    "typesmapping": "what is a mapping object, and what is the only standard mapping type?",
    "typesmethods": "which two kinds of methods are there, and how are methods called?",
    "with": "what is the statement used for, and what does it make convenient?",
}

SUMMARIES = (
    "Summarize the text above in three sentences.",
    "What is the text above about? Explain its main ideas to a beginner in one paragraph.",
    "List the most important points of the text above, one short line for each.",
    "Write a short abstract of the text above, then suggest a title for it.",
)

INSTRUCTIONS = (
    "Pick three facts from the text above. Write each as a bullet point of at most twelve words that begins "
    "with a capital letter, and end your answer with the line: END OF LIST",
    'Answer in JSON only, with the two keys "topic" and "example". Describe the text above with at most ten '
    "words for each key.",
    'Describe the text above in exactly two sentences, all in lower case. Do not use the word "Python".',
    "Write a numbered list of four questions that the text above answers. Every question has fewer than "
    "fifteen words, and no two begin with the same word.",
)

FUNCTIONS = (
    """
def {name}(n):
    total = {a}
    for step in range(n):
        total = total + {b}
    return total
""",
    """
def {name}(n):
    if n > {a}:
        return n * {b}
    return n + {a}
""",
    """
def {name}(n):
    values = [{a} * i for i in range(n)]
    return [v for v in values if v > {b}]
""",
    """
def {name}(n):
    while n < {a} * {b}:
        n = n + {b}
    return n - {a}
""",
)

CITIES = (
    "Lisbon",
    "Nairobi",
    "Oslo",
    "Quito",
    "Hanoi",
    "Dublin",
    "Tunis",
    "Riga",
    "Lima",
    "Cairo",
    "Perth",
    "Boston",
)
VARIABLES = (
    "ALPHA",
    "BRAVO",
    "DELTA",
    "ECHO",
    "GOLF",
    "HOTEL",
    "INDIA",
    "KILO",
    "OSCAR",
    "TANGO",
    "VICTOR",
    "ZULU",
)
VERBS = ("blend", "count", "fold", "merge", "scale", "shift", "stack", "weave")
THINGS = ("apples", "books", "candles", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps")
PEOPLE = (
    "Amina",
    "Ben",
    "Carla",
    "Dmitri",
    "Elena",
    "Farid",
    "Grace",
    "Hiro",
    "Ines",
    "Jonas",
    "Kofi",
    "Lucia",
)


# --- Parts ---


def ask(
    before: str,
    after: str,
    *,
    document: str,
    cut: Literal["word", "line", "paragraph"] = "word",
    inserts: tuple[Insert, ...] = (),
    evidence: tuple[str, ...] = (),
) -> Prompt:
    """Return a prompt of one user message: an opening, the document, and the task. The caller sets its id."""
    omission = " [...]" if cut == "word" else ""  # marks the end of a text that may stop within a sentence
    content = f"{before}\n\n{PLACEHOLDER}{omission}\n\n{after}"
    return Prompt(
        id="unnamed",
        messages=({"role": "user", "content": content},),
        document=document,
        cut=cut,
        inserts=inserts,
        evidence=evidence,
    )


def _depth(number: int) -> float:
    """Relative depth of the answer in the document: the prompts of a category spread it evenly."""
    return (number + 0.5) / PROMPTS_PER_CATEGORY


def assignments(names: list[str], value: int) -> list[str]:
    """A chain: the first variable gets the value, each further variable the value of the previous one."""
    copies = [f"The variable {new} is set to the value of {old}." for old, new in pairwise(names)]
    return [f"The variable {names[0]} is set to {value}.", *copies]


def _word_problem(rng: Random) -> tuple[str, str]:
    """A problem and its worked answer."""
    who, things = rng.choice(PEOPLE), rng.choice(THINGS)
    few, many = rng.randrange(2, 20), rng.randrange(21, 80)
    kind = rng.randrange(4)
    if kind == 0:
        return (
            f"{who} has {many} {things} and buys {few} more. How many {things} does {who} have now?",
            f"{many} + {few} = {many + few}. {who} has {many + few} {things}.",
        )
    if kind == 1:
        return (
            f"{who} has {many} {things} and gives {few} away. How many {things} are left?",
            f"{many} - {few} = {many - few}. There are {many - few} {things} left.",
        )
    if kind == 2:
        return (
            f"{who} fills {few} boxes with {many} {things} each. How many {things} are in the boxes?",
            f"{few} * {many} = {few * many}. There are {few * many} {things} in the boxes.",
        )
    return (
        f"{who} shares {few * many} {things} equally among {few} friends. How many does each friend get?",
        f"{few * many} / {few} = {many}. Each friend gets {many} {things}.",
    )
