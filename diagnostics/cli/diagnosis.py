"""``diagnose``: every layer and every cutoff of a model, measured on prompts."""

from typing import Annotated, Any

from rich.console import Console

from diagnostics.cli.common import INTERRUPTED, announce, claim, fail, load, new_folder, plain, progress
from diagnostics.cli.flags import with_flags
from diagnostics.cli.options import (
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
    Model,
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


def diagnose(
    model: Model = EMBEDDED_MODEL,
    prompts: PromptsOption = "builtin",
    max_prompts: MaxPrompts = None,
    context_length: ContextLength = None,
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
    json: Annotated[bool, option(RESULTS, "--json", help="print the run's manifest alone")] = False,
) -> None:
    """Measure every layer and every cutoff of a model on prompts, and keep the tables in a run folder."""
    arguments = dict(locals())
    run = measure(arguments)
    if json:
        from json import dumps

        print(dumps(run.manifest, indent=1))
        return
    from diagnostics.terminal.diagnosis import show_run

    show_run(run, Console(highlight=False), phrase=with_flags)
    print(f"Run folder: {run.path}")


def measure(arguments: dict[str, Any]) -> Any:
    """Load model and prompts and run the diagnosis, with signs of life."""
    a = arguments
    if a["resume"] and a["out"] is None:
        raise UserError("--resume needs --out: the folder of the run to continue")
    out = a["out"] or new_folder(a["model"])
    from diagnostics.cutoffs.rules import named_rules
    from diagnostics.prompts.load import load_prompts
    from diagnostics.runs.manifest import RUN_FOLDER

    named_rules(a["rules"])  # refuses an unknown one
    claim(out)
    RUN_FOLDER.require_free(out, resume=a["resume"])  # before a large model is loaded
    prompt_set = load_prompts(
        a["prompts"], max_prompts=a["max_prompts"], context_length=a["context_length"], seed=a["seed"]
    )
    import torch

    from diagnostics.diagnosis.diagnosis import diagnose as run_diagnosis

    quiet = a["quiet"]
    measured = "every layer" if a["without_sweep"] else "every layer and every cutoff"
    announce(f"Measuring {measured} of {a['model']}; results go to {out}.", quiet=quiet)
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
                rules=a["rules"],
                sweep=not a["without_sweep"],
                out=out,
                resume=a["resume"],
                progress=advance,
                arguments=plain(a),
            )
    except torch.OutOfMemoryError:
        raise UserError("out of device memory: give a smaller --context-length, or --dtype bfloat16") from None
    except KeyboardInterrupt:
        fail(f"interrupted; what is finished is kept, continue with --out {out} --resume", INTERRUPTED)
