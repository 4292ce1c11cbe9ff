"""Counts how faults of the machine end: kills, full disks, damaged files, hostile archives.

python analyses/check_faults.py [--kills 40] [--damages 512] [--only kills,disks,damages,archives]

- kills: a diagnosis, an evaluation and a fine-tuning of a tiny model are killed (SIGKILL) at random moments and
  resumed until they end; their tables must then equal those of an uninterrupted one, bit for bit.
- disks: the same with so little space left that writing fails once; the work must end in a `UserError`, and resume.
- damages: one file of a folder of results, of a saved cache or of an adapter is damaged, and everything is read. The
  folder must be refused by a `UserError`, or read unchanged. A different number, or any other error, counts as a fault.
- archives: zipped runs, damaged or malicious, go through the dashboard's upload.

Exit status 1 if any check fails.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "app")]

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402

from dashboard.upload import import_zip  # noqa: E402
from diagnostics import (  # noqa: E402  # noqa: E402
    SpeedPolicy,
    UserError,
    diagnose,
    generate,
    load_cache,
    load_model,
    load_prompts,
    load_run,
    recommend,
    save_cache,
)
from diagnostics.evaluate.evaluation import evaluate  # noqa: E402
from diagnostics.evaluate.evaluation_folder import load_evaluation  # noqa: E402
from diagnostics.evaluate.tasks import load_task  # noqa: E402
from diagnostics.finetune import Settings, Source, finetune, load_data, load_finetuning, load_held_out  # noqa: E402
from diagnostics.generation.benchmark_folder import load_benchmark  # noqa: E402
from diagnostics.generation.benchmarks import benchmark  # noqa: E402
from diagnostics.policies.recommendation import read_recommendation  # noqa: E402
from tests.support.runs import save_tiny, write_prompts  # noqa: E402

WORKS = ("diagnose", "evaluate", "finetune")


class World:
    """A tiny model, and the three kinds of long work on it, each as a function of its folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny(root / "model")
        self.prompts = write_prompts(root / "prompts.jsonl", n_prompts=70, n_tokens=40)
        self.few = write_prompts(root / "few.jsonl", n_prompts=6, n_tokens=40)
        self.data = write_prompts(root / "data.jsonl", n_prompts=7, n_tokens=20, seed=1)
        self.lm = load_model(self.model)
        rng = random.Random(0)
        lines: list[dict[str, Any]] = [{"task": {"metric": "acc_per_char"}}]
        for n in range(24):
            query = " ".join(f"w{rng.randrange(4, 30)}" for _ in range(20))
            lines.append({"id": f"i{n}", "query": query, "continuations": [" w4", " w5"], "gold": n % 2})
        self.task = root / "task.jsonl"
        self.task.write_text("\n".join(map(json.dumps, lines)) + "\n")

    def diagnose(self, out: Path, prompts: Path | None = None) -> Any:
        """Start or continue a diagnosis."""
        return diagnose(self.lm, load_prompts(prompts or self.prompts), decode_tokens=4, out=out, resume=True)

    def evaluate(self, out: Path) -> Any:
        """Start or continue an evaluation."""
        task = load_task(str(self.task), self.lm.tokenizer)
        return evaluate(self.lm, [task], [SpeedPolicy(2)], out=out, resume=True)

    def finetune(self, out: Path) -> Any:
        """Start or continue a fine-tuning."""
        settings = Settings(
            cutoff=2, rank=2, steps=6, decode_tokens=4, checkpoint_every=2, sweep_every=3, learning_rate=1e-2
        )
        source = Source(load_data(self.data), "data.jsonl", answer_tokens=5)
        return finetune(load_model(self.model), source, load_held_out(self.few), settings, out=out, resume=True)

    def work(self, name: str, out: Path, most_bytes: int | None = None) -> None:
        """Run one of the three, with a limit in bytes on the size of files."""
        if most_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, -1))
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        getattr(self, name)(out)


def in_child(work: Callable[[], Any], after_s: float | None = None) -> int | str:
    """Run in a forked process: 0, its signal as a negative number, the UserError's text, or a traceback's last line."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
            os.dup2(nothing.fileno(), 1)
        try:
            work()
            text = ""
        except UserError as error:
            text = f"U{error}"
        except BaseException as error:
            text = f"T{type(error).__name__}: {error}"
        os.write(writing, text.encode()[:4000])
        os._exit(0)
    os.close(writing)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(pid, signal.SIGKILL)
    text = os.fdopen(reading).read()
    _, status = os.waitpid(pid, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else text or 0


def tables(folder: Path) -> dict[str, Any]:
    """Return the content of every table and of the weights."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".parquet":
            found[name] = pd.read_parquet(path).to_json(double_precision=15)
        elif path.suffix == ".safetensors":
            found[name] = path.read_bytes()
    return found


def undisturbed(world: World, name: str) -> dict[str, Any]:
    """Return the results of one of the three without a fault; run once."""
    out = world.root / "calm" / name
    if not out.exists() and (result := in_child(partial(world.work, name, out))) != 0:
        raise SystemExit(f"{name} fails undisturbed: {result}")
    return tables(out)


def kills(world: World, n: int, rng: random.Random, say: Callable[..., None]) -> Counter[str]:
    """Kill and resume until `n` kills are done, alternating between the three kinds of work."""
    count: Counter[str] = Counter()
    wanted, lasted = {}, {}
    for name in WORKS:
        started = time.monotonic()
        wanted[name], lasted[name] = undisturbed(world, name), time.monotonic() - started
    number = 0
    while count["kills"] < n:
        name = WORKS[number % len(WORKS)]
        out = world.root / "killed" / f"{name}{number}"
        number += 1
        for _ in range(3):
            result = in_child(partial(world.work, name, out), rng.uniform(0.05, 0.7 * lasted[name]))
            count["kills"] += result == -signal.SIGKILL
            if isinstance(result, str):
                count["faults"] += 1
                say(f"{name} resumed after a kill: {result}")
        result = in_child(partial(world.work, name, out))
        same = result == 0 and tables(out) == wanted[name]
        left = [p for p in out.rglob("*") if p.name.startswith(".")] if out.exists() else []
        count["ended with the same numbers"] += same
        count["runs"] += 1
        if not same or left:
            count["faults"] += 1
            say(f"{name} ended with other numbers ({result}), or left {left}")
    return count


def disks(world: World, n: int, rng: random.Random, say: Callable[..., None]) -> Counter[str]:
    """Simulate a full disk: a file system in memory with little space left, or files that cannot grow."""
    count: Counter[str] = Counter()
    for number in range(n):
        name = WORKS[number % len(WORKS)]
        place = Path(tempfile.mkdtemp(dir=world.root))
        mounted = os.system(f"mount -t tmpfs -o size=3m none {place} 2>/dev/null") == 0
        left = (0, 8, 24, 60, 120, 300)[number // len(WORKS) % 6] << 10
        filler = place / "filler"
        if mounted:
            free = shutil.disk_usage(place).free
            filler.write_bytes(bytes(max(0, free - left)))

        out = place / "out"
        result = in_child(partial(world.work, name, out, None if mounted else left // 4 + 100))
        filler.unlink(missing_ok=True)
        if mounted:
            os.system(f"mount -o remount,size=64m {place}")
        refused = isinstance(result, str) and result.startswith("U")
        count["refused in one line" if refused else "had room enough" if result == 0 else "faults"] += 1
        again = in_child(partial(world.work, name, out))
        if again == 0 and tables(out) == undisturbed(world, name):
            count["went on to the same numbers"] += 1
        else:
            count["faults"] += 1
        if (not refused and result != 0) or again != 0:
            say(f"{name} with {left >> 10} KiB left: {result}; again: {again}")
        if mounted:
            os.system(f"umount {place}")
    return count


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip a bit, truncate, overwrite a range with zeros, or insert bytes."""
    at = rng.randrange(len(data))
    size = rng.choice((1, 8, 64, 512))
    kind = rng.choice(("flip", "flip", "cut", "zeros", "insert"))
    if kind == "flip":
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[:at]
    if kind == "zeros":
        return data[:at] + bytes(min(size, len(data) - at)) + data[at + size :]
    return data[:at] + rng.randbytes(size) + data[at:]


def readings(world: World) -> dict[str, tuple[Path, Callable[[Path], Any]]]:
    """Return every kind of result with a function that reads all its content for comparison."""
    place = world.root / "results"
    run = world.diagnose(place / "run", world.few)
    recommend(run, max_kl=5).save(place / "run" / "recommendation.json")
    part = diagnose_partly(world, place / "part-run")
    benchmark(world.lm, [SpeedPolicy(2)], lengths=[8, 16], repeats=2, new_tokens=3, out=place / "benchmark")
    world.evaluate(place / "evaluation")
    world.finetune(place / "finetuning")
    made = generate(world.lm, torch.tensor([[1, 5, 6, 7, 8, 9]]), policy=SpeedPolicy(2), max_new_tokens=3)
    (place / "cache").mkdir()
    save_cache(made.cache, place / "cache" / "cache.safetensors", world.lm)

    def read_run(folder: Path) -> Any:
        found = load_run(folder)
        recommendation = read_recommendation(folder) if (folder / "recommendation.json").exists() else None
        kept = {name: table.to_json(double_precision=15) for name, table in found.tables.items()}
        return found.manifest, kept, recommend(found).data, recommendation

    def read_finetuning(folder: Path) -> Any:
        found = load_finetuning(folder)
        weights = load_model(folder).model.state_dict()
        return (
            *(found.manifest, found.steps.to_json(), found.sweeps.to_json(), read_recommendation(folder)),
            *(read_run(folder / name) for name in ("before", "after")),
            {name: value.numpy().tobytes() for name, value in weights.items()},
        )

    def read_cache(folder: Path) -> Any:
        cache = load_cache(folder / "cache.safetensors", world.lm)
        held = [
            [x[:, :, layer.first : layer.first + layer.n_slots].numpy().tobytes() for x in (layer.keys, layer.values)]
            for layer in cache.layers
        ]
        return cache.policy.spec, cache.n_columns, cache.n_prompt, cache.batch, repr(cache.decoded), held

    return {
        "run": (place / "run", read_run),
        "interrupted run": (part, read_run),
        "benchmark": (
            place / "benchmark",
            lambda f: (load_benchmark(f).manifest, load_benchmark(f).rows.to_json(double_precision=15)),
        ),
        "evaluation": (
            place / "evaluation",
            lambda f: (load_evaluation(f).manifest, load_evaluation(f).items.to_json(double_precision=15)),
        ),
        "fine-tuning": (place / "finetuning", read_finetuning),
        "cache": (place / "cache", read_cache),
    }


def diagnose_partly(world: World, out: Path) -> Path:
    """Stop a diagnosis after four prompts."""

    class Stop(BaseException):
        pass

    def stop(done: int, total: int, prompt_id: str) -> None:
        if done == 4:
            raise Stop

    with contextlib.suppress(Stop):
        diagnose(world.lm, load_prompts(world.few), decode_tokens=4, out=out, progress=stop)
    return out


def damages(world: World, n: int, rng: random.Random, say: Callable[..., None]) -> Counter[str]:
    """Damage one file at a time and read the folder."""
    count: Counter[str] = Counter()
    kinds = readings(world)
    whole = {name: repr(read(folder)) for name, (folder, read) in kinds.items()}
    # Files that only people read do not count.
    unread = ("README.md", "summary.md")
    # A fine-tuning has the most files and takes longest to read.
    names = [name for name in kinds for _ in range(1 if name == "fine-tuning" else 3)]
    for number in range(n):
        name = names[number % len(names)]
        folder, read = kinds[name]
        files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in unread and p.stat().st_size]
        path = rng.choice(files)
        data = path.read_bytes()
        path.write_bytes(damage(data, rng))
        try:
            outcome = "unchanged" if repr(read(folder)) == whole[name] else "OTHER NUMBERS"
        except UserError as error:
            named = path.name in str(error) and "\n" not in str(error)
            outcome = "refused by its name" if named else f"REFUSED AS {error}"
        except Exception:
            outcome = "TRACEBACK"
            say(traceback.format_exc(limit=-3))
        path.write_bytes(data)
        count[outcome] += 1
        if outcome not in ("unchanged", "refused by its name"):
            count["faults"] += 1
            say(f"{name}: {path.relative_to(folder)}: {outcome}")
    return count


def archives(world: World, n: int, rng: random.Random, say: Callable[..., None]) -> Counter[str]:
    """Send zipped runs through the upload."""
    count: Counter[str] = Counter()
    folder = world.root / "zipped"
    if not folder.exists():
        world.diagnose(folder, world.few)
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    whole = repr({name: table.to_json() for name, table in load_run(folder).tables.items()})
    made = [bomb(files) for bomb in BOMBS]
    while len(made) < n:
        name = rng.choice(list(files))
        made.append(files | {name: damage(files[name], rng)})
    for number, content in enumerate(made):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        runs = world.root / "uploads" / str(number)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            name = import_zip(buffer.getvalue(), "run.zip", runs)
            shown = repr({name: table.to_json() for name, table in load_run(runs / name).tables.items()})
            outcome = "the same run" if shown == whole else "ANOTHER RUN"
        except UserError:
            outcome = "refused" if not any(runs.iterdir()) else "REFUSED, SOMETHING LEFT"
        except Exception:
            outcome = "TRACEBACK"
            say(traceback.format_exc(limit=-3))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > 500:
            outcome = f"MEMORY ({grown} MB)"
        count[outcome] += 1
        if outcome.isupper() or "MEMORY" in outcome:
            count["faults"] += 1
            say(f"archive {number}: {outcome}")
    return count


def _with_prompts(files: dict[str, bytes], table: pa.Table, **options: Any) -> dict[str, bytes]:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", **options)
    return files | {"prompts.parquet": sink.getvalue()}


def _many_rows(files: dict[str, bytes]) -> dict[str, bytes]:
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000_000, np.int32)), pa.array(["p"]))
    return _with_prompts(files, pa.table({"prompt_id": names, "category": names}))


def _long_texts(files: dict[str, bytes]) -> dict[str, bytes]:
    names = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1_000_000, np.int32)), pa.array(["x" * 1_000_000]))
    return _with_prompts(files, pa.table({"prompt_id": names, "category": names}))


def _long_texts_elsewhere(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"benchmark.parquet": _long_texts(files)["prompts.parquet"]}


def _long_lists(files: dict[str, bytes]) -> dict[str, bytes]:
    values = pa.array(np.zeros(120_000_000, np.float32))
    lists = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    return _with_prompts(files, pa.table({"prompt_id": ["p0"], "attention": lists}))


def _same_beginnings(files: dict[str, bytes]) -> dict[str, bytes]:
    texts = ["a" * 200_000 + f"{i:06d}" for i in range(8000)]
    encoding = {"prompt_id": "DELTA_BYTE_ARRAY"}
    return _with_prompts(files, pa.table({"prompt_id": texts}), use_dictionary=False, column_encoding=encoding)


def _deep(files: dict[str, bytes]) -> dict[str, bytes]:
    values: Any = pa.array([1], pa.int8())
    for _ in range(60):
        values = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), values)
    return _with_prompts(files, pa.table({"prompt_id": values}))


def _structures(files: dict[str, bytes]) -> dict[str, bytes]:
    return _with_prompts(files, pa.table({"prompt_id": pa.array([{"a": 1}])}))


def _one_category(files: dict[str, bytes]) -> dict[str, bytes]:
    """Store repeated texts as categories, as other writers do: the run must be accepted."""
    table = pq.read_table(io.BytesIO(files["prompts.parquet"])).replace_schema_metadata(None)
    at = table.schema.get_field_index("category")
    return _with_prompts(files, table.set_column(at, "category", table.column(at).dictionary_encode()))


def _odd_types(files: dict[str, bytes]) -> dict[str, bytes]:
    """Change the types that pandas stores for a table."""
    table = pq.read_table(io.BytesIO(files["prompts.parquet"]))
    metadata = {b"pandas": (table.schema.metadata or {})[b"pandas"].replace(b'"int64"', b'"int68"')}
    return _with_prompts(files, table.replace_schema_metadata(metadata))


def _deep_json(files: dict[str, bytes]) -> dict[str, bytes]:
    return files | {"manifest.json": b"[" * 1_000_000}


BOMBS = (
    *(_many_rows, _long_texts, _long_texts_elsewhere, _long_lists, _same_beginnings),
    *(_deep, _structures, _one_category, _odd_types, _deep_json),
)


def main() -> None:
    """Run the selected checks, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--disks", type=int, default=17)
    parser.add_argument("--damages", type=int, default=512)
    parser.add_argument("--archives", type=int, default=48)
    parser.add_argument("--only", default="kills,disks,damages,archives")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as root:
        world = World(Path(root))
        for name in options.only.split(","):
            check = {"kills": kills, "disks": disks, "damages": damages, "archives": archives}[name]
            started = time.monotonic()
            count = check(
                world, getattr(options, name), random.Random(options.seed), lambda *line: print(*line, file=sys.stderr)
            )
            faults += count["faults"]
            print(f"{name}: {dict(count)} ({time.monotonic() - started:.0f} s)", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
