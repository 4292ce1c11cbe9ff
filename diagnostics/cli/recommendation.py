"""``recommend``: a cutoff for a model, which is measured first, or for a run."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from diagnostics.cli.common import announce, warn
from diagnostics.cli.diagnosis import measure
from diagnostics.cli.flags import with_flags
from diagnostics.cli.options import (
    GOAL,
    RESULTS,
    Anchors,
    Backend,
    ContextLength,
    DecodeTokens,
    DetailPrompts,
    Device,
    Dtype,
    LensPositions,
    MaxPrompts,
    ModelOrRun,
    Out,
    PromptsOption,
    Quiet,
    RemoteCode,
    Resume,
    Revision,
    Rules,
    Seed,
    SkipSelfTest,
    WithoutSweep,
    option,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support import defaults
from diagnostics.support.errors import UserError

# Options that an existing run has no use for: they say how to measure.
MEASURING = (
    *("prompts", "max_prompts", "context_length", "decode_tokens", "anchors", "lens_positions", "detail_prompts"),
    *("rules", "without_sweep", "backend", "device", "dtype", "revision", "trust_remote_code", "skip_self_test"),
    *("out", "resume"),
)
REGION_RULES = "max_uptake_above, uptake_share, min_uptake, max_gap, max_drift, min_overlap, min_layers"


def recommend(
    context: typer.Context,
    model: ModelOrRun = EMBEDDED_MODEL,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
    max_kl: Annotated[
        float | None, option(GOAL, help=f"KL from full depth, nats per token  [{defaults.MAX_KL} without other goal]")
    ] = None,
    max_nll_increase: Annotated[float | None, option(GOAL, help="NLL increase, nats per token")] = None,
    min_agreement: Annotated[float | None, option(GOAL, help="share of same top tokens, 0..1")] = None,
    kv_budget: Annotated[
        float | None, option(GOAL, help="largest cutoff whose KV fits this share of full, 0..1")
    ] = None,
    confidence: Annotated[float, option(GOAL, help="confidence of the bound on the goal")] = defaults.CONFIDENCE,
    every_category: Annotated[
        bool, option(GOAL, "--every-category", help="the mean of every category of prompts must meet the goal, too")
    ] = False,
    region_rule: Annotated[
        list[str] | None,
        option(
            GOAL,
            metavar="NAME=VALUE",
            help=f"change a threshold of the regions, e.g. max_drift=0.2; repeatable. Names: {REGION_RULES}",
        ),
    ] = None,
    decode_tokens: DecodeTokens = defaults.DECODE_TOKENS,
    anchors: Anchors = defaults.ANCHORS,
    lens_positions: LensPositions = defaults.LENS_POSITIONS,
    detail_prompts: DetailPrompts = defaults.DETAIL_PROMPTS,
    rules: Rules = "all",
    without_sweep: WithoutSweep = False,
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
    json: Annotated[bool, option(RESULTS, "--json", help="print the recommendation alone on stdout")] = False,
) -> None:
    """Recommend the SPEED cutoff of a model, with its measured loss; or of an existing run, without the model.

    Without the sweep the cutoff is by a rule, which looks at the layers alone. Without a goal, a run that has a
    recommendation keeps its goal.
    """
    arguments = dict(locals())
    from diagnostics.cutoffs.criterion import Criterion
    from diagnostics.cutoffs.goals import GOALS
    from diagnostics.cutoffs.recommendation import recommend as recommend_cutoff
    from diagnostics.runs.places import MANIFEST, RECOMMENDATION
    from diagnostics.runs.run import load_run

    del arguments["context"]
    criterion = (*GOALS, "confidence", "every_category")
    goals = {name: arguments[name] for name in criterion}
    # Refuses wrong goals before the model runs for minutes.
    asked = Criterion(**goals)
    if without_sweep:
        asked.require_no_sweep()
    goals["rules"] = _region_rules(region_rule or [])
    # os.path, unlike pathlib, treats a name that is too long as a missing file.
    exists = os.path.isfile(os.path.join(model, MANIFEST))
    kept: dict[str, Any] = {}
    if exists:
        _refuse_measuring_options(context)
        run = load_run(model)
        if not any(_is_given(context, name) for name in (*criterion, "region_rule")):
            kept = _saved_goals(Path(model))
    else:
        run = measure(arguments)
    assert run.path is not None
    try:
        recommendation = recommend_cutoff(run, **(kept or goals), seed=seed)
    except UserError as error:
        raise UserError(f"{error} (what was measured is in {str(run.path)!r})") from None
    problem: UserError | None = None
    try:
        written = recommendation.save(run.path / RECOMMENDATION)
    except UserError as error:  # it is shown all the same
        problem = error
    else:
        announce(
            _outcome(recommendation.data["criterion"], run.path / RECOMMENDATION, bool(kept), written), quiet=quiet
        )
    if json:
        print(recommendation.to_json())
    else:
        from diagnostics.terminal.diagnosis import show_recommendation

        show_recommendation(run, recommendation, Console(highlight=False), phrase=with_flags)
        print(f"Run folder: {run.path}")
    if problem and not exists:
        raise problem
    if problem:
        warn(with_flags(f"{problem}: the recommendation is not kept"))


def _refuse_measuring_options(context: typer.Context) -> None:
    """Raise UserError for options that decide how to measure, if they are given with an existing run."""
    for name in MEASURING:
        if _is_given(context, name):
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} has no effect on a run that exists: leave it out, or give the model")


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _region_rules(settings: list[str]) -> Any:
    """Parse ``name=value`` pairs into region rules."""
    from diagnostics.cutoffs.regions import RegionRules

    # max_uptake_above, a number, is None by default.
    types = {name: float if default is None else type(default) for name, default in asdict(RegionRules()).items()}
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in types:
            raise UserError(f"region rule {name!r} is not one of: {', '.join(types)}")
        try:
            values[name] = types[name](value)
        except ValueError:
            raise UserError(f"region rule {name} must be a number ({types[name].__name__}), not {value!r}") from None
    return RegionRules(**values)


def _saved_goals(folder: Path) -> dict[str, Any]:
    from diagnostics.cutoffs.goals import saved_goals

    try:
        return saved_goals(folder)
    except UserError as error:
        raise UserError(f"{error}; with a goal, such as --max-kl {defaults.MAX_KL}, it is made anew") from None


def _outcome(criterion: dict[str, Any], path: Path, kept: bool, written: bool) -> str:
    """Say which goal a recommendation has, and where it was saved."""
    from diagnostics.cutoffs.goals import goals_in_words

    goal = f"{goals_in_words(criterion)}, {100 * criterion['confidence']:g}% confidence"
    place = f"saved in {path}" if written else f"{path} has it already"
    return f"Goal: {goal}{', kept from the last time' if kept else ''}; {place}."
