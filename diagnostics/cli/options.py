"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from diagnostics.support.defaults import CONTEXT_LENGTH

MODEL_HELP = "hub id or folder of a model or adapter, .gguf file or built-in name"
Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
ModelOrRun = Annotated[str, typer.Argument(help="the same, or the folder of an existing run")]
PromptsOption = Annotated[str, typer.Option(help="'builtin' or a .jsonl file")]
MaxPrompts = Annotated[int | None, typer.Option(help="use only the first N prompts")]
ContextLength = Annotated[
    int | None, typer.Option(help=f"tokens per prompt; documents are cut to fit  [built-in prompts: {CONTEXT_LENGTH}]")
]
DecodeTokens = Annotated[int, typer.Option(help="reference tokens per prompt")]
Anchors = Annotated[int, typer.Option(help="leading tokens that keep their KV in all layers")]
LensPositions = Annotated[int, typer.Option(help="decode positions per prompt that the logit lens reads")]
DetailPrompts = Annotated[int, typer.Option(help="how many of the first prompts also keep their tokens")]
Seed = Annotated[int, typer.Option(min=0, help="seed of the built-in prompts and of the bootstrap")]
Backend = Annotated[str, typer.Option(help="how activations are read: hooks, transformer-lens or nnsight")]
Device = Annotated[str, typer.Option(help="auto, map (spread over GPUs), cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]
Revision = Annotated[str | None, typer.Option(help="hub revision of the model")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
SkipSelfTest = Annotated[
    bool, typer.Option("--skip-self-test", help="skip the proof that the model is measured and run correctly")
]
Out = Annotated[Path | None, typer.Option(help="run folder  [runs/MODEL_TIME]")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no signs of life on stderr: results and errors alone")]
Resume = Annotated[bool, typer.Option("--resume", help="continue the interrupted run in --out")]
