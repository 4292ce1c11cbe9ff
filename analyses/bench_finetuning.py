"""Time of a training step under SPEED beside one at full depth, LoRA, forward and backward pass.

    python analyses/bench_finetuning.py

Steps of all cutoffs alternate in one process, so that a busy machine slows all of them; the ratios are medians over
rounds. ``distillation`` adds the teacher's forward pass at full depth. The result goes to
``analyses/results/bench_finetuning_DEVICE.json``.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diagnostics import SpeedPolicy, UserError, load_model
from diagnostics.finetune import decode_phase, distillation_loss, full_depth, predicting, supervised_loss, train_under
from diagnostics.finetune.lora import add_lora
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.console import fail, quiet
from diagnostics.support.files import write_json
from diagnostics.support.versions import hardware, versions

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Time the steps and write the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 2 / 3, 0.8], help="cutoffs, as shares of L")
    parser.add_argument("--lengths", nargs="+", default=["256+64", "960+64"], help="tokens of prompt + answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    quiet()
    lm = load_model(options.model, device=options.device)
    model = add_lora(lm, 16).train()
    n_layers = lm.anatomy.n_layers
    cutoffs = sorted({round(share * n_layers) for share in options.shares})
    rows = []
    for text in options.lengths:
        prompt, answer = map(int, text.split("+"))
        ids = torch.randint(10, lm.model.config.vocab_size, (1, prompt + answer), device=lm.device)
        labels = ids.clone()
        labels[:, :prompt] = -100
        for distilled in (False, True):
            kinds: list[int | None] = [None, *cutoffs]  # None: the stock model
            times: dict[int | None, list[float]] = {kind: [] for kind in kinds}
            for number in range(options.rounds + 1):
                for kind in kinds:
                    seconds = _time_step(model, ids, labels, kind, n_layers, distilled)
                    if number:  # the first warms up
                        times[kind].append(seconds)
            for cutoff in cutoffs:
                ratios = [a / b for a, b in zip(times[cutoff], times[None], strict=True)]
                rows.append(
                    {
                        "prompt": prompt,
                        "answer": answer,
                        "loss": "distillation" if distilled else "supervised",
                        "cutoff": cutoff,
                        "seconds": round(median(times[cutoff]), 4),
                        "seconds_full_depth": round(median(times[None]), 4),
                        "ratio": round(median(ratios), 3),
                        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
                    }
                )
                print(json.dumps(rows[-1]))
    about: dict[str, Any] = {
        "command": " ".join(["python analyses/bench_finetuning.py", *sys.argv[1:]]),
        "model": lm.name,
        "n_layers": n_layers,
    }
    about |= {"rounds": options.rounds, "threads": torch.get_num_threads(), "dtype": str(lm.dtype)}
    about |= {"hardware": hardware(lm.device), "versions": versions()}
    write_json(options.results / f"bench_finetuning_{lm.device.type}.json", about | {"rows": rows})


def _time_step(
    model: Any, ids: torch.Tensor, labels: torch.Tensor, cutoff: int | None, n_layers: int, distilled: bool
) -> float:
    """Return the seconds of one forward and backward pass; without a cutoff, of the stock model."""
    kept = int((labels[0] != -100).sum()) + 1
    model.zero_grad()
    started = _now(ids.device)
    policy = SpeedPolicy(n_layers if cutoff is None else cutoff)
    with nullcontext() if cutoff is None else train_under(policy, model):
        teacher = None
        if distilled:
            with torch.no_grad(), nullcontext() if cutoff is None else full_depth(model), model.disable_adapter():
                teacher = model(ids, logits_to_keep=kept).logits
        given = {} if cutoff is None else {"decode_mask": decode_phase(labels)}
        logits = model(ids, logits_to_keep=kept, **given).logits
        labels = labels[:, -kept:]
        if teacher is None:
            loss = supervised_loss(logits, labels)
        else:
            loss = distillation_loss(logits, teacher, predicting(labels))
        loss.backward()
    return _now(ids.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        fail(str(error))
