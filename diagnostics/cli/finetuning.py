"""``finetune``: an adapter that lets prompts stop lower, and what it costs."""

from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console

from diagnostics.cli.common import INTERRUPTED, announce, claim, fail, load, new_folder, plain, progress
from diagnostics.cli.flags import with_flags
from diagnostics.cli.options import (
    MEASUREMENT,
    RESULTS,
    Anchors,
    Device,
    Dtype,
    Model,
    Quiet,
    RemoteCode,
    Resume,
    Revision,
    SkipSelfTest,
    option,
    seed_option,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support import defaults
from diagnostics.support.errors import UserError
from diagnostics.support.progress import Progress

DATA, TRAINING = "Data", "Training"  # headings of its options
# What the library calls the parts of its work -> what they are, in their order.
STAGES = {
    "answers": "preparing rows",
    "before": "measuring before training",
    "teacher": "reading full depth",
    "training": "training",
    "after": "measuring after training",
}


def finetune(
    model: Model = EMBEDDED_MODEL,
    *,
    cutoff: Annotated[int, option(TRAINING, help="layers that prompts are to run through, 1 to L")],
    data: Annotated[str, option(DATA, help="'builtin', or a .jsonl file of conversations or prompts")] = "builtin",
    examples: Annotated[
        int | None, option(DATA, help=f"rows to train on at most  [built-in prompts: {defaults.EXAMPLES}]")
    ] = None,
    supervised: Annotated[
        float, option(DATA, help="share of given answers in the loss, 0 to 1; the rest is self-distillation")
    ] = 0.0,
    own_answers: Annotated[
        bool | None,
        option(DATA, help="distil on the model's own answers at full depth  [if nothing is supervised]"),
    ] = None,
    answer_tokens: Annotated[int, option(DATA, help="tokens of an own answer at most")] = defaults.ANSWER_TOKENS,
    context_length: Annotated[
        int | None, option(DATA, help=f"tokens per prompt  [built-in prompts: {defaults.TRAINING_CONTEXT_LENGTH}]")
    ] = None,
    max_length: Annotated[int | None, option(DATA, help="tokens per row; longer ones are cut or dropped")] = None,
    held_out: Annotated[str, option(MEASUREMENT, help="prompts to measure on: 'builtin' or a .jsonl file")] = "builtin",
    held_out_categories: Annotated[
        str | None,
        option(MEASUREMENT, help="measure on prompts of these kinds only  [built-in data: question,variables,code]"),
    ] = None,
    held_out_prompts: Annotated[
        int | None,
        option(
            MEASUREMENT, help=f"number of held-out prompts at most  [built-in prompts: {defaults.HELD_OUT_PROMPTS}]"
        ),
    ] = None,
    start_cutoff: Annotated[
        int | None, option(TRAINING, help="lower the cutoff from here over half the training")
    ] = None,
    hold: Annotated[
        float, option(TRAINING, help="share of steps at full depth, to preserve it, 0 to 0.5")
    ] = defaults.HOLD,
    anchors: Anchors = defaults.ANCHORS,
    method: Annotated[Literal["lora", "full"], option(TRAINING, help="train an adapter or all weights")] = "lora",
    rank: Annotated[int | None, option(TRAINING, help=f"rank of the adapter  [{defaults.RANK}]")] = None,
    learning_rate: Annotated[float | None, option(TRAINING, help="peak learning rate  [by the model's size]")] = None,
    steps: Annotated[int, option(TRAINING, help="optimizer steps")] = defaults.STEPS,
    batch_size: Annotated[int, option(TRAINING, help="rows per forward pass")] = defaults.BATCH_SIZE,
    accumulate: Annotated[int, option(TRAINING, help="forward passes per step")] = defaults.ACCUMULATE,
    gradient_checkpointing: Annotated[
        bool | None, option(TRAINING, help="compute activations again to save memory  [from 1B parameters]")
    ] = None,
    against: Annotated[
        Literal["base", "itself"] | None,
        option(
            MEASUREMENT, help="full depth to measure against: of the model before, or after  [before, if it distils]"
        ),
    ] = None,
    decode_tokens: Annotated[
        int, option(MEASUREMENT, help="reference tokens per held-out prompt")
    ] = defaults.HELD_OUT_DECODE_TOKENS,
    max_kl: Annotated[float, option(MEASUREMENT, help="goal of the recommendation, nats per token")] = defaults.MAX_KL,
    sweep_every: Annotated[
        int, option(MEASUREMENT, help="steps between measurements of all cutoffs")
    ] = defaults.SWEEP_EVERY,
    checkpoint_every: Annotated[int, option(TRAINING, help="steps between checkpoints")] = defaults.CHECKPOINT_EVERY,
    seed: Annotated[int, seed_option(TRAINING, "seed of the adapter, the built-in data and its order")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    out: Annotated[Path | None, option(RESULTS, help="folder  [runs/MODEL-finetune_TIME]")] = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Annotated[bool, option(RESULTS, "--json", help="print the table alone, as JSON")] = False,
) -> None:
    """Train a model to lose less at a cutoff, and measure all cutoffs before, during and after."""
    arguments = dict(locals())
    if resume and out is None:
        raise UserError("--resume needs --out: the folder of the fine-tuning to continue")
    out = out or new_folder(model, "-finetune")
    from diagnostics.finetune.settings import Settings
    from diagnostics.finetune.sources import BUILTIN, HELD_OUT, Source, load_data, load_held_out
    from diagnostics.policies.speed import SpeedPolicy

    kinds = tuple(filter(None, map(str.strip, (held_out_categories or "").split(","))))
    if not kinds and Path(data).resolve() == Path(held_out).resolve():
        if data != BUILTIN:
            raise UserError("the model would be measured on what it learns: give --held-out or --held-out-categories")
        kinds = HELD_OUT
    measured = load_held_out(held_out, n_prompts=held_out_prompts, context_length=context_length, only=kinds)
    source = Source(
        load_data(data, examples=examples, context_length=context_length, without=kinds, seed=seed),
        Path(data).name,
        own_answers=not supervised if own_answers is None else own_answers,
        answer_tokens=answer_tokens,
        max_length=max_length,
    )
    settings = Settings(
        cutoff=cutoff,
        start_cutoff=start_cutoff,
        hold=hold,
        anchors=anchors,
        supervised=supervised,
        against=against,
        method=method,
        rank=rank,
        learning_rate=learning_rate,
        steps=steps,
        batch_size=batch_size,
        accumulate=accumulate,
        gradient_checkpointing=gradient_checkpointing,
        decode_tokens=decode_tokens,
        sweep_every=sweep_every,
        checkpoint_every=checkpoint_every,
        seed=seed,
    )
    claim(out)
    announce(f"Fine-tuning {model} for cutoff {cutoff}; results go to {out}.", quiet=quiet)
    lm = load(arguments, [SpeedPolicy(cutoff, anchors)])
    from diagnostics.finetune.training import finetune as run_finetuning

    try:
        with progress("fine-tuning", quiet=quiet) as advance:
            finetuning = run_finetuning(
                lm,
                source,
                measured,
                settings,
                out=out,
                resume=resume,
                goals={"max_kl": max_kl},
                progress=_staged(advance),
                arguments=plain(arguments),
            )
    except KeyboardInterrupt:
        fail(f"interrupted; what is finished is kept, continue with --out {out} --resume", INTERRUPTED)
    from diagnostics.finetune.cutoff_comparison import compare_cutoffs

    table = compare_cutoffs(finetuning)
    if json:
        print(table.to_json(orient="records", indent=1))
    else:
        from diagnostics.terminal.finetuning import show_finetuning

        show_finetuning(finetuning, table, Console(highlight=False), phrase=with_flags)
        print(f"Adapter, recommendation and measurements: {out}")


def _staged(advance: Progress) -> Progress:
    """Return a callback that also says which stage of the whole the work is in: the time left is that of the stage."""

    def report(done: int, total: int, what: str) -> None:
        name, _, piece = what.partition(" ")
        stage = f"{STAGES[name]} (stage {[*STAGES].index(name) + 1} of {len(STAGES)})"
        advance(done, total, f"{stage}, {piece}" if piece else stage)

    return report
