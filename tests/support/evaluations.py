"""Evaluations to test with: tables of random answers, in memory and as folders."""

import json
import random

import pandas as pd

from diagnostics.evaluate.answer_metrics import FAILURES
from diagnostics.evaluate.evaluation_folder import EVALUATION, ITEMS, Evaluation

# Chances of a right answer under full depth.
CHOICE = {"arc_easy": 0.8, "boolq": 0.7}
WRITTEN = {"gsm8k": 0.5}
# Policies, and what is left of these chances.
POLICIES = {
    "full": 1.0,
    "speed:22": 0.4,
    "speed:26": 0.97,
    "speed:24": 0.8,
    "speed:24:anchors=0": 0.5,
    "projected:24": 0.9,
    "fastkv": 0.6,
}


def make_evaluation(choice=CHOICE, written=WRITTEN, policies=POLICIES, n=120, seed=0):
    """An evaluation of random answers: the same luck under every policy, so that pairs agree mostly."""
    rows = []
    for task, chance in (choice | written).items():
        rng = random.Random(f"{seed} {task}")
        luck = [rng.random() for _ in range(n)]
        for policy, share in policies.items():
            for number, drawn in enumerate(luck):
                right = drawn < chance * share
                row = {"task": task, "policy": policy, "item_id": f"{task}/{number}", "category": "ab"[number % 2]}
                row |= {"n_prompt": 100 + number, "score": float(right)}
                if task in choice:
                    row |= {"gold": number % 4, "chosen": (number + (not right)) % 4, "gold_log_likelihood": -drawn}
                else:
                    empty = policy == "fastkv" and number % 10 == 0 and not right
                    row |= {"answer": "" if empty else f"The answer is {number if right else -1}.", "n_tokens": 5}
                    row |= dict.fromkeys(FAILURES, 0.0) | {"empty": float(empty)}
                rows.append(row)
    n_tasks = choice | written
    manifest = {
        "created": "2026-01-02T03:04:05+00:00",
        "model": "made-model",
        "n_layers": 32,
        "hardware": "CPU",
        "versions": {},
        "tasks": {task: {"metric": "acc", "n_items": n, "source": "made", "licence": ""} for task in n_tasks},
        "policies": list(policies),
        "identity": {"dtype": "float32", "query": "prompt", "seed": 0, "policies": list(policies)},
        "arguments": {"margin": 0.02},
        "errors": [],
    }
    return Evaluation(manifest, pd.DataFrame(rows))


def save_evaluation(folder, evaluation):
    """Write the files of an evaluation's folder."""
    folder.mkdir(parents=True)
    evaluation.items.to_parquet(folder / ITEMS, index=False)
    (folder / EVALUATION).write_text(json.dumps(evaluation.manifest))
    return folder
