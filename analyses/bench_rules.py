"""Cost of what cutoff rules read: a diagnosis with all rules relative to one without them.

Both diagnoses (probes and all-cutoff sweep, one built-in prompt) are interleaved in one process; printed and written
are medians of the ratios inside each repeat.

    python analyses/bench_rules.py [--lengths 512 2048] [--repeats 5] [--out FILE.json]
    python analyses/bench_rules.py --rules all,leave-one-out
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from diagnostics.diagnosis import diagnose
from diagnostics.models.loading import LoadedModel, load_model
from diagnostics.prompts import load_prompts
from diagnostics.prompts.prompt import PromptSet
from diagnostics.support.versions import hardware, versions


def seconds(lm: LoadedModel, prompts: PromptSet, rules: str) -> float:
    start = time.perf_counter()
    diagnose(lm, prompts, rules=rules, detail_prompts=0, self_test=False, progress=False)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rules", default="all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    lm = load_model()
    rows = []
    for length in options.lengths:
        prompts = load_prompts(context_length=length, max_prompts=1)
        times: dict[str, list[float]] = {"none": [], options.rules: []}
        for rules in times:
            seconds(lm, prompts, rules)
        for _ in range(options.repeats):
            for rules, taken in times.items():
                taken.append(seconds(lm, prompts, rules))
        ratios = [t / base for t, base in zip(times[options.rules], times["none"], strict=True)]
        row = {
            "tokens": length,
            "rules": options.rules,
            "ratio": round(statistics.median(ratios), 3),
            "ratio_min": round(min(ratios), 3),
            "ratio_max": round(max(ratios), 3),
            "seconds_without": round(statistics.median(times["none"]), 3),
            "seconds": round(statistics.median(times[options.rules]), 3),
        }
        rows.append(row)
        print(row, flush=True)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "model": lm.name,
        "dtype": str(lm.dtype),
        "device": hardware(lm.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
