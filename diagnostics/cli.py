"""The command: parses, calls, prints."""

import io
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diagnostics.errors import UserError

# Only light imports above: `--help` must not wait for torch.

EMBEDDED = "smollm2-135m-instruct"
RUNS = Path("runs")
INTERRUPTED = 130  # exit status, as shells have it for SIGINT
ClickException: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

app = typer.Typer(
    help="How deep must a prompt go? Layer diagnostics and the SPEED cutoff for decoder-only language models.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[str, typer.Argument(help="hub id, model folder, .gguf file or built-in name")]
ModelOrRun = Annotated[str, typer.Argument(help="the same, or the folder of an existing run")]
PromptsOption = Annotated[str, typer.Option(help="'builtin' or a .jsonl file")]
MaxPrompts = Annotated[int | None, typer.Option(help="use only the first N prompts")]
ContextLength = Annotated[
    int | None, typer.Option(help="tokens per prompt; documents are cut to fit  [built-in prompts: 1024]")
]
DecodeTokens = Annotated[int, typer.Option(help="reference tokens per prompt")]
Anchors = Annotated[int, typer.Option(help="leading tokens that keep their KV in all layers")]
LensPositions = Annotated[int, typer.Option(help="decode positions per prompt that the logit lens reads")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the built-in prompts and of the bootstrap")]
Backend = Annotated[str, typer.Option(help="how activations are read: hooks")]
Device = Annotated[str, typer.Option(help="auto, map (spread over GPUs), cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Revision = Annotated[str | None, typer.Option(help="hub revision of the model")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Out = Annotated[Path | None, typer.Option(help="run folder  [runs/MODEL_TIME]")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the interrupted run in --out")]


@app.command()
def diagnose(
    model: Model = EMBEDDED,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
    decode_tokens: DecodeTokens = 48,
    anchors: Anchors = 1,
    lens_positions: LensPositions = 4,
    seed: Seed = 0,
    backend: Backend = "hooks",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    out: Out = None,
    resume: Resume = False,
    json: Annotated[bool, typer.Option("--json", help="print the run's manifest alone")] = False,
) -> None:
    """Measure every layer and every cutoff of a model on prompts, and keep the tables in a run folder."""
    arguments = dict(locals())
    run = _diagnose(arguments)
    if json:
        from json import dumps

        print(dumps(run.manifest, indent=1))
        return
    from diagnostics.terminal import show_run

    show_run(run, Console(highlight=False))
    print(f"Run folder: {run.path}")


@app.command()
def recommend(
    model: ModelOrRun = EMBEDDED,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
    decode_tokens: DecodeTokens = 48,
    max_kl: Annotated[
        float | None, typer.Option(help="goal: KL from full depth, nats per token  [0.1 without other goal]")
    ] = None,
    max_nll_increase: Annotated[float | None, typer.Option(help="goal: NLL increase, nats per token")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="goal: share of same top tokens, 0..1")] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="largest cutoff whose KV fits this share of full, 0..1")
    ] = None,
    confidence: Annotated[float, typer.Option(help="of the bound that must meet the goal")] = 0.95,
    region_rule: Annotated[
        list[str] | None,
        typer.Option(help="change a threshold of the regions, e.g. max_drift=0.2; repeatable"),
    ] = None,
    anchors: Anchors = 1,
    lens_positions: LensPositions = 4,
    seed: Seed = 0,
    backend: Backend = "hooks",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    out: Out = None,
    resume: Resume = False,
    json: Annotated[bool, typer.Option("--json", help="print the recommendation alone on stdout")] = False,
) -> None:
    """Recommend the SPEED cutoff of a model, with its measured loss; or of an existing run, without the model."""
    arguments = dict(locals())
    from diagnostics.recommend import Criterion
    from diagnostics.results import MANIFEST, RECOMMENDATION, load_run

    rules = _region_rules(region_rule or [])
    # Before the model runs for minutes: these say in one line what is wrong with the goals.
    Criterion(max_kl, max_nll_increase, min_agreement, kv_budget, confidence)
    # os.path, unlike pathlib, takes a name that is too long for one that is not there.
    run = load_run(model) if os.path.isfile(os.path.join(model, MANIFEST)) else _diagnose(arguments)
    from diagnostics.recommend import recommend as recommend_cutoff

    assert run.path is not None
    try:
        recommendation = recommend_cutoff(
            run,
            max_kl=max_kl,
            max_nll_increase=max_nll_increase,
            min_agreement=min_agreement,
            kv_budget=kv_budget,
            confidence=confidence,
            rules=rules,
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{error} (what was measured is in {str(run.path)!r})") from None
    recommendation.save(run.path / RECOMMENDATION)
    if json:
        print(recommendation.to_json())
        return
    from diagnostics.terminal import show_recommendation

    show_recommendation(run, recommendation, Console(highlight=False))
    print(f"Run folder: {run.path}")


def _diagnose(arguments: dict[str, Any]) -> Any:
    """Load model and prompts and run the diagnosis, with a progress bar on a terminal."""
    a = arguments
    if a["resume"] and a["out"] is None:
        raise UserError("--resume needs --out: the folder of the run to continue")
    out = a["out"] or RUNS / f"{_slug(a['model'])}_{datetime.now():%Y-%m-%dT%H-%M-%S}"
    from diagnostics.prompts import load_prompts
    from diagnostics.results import require_place

    require_place(out, resume=a["resume"])  # before a large model is loaded
    prompt_set = load_prompts(
        a["prompts"], max_prompts=a["max_prompts"], context_length=a["context_length"], seed=a["seed"]
    )
    _quiet()
    import torch

    from diagnostics.diagnose import diagnose as run_diagnosis
    from diagnostics.models import load_model

    lm = load_model(
        a["model"],
        device=a["device"],
        dtype=a["dtype"],
        revision=a["revision"],
        trust_remote_code=a["trust_remote_code"],
    )
    try:
        with _progress(f"diagnosing {lm.name}") as progress:
            return run_diagnosis(
                lm,
                prompt_set,
                decode_tokens=a["decode_tokens"],
                anchors=a["anchors"],
                lens_positions=a["lens_positions"],
                backend=a["backend"],
                out=out,
                resume=a["resume"],
                progress=progress,
                arguments={k: str(v) if isinstance(v, Path) else v for k, v in a.items()},
            )
    except torch.OutOfMemoryError:
        raise UserError("out of device memory: give a smaller --context-length, or --dtype bfloat16") from None
    except KeyboardInterrupt:
        _fail(f"interrupted; what is finished is kept, continue with --out {out} --resume", INTERRUPTED)


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """Yield a `diagnostics.diagnose.Progress` callback that draws a bar on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, prompt_id: bar.update(
            task, completed=done, total=total, description=f"{title} {prompt_id}"
        )


def _region_rules(settings: list[str]) -> Any:
    """Parse ``name=value`` pairs into region rules."""
    from diagnostics.regions import RegionRules

    types = {name: type(default) for name, default in asdict(RegionRules()).items()}
    values = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in types:
            raise UserError(f"region rule {name!r} is not one of: {', '.join(types)}")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise UserError(f"region rule {name} must be a number ({types[name].__name__}), not {value!r}") from None
    return RegionRules(**values)


def _slug(model: str) -> str:
    return re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name or "model").strip("-")


def _quiet() -> None:
    """Keep the libraries' own progress bars and advice out of what the user reads."""
    warnings.filterwarnings("ignore", module="transformers|torch")
    # Their environment variables would be too late: both are imported by now.
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    disable_progress_bars()
    hub_logging.set_verbosity_error()


def main() -> None:
    """Entry point: what is wrong with the input is one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode gets "?" for the bars
    try:
        status = app(sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()  # here, where a full disk below it can still be reported
    except UserError as error:
        _fail(str(error))
    except ClickException as error:
        _fail(error.format_message())
    except OSError as error:  # such as a full disk below stdout
        # What is still in its buffer has no place to go; Python would try again at exit, and complain.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    if status == INTERRUPTED:
        _fail("interrupted", INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int = 2) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
