"""The example that ships with the package is whole, small, and says nothing of the machine that made it."""

import re

import pandas as pd

from diagnostics import load_run, recommend
from diagnostics.evaluate.evaluation_folder import load_evaluation
from diagnostics.finetune.finetuning_folder import AFTER, BEFORE, load_finetuning
from diagnostics.generation.benchmark_folder import load_benchmark
from diagnostics.policies.recommendation import read_recommendation
from diagnostics.runs.example import BENCHMARK, EVALUATION, FINETUNING, RUN, example_folder
from make_example import MOST_BYTES

FILES = [file for file in example_folder().rglob("*") if file.is_file()]


def test_the_run_is_complete_and_its_recommendation_follows_from_it():
    run = load_run(example_folder() / RUN)
    assert run.complete
    assert run.manifest["model"] == "smollm2-135m-instruct"
    assert not run.tokens.empty
    saved = read_recommendation(example_folder() / RUN)
    assert saved["cutoff"] == recommend(run).cutoff < run.n_layers


def test_benchmark_and_evaluation_have_the_recommended_cutoff_beside_full_depth():
    spec = f"speed:{recommend(load_run(example_folder() / RUN)).cutoff}"
    assert {"full", spec} <= set(load_benchmark(example_folder() / BENCHMARK).summary()["spec"])
    assert {"full", spec} <= set(load_evaluation(example_folder() / EVALUATION).items["policy"])


def test_the_fine_tuning_is_finished_and_lowered_the_cutoff():
    finetuning = load_finetuning(example_folder() / FINETUNING)
    assert finetuning.complete
    goal = finetuning.manifest["arguments"]["max_kl"]
    before, after = (
        recommend(load_run(example_folder() / FINETUNING / name), max_kl=goal).cutoff for name in (BEFORE, AFTER)
    )
    assert after < before


def test_it_is_small():
    assert sum(file.stat().st_size for file in FILES) < MOST_BYTES


def test_it_names_no_folder_of_the_machine():
    texts = [file.read_text() for file in FILES if file.suffix == ".json"]
    for file in FILES:
        if file.suffix == ".parquet":
            texts.append(pd.read_parquet(file).to_csv())
    assert not [text for text in texts if re.search(r"(^|[\"' ,])/(home|root|work|tmp|Users)/", text)]
