"""How quickly the dashboard answers: from the command to the first page, from page to page, and a slider.

python analyses/bench_dashboard.py [--out FILE]    # analyses/results/bench_dashboard.json

On a synthetic run of 64 prompts, 32 layers and 32 heads with 1024-token prompts. Times are measured in the browser,
from the click or key until the server has finished the page. "first" is the first visit, with every figure drawn;
"again" is a later one.
Needs `pip install -e '.[app,browser]'` and a Chromium.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from browsing import browsing, go, serving, settled
from diagnostics import recommend
from diagnostics.runs.manifest import SCHEMA_VERSION
from diagnostics.runs.places import RECOMMENDATION
from diagnostics.runs.schema import COLUMNS
from diagnostics.runs.writer import RunWriter
from diagnostics.support.versions import hardware, versions

N_PROMPTS, N_LAYERS, N_HEADS, N_TOKENS, N_LENS, DETAIL_PROMPTS = 64, 32, 32, 1024, 24, 7
PAGES = ("Layers", "Cutoff", "Benchmark", "Compare", "Playground", "New diagnosis", "Overview")
# Llama-3.1-8B in bfloat16.
SHAPE = {
    **{"n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "width": 4096, "bytes_per_value": 2, "sliding_window": None},
    **{"layer_parameters": [218_103_808] * N_LAYERS, "head_parameters": 128256 * 4096},
    "layer_types": ["full_attention"] * N_LAYERS,
}


def synthetic_run(folder: Path) -> None:
    """Write a run of random measures."""
    rng = np.random.default_rng(0)
    identity = {"weight_hash": "0" * 64, "anchors": 1, "context_length": N_TOKENS}
    manifest = {
        **{"schema_version": SCHEMA_VERSION, "status": "running", "model": "made up", "prompt_set": "made up"},
        **{"n_layers": N_LAYERS, "n_heads": N_HEADS, "n_prompts": N_PROMPTS, "max_positions": 131072},
        **{"shape": SHAPE, "notes": [], "identity": identity},
    }
    writer = RunWriter.open(folder, manifest, resume=False)
    layer = np.arange(N_LAYERS)
    for index in range(N_PROMPTS):
        prompt_id = f"p{index}"
        key = {"prompt_id": prompt_id}
        kl = np.append(3 * np.exp(-layer[:-1] / 4) * rng.uniform(0.8, 1.2), 0)
        measures = {name: rng.random(N_LAYERS) / 2 for name in COLUMNS["layers"].split()[2:]}
        per_head = {name: rng.random(N_LAYERS * N_HEADS) for name in COLUMNS["heads"].split()[3:]}
        heads = {"layer": np.repeat(layer, N_HEADS), "head": np.tile(np.arange(N_HEADS), N_LAYERS)}
        prompt = {"category": f"category {index % 7}", "n_prompt": N_TOKENS, "n_decode": 48}
        tables = {
            "prompts": pd.DataFrame([key | prompt]),
            "layers": pd.DataFrame(key | {"layer": layer} | measures),
            "heads": pd.DataFrame(key | heads | per_head),
            "cutoffs": pd.DataFrame(
                key | {"cutoff": layer + 1, "kl": kl, "top1_agreement": 1 - kl / 4, "nll": 2 + kl, "nll_full": 2.0}
            ),
        }
        if index < DETAIL_PROMPTS:
            tables |= detail(key, rng)
        writer.write(index, tables)
    recommend(writer.finish()).save(folder / RECOMMENDATION)


def detail(key: dict[str, str], rng: np.random.Generator) -> dict[str, pd.DataFrame]:
    total, inside = N_TOKENS + 48, N_TOKENS - 2
    received = rng.random((inside, N_LAYERS)).astype("float32") / N_TOKENS
    tokens = {
        **{"position": np.arange(total), "token_id": 1, "text": [f" word{i}" for i in range(total)], "evidence": False},
        "segment": ["anchor"] + ["prompt"] * inside + ["decode"] * (total - inside - 1),
        "attention": [None, *received, *[None] * (total - inside - 1)],
        "selectivity": [None, *received / 2, *[None] * (total - inside - 1)],
    }
    layer, head, place = np.indices((N_LAYERS, N_HEADS, 32)).reshape(3, -1)
    head_tokens = {"layer": layer, "head": head, "position": 1 + place * 9, "attention": (1 / (2 + place)).astype("f4")}
    lens = {
        "position": N_TOKENS - 1 + np.repeat(np.arange(N_LENS), N_LAYERS),
        "layer": np.tile(np.arange(N_LAYERS), N_LENS),
        "lens_token": rng.integers(0, 5, N_LENS * N_LAYERS),
        "lens_text": " token",
        "lens_probability": rng.random(N_LENS * N_LAYERS),
    }
    columns = {"tokens": tokens, "lens": lens, "head_tokens": head_tokens}
    return {name: pd.DataFrame(key | table) for name, table in columns.items()}


def timed(act: Callable[[], Any]) -> float:
    launched = time.perf_counter()
    act()
    return round(time.perf_counter() - launched, 3)


def measure(runs: Path, repeats: int) -> dict[str, Any]:
    """Return seconds: start of server and first page, first and later visits of every page, slider."""
    with browsing() as browser:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(60_000)
        launched = time.perf_counter()
        with serving(runs) as address:
            listening = time.perf_counter() - launched
            page.goto(address)
            page.locator("h1").wait_for()
            settled(page)
            start = time.perf_counter() - launched
            page.wait_for_timeout(8000)  # imports that the server does in the background after the first page
            first, again = {}, {}

            for title in PAGES:
                first[title] = timed(lambda title=title: go(page, title))
                page.wait_for_timeout(500)
            go(page, "Compare")
            for title in PAGES:
                times = []
                for _ in range(repeats):
                    go(page, "Compare" if title == "Overview" else "Overview")
                    page.wait_for_timeout(300)
                    times.append(timed(lambda title=title: go(page, title)))
                again[title] = statistics.median(times)
            go(page, "Cutoff")
            slider = page.get_by_role("slider", name=re.compile("^Cutoff"))
            slider.focus()
            moved = []
            for _ in range(2 * repeats):
                value = page.get_by_test_id("stMetricValue").first
                before = value.inner_text()

                def press(before: str = before) -> None:
                    page.keyboard.press("ArrowRight")
                    page.wait_for_function(
                        "b => document.querySelector('[data-testid=stMetricValue]').innerText !== b", arg=before
                    )
                    settled(page)

                moved.append(timed(press))
                page.wait_for_timeout(300)
        page.close()
    return {
        "server_s": round(listening, 3),
        "first_page_s": round(start, 3),
        "page_first_s": first,
        "page_again_s": again,
        "slider_s": {"median": statistics.median(moved), "max": max(moved)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bench_dashboard.json")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as scratch:
        synthetic_run(Path(scratch) / "made")
        result = measure(Path(scratch), options.repeats)
    about = {"command": "python analyses/bench_dashboard.py", "hardware": hardware(torch.device("cpu"))}
    text = json.dumps(about | {"versions": versions()} | result, indent=1)
    options.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
