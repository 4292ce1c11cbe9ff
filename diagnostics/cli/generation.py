"""``generate``: a prompt under a policy, streamed, or side by side with full depth."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from diagnostics.cli.common import announce, load
from diagnostics.cli.options import (
    RESULTS,
    Device,
    Dtype,
    Model,
    Quiet,
    RemoteCode,
    Revision,
    SkipSelfTest,
    option,
    seed_option,
)
from diagnostics.models.embedded import EMBEDDED_MODEL
from diagnostics.support.errors import UserError

TEXT, POLICY = "Text", "Policy"  # headings of its options

PromptText = Annotated[str, option(TEXT, help="text, @FILE, or @- for standard input")]
PolicyName = Annotated[
    str | None,
    option(POLICY, help="such as full or speed; parameters as in speed:24:anchors=0  [speed with a cutoff]"),
]
Cutoff = Annotated[
    int | None, option(POLICY, help="layers that prompt tokens run through, for policies that take a cutoff")
]
RecommendationFile = Annotated[
    Path | None, option(POLICY, help="recommendation.json, or a run folder, to take the policy's layer from")
]


def generate(
    model: Model = EMBEDDED_MODEL,
    *,
    prompt: PromptText,
    policy: PolicyName = None,
    cutoff: Cutoff = None,
    recommendation: RecommendationFile = None,
    max_new_tokens: Annotated[int, option(TEXT, help="tokens to generate at most")] = 128,
    chat: Annotated[bool | None, option(TEXT, "--chat/--text", help="use the chat template  [if there is one]")] = None,
    system: Annotated[str | None, option(TEXT, help="system message, with the chat template")] = None,
    temperature: Annotated[float, option(TEXT, help="0 takes the most likely token")] = 0.0,
    top_p: Annotated[float, option(TEXT, help="share of the probability to draw from")] = 1.0,
    seed: Annotated[int, seed_option(TEXT, "seed of the sampling")] = 0,
    chunk_size: Annotated[int | None, option(POLICY, help="prompt tokens per forward pass; bounds memory")] = None,
    compare: Annotated[bool, option(POLICY, "--compare", help="full depth and the policy side by side")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    skip_self_test: SkipSelfTest = False,
    quiet: Quiet = False,
    json: Annotated[bool, option(RESULTS, "--json", help="print token ids, text and timings alone")] = False,
) -> None:
    """Generate after a prompt under a policy, and print its time and memory."""
    arguments = dict(locals())
    text = read_prompt(prompt)
    chosen = choose_policy(policy, cutoff, recommendation)
    from diagnostics.policies.full import FullPolicy

    if compare and isinstance(chosen, FullPolicy):
        raise UserError("--compare sets a policy beside full depth: give --policy, --cutoff or --recommendation")
    if system is not None and not system.strip():
        raise UserError("--system is empty")
    if not text.strip():
        raise UserError("the prompt is empty")
    lm = load(arguments, [chosen])
    import torch

    from diagnostics.generation.generation import generate as run_generation
    from diagnostics.generation.inputs import encode_input

    chosen.check(lm.anatomy)  # not all of it is known before the weights
    ids = encode_input(lm, text, system=system, chat=chat, max_new_tokens=max_new_tokens)
    streams = not json and not compare
    announce(f"Generating at most {max_new_tokens} tokens after {ids.shape[1]} under {chosen}.", quiet=quiet)

    def run(one: Any, tokens: int = max_new_tokens, prompt_ids: Any = ids) -> Any:
        streamer = None
        if streams:
            from transformers import TextStreamer

            streamer = TextStreamer(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)
        return run_generation(
            lm,
            prompt_ids,
            policy=one,
            max_new_tokens=tokens,
            chunk_size=chunk_size,
            temperature=temperature,
            top_p=top_p,
            generator=torch.Generator(lm.device).manual_seed(seed),
            streamer=streamer,
        )

    from diagnostics.terminal.generation import as_json, show_comparison, summary_line

    try:
        if compare:
            run(FullPolicy(), 2, ids[:, :64])  # the first pass of a process also sets libraries up
            results = {FullPolicy.name: run(FullPolicy()), chosen.name: run(chosen)}
        else:
            results = {chosen.name: run(chosen)}
    except torch.OutOfMemoryError:
        raise UserError("out of device memory: give a --chunk-size, a shorter prompt, or --dtype bfloat16") from None
    if json:
        print(as_json(lm, ids, results))
    elif compare:
        show_comparison(lm, ids, results, chosen, Console(highlight=False))
    else:
        print(summary_line(lm, ids, results[chosen.name], chosen), file=sys.stderr)


def read_prompt(argument: str) -> str:
    """Return the text itself, or that of ``@FILE`` or of standard input; raise UserError where it cannot be read."""
    if not argument.startswith("@"):
        return argument
    try:
        data = sys.stdin.buffer.read() if argument == "@-" else Path(argument[1:]).expanduser().read_bytes()
        return data.decode("utf-8")
    except (OSError, RuntimeError) as error:  # RuntimeError: ~nobody has no home folder
        raise UserError(f"cannot read the prompt {argument[1:]!r}: {getattr(error, 'strerror', error)}") from None
    except (UnicodeDecodeError, ValueError):
        raise UserError(f"the prompt {argument[1:]!r} is not UTF-8 text") from None


def choose_policy(text: str | None, cutoff: int | None, recommendation: Path | None) -> Any:
    """Return the policy for a name and a cutoff or recommendation; raise UserError if they do not fit together."""
    from diagnostics.policies.full import FullPolicy
    from diagnostics.policies.registry import find_policy, menu, parse_policy
    from diagnostics.policies.speed import SpeedPolicy

    if cutoff is not None and recommendation is not None:
        raise UserError("--cutoff and --recommendation both set the cutoff: give one")
    if text is None:
        text = (FullPolicy if cutoff is None and recommendation is None else SpeedPolicy).name
    name, *settings = text.strip().split(":")
    plain = not settings
    if cutoff is None and recommendation is None:
        return parse_policy(text)
    policy = find_policy(name)
    if recommendation is not None:
        if not plain or not policy.follows_recommendation():
            names = _listed([one.name for one in menu() if one.follows_recommendation()], "or")
            raise UserError(f"--recommendation sets the layer of {names}, not of {text!r}")
        return policy.from_recommendation(recommendation)
    if not policy.takes_cutoff():
        names = _listed([one.name for one in menu() if one.takes_cutoff()], "and")
        raise UserError(f"--cutoff is for {names}, not for {text!r}")
    named = [setting.rpartition("=")[0] for setting in settings]
    if plain or not (named[0] == "" or "cutoff" in named):
        return parse_policy(f"{text}:cutoff={cutoff}")
    return replace(parse_policy(text), cutoff=cutoff)


def _listed(names: list[str], word: str) -> str:
    """Join names as in a sentence: ``a, b or c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
