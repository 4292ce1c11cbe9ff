"""The page *Benchmark*: the summary of a benchmark, and damaged ones in one line."""

import json
import re
import shutil

import numpy as np
import pytest

from diagnostics.generation.benchmark_folder import BENCHMARK_MANIFEST, load_benchmark
from tests.support.pages import calm, edit_table, figure, go, literal, numbers, same, table


def test_the_benchmark_is_its_summary(library, open_app):
    at = open_app(library, "benchmark")
    assert calm(at) == []
    summary = load_benchmark(library / "bench").summary()
    shown = table(at)
    assert len(shown) == len(summary) == 6
    expected = {
        "n_prompt": summary["n_prompt"],
        "spec": summary["spec"],
        "ttft_s": summary["ttft_s"],
        "ttft_s_ratio": summary["ttft_s_ratio"],
        "ttft_limit": summary["ttft_limit"],
        "tpot_ms": 1000 * summary["tpot_s"],
        "tpot_s_ratio": summary["tpot_s_ratio"],
        "tpot_limit": summary["tpot_limit"],
        "kv_mib": summary["kv_bytes"] / 2**20,
        "kv_bytes_ratio": summary["kv_bytes_ratio"],
        "repeats": summary["repeats"],
    }
    for name, column in expected.items():
        if name == "spec":
            assert list(shown[name]) == list(column)
        else:
            np.testing.assert_allclose(shown[name].astype(float), column, atol=6e-4)
    drawn = figure(at)
    assert {t["name"] for t in drawn["data"] if t.get("showlegend")} == {"speed:3", "speed:2"}
    (ttft, *_) = [t for t in drawn["data"] if t["name"] == "speed:2"]
    rows = summary[summary["spec"] == "speed:2"]
    same(numbers(ttft["x"]), rows["n_prompt"])
    same(numbers(ttft["y"]), rows["ttft_s_ratio"])
    assert any("tiny-llama" in literal(caption.value) for caption in at.caption)
    assert any(re.search(r"made \d+ \w{3} \d{4}, \d\d:\d\d UTC", literal(c.value)) for c in at.caption)


def test_a_sentence_says_what_each_policy_needs_at_the_longest_prompt(library, open_app):
    at = open_app(library, "benchmark")
    said = literal(at.markdown[0].value)
    summary = load_benchmark(library / "bench").summary()
    for spec in ("speed:3", "speed:2"):
        row = summary[(summary["spec"] == spec) & (summary["n_prompt"] == 32)].iloc[0]
        assert (
            f"- At 32 tokens {spec} needs {row['ttft_s_ratio']:.2f} of full depth's time to first token, "
            f"{row['tpot_s_ratio']:.2f} of its time per further token and {row['kv_bytes_ratio']:.2f} of its KV cache."
        ) in said


def test_columns_have_names_in_words(library, open_app):
    config = json.loads(open_app(library, "benchmark").dataframe[0].proto.columns)
    labels = [column["label"] for column in config.values() if "label" in column]
    assert len(set(labels)) == len(labels) == 14
    assert {"TTFT of full depth", "TPOT of full depth", "KV of full depth"} <= set(labels)


def test_a_benchmark_in_a_run_folder_is_found(copy, library, open_app):
    folder = copy("tiny")
    for file in (library / "bench").iterdir():
        shutil.copy(file, folder)
    at = open_app(folder.parent, "benchmark")
    assert calm(at) == []
    assert len(table(at)) == 6
    assert table(go(at, "overview"))["status"].tolist() == ["complete"]


def without(column):
    return lambda f: edit_table(f, "benchmark", lambda t: t.drop(columns=column))


def manifest_of(text):
    return lambda f: (f / BENCHMARK_MANIFEST).write_text(text)


DAMAGE = {
    "no manifest": lambda f: (f / BENCHMARK_MANIFEST).unlink(),
    "manifest no JSON": manifest_of("{"),
    "no parquet": lambda f: (f / "benchmark.parquet").write_bytes(b"PAR1"),
    "no column ttft_s": without("ttft_s"),
    "no column kv_limit": without("kv_limit"),
    "no column spec": without("spec"),
    "text for seconds": lambda f: edit_table(f, "benchmark", lambda t: t.assign(ttft_s="fast")),
    "text for peaks": lambda f: edit_table(f, "benchmark", lambda t: t.assign(peak_bytes="much")),
    "manifest a list": manifest_of("[]"),
    "manifest a number": manifest_of("1"),
    "manifest empty": manifest_of("{}"),
    "manifest notes": manifest_of('{"model": "m", "hardware": "h", "notes": 5}'),
    "no rows": lambda f: edit_table(f, "benchmark", lambda t: t.iloc[:0]),
    "text for lengths": lambda f: edit_table(f, "benchmark", lambda t: t.assign(n_prompt="long")),
    "text for limits": lambda f: edit_table(f, "benchmark", lambda t: t.assign(tpot_limit="low")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_benchmark_is_one_line(copy, open_app, damage):
    folder = copy("bench")
    DAMAGE[damage](folder)
    (said,) = calm(open_app(folder.parent, "benchmark"))
    assert "bench" in said


def test_without_a_benchmark_the_page_says_how_to_make_one(copy, open_app):
    at = open_app(copy("tiny").parent, "benchmark")
    assert calm(at) == []
    assert "There is no benchmark" in at.info[0].value
    assert "speed-diagnostics bench" in at.code[0].value
