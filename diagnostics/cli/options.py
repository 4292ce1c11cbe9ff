"""Arguments that several commands share, and the groups that --help shows options in."""

from pathlib import Path
from typing import Annotated, Any

import typer

from diagnostics.support.defaults import CONTEXT_LENGTH

# Groups of options, in the words of their headings.
PROMPTS, MEASUREMENT, GOAL, MODEL, RESULTS = "Prompts", "Measurement", "Goal", "Model", "Results"
LAST_SEED = 2**63 - 1  # of torch's generators


def option(group: str, *names: str, **settings: Any) -> Any:
    """Return an option that --help shows in a group."""
    return typer.Option(*names, rich_help_panel=group, **settings)


def seed_option(group: str, what: str) -> Any:
    """Return the option of a seed: its range is said in words, not as one of 64 bits."""

    def require_seed(value: int) -> int:
        if not 0 <= value <= LAST_SEED:
            raise typer.BadParameter(f"{value}: give a whole number of 0 or more, up to {LAST_SEED}")
        return value

    return option(group, callback=require_seed, metavar="N", help=f"{what}, 0 or more")


MODEL_HELP = "hub id or folder of a model or adapter, .gguf file or built-in name"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
ModelOrRun = Annotated[str, typer.Argument(help=f"{MODEL_HELP}; or the folder of a run, which needs no model")]

PromptsOption = Annotated[str, option(PROMPTS, help="'builtin' or a .jsonl file")]
MaxPrompts = Annotated[int | None, option(PROMPTS, help="use only the first N prompts")]
ContextLength = Annotated[
    int | None,
    option(PROMPTS, help=f"tokens per prompt; documents are cut to fit  [built-in prompts: {CONTEXT_LENGTH}]"),
]
DecodeTokens = Annotated[int, option(MEASUREMENT, help="reference tokens per prompt")]
Anchors = Annotated[int, option(MEASUREMENT, help="leading tokens that keep their KV in all layers")]
LensPositions = Annotated[int, option(MEASUREMENT, help="decode positions per prompt that the logit lens reads")]
DetailPrompts = Annotated[int, option(MEASUREMENT, help="how many of the first prompts also keep their tokens")]
Rules = Annotated[
    str,
    option(
        MEASUREMENT,
        metavar="NAMES",
        help="cutoff rules whose measures are taken along: all, none, or some; costly ones by name: all,leave-one-out",
    ),
]
WithoutSweep = Annotated[
    bool,
    option(
        MEASUREMENT,
        "--without-sweep",
        help="leave out the loss of every cutoff: quicker, and the cutoff is then by a rule, not measured",
    ),
]
Seed = Annotated[int, seed_option(MEASUREMENT, "seed of the built-in prompts and of the bootstrap")]
Backend = Annotated[str, option(MEASUREMENT, help="how activations are read: hooks, transformer-lens or nnsight")]
Device = Annotated[str, option(MODEL, help="auto, map (spread over GPUs), cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, option(MODEL, help="auto, float32, bfloat16, float16")]
Revision = Annotated[str | None, option(MODEL, help="hub revision of the model")]
RemoteCode = Annotated[bool, option(MODEL, "--trust-remote-code", help="run code that comes with the model")]
SkipSelfTest = Annotated[
    bool, option(MODEL, "--skip-self-test", help="skip the proof that the model is measured and run correctly")
]
Out = Annotated[Path | None, option(RESULTS, help="run folder  [runs/MODEL_TIME]")]
Resume = Annotated[bool, option(RESULTS, "--resume", help="continue the interrupted run in --out")]
Quiet = Annotated[bool, option(RESULTS, "--quiet", "-q", help="no signs of life on stderr: results and errors alone")]
