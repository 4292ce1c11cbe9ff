"""``diagnose`` and ``recommend``."""

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console

from diagnostics.cli.common import INTERRUPTED, announce, claim, fail, load, new_folder, plain, progress, warn
from diagnostics.cli.flags import with_flags
from diagnostics.cli.options import (
    Anchors,
    Backend,
    ContextLength,
    DecodeTokens,
    DetailPrompts,
    Device,
    Dtype,
    LensPositions,
    MaxPrompts,
    Model,
    ModelOrRun,
    Out,
    PromptsOption,
    Quiet,
    RemoteCode,
    Resume,
    Revision,
    Seed,
    SkipSelfTest,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support import defaults
from diagnostics.support.errors import UserError

# Options of `recommend` that an existing run has no use for.
MEASURING = (
    *("prompts", "max_prompts", "context_length", "decode_tokens", "anchors", "lens_positions"),
    *(
        "detail_prompts",
        "backend",
        "device",
        "dtype",
        "revision",
        "trust_remote_code",
        "skip_self_test",
        "out",
        "resume",
    ),
)


def diagnose(
    model: Model = EMBEDDED_MODEL,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
    decode_tokens: DecodeTokens = defaults.DECODE_TOKENS,
    anchors: Anchors = defaults.ANCHORS,
    lens_positions: LensPositions = defaults.LENS_POSITIONS,
    detail_prompts: DetailPrompts = defaults.DETAIL_PROMPTS,
    seed: Seed = 0,
    backend: Backend = "hooks",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="print the run's manifest alone")] = False,
) -> None:
    """Measure every layer and every cutoff of a model on prompts, and keep the tables in a run folder."""
    arguments = dict(locals())
    run = _diagnose(arguments)
    if json:
        from json import dumps

        print(dumps(run.manifest, indent=1))
        return
    from diagnostics.terminal.diagnosis import show_run

    show_run(run, Console(highlight=False), phrase=with_flags)
    print(f"Run folder: {run.path}")


def recommend(
    context: typer.Context,
    model: ModelOrRun = EMBEDDED_MODEL,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
    decode_tokens: DecodeTokens = defaults.DECODE_TOKENS,
    max_kl: Annotated[
        float | None,
        typer.Option(help=f"goal: KL from full depth, nats per token  [{defaults.MAX_KL} without other goal]"),
    ] = None,
    max_nll_increase: Annotated[float | None, typer.Option(help="goal: NLL increase, nats per token")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="goal: share of same top tokens, 0..1")] = None,
    kv_budget: Annotated[
        float | None, typer.Option(help="largest cutoff whose KV fits this share of full, 0..1")
    ] = None,
    confidence: Annotated[float, typer.Option(help="confidence of the bound on the goal")] = defaults.CONFIDENCE,
    every_category: Annotated[
        bool, typer.Option("--every-category", help="the mean of every category of prompts must meet the goal, too")
    ] = False,
    region_rule: Annotated[
        list[str] | None,
        typer.Option(help="change a threshold of the regions, e.g. max_drift=0.2; repeatable"),
    ] = None,
    anchors: Anchors = defaults.ANCHORS,
    lens_positions: LensPositions = defaults.LENS_POSITIONS,
    detail_prompts: DetailPrompts = defaults.DETAIL_PROMPTS,
    seed: Seed = 0,
    backend: Backend = "hooks",
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Annotated[bool, typer.Option("--json", help="print the recommendation alone on stdout")] = False,
) -> None:
    """Recommend the SPEED cutoff of a model, with its measured loss; or of an existing run, without the model."""
    arguments = dict(locals())
    from diagnostics.cutoffs.recommendation import Criterion
    from diagnostics.runs.places import MANIFEST, RECOMMENDATION
    from diagnostics.runs.run import load_run

    rules = _region_rules(region_rule or [])
    del arguments["context"]
    # Refuses wrong goals before the model runs for minutes.
    Criterion(max_kl, max_nll_increase, min_agreement, kv_budget, confidence, every_category)
    # os.path, unlike pathlib, treats a name that is too long as a missing file.
    exists = os.path.isfile(os.path.join(model, MANIFEST))
    if exists:
        _refuse_measuring_options(context)
        run = load_run(model)
    else:
        run = _diagnose(arguments)
    from diagnostics.cutoffs.recommendation import recommend as recommend_cutoff

    assert run.path is not None
    try:
        recommendation = recommend_cutoff(
            run,
            max_kl=max_kl,
            max_nll_increase=max_nll_increase,
            min_agreement=min_agreement,
            kv_budget=kv_budget,
            confidence=confidence,
            every_category=every_category,
            rules=rules,
            seed=seed,
        )
    except UserError as error:
        raise UserError(f"{error} (what was measured is in {str(run.path)!r})") from None
    if json:
        print(recommendation.to_json())
    else:
        from diagnostics.terminal.diagnosis import show_recommendation

        show_recommendation(run, recommendation, Console(highlight=False), phrase=with_flags)
        print(f"Run folder: {run.path}")
    # Last: the recommendation is printed even if it cannot be saved.
    try:
        recommendation.save(run.path / RECOMMENDATION)
    except UserError as error:
        if not exists:
            raise
        warn(with_flags(f"{error}: the recommendation is not kept"))


def _diagnose(arguments: dict[str, Any]) -> Any:
    """Load model and prompts and run the diagnosis, with a progress bar on a terminal."""
    a = arguments
    if a["resume"] and a["out"] is None:
        raise UserError("--resume needs --out: the folder of the run to continue")
    out = a["out"] or new_folder(a["model"])
    from diagnostics.prompts.load import load_prompts
    from diagnostics.runs.manifest import RUN_FOLDER

    claim(out)
    RUN_FOLDER.require_free(out, resume=a["resume"])  # before a large model is loaded
    prompt_set = load_prompts(
        a["prompts"], max_prompts=a["max_prompts"], context_length=a["context_length"], seed=a["seed"]
    )
    import torch

    from diagnostics.diagnosis.diagnosis import diagnose as run_diagnosis

    quiet = a["quiet"]
    announce(f"Measuring every layer and every cutoff of {a['model']}; results go to {out}.", quiet=quiet)
    lm = load(a)
    try:
        with progress("measuring", first="preparing the model and the prompts", quiet=quiet) as advance:
            return run_diagnosis(
                lm,
                prompt_set,
                decode_tokens=a["decode_tokens"],
                anchors=a["anchors"],
                lens_positions=a["lens_positions"],
                detail_prompts=a["detail_prompts"],
                backend=a["backend"],
                out=out,
                resume=a["resume"],
                progress=advance,
                arguments=plain(a),
            )
    except torch.OutOfMemoryError:
        raise UserError("out of device memory: give a smaller --context-length, or --dtype bfloat16") from None
    except KeyboardInterrupt:
        fail(f"interrupted; what is finished is kept, continue with --out {out} --resume", INTERRUPTED)


def _refuse_measuring_options(context: typer.Context) -> None:
    """Raise UserError for options that decide how to measure, if they are given with an existing run."""
    for name in MEASURING:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} has no effect on a run that exists: leave it out, or give the model")


def _region_rules(settings: list[str]) -> Any:
    """Parse ``name=value`` pairs into region rules."""
    from diagnostics.cutoffs.regions import RegionRules

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
